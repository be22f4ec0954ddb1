"""A toy that cannot be built or kept: the error names its own cause, and the cache alone is blamed on the cache."""

from pathlib import Path

import pytest

from fleet.command.options import parse_options
from fleet.errors import UsageError
from fleet.run.model_setup import local_model_path
from fleet.toy.model import PLAIN, SIGHTED, TAUGHT, toy_model_path
from fleet.toy.process import kind_for
from tests.helpers import REPOSITORY


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("", PLAIN),
        ("--fixed_correct_index none", SIGHTED),
        ("--env examples/odd_one_out.py:OddOneOutEnv", PLAIN),
        ("--env examples/odd_one_out.py:OddOneOutEnv --fixed_correct_index none", TAUGHT),
        ("--env examples/click.py:ClickEnv", TAUGHT),
        ("--env examples/click.py:ClickEnv --fixed_correct_index none", TAUGHT),
    ],
)
def test_a_task_that_needs_eyes_or_has_a_tool_of_its_own_gets_a_toy_of_its_own(
    line: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    given, env = kind_for(parse_options(line.split()))
    assert (given, env is not None) == (kind, kind == TAUGHT)


def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    """What a run says whose toy is built with what lies in tmp_path before the installed packages."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FLEET_CACHE", str(cache))
    with pytest.raises(UsageError) as error:
        local_model_path("toy", parse_options([]))
    return str(error.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise MemoryError", "MemoryError: "),
        ("raise RuntimeError('not enough memory:\\n9 bytes')", "RuntimeError: not enough memory: 9 bytes"),
        ("raise OSError(28, 'No space left on device', '/elsewhere')", "OSError: [Errno 28] No space left on device"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL"),
        ("raise SystemExit(3)", "its process ended with 3"),
        (
            "import atexit; print('1', end=''); atexit.register(print, '2'); raise OSError('no \\udce9 \u00e9')",
            "(OSError: no ? \u00e9)",
        ),
    ],
)
def test_a_failure_of_the_build_is_told_by_its_cause(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text(code)
    said = refusal(tmp_path, monkeypatch, tmp_path / "cache")
    assert said.startswith("the toy model could not be built (") and reason.strip() in said and "\n" not in said
    assert "FLEET_CACHE" not in said


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_told_from_the_building_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path, monkeypatch, tmp_path / "file" / "cache")
    reason = f"{tmp_path}/file/cache: Not a directory"
    assert said == f"the toy model cannot be kept ({reason}); set FLEET_CACHE to a folder to write to"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "toy.lock").mkdir()
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=f"{tmp_path}/cache/toy.lock: Is a directory"):
        toy_model_path()
