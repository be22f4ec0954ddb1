"""Code of the user's own, named on the command line as `path/to/file.py:name`.

Owns running such a file. What the name has to be is the caller's affair.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


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
    module_spec = importlib.util.spec_from_file_location(f"fleet_{flag}_{path.stem}", path)
    if not path.is_file() or module_spec is None or module_spec.loader is None:
        raise ValueError(f"{flag}={spec!r}: {path} is not a file; correct the path")
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickling look a class's module up by name
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    # the user's code may also leave by sys.exit
    except (Exception, SystemExit) as error:
        raise ValueError(f"{flag}={spec} failed with {type(error).__name__}: {error}; correct it") from error
    return module, name
