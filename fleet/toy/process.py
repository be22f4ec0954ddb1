"""A toy model built by a process of its own, which knows nothing of launcher, ranks and GPUs.

Its arguments are KIND and FD. It prints the model's folder, or writes to the open file FD why there is none, so that
each failure is told by its own cause.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from utils.child_process import command_of

# of that process; sysexits.h: a file cannot be created, an internal error
CACHE_ERROR_CODE, BUILD_ERROR_CODE = 73, 70
MAX_REASON_BYTES = 2000


class BuildError(Exception):
    """A toy could not be built; the message says why."""


def build_in_own_process(kind: str) -> Path:
    """`toy_model.toy_model_path` run by a process of its own.

    Raises toy_model.CacheError if the cache cannot be written, and BuildError with the cause if the build fails.
    """
    from fleet.toy.model import CacheError, default_cache_root, folder_name, is_whole

    path = default_cache_root() / folder_name(kind)
    if is_whole(path):
        return path
    of_launcher = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_launcher)}
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reasons:
        try:
            done = subprocess.run(
                command_of("fleet.toy.process", kind, write_end),
                env=environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[write_end],
            )
        except OSError as error:
            raise BuildError(f"{sys.executable} cannot be started: {error}") from error
        finally:
            os.close(write_end)
        reason = reasons.read().decode(errors="replace")
    if done.returncode == CACHE_ERROR_CODE:
        raise CacheError(reason)
    if done.returncode < 0:
        raise BuildError(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        raise BuildError(reason or f"its process ended with {done.returncode}")
    return Path(done.stdout.splitlines()[-1])


def main() -> int:
    """Builds the toy if need be and prints its folder. Returns the exit code; the reason goes to a descriptor."""
    kind, reasons = sys.argv[1], int(sys.argv[2])
    try:
        from transformers.utils import logging as transformers_logging

        from fleet.toy.model import CacheError, toy_model_path

        # the build has a bar of its own
        transformers_logging.disable_progress_bar()
        try:
            print(toy_model_path(kind))
        except CacheError as error:
            _say(reasons, str(error))
            return CACHE_ERROR_CODE
    except Exception as error:
        _say(reasons, f"{type(error).__name__}: {error}")
        return BUILD_ERROR_CODE
    return 0


def _say(reasons: int, text: str) -> None:
    os.write(reasons, " ".join(text.split()).encode(errors="replace")[:MAX_REASON_BYTES])
