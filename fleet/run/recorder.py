"""RunRecorder: all that a run shows and writes at each step, from its progress to its files.

Owns the moments; the forms are in records.py, the rules of the warnings in diagnostics.py.
"""

import contextlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from transformers.trainer_callback import TrainerCallback

from fleet.command.training_flags import RunFlags
from fleet.errors import RunStopped
from fleet.evaluation.figures import percent_at
from fleet.progress import StepProgress
from fleet.rl.checkpoints import remedy_of
from fleet.rl.rollouts import RolloutRecord
from fleet.run.diagnostics import Diagnostics
from fleet.run.records import distinct_rollouts, group_lines, look_line, sample_table
from fleet.run.trackers import Sample, log_samples
from fleet.run_folder import EVALUATIONS_NAME, METRICS_NAME, ROLLOUTS_NAME, THUMBNAILS_NAME, LineFile

logger = logging.getLogger("fleet")

MAX_GROUPS_PER_STEP = 8
MAX_THUMBNAILS = 2000  # per process; a run over more pictures keeps the first
THUMBNAIL_PX = 112


class RunRecorder(TrainerCallback):
    """Shows progress, tables of completions and warnings, and writes the run's records."""

    def __init__(self, trainer: Any, run: RunFlags, *, fixed_correct_index: int | None):
        """trainer: a FleetRLOOTrainer. fixed_correct_index: the flag."""
        self.trainer, self.run, self.output_dir = trainer, run, Path(trainer.args.output_dir)
        self.diagnostics = Diagnostics(fixed_correct_index=fixed_correct_index)
        self._metrics = LineFile(self.output_dir / METRICS_NAME)
        self._rollouts = LineFile(self.output_dir / ROLLOUTS_NAME)
        self._evaluations = LineFile(self.output_dir / EVALUATIONS_NAME)
        self._thumbnails: set[str] = set()
        self._progress: StepProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops lines past the step that the run resumes from: it takes and writes those steps again."""
        if not state.is_world_process_zero:
            return
        self._progress = StepProgress(state.global_step, state.max_steps)
        # a run that begins anew evaluates its start again
        last_step = state.global_step if state.global_step > 0 else -1
        try:
            self._rollouts.drop_after(last_step)
            self._evaluations.drop_after(last_step)
            kept = self._metrics.drop_after(last_step)
        except ValueError as error:
            raise RunStopped(f"resume: {error}, and pass --resume", is_of_all=False) from error
        except OSError as error:
            raise RunStopped(
                f"the records of the run could not be cut to step {max(last_step, 0)} ({error}); "
                f"{remedy_of(error, self.output_dir)}, and pass --resume",
                is_of_all=False,
            ) from error
        for line in kept:
            self.diagnostics.observe(line)
        # a run that is resumed at its end logs nothing, and its page is drawn from this file
        self._metrics.append([])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Writes the step's figures and rollouts, shows two of the figures, and gives new warnings."""
        is_training_step = "loss" in logs
        if is_training_step:
            self._keep_thumbnails()
        is_held_out = "eval_greedy_accuracy" in logs or "control/true" in logs
        if not state.is_world_process_zero or not (is_training_step or is_held_out):
            return
        named = {name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name: logs[name] for name in logs}
        figures = {name: value for name, value in named.items() if isinstance(value, int | float)}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._metrics.append([{"step": state.global_step, **finite}])
        # a point that evaluation gave is in its line
        if "control/seconds" in logs:
            self._say(f"step {state.global_step}: {look_line(logs)}")
        if is_training_step and self._progress is not None:
            # a step whose rollouts were all dropped has no reward
            self._progress.logged(state.global_step, {name: finite.get(name) for name in named})
        if "reward" not in logs:  # an evaluation, or a step that reuses a generation
            return
        groups = group_lines(self.trainer.latest_rollouts, self.trainer.num_generations, state.global_step)
        self._rollouts.append(groups[:MAX_GROUPS_PER_STEP])
        for warning in self.diagnostics.observe(finite):
            self._say(f"\nstep {state.global_step}: {warning}\n")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> Any:
        """Writes the evaluation's document and says its main figures; asks for a checkpoint of a new best."""
        document = self.trainer.latest_evaluation
        is_best = metrics["eval_greedy_accuracy"] > (-math.inf if state.best_metric is None else state.best_metric)
        if args.metric_for_best_model is not None and state.global_step > 0 and is_best:
            control.should_save = True
        if state.is_world_process_zero:
            self._evaluations.append([document])
            self._say(
                f"step {state.global_step}: held-out accuracy {percent_at(document, 'greedy_accuracy')}, "
                f"with blank pictures {percent_at(document, 'controls', 'blank_images')}"
            )
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Moves the bar, prints the table when it is due, and asks for the last step's log and evaluation."""
        if self._progress is not None:
            self._progress.step_done(state.global_step)
        if state.global_step == state.max_steps:
            control.should_log = True
            control.should_evaluate |= args.do_eval
        every = self.run.sample_steps
        is_due = every and (state.global_step == 1 or state.global_step % every == 0)
        if state.is_world_process_zero and is_due:
            shown = distinct_rollouts(self.trainer.latest_rollouts)
            self._say(sample_table(shown, state.global_step))
            callbacks = self.trainer.callback_handler.callbacks
            log_samples(self.run.report_to, callbacks, self._samples(shown), state.global_step)
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.close()

    def _say(self, text: str) -> None:
        assert self._progress is not None, "the main process has had on_train_begin"
        self._progress.say(text)

    def _samples(self, rollouts: Sequence[RolloutRecord]) -> list[Sample]:
        """Those of the rollouts whose pictures this process has."""
        pictures = self.trainer.latest_pictures
        return [
            Sample(rollout, tuple(pictures[name] for name in rollout.episode.images))
            for rollout in rollouts
            if all(name in pictures for name in rollout.episode.images)
        ]

    def _keep_thumbnails(self) -> None:
        """Saves small copies of this process's pictures that rollouts.jsonl names, each once a run."""
        kept = self.trainer.latest_rollouts[: MAX_GROUPS_PER_STEP * self.trainer.num_generations]
        wanted = {name for rollout in kept for name in rollout.images}
        folder = self.output_dir / THUMBNAILS_NAME
        for name, picture in self.trainer.latest_pictures.items():
            if name not in wanted or name in self._thumbnails or len(self._thumbnails) >= MAX_THUMBNAILS:
                continue
            self._thumbnails.add(name)
            # a report without a picture is better than a run that ends for one
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
                if not (folder / name).exists():
                    _save_thumbnail(picture, folder / name)


def _save_thumbnail(picture: Image.Image, path: Path) -> None:
    small = ImageOps.contain(picture, (THUMBNAIL_PX, THUMBNAIL_PX)) if max(picture.size) > THUMBNAIL_PX else picture
    # processes may save the same picture at once, each under a name of its own until it is whole
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.unfinished")
    small.save(unfinished, format="WEBP", quality=85)
    os.replace(unfinished, path)
