"""Code of the user's own, named on the command line as `path/to/file.py:name`.

Owns running such a file, and the import of files beside it. The caller checks what the name stands for.

A file imports its neighbours by name, as under `python path/to/file.py`, with one difference: Fleet's own modules, the
standard library and installed packages win over a file of the same name, and a line on the log says so.
"""

import ast
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

logger = logging.getLogger("fleet")

FLEET_ROOT = Path(__file__).resolve().parent.parent

_said: set[str] = set()
# files whose module gave its name to one beside another user file
_set_aside: set[Path] = set()


class _Beside:
    """Finds modules beside the user's files, the latest file's folder first, after every other finder."""

    folders: ClassVar[list[Path]] = []

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module of this name in one of the folders, as Python's import asks for it."""
        for folder in cls.folders if path is None else ():
            spec = PathFinder.find_spec(name, [str(folder)])
            # a folder of data or of a tracker's runs is not a package
            patterns = ("*.py", "*/*.py")
            if spec and (spec.origin is not None or any(any((folder / name).glob(pattern)) for pattern in patterns)):
                return spec
        return None


@contextlib.contextmanager
def folder_kept() -> Iterator[None]:
    """Restores the working directory, which the user's code may change: a run's paths may be relative to its end."""
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def load_user_file(spec: str, flag: str, form: str) -> tuple[ModuleType, str]:
    """(the module of the file in `spec`, the name after the colon). Runs that file.

    flag: the flag that named it, as "env". form: of the spec, as "path/to/file.py:ClassName". Raises ValueError if the
    spec has another form, there is no such file, or the file raises anything.
    """
    file_name, colon, name = spec.rpartition(":")
    path = Path(file_name)
    if not colon or not name or path.suffix != ".py":
        raise ValueError(f"{flag}={spec!r}, but wanted {form}")
    if not path.is_file():
        raise ValueError(f"{flag}={spec!r}: {path} is not a file; correct the path")
    # absolute before it runs: the file's own code may change the working directory
    path = path.resolve()
    module_spec = spec_from_file_location(f"fleet_{flag}_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a file of Python has both"
    module = module_from_spec(module_spec)
    # dataclasses and pickling look a class's module up by name
    sys.modules[module_spec.name] = module
    _look_beside(path.parent)
    try:
        module_spec.loader.exec_module(module)
    # the user's code may also leave by sys.exit
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        remedy = _import_remedy(error, path) or "correct it"
        raise ValueError(f"{flag}={spec} failed with {type(error).__name__}: {words}; {remedy}") from error
    _say_what_was_not_taken(path, f"{flag}={spec}")
    return module, name


def _import_remedy(error: BaseException, path: Path) -> str | None:
    """The remedy for a failed import of a file beside `path`, the user's file; None for another error."""
    if isinstance(error, ImportError) and "relative import" in str(error):
        return f"{path.name} is run by itself, not as part of a package: write `from name import ...` without the dot"
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__
    elif isinstance(error, ImportError) and error.name is not None:
        name = error.name
    else:
        return None
    return _why_not_taken(name.partition(".")[0], path)


def folder_of(spec: str) -> Path:
    """The absolute folder of the file in `spec`."""
    return Path(spec.rpartition(":")[0]).resolve().parent


def files_beside(spec: str) -> list[str]:
    """The files beside the one in `spec` that this process has imported, as paths from its folder on.

    Empty for a file in Fleet's own folder: config.json names the commit of what lies there.
    """
    folder = folder_of(spec)
    files = set() if folder == FLEET_ROOT else {*_imported_from([folder]).values(), *_set_aside}
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_relative_to(folder))


def _imported_from(folders: Sequence[Path]) -> dict[str, Path]:
    """The files of the modules imported from these folders, by the modules' names."""
    files = {}
    for name, module in list(sys.modules.items()):
        origin, place = getattr(module, "__file__", None) or "", name.replace(".", os.sep)
        if any(origin in (f"{folder}/{place}.py", f"{folder}/{place}/__init__.py") for folder in folders):
            files[name] = Path(origin)
    return files


def _look_beside(folder: Path) -> None:
    """Makes the files of `folder` importable: before those beside other user files, after everything else."""
    if folder == FLEET_ROOT:
        return
    others = [other for other in _Beside.folders if other != folder]
    # a name that two such folders have stands for the file in the folder of whoever imports it
    for name, file in _imported_from(others).items():
        root = name.partition(".")[0]
        if _found_beside(root, folder):
            _set_aside.add(file)
            # their packages too: a folder without __init__.py is a module, and remembers its place
            for parts in range(1 + name.count("."), 0, -1):
                sys.modules.pop(".".join(name.split(".")[:parts]), None)
    _Beside.folders = [folder, *others]
    if _Beside not in sys.meta_path:
        sys.meta_path.append(_Beside)
    importlib.invalidate_caches()


def _found_beside(name: str, folder: Path) -> Path | None:
    """The file, the package's file or the folder of this name in a folder, or None."""
    for path in (folder / f"{name}.py", folder / name / "__init__.py"):
        if path.is_file():
            return path
    return folder / name if (folder / name).is_dir() else None


def _why_not_taken(name: str, path: Path) -> str | None:
    """The sentence that `import name` gives another module than the one beside `path`; None if it gives that one."""
    beside = _found_beside(name, path.parent)
    if beside is None or path.parent == FLEET_ROOT:
        return None
    module = sys.modules.get(name)
    try:
        origin = getattr(module, "__file__", None) or getattr(find_spec(name), "origin", None)
    except (ImportError, ValueError):
        origin = None
    # a folder without __init__.py has no file
    given = [Path(origin)] if origin is not None else map(Path, getattr(module, "__path__", ()))
    if beside in given:
        return None
    if origin is not None and Path(origin).is_relative_to(FLEET_ROOT) and "site-packages" not in origin:
        owned = "Fleet's own module"
    else:
        owned = "Python's own module" if name in sys.stdlib_module_names else f"the installed {name}"
    return f"{name} is {owned}, not {beside}; rename that one"


def _say_what_was_not_taken(path: Path, named: str) -> None:
    """Says once which imports of a user's file gave another module than the file of that name beside it."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module]
    for name in dict.fromkeys(module.partition(".")[0] for module in imported):
        beside = _found_beside(name, path.parent)
        is_other_file = beside is not None and beside.is_file() and beside != path
        found = _why_not_taken(name, path) if is_other_file else None
        if found is not None and (line := f"{named}: {found} if it is meant") not in _said:
            _said.add(line)
            logger.warning(f"{line}\n")
