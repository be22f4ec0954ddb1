"""A toy model built by a process of its own, which knows nothing of launcher, ranks and GPUs.

Its argument is KIND. If the build fails, the exit code tells whether the cache is to blame, and a marked line of output
tells the cause.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from utils.child_process import command_of

# exit codes of that process; sysexits.h: a file cannot be created, an internal error
CACHE_ERROR_CODE, BUILD_ERROR_CODE = 73, 70
REASON_MARK, MAX_REASON_LENGTH = "\x1e", 2000  # libraries may write to the same output


class BuildError(Exception):
    """A toy could not be built; the message says why."""


def build_in_own_process(kind: str) -> Path:
    """The folder of a toy, as fleet.toy.model.toy_model_path gives it; a process of its own builds it.

    Raises fleet.toy.model.CacheError if the cache cannot be written, and BuildError with the cause if the build fails.
    """
    from fleet.toy.model import CacheError, default_cache_root, folder_name, is_whole

    path = default_cache_root() / folder_name(kind)
    if is_whole(path):
        return path
    launcher_names = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher_names)}
    try:
        done = subprocess.run(
            command_of("fleet.toy.process", kind),
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
        )
    except OSError as error:
        raise BuildError(f"{sys.executable} cannot be started: {error}") from error
    reason = done.stdout.decode(errors="replace").partition(REASON_MARK)[2].partition("\n")[0]
    if done.returncode == CACHE_ERROR_CODE:
        raise CacheError(reason)
    if done.returncode < 0:
        raise BuildError(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        raise BuildError(reason or f"its process ended with {done.returncode}")
    return path


def main() -> int:
    """Builds the toy if need be. Returns the exit code; a marked line of output has the reason of a failure."""
    try:
        from transformers.utils import logging as transformers_logging

        from fleet.toy.model import CacheError, toy_model_path

        # the build has a bar of its own
        transformers_logging.disable_progress_bar()
        try:
            toy_model_path(sys.argv[1])
        except CacheError as error:
            return _failed(CACHE_ERROR_CODE, str(error))
    except Exception as error:
        return _failed(BUILD_ERROR_CODE, f"{type(error).__name__}: {error}")
    return 0


def _failed(code: int, reason: str) -> int:
    sys.stdout.flush()
    # a line of its own, in UTF-8 whatever the locale
    line = f"\n{REASON_MARK}{' '.join(reason.split())[:MAX_REASON_LENGTH]}\n"
    os.write(sys.stdout.fileno(), line.encode(errors="replace"))
    return code
