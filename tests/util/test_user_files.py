"""A user's file imports what lies beside it, which never takes the place of Fleet's, Python's or a package's module."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from utils.user_files import files_beside, load_user_file

pytestmark = pytest.mark.fast


def word_of(file: Path, flag: str = "env") -> Any:
    module, name = load_user_file(f"{file}:WORD", flag, "path/to/file.py:NAME")
    return getattr(module, name)


def write(folder: Path, texts: dict[str, str]) -> Path:
    """Writes files of Python, by name without suffix; returns main.py's path."""
    for name, text in texts.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return folder / "main.py"


FOUND = {
    "a file": {"main": "from beside import WORD", "beside": "WORD = 'found'"},
    "its own import": {"main": "from beside import WORD", "beside": "from far import WORD", "far": "WORD = 'found'"},
    "a folder": {"main": "from words.one import WORD", "words/one": "WORD = 'found'"},
    "a package": {"main": "from pack import WORD", "pack/__init__": "from .one import *", "pack/one": "WORD = 'found'"},
}  # fmt: skip


@pytest.mark.parametrize("texts", FOUND.values(), ids=FOUND.keys())
def test_what_lies_beside_is_found_from_any_folder(texts: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    main = write(tmp_path / "mine", texts)
    monkeypatch.chdir(tmp_path)
    assert word_of(main.relative_to(tmp_path)) == "found"
    assert files_beside(f"{main}:WORD") == sorted(f"{name}.py" for name in texts if name != "main")


def test_a_late_import_is_found_too(tmp_path: Path) -> None:
    main = write(
        tmp_path, {"main": "def WORD():\n    from late_one import WORD\n    return WORD", "late_one": "WORD = 'late'"}
    )
    assert word_of(main)() == "late"


@pytest.mark.parametrize("beside", ["common", "common/one", "common/two/one"])
def test_two_folders_with_a_file_of_the_same_name_each_find_their_own(beside: str, tmp_path: Path) -> None:
    module = beside.replace("/", ".")
    mains = {
        folder: write(tmp_path / folder, {"main": f"from {module} import WORD", beside: f"WORD = {folder!r}"})
        for folder in ("first", "second")
    }
    assert word_of(mains["first"]) == "first"
    assert word_of(mains["second"], "reward") == "second"
    assert word_of(mains["first"]) == "first"
    for main in mains.values():
        assert files_beside(f"{main}:WORD") == [f"{beside}.py"]


TAKEN = {
    "Fleet's": ("dataset", "Fleet's own module", "from dataset import WORD"),
    "Fleet's, by attribute": ("reward", "Fleet's own module", "import reward; WORD = reward.WORD"),
    "Python's": ("random", "Python's own module", "from random import WORD"),
    "built in": ("time", "Python's own module", "from time import WORD"),
    "a package's": ("yaml", "the installed yaml", "import yaml; WORD = yaml.WORD"),
}


@pytest.mark.parametrize(("name", "owner", "text"), TAKEN.values(), ids=TAKEN.keys())
def test_a_name_that_is_taken_is_said_where_the_import_fails(name: str, owner: str, text: str, tmp_path: Path) -> None:
    before = importlib.import_module(name)
    main = write(tmp_path, {"main": text, name: "WORD = 'mine'"})
    with pytest.raises(ValueError) as refusal:
        word_of(main)
    assert f"{name} is {owner}, not {tmp_path / name}.py; rename that one" in str(refusal.value)
    assert sys.modules[name] is before


def test_a_module_in_a_folder_of_a_taken_name_is_said_too(tmp_path: Path) -> None:
    main = write(tmp_path, {"main": "from utils.words import WORD", "utils/words": "WORD = 'mine'"})
    with pytest.raises(ValueError, match=rf"utils is Fleet's own module, not {tmp_path}/utils; rename that one"):
        word_of(main)


def test_a_name_that_is_taken_is_said_where_the_import_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = write(tmp_path, {"main": "import json\nWORD = json.dumps('theirs')", "json": "WORD = 'mine'"})
    for _ in range(2):
        assert word_of(main) == '"theirs"'
    (line,) = [record.message for record in caplog.records]
    assert f"json is Python's own module, not {tmp_path}/json.py; rename that one if it is meant" in line


def test_a_file_may_have_the_name_of_what_it_imports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"environment": "from environment import PickImageEnv as WORD"})
    assert word_of(tmp_path / "environment.py").__name__ == "PickImageEnv"
    assert not caplog.records


def test_an_import_with_a_dot_is_told_to_do_without(tmp_path: Path) -> None:
    main = write(tmp_path, {"main": "from .beside import WORD", "beside": "WORD = 1"})
    with pytest.raises(ValueError, match=r"main.py is run by itself, .*: write `from name import ...` without the dot"):
        word_of(main)


def test_a_folder_of_data_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "flash_attn_of_mine" / "runs").mkdir(parents=True)
    word_of(write(tmp_path, {"main": "WORD = 1"}))
    assert find_spec("flash_attn_of_mine") is None
