"""Code of the user's own, named on the command line as `path/to/file.py:name`.

Owns running such a file, and how it finds the files beside it. The caller decides what the name has to be.

A file imports what lies beside it by name, as it would under `python path/to/file.py`, with one difference: Fleet's own
modules, the standard library and installed packages win over a file of the same name, which a line then says.
"""

import ast
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger("fleet")

FLEET_ROOT = Path(__file__).resolve().parent.parent

_said: set[str] = set()
# files whose module gave its name to one beside another user file
_set_aside: set[Path] = set()


class _Beside:
    """Finds modules beside the user's files, the latest file's folder first, once nothing else has found them."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module of this name in one of the folders, as Python's import asks for it."""
        for folder in self.folders if path is None else ():
            spec = PathFinder.find_spec(name, [str(folder)])
            # a folder of data, or of a tracker's runs, is no package
            if spec is not None and (spec.origin is not None or _holds_code(folder / name)):
                return spec
        return None


def _holds_code(folder: Path) -> bool:
    return any(file for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern))


_beside = _Beside()


@contextlib.contextmanager
def folder_kept() -> Iterator[None]:
    """Within it the user's code may change the working directory; afterwards the run is in its own again.

    Paths that a run was given may be relative, and are read and written until its end.
    """
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def load_user_file(spec: str, flag: str, form: str) -> tuple[ModuleType, str]:
    """(the module of the file in `spec`, the name after the colon). Runs that file.

    flag, form: what named it and in what form, as "env" and "path/to/file.py:ClassName". Raises ValueError if the spec
    has another form, there is no such file, or the file raises anything.
    """
    file_name, colon, name = spec.rpartition(":")
    path = Path(file_name)
    if not colon or not name or path.suffix != ".py":
        raise ValueError(f"{flag}={spec!r}, but wanted {form}")
    if not path.is_file():
        raise ValueError(f"{flag}={spec!r}: {path} is not a file; correct the path")
    # absolute once: the file's own code may change the folder that a process works in
    path = path.resolve()
    loader = SourceFileLoader(f"fleet_{flag}_{path.stem}", str(path))
    module_spec = spec_from_loader(loader.name, loader)
    assert module_spec is not None, "a loader of source has a spec"
    module = module_from_spec(module_spec)
    # dataclasses and pickling look a class's module up by name
    sys.modules[module_spec.name] = module
    _look_beside(path.parent)
    try:
        loader.exec_module(module)
    # the user's code may also leave by sys.exit
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        remedy = import_remedy(error, path) or "correct it"
        raise ValueError(f"{flag}={spec} failed with {type(error).__name__}: {words}; {remedy}") from error
    _say_what_was_not_taken(path, f"{flag}={spec}")
    return module, name


def import_remedy(error: BaseException, path: Path) -> str | None:
    """What to do about an import of a file beside `path` that failed; None if the error is not that.

    path: of the user's file, absolute.
    """
    if isinstance(error, ImportError) and "relative import" in str(error):
        return f"{path.name} is run by itself, not as part of a package: write `from name import ...` without the dot"
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__.partition(".")[0]
    elif isinstance(error, ImportError) and error.name is not None:
        name = error.name.partition(".")[0]
    else:
        return None
    beside = _passed_over(name, path)
    return None if beside is None else f"{name} is {_origin_in_words(name)}, not {beside}; rename that one"


def folder_of(spec: str) -> Path:
    """The absolute folder of the file in `spec`."""
    return Path(spec.rpartition(":")[0]).resolve().parent


def files_beside(spec: str) -> list[str]:
    """The files beside the one in `spec` that this process has imported, by their places in its folder.

    A file in Fleet's own folder has none, as config.json names the commit of what lies there.
    """
    folder = folder_of(spec)
    files = set() if folder == FLEET_ROOT else {*_imported_from([folder]).values(), *_set_aside}
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_relative_to(folder))


def _imported_from(folders: Sequence[Path]) -> dict[str, Path]:
    """The files of the modules that were imported from these folders, by the modules' names."""
    wanted = {str(folder) for folder in folders}
    files = {}
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None) or ""
        place = os.sep + name.replace(".", os.sep)
        for ending in (f"{place}.py", os.path.join(place, "__init__.py")):
            if origin.endswith(ending) and origin.removesuffix(ending) in wanted:
                files[name] = Path(origin)
    return files


def _look_beside(folder: Path) -> None:
    """Makes the files of `folder` importable, before those beside other user files and after everything else."""
    if folder == FLEET_ROOT:
        return
    others = [other for other in _beside.folders if other != folder]
    # a name that two such folders have stands for the file in the folder of whoever imports it
    for name, file in _imported_from(others).items():
        root = name.partition(".")[0]
        if _file_beside(root, folder) or (folder / root).is_dir():
            _set_aside.add(file)
            # a folder without __init__.py is a module without a file, and knows where it was found
            for parts in range(1 + name.count("."), 0, -1):
                sys.modules.pop(".".join(name.split(".")[:parts]), None)
    _beside.folders = [folder, *others]
    if _beside not in sys.meta_path:
        sys.meta_path.append(_beside)
    importlib.invalidate_caches()


def _file_beside(name: str, folder: Path) -> Path | None:
    """The file or package of this name in a folder; None if it has none."""
    candidates = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _passed_over(name: str, path: Path) -> Path | None:
    """The file beside `path` that `import name` does not give, because another module of that name wins."""
    beside = _file_beside(name, path.parent) or (path.parent / name if (path.parent / name).is_dir() else None)
    if beside is None or path.parent == FLEET_ROOT:
        return None
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None) if loaded else getattr(_found(name), "origin", None)
    if origin is None and loaded is not None and name not in sys.builtin_module_names:
        # a folder without __init__.py
        return None if beside in map(Path, getattr(loaded, "__path__", ())) else beside
    return None if origin is not None and Path(origin) == beside else beside


def _found(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except (ImportError, ValueError):
        return None


def _origin_in_words(name: str) -> str:
    origin = getattr(sys.modules.get(name), "__file__", None) or getattr(_found(name), "origin", None)
    if origin is not None and Path(origin).is_relative_to(FLEET_ROOT) and "site-packages" not in origin:
        return "Fleet's own module"
    return "Python's own module" if name in sys.stdlib_module_names else f"the installed {name}"


def _say_what_was_not_taken(path: Path, named: str) -> None:
    """Says once which imports of a user's file gave another module than the file of that name beside it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        for name in {name.partition(".")[0] for name in names}:
            beside = _file_beside(name, path.parent)
            passed_over = _passed_over(name, path) if beside is not None and beside != path else None
            line = f"{named}: {name} is {_origin_in_words(name)}, not {passed_over}; rename that one if it is meant"
            if passed_over is not None and line not in _said:
                _said.add(line)
                logger.warning(f"{line}\n")
