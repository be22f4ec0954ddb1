"""A trained model becomes the files and the last lines of the log that a run leaves at its end.

Every process takes part in saving weights; the main one writes the rest.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fleet.command.command_line import COLOURED
from fleet.command.flags import ModelFlags
from fleet.episodes import EpisodeSource
from fleet.errors import RunStopped, UsageError, one_line
from fleet.export.weights import merge_adapter
from fleet.report.page import training_seconds, write_report
from fleet.rl.checkpoints import remedy_of
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.run.commands import next_commands
from fleet.run.measured import measured_figures, note_measured
from fleet.run.records import draw_curve
from fleet.run_folder import (
    CURVE_NAME,
    FINAL_NAME,
    MERGED_NAME,
    METRICS_NAME,
    REPORT_NAME,
    UNFINISHED_NAME,
    read_jsonl,
    replace_folder,
)

logger = logging.getLogger("fleet")


def save_results(trainer: FleetRLOOTrainer, model: ModelFlags, *, merge_lora: bool) -> None:
    """Writes final/, final_merged/, curve.png and report.html on all processes. Raises RunStopped if a write fails."""
    folder = Path(str(trainer.args.output_dir))
    try:
        _write_results(folder, trainer, f"RLOO on {model.model_id}")
    except (OSError, SafetensorError) as error:
        raise RunStopped(
            f"the last step is saved, but the results could not be written to {folder} "
            f"({one_line(error)}); {remedy_of(error, folder)}, and pass --resume",
            is_of_all=False,
        ) from error
    if merge_lora and trainer.is_world_process_zero():
        trainer.on_activity("merging the adapter")
        try:
            merge_adapter(folder / FINAL_NAME, folder / MERGED_NAME, revision=model.revision)
        except (OSError, SafetensorError) as error:
            raise RunStopped(
                f"{folder / FINAL_NAME} is written, but its adapter could not be merged "
                f"({one_line(error)}); correct that and pass --resume",
                is_of_all=False,
            ) from error


def _write_results(folder: Path, trainer: FleetRLOOTrainer, title: str) -> None:
    trainer.on_activity("writing the results")
    # before saving, which takes memory of its own
    figures = measured_figures(trainer.state.log_history)
    unfinished = folder / UNFINISHED_NAME / FINAL_NAME
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        replace_folder(unfinished, folder / FINAL_NAME)
        if comparison := note_measured(folder, figures):
            logger.info(comparison, extra=COLOURED)
        draw_curve(read_jsonl(folder / METRICS_NAME), folder / CURVE_NAME, title)
        try:
            write_report(folder)
        except UsageError as error:
            logger.warning(f"no report was written: {error}")


def describe_results(trainer: FleetRLOOTrainer, model: ModelFlags, env: EpisodeSource) -> str:
    """The end of the log: the gain, the time, the place of everything, and the commands for it."""
    lines = [line for line in trainer.state.log_history if "reward" in line]
    folder = Path(str(trainer.args.output_dir))
    report = "report.html, " if (folder / REPORT_NAME).exists() else ""
    left = f"in {folder}: {report}metrics.jsonl, curve.png, config.json, checkpoints, final/"
    left = f"{left}\n\n{next_commands(folder, model, env)}"
    if not lines:
        return f"\nresumed at step {trainer.state.global_step}, the last one; before it no step was logged\n{left}"
    window = max(1, min(3, len(lines) // 2))
    figures = ", ".join(
        f"mean {name} {_mean(lines[:window], name)} -> {_mean(lines[-window:], name)}"
        for name in ("reward", "accuracy")
    )
    steps = f"{window} logged steps" if window > 1 else "logged step"
    return f"\n{figures} (first and last {steps}), {training_seconds(lines):.0f} s of training\n{left}"


def _mean(lines: Sequence[dict[str, Any]], name: str) -> str:
    """The mean of a metric; "none" where all rollouts of these steps were dropped."""
    found = [line[name] for line in lines if line[name] is not None]
    return f"{sum(found) / len(found):.2f}" if found else "none"
