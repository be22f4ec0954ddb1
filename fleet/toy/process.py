"""A toy model built by a process of its own, which knows nothing of launcher, ranks and GPUs.

Its argument is KIND. If the build fails, a marked line of output has the words of the error.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from fleet.errors import UsageError, one_line
from utils.child_process import command_of

WORDS_MARK, MAX_REASON_LENGTH = "\x1e", 2000  # libraries may write to the same output


def build_in_own_process(kind: str) -> Path:
    """The folder of a toy, as fleet.toy.model.toy_model_path gives it; a process of its own builds it.

    Raises UsageError if the cache cannot be written or the build fails.
    """
    from fleet.toy.model import cached_path, is_whole

    path = cached_path(kind)
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
        raise _not_built(f"{sys.executable} cannot be started: {error}") from error
    if done.returncode < 0:
        raise _not_built(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        words = done.stdout.decode(errors="replace").partition(WORDS_MARK)[2].partition("\n")[0]
        raise UsageError(words) if words else _not_built(f"its process ended with {done.returncode}")
    return path


def main() -> int:
    """Builds the toy if need be. Returns the exit code; a marked line of output has the words of a failure."""
    try:
        from fleet.toy.model import toy_model_path

        toy_model_path(sys.argv[1])
        return 0
    except UsageError as error:
        refusal = error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        refusal = _not_built(reason[:MAX_REASON_LENGTH])
    sys.stdout.flush()
    # a line of its own, in UTF-8 whatever the locale
    os.write(sys.stdout.fileno(), f"\n{WORDS_MARK}{one_line(refusal)}\n".encode(errors="replace"))
    return 1


def _not_built(reason: str) -> UsageError:
    return UsageError(f"the toy model could not be built ({reason}); mend that, or pass another --model_id")
