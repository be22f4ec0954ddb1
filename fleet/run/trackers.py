"""Sampled completions with their images, for TensorBoard, W&B or trackio, whichever --report_to chose.

Owns how a sample looks there. The caller (the main process) chooses the rollouts. The tracker's run is the one that
transformers' own callback opened: TensorBoard's writer is that callback's `tb_writer`, and the other two have one
current run per process, which their public `log` writes to.

Limits: one picture a sample, shrunk to 160 pixels a candidate, not the pixels that the model sees. TensorBoard shows
10 steps per tag, drawn at random, unless started with `--samples_per_plugin images=0,text=0`. W&B and trackio get the
text as it is, control characters spelled out. trackio 0.43 shows it as text, up to 250 characters a cell; W&B's page
is not tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback

from fleet.rl.rollouts import RolloutRecord, picture_chosen
from utils.plain_text import printable, printable_lines

TAG = "samples"
STEP_NAME = "train/global_step"  # what transformers' callbacks call the step in W&B and trackio
COLUMNS = (
    "instruction", "candidates", "right", "chosen", "completion", "outcome", "parse_status", "reward", "advantage",
)  # fmt: skip

THUMBNAIL_PX = 160
FRAME_PX = 4
CAPTION_PX = 20
GAP_PX = 8
SHEET_COLOUR = "#f2f2f2"
RIGHT_COLOUR = "#1a9850"
CHOSEN_COLOUR = "#e66101"


@dataclass(frozen=True)
class Sample:
    """One rollout to show. images: RGB, one per candidate, as utils.images.open_image gives them."""

    rollout: RolloutRecord
    images: tuple[Image.Image, ...]


def log_samples(report_to: str, callbacks: Sequence[TrainerCallback], samples: Sequence[Sample], step: int) -> None:
    """Sends the samples to the tracker of this name; to none for "none".

    callbacks: the trainer's, `trainer.callback_handler.callbacks`. Call it while training runs, on the main process
    alone, which has the tracker's run. Raises RuntimeError without one, ValueError for another tracker.
    """
    if report_to == "none" or not samples:
        return
    if report_to == "tensorboard":
        _log_to_tensorboard(callbacks, samples, step)
    elif report_to in ("wandb", "trackio"):
        _log_as_table(import_module(report_to), samples, step)
    else:
        raise ValueError(f"report_to={report_to!r}, but samples go to tensorboard, wandb, trackio or none; pass one")


def contact_sheet(sample: Sample) -> Image.Image:
    """The images side by side as RGB, each over its number.

    In a task that picks one, the right one has a green outer frame, the chosen one an orange inner frame, and the
    captions say so too.
    """
    border_px = 2 * FRAME_PX
    cell_px = THUMBNAIL_PX + 2 * border_px
    size = len(sample.images) * (cell_px + GAP_PX) - GAP_PX, cell_px + CAPTION_PX
    sheet = Image.new("RGB", size, SHEET_COLOUR)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(sample.images):
        left = index * (cell_px + GAP_PX)
        thumbnail = ImageOps.contain(image, (THUMBNAIL_PX, THUMBNAIL_PX))
        inset_x, inset_y = ((THUMBNAIL_PX - side_px) // 2 for side_px in thumbnail.size)
        sheet.paste(thumbnail, (left + border_px + inset_x, border_px + inset_y))
        right, bottom, marks = left + cell_px - 1, cell_px - 1, []
        if index == sample.rollout.episode.correct_index:
            draw.rectangle((left, 0, right, bottom), outline=RIGHT_COLOUR, width=FRAME_PX)
            marks.append("right")
        if picture_chosen(sample.rollout) == index:
            inner = (left + FRAME_PX, FRAME_PX, right - FRAME_PX, bottom - FRAME_PX)
            draw.rectangle(inner, outline=CHOSEN_COLOUR, width=FRAME_PX)
            marks.append("chosen")
        caption = f"{index}: {', '.join(marks)}" if marks else str(index)
        draw.text((left + border_px, cell_px + 2), caption, fill="black", font=ImageFont.load_default(14))
    return sheet


def markdown_table(samples: Sequence[Sample]) -> str:
    """The samples as a Markdown table that shows every text character by character, whatever it holds."""
    rows = [[str(number), *(_as_literal(value) for value in _row(sample))] for number, sample in enumerate(samples)]
    header = ["sample", *COLUMNS]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _log_to_tensorboard(callbacks: Sequence[TrainerCallback], samples: Sequence[Sample], step: int) -> None:
    writer = next((callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)
    if writer is None:
        raise RuntimeError(
            "report_to='tensorboard', but no TensorBoardCallback with an open writer is among the trainer's callbacks; "
            "log samples on the main process, while it trains"
        )
    for number, sample in enumerate(samples):
        writer.add_image(f"{TAG}/{number}", np.asarray(contact_sheet(sample)), step, dataformats="HWC")
    writer.add_text(f"{TAG}/completions", markdown_table(samples), step)


def _log_as_table(tracker: Any, samples: Sequence[Sample], step: int) -> None:
    """tracker: the module wandb or trackio, whose tables are alike."""
    # trackio itself raises RuntimeError without a run
    if tracker.__name__ == "wandb" and tracker.run is None:
        raise RuntimeError(
            "report_to='wandb', but there is no W&B run; log samples on the main process, while it trains"
        )
    rows = [[tracker.Image(contact_sheet(sample)), *_row(sample)] for sample in samples]
    tracker.log({TAG: tracker.Table(columns=["images", *COLUMNS], data=rows), STEP_NAME: step})


def _row(sample: Sample) -> list[Any]:
    """The values of COLUMNS. In texts, characters that do not print are spelled out; line breaks stay."""
    rollout, episode, verdict = sample.rollout, sample.rollout.episode, sample.rollout.verdict
    candidates = ", ".join(f"{index}: {label}" for index, label in enumerate(episode.labels))
    return [
        printable_lines(episode.instruction),
        printable(candidates),
        episode.solution,
        None if verdict.call is None else str(verdict.call),
        printable_lines(rollout.completion),
        str(verdict.outcome),
        verdict.parse_status.value,
        round(rollout.reward, 4),
        round(rollout.advantage, 4),
    ]


def _as_literal(value: object) -> str:
    """The value's text on one line, in which no character means anything to Markdown or HTML.

    >>> _as_literal("a*b")
    'a&#42;b'
    """
    text = "" if value is None else str(value)
    return "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in printable(text))
