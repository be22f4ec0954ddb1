"""A resumed run is the run that was begun: config.json has its flags, processes and images. Imports no torch."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fleet.command.image_check import MAX_NAMED, RunData
from fleet.command.options import MAY_CHANGE_ON_RESUME, PATH_FLAGS
from fleet.command.output_dir import is_run_folder
from fleet.command.parser import as_seen_from
from fleet.command.training_flags import RunFlags
from fleet.errors import UsageError
from fleet.model_folder.files import read_json
from fleet.run_folder import CONFIG_NAME, IMAGES_NAME, RUN_CONFIG_NAME
from utils.plain_text import printable


def resumes(run: RunFlags) -> bool:
    """True for --resume true, or auto with a run in output_dir."""
    return is_run_folder(Path(str(run.output_dir))) if run.resume == "auto" else bool(run.resume)


def recorded_checkpointing(run: RunFlags, given: bool | str | None) -> bool | str | None:
    """--gradient_checkpointing as a resumed run has recorded it, where nothing else was given: it stays as it was."""
    if not run.resume or given not in (None, "auto"):
        return given
    try:
        recorded = read_json(Path(str(run.output_dir)) / CONFIG_NAME).get("options", {})
    except UsageError:
        # require_same_run says it, on all processes
        return given
    value = recorded.get("gradient_checkpointing")
    return value if isinstance(value, bool) else given


def require_same_run(run: RunFlags, now: Mapping[str, Any], idle: Collection[str], num_processes: int) -> None:
    """Raises UsageError if a resumed run has other flags or processes. now: all flags. idle: those without a part."""
    if not run.resume:
        return
    folder = Path(str(run.output_dir))
    recorded = read_json(folder / CONFIG_NAME)
    before = recorded.get("options", {})
    changed = [
        f"{name} (was {before[name]}, now {now[name]})"
        for name in _differing({"options": now, "idle_flags": idle}, recorded)
        if not _is_same_path(name, before[name], now[name], recorded.get("directory"))
    ]
    if changed:
        raise UsageError(
            f"resume: the run in {folder} had other flags: {', '.join(changed)}; pass the same ones, or start a new run"
        )
    if not now["lr_scheduler_type"].startswith("constant") and before.get("train_steps") != now["train_steps"]:
        raise UsageError(
            f"resume: train_steps was {before.get('train_steps')} and is now {now['train_steps']}, but the schedule "
            f"{now['lr_scheduler_type']} is drawn over all steps, so the learning rate would jump; pass the same "
            "--train_steps, or start a new run"
        )
    num_before = recorded.get("num_processes")
    if num_before not in (None, num_processes):
        raise UsageError(
            f"resume: the run in {folder} had {num_before} processes, and now there are {num_processes}, which would "
            f"deal its episodes differently; start {num_before}"
        )


def why_of_another_run(recorded: Mapping[str, Any], checkpoint: Path) -> str | None:
    """The reason why a checkpoint in a run's folder is another run's; None if it is this run's, or nothing tells.

    recorded: the run's config.json. Flags, images and processes tell apart runs that were begun before runs had an id.
    """
    if not (checkpoint / RUN_CONFIG_NAME).is_file():
        return None
    try:
        there = read_json(checkpoint / RUN_CONFIG_NAME)
    except UsageError as error:
        return str(error)
    ids = recorded.get("run_id"), there.get("run_id")
    if None not in ids and ids[0] == ids[1]:
        return None
    differences = [
        f"{name} is {there['options'][name]} there and {recorded['options'][name]} here"
        for name in _differing(recorded, there)
    ]
    for name, words in (("data_digest", "other images"), ("num_processes", "another number of processes")):
        if recorded.get(name) is not None and there.get(name) not in (None, recorded[name]):
            differences.append(words)
    if None in ids and not differences:
        return None
    return f"it is another run's ({', '.join(differences) or 'with the same flags'})"


def _differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """The flags with a part in both runs that no resume may change, and that differ. here, there: as in config.json."""
    ours, theirs = here.get("options", {}), there.get("options", {})
    # the flags that leave others without a part are compared themselves
    without_part = {*here.get("idle_flags", ()), *there.get("idle_flags", ())}
    compared = ours.keys() & theirs.keys() - MAY_CHANGE_ON_RESUME - without_part
    return sorted(name for name in compared if ours[name] != theirs[name])


def images_of_beginning(run: RunFlags) -> dict[str, str]:
    """The SHA-256 in hex of each image that a resumed run drew from at its start, by its name; empty if not known."""
    path = Path(str(run.output_dir)) / IMAGES_NAME
    if not run.resume or not path.is_file():
        return {}
    sha256s = read_json(path)
    if not all(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in sha256s.values()):
        raise UsageError(f"{path} holds more than the SHA-256 of images; restore it")
    return sha256s


def _is_same_path(name: str, before: Any, now: Any, directory: str | None) -> bool:
    """True if two values of a flag name one file, `before` as seen from the run's first `directory`."""
    are_paths = name in PATH_FLAGS and isinstance(before, str) and isinstance(now, str)
    return are_paths and directory is not None and as_seen_from(directory, before) == as_seen_from(os.getcwd(), now)


def require_same_images(recorded: Mapping[str, Any], data: RunData, beginning: Mapping[str, str]) -> None:
    """Raises UsageError if a resumed run would draw from other images than config.json has.

    beginning: the SHA-256 of each image by its name, as the run began.
    """
    if recorded.get("data_digest") in (None, data.data_digest):
        return
    what = _changed_images(beginning, data.sha256s)
    if skipped := set(data.skipped_images) ^ set(recorded.get("skipped_images", ())):
        what.append(f"left out in only one of the two: {_first(skipped)}")
    # deleted ones alone would not stop Fleet's own environment, if bad images were skipped
    can_skip = len(what) == 1 and what[0].startswith("lost: ") and recorded.get("options", {}).get("env") is None
    raise UsageError(
        f"resume: the images are not those that the run began with ({'; '.join(what) or 'a label or the order changed'}"
        f"), so its episodes would be others; restore them{', pass --bad_images skip' * can_skip}, or start a new run"
    )


def _changed_images(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    if not before:
        return ["a file was added, lost or changed"]
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    found = (("added", now.keys() - before.keys()), ("lost", before.keys() - now.keys()), ("changed", changed))
    return [f"{word}: {_first(names)}" for word, names in found if names]


def _first(names: Collection[str]) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
