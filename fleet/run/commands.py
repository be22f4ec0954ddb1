"""The commands that a run prints for its user to go on with. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from environment import PickImageEnv
from fleet.command.flags import ModelFlags
from fleet.episodes import BrokenEpisode, EpisodeSource, checked_episode
from fleet.rl.rollouts import instruction_of
from fleet.run_folder import FINAL_NAME, REPORT_NAME, SEPARATE_EVALUATION_NAME
from utils.images import BadImage, checked_sha256

NUM_EPISODES_TRIED = 20  # pictures may have broken since the run began
LAUNCHERS = ("accelerate", "torchrun", "deepspeed")


def resume_command(output_dir: str) -> str:
    """The whole command that goes on with this run, on this machine."""
    started = launched_command(sys.argv, _words_of(os.getppid()))
    words = _without_flags(started, ("--output_dir", "--resume", "--overwrite"))
    return shlex.join([*words, "--output_dir", output_dir, "--resume", "true"])


def launched_command(own: list[str], parent: list[str]) -> list[str]:
    """The words that started this process, its launcher's first. own, parent: the command lines of both processes."""
    names = [Path(word).name for word in parent]
    launcher = next((place for place, name in enumerate(names) if name in LAUNCHERS), None)
    # what the launcher was given ends with what this process was given
    if launcher is None or own[0] not in parent or parent[parent.index(own[0]) :] != own:
        return ["python", *own]
    return [names[launcher], *parent[launcher + 1 :]]


def next_commands(folder: Path, base: ModelFlags, env: EpisodeSource) -> str:
    """The commands that score a finished run, show it and use it; each runs as it stands.

    base: the model that the run began with. The model is asked the first sound episode of `env` that has files and an
    instruction; without one the last command is left out.
    """
    model = str(folder / FINAL_NAME)
    score = ["python", "evaluate.py", "--model_id", model]
    if base.revision:
        score += ["--revision", base.revision]
    rows = [
        ("score it", [*score, "--baseline", base.model_id, "--output", str(folder / SEPARATE_EVALUATION_NAME)]),
        (f"look at it ({REPORT_NAME}, with the scores)", ["python", "report.py", str(folder)]),
    ]
    questions = (_question(env, index) for index in range(NUM_EPISODES_TRIED))
    if question := next(filter(None, questions), None):
        rows.append(("use it", ["python", "-m", "fleet.ask", *score[2:], *question]))
    return "\n".join(f"{what}:\n  {shlex.join(words)}" for what, words in rows)


def _question(env: EpisodeSource, index: int) -> list[str]:
    """The flags that ask what this episode asks; empty where it shows no files, or fails."""
    try:
        episode = checked_episode(env, index)
        paths = [str(image) for image in episode.images if isinstance(image, Path)]
        for path in paths:
            checked_sha256(path)
    except (BrokenEpisode, BadImage, OSError):
        return []
    instruction = env.instruction(episode) if isinstance(env, PickImageEnv) else instruction_of(episode.messages)
    if len(paths) < max(2, episode.num_candidates) or not instruction:
        return []
    return ["--images", *paths, "--instruction", instruction]


def _without_flags(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words less these flags and the values that follow them."""
    kept: list[str] = []
    previous = ""
    for word in words:
        is_value = previous in flags and not word.startswith("-")
        if not is_value and word.split("=")[0] not in flags:
            kept.append(word)
        previous = word
    return kept


def _words_of(process_id: int) -> list[str]:
    """The command line of a process; empty where the system does not show it."""
    try:
        content = Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return []
    return content.decode("utf-8", "replace").rstrip("\0").split("\0")
