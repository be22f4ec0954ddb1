"""The run's folder while the run is on: named, held by one run, resumed from or begun.

All processes agree before anything is written, and the main one writes.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from fleet.command.image_check import RunData
from fleet.command.output_dir import empty_run_folder, make_new_output_dir, require_output_dir
from fleet.command.resume_check import images_of_beginning, require_same_images, why_of_another_run
from fleet.command.training_flags import RunFlags
from fleet.errors import UsageError
from fleet.model_folder.files import read_json
from fleet.processes import gather_by_rank, together
from fleet.rl.checkpoints import ProcessPlace, choose_checkpoint, remedy_of, remove_unfinished
from fleet.rl.resumable_trainer import require_plain_pickles
from fleet.run.config import what_changed_since
from fleet.run_folder import CONFIG_NAME, IMAGES_NAME, TENSORBOARD_NAME, write_atomically
from fleet.run_lock import RunLock

logger = logging.getLogger("fleet")


def name_output_dir(output_dir: str | None, model_id: str, rank: int) -> Path:
    """The run's folder, the same on every process; a new one is made if `output_dir` is None."""
    is_maker = output_dir is None and rank == 0
    made = together(lambda: str(make_new_output_dir(model_id)) if is_maker else output_dir)
    folder = Path(gather_by_rank(made)[0])
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD_NAME)
    return folder


@contextlib.contextmanager
def held(folder: Path, rank: int) -> Iterator[RunLock | None]:
    """Within it, the main process holds the lock; others get None. Raises UsageError on all if another run has it."""
    with contextlib.ExitStack() as stack:
        yield together(lambda: stack.enter_context(RunLock(folder)) if rank == 0 else None)


def find_checkpoint(
    folder: Path, run: RunFlags, data: RunData, place: ProcessPlace, code: Mapping[str, str], model_id: str
) -> Path | None:
    """The checkpoint that the run goes on from, the same on every process; None for a run that begins.

    Raises UsageError if all checkpoints are damaged, the chosen one could run code, or the images changed.
    """
    if not run.resume:
        return None
    recorded = read_json(folder / CONFIG_NAME)
    require_same_images(recorded, data, images_of_beginning(run))
    if changed := what_changed_since(recorded, code, model_id):
        logger.warning(
            f"resume: since the run began, changed: {', '.join(changed)}; its bits may differ from here on\n"
        )
    checkpoint = choose_checkpoint(folder, place, partial(why_of_another_run, recorded))
    if checkpoint is None:
        logger.warning(f"resume: {folder} has no checkpoint yet, so the run begins at step 0\n")
    elif not run.trust_checkpoint:
        require_plain_pickles(checkpoint, place)
    return checkpoint


def begin_folder(
    folder: Path, run: RunFlags, paths_read: Mapping[str, str], config: str, sha256s: Mapping[str, str], rank: int
) -> None:
    """Called after all checks pass: makes or empties the run's folder, then writes config.json and images.json.

    Raises UsageError on all processes if somebody has put files there since the checks, or a write fails.
    """

    def begin() -> None:
        # the model took its time to load, and files that are new since must not be deleted or mixed with
        require_output_dir(run, paths_read)
        try:
            if run.overwrite and folder.is_dir():
                empty_run_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
            write_atomically(folder / CONFIG_NAME, config)
            if sha256s and not (folder / IMAGES_NAME).exists():
                write_atomically(folder / IMAGES_NAME, json.dumps(dict(sha256s), indent=0) + "\n")
        except OSError as error:
            raise UsageError(
                f"output_dir={folder} cannot be written to ({error}); {remedy_of(error, folder)}, and start again"
            ) from error

    together(begin if rank == 0 else lambda: None)
