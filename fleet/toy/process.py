"""A toy model built by a process of its own, which knows nothing of launcher, ranks and GPUs.

Its arguments are KIND and, for a kind that is taught an environment's calls, the flags of the task as JSON. If the
build fails, a marked line of output has the words of the error.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from environment import EpisodeSource, PickImageTask
from fleet.command.flags import TOY_MODEL_ID, TaskFlags
from fleet.command.options import starts_sighted
from fleet.command.preflight import make_environment
from fleet.episodes import BrokenEpisode
from fleet.errors import UsageError, one_line
from utils.child_process import command_of

WORDS_MARK, MAX_REASON_LENGTH = "\x1e", 2000  # libraries may write to the same output


def kind_for(task: TaskFlags) -> tuple[str, EpisodeSource | None]:
    """(kind of toy that a task starts from, the environment that it is taught for, if it is)."""
    from fleet.toy.model import PLAIN, READING, SCHOOL_SEED, SIGHTED, TAUGHT, is_shipped

    if task.env is None:
        return (SIGHTED if starts_sighted(TOY_MODEL_ID, task) else PLAIN), None
    env = make_environment(task, SCHOOL_SEED)
    # a fixed index is learnt without looking
    is_plain = list(env.tools) == list(PickImageTask.tools) and task.fixed_correct_index is not None
    if is_plain:
        return PLAIN, None
    return (READING if is_shipped(READING, env) else TAUGHT), env


def build_for(task: TaskFlags) -> Path:
    """The folder of the toy that a task starts from. Raises as build_in_own_process."""
    kind, env = kind_for(task)
    return build_in_own_process(kind, env, task)


def build_in_own_process(kind: str, env: EpisodeSource | None = None, task: TaskFlags | None = None) -> Path:
    """The folder of a toy, as fleet.toy.model.toy_model_path gives it; a process of its own builds it.

    env: whose calls it is taught, and task: the flags that it was made from. Raises UsageError if the cache cannot be
    written or the build fails.
    """
    from fleet.toy.model import cached_path, is_whole

    path = cached_path(kind, env)
    if is_whole(path):
        return path
    launcher_names = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher_names)}
    try:
        done = subprocess.run(
            command_of("fleet.toy.process", kind, *([] if env is None else [json.dumps(_flags_of(task))])),
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
        from fleet.toy.model import SCHOOL_SEED, toy_model_path

        kind, *flags = sys.argv[1:]
        toy_model_path(kind, make_environment(TaskFlags(**json.loads(flags[0])), SCHOOL_SEED) if flags else None)
        return 0
    except UsageError as error:
        refusal = error
    except BrokenEpisode as error:
        refusal = UsageError(f"the environment is broken: {error}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        refusal = _not_built(reason[:MAX_REASON_LENGTH])
    sys.stdout.flush()
    # a line of its own, in UTF-8 whatever the locale
    os.write(sys.stdout.fileno(), f"\n{WORDS_MARK}{one_line(refusal)}\n".encode(errors="replace"))
    return 1


def _flags_of(task: TaskFlags | None) -> dict[str, Any]:
    return {field.name: getattr(task, field.name) for field in fields(TaskFlags)}


def _not_built(reason: str) -> UsageError:
    return UsageError(f"the toy model could not be built ({reason}); mend that, or pass another --model_id")
