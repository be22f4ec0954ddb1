"""Every command that the pages show is in the table of what CI runs, and the runs are those commands."""

import os
import shlex
import time
from pathlib import Path

import pytest

from tests.documented import (
    REPOSITORY,
    TABLE,
    NotRun,
    RunBy,
    Runs,
    all_documented_commands,
    documented_commands,
)
from tests.run_documented import run_all, run_one

pytestmark = pytest.mark.fast

PAGE = """
    make indented

Text with `make inline`, `python
broken.py over lines`, `accelerate launch`, `make`, `makeshift.py`, `SEED=1 python variable.py` and `--a_flag`.

```bash
# a comment
accelerate launch training.py \\
  --on_two_lines
whatever it begins with
```

```text
python is no command here, but begins with a verb
neither is this
```
"""


def test_commands_are_found_in_blocks_indented_lines_and_inline_code() -> None:
    assert documented_commands(PAGE) == [
        "accelerate launch training.py --on_two_lines",
        "whatever it begins with",
        "python is no command here, but begins with a verb",
        "make indented",
        "make inline",
        "python broken.py over lines",
        "accelerate launch",
        "SEED=1 python variable.py",
    ]


def test_every_documented_command_has_an_entry_and_every_entry_is_documented() -> None:
    found, listed = all_documented_commands(), [entry.command for entry in TABLE]
    assert {"make demo", "make demo-look", "python -m fleet.toy.model ship"} <= set(found) and len(found) >= 44
    assert set(found) - set(listed) == set(), "new on a page: say in tests/documented.py how CI runs it"
    assert set(listed) - set(found) == set(), "no longer on a page: take it out of tests/documented.py"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("run", [entry for entry in TABLE if isinstance(entry, Runs)], ids=lambda run: run.command)
def test_what_is_run_is_the_documented_command_with_the_changes_named(run: Runs) -> None:
    documented, words = shlex.split(run.command), shlex.split(run.as_run())
    kept, added = words[: len(documented)], words[len(documented) :]
    changed = {documented[place - 1]: word for place, word in enumerate(kept) if word != documented[place]}
    assert changed == run.changed
    assert all(flag.startswith("--") for flag in changed)
    assert added == shlex.split(run.added)
    assert not added or added[0].startswith("--")
    assert not {word for word in added if word.startswith("--")} & set(documented), "change its value instead"
    assert run.leaves or run.says or run.command.startswith("source "), "what shows that it did its work?"


def test_make_demo_and_make_demo_look_are_run_as_they_stand() -> None:
    runs = {entry.command: entry.as_run() for entry in TABLE if isinstance(entry, Runs)}
    assert runs["make demo"] == "make demo" and runs["make demo-look"] == "make demo-look"


@pytest.mark.parametrize("entry", [e for e in TABLE if isinstance(e, RunBy)], ids=lambda entry: entry.command)
def test_what_runs_a_command_elsewhere_does_so(entry: RunBy) -> None:
    lines = (REPOSITORY / entry.where).read_text(encoding="utf-8").splitlines()
    assert any(line.strip().removeprefix("$(ACTIVATE) && ") == entry.line for line in lines)
    if "pytest" in entry.command:
        (path,) = [word for word in shlex.split(entry.command) if word.endswith(".py")]
        assert "pytest.mark.slow" not in (REPOSITORY / path).read_text(encoding="utf-8")
    elif entry.where.startswith("tests/"):
        # read from the pages as it stands, and started on a small model
        assert "all_documented_commands()" in entry.line
    else:
        assert entry.command in entry.line


def test_ci_runs_the_table() -> None:
    assert "make documented" in (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert "$(ACTIVATE) && python -m tests.run_documented" in (REPOSITORY / "Makefile").read_text()


def test_few_commands_are_not_run_and_say_why() -> None:
    reasons = {entry.command: entry.reason for entry in TABLE if isinstance(entry, NotRun)}
    assert len(reasons) <= 3 and all(reasons.values())


def test_a_change_of_a_flag_that_the_command_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="--stpes"):
        Runs("python train.py --steps 200", {"--stpes": "2"}).as_run()


# the command's shell, exit code, what else is asked of it, the fault
FAULTS = [
    ("true", {}, None),
    ("exit 3", {}, "exit code 3, wanted 0"),
    ("kill -9 $$", {}, "exit code 137, wanted 0"),
    ("echo 'Traceback (most recent call last):' >&2", {}, "its output has a traceback"),
    ("echo no", {"says": "yes"}, "its output lacks 'yes'"),
    ("echo yes", {"says": "yes"}, None),
    ("true", {"leaves": ("old.json",)}, "it left no old.json"),
    ("true", {"leaves": ("new.json",)}, "it left no new.json"),
    ("touch new.json", {"leaves": ("new.json",)}, "it left no new.json"),
    ("echo 1 > new.json", {"leaves": ("*.json",)}, None),
    ("true", {"leaves": ("{run}/final/*",)}, "its output names no run folder"),
    ("echo in here: report.html", {"leaves": ("{run}/final/*",)}, "it left no {run}/final/*"),
    ("mkdir -p here/final; echo 1 > here/final/a; echo in here: report.html", {"leaves": ("{run}/final/*",)}, None),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with an environment that changes nothing, and a file of an hour ago."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "old.json").write_text("{}")
    os.utime(tmp_path / "old.json", (time.time() - 3600,) * 2)
    return tmp_path


@pytest.mark.parametrize(("script", "asked", "fault"), FAULTS)
def test_a_command_that_did_not_do_its_work_is_found_out(
    script: str, asked: dict, fault: str | None, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "script").write_text(script)
    assert run_one(Runs("bash script", **asked), tree).fault == fault
    shown = capsys.readouterr().out
    assert shown.startswith("ok " if fault is None else "FAILED ") and "bash script" in shown


def test_two_launches_of_one_command_run_at_the_same_time(tree: Path) -> None:
    # each waits for the other's file
    (tree / "meet").write_text('touch "came-$2"; while [ ! -e "came-$((1 - $2))" ]; do sleep 0.01; done; exit $2')
    result = run_one(Runs("bash meet --rank 0", beside={"--rank": "1"}), tree)
    assert result.exit_code == 1, "the second's code counts too"


def test_stages_run_one_after_the_other(tree: Path) -> None:
    (tree / "late").write_text("test -e made")
    (tree / "early").write_text("sleep 0.2; touch made")
    results = run_all([Runs("bash late", stage=2), Runs("bash early", stage=1)], tree)
    assert [(result.run.command, result.fault) for result in results] == [("bash early", None), ("bash late", None)]
