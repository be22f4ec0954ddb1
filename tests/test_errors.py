"""Errors of any kind become one line that refuses, and the first problem of a process is the one that counts."""

import pytest

from fleet.errors import RunStopped, UsageError, one_line, reason_of, refused
from fleet.processes import first_problem

pytestmark = pytest.mark.fast


def test_an_error_of_a_named_kind_is_refused_with_words_around_its_own() -> None:
    words = pytest.raises(UsageError, match=r"^images: no such folder; correct it$")
    with words as caught, refused(ValueError, OSError, before="images: ", after="; correct it"):
        raise OSError("no such folder")
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_of_another_kind_passes() -> None:
    with pytest.raises(KeyError), refused(ValueError, before="images: "):
        raise KeyError("seed")


@pytest.mark.parametrize(
    ("error", "line", "reason"),
    [
        (OSError(28, "No space left on device", "a.json"), "[Errno 28] No space left on device: 'a.json'",
         "No space left on device"),
        (ValueError("two\n  lines"), "two lines", "two\n  lines"),
    ],
)  # fmt: skip
def test_words_of_an_error(error: Exception, line: str, reason: str) -> None:
    assert (one_line(error), reason_of(error)) == (line, reason)


def test_the_first_problem_counts_and_ends_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    made: list[str] = []

    def fails(words: str) -> None:
        made.append(words)
        raise UsageError(words)

    assert first_problem(None, lambda: None, lambda: fails("first"), lambda: fails("second")) == "first"
    assert first_problem("before", lambda: fails("third")) == "before"
    assert first_problem(None, lambda: None) is None
    assert made == ["first"]


def test_a_process_alone_raises_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fails() -> None:
        raise UsageError("first")

    with pytest.raises(UsageError, match="^first$"):
        first_problem(None, fails)
    with pytest.raises(RunStopped):
        first_problem(None, lambda: (_ for _ in ()).throw(RunStopped("lost")))
