"""Samples as the trackers hold them: sent through transformers' own callbacks to the real libraries, and read back."""

import hashlib
import html
import io
import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from transformers import TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from environment import Outcome, ParseStatus
from fleet.rl.rollouts import RolloutRecord
from fleet.run.trackers import CAPTION_PX, Sample, contact_sheet, log_samples, markdown_table
from tests import HANG_S
from tests.conftest import call_text
from tests.helpers_env import pick_record, pick_verdict

REPOSITORY = Path(__file__).resolve().parents[2]
RED, BLUE, GREY = (200, 0, 0), (0, 0, 200), (90, 90, 90)
GREEN_FRAME, ORANGE_FRAME, SHEET = (26, 152, 80), (230, 97, 1), (242, 242, 242)
MISCHIEF = '<script>alert(1)</script> | **bold** `code` [a](b) &amp; \\ _x_\n# new line\t"é漢" \ud800'
SHOWN = '<script>alert(1)</script> | **bold** `code` [a](b) &amp; \\ _x_\\n# new line\\t"é漢" \\ud800'
CELL_PX = 160 + 16


def sample(completion: str, outcome: Outcome, status: ParseStatus, index: int | None, reward: float) -> Sample:
    names = ("r.webp", "b.webp", "g.webp")
    episode = pick_record(1, ("red", "blue", "grey"), "blue", "Pick the blue.", names)
    images = Image.new("RGB", (56, 56), RED), Image.new("RGB", (300, 100), BLUE), Image.new("RGB", (80, 160), GREY)
    return Sample(RolloutRecord(episode, completion, pick_verdict(outcome, status, index), reward, 0.7125), images)


RIGHT_SAMPLE = sample(call_text(1), Outcome.CORRECT, ParseStatus.OK, 1, 1.0)
WRONG_SAMPLE = sample(call_text(2), Outcome.WRONG_INDEX, ParseStatus.OK, 2, 0.05)
FAR_SAMPLE = sample(call_text(7), Outcome.INDEX_OUT_OF_RANGE, ParseStatus.OK, 7, 0.0)
UNPARSABLE_SAMPLE = sample(MISCHIEF, Outcome.UNPARSABLE, ParseStatus.NO_CALL, None, 0.0)
SAMPLES = (RIGHT_SAMPLE, WRONG_SAMPLE, UNPARSABLE_SAMPLE)
# W&B and trackio take text as it is, and a lone surrogate, the last character, is none
PLAIN_SAMPLES = (
    RIGHT_SAMPLE, WRONG_SAMPLE, sample(MISCHIEF[:-1], Outcome.UNPARSABLE, ParseStatus.NO_CALL, None, 0.0)
)  # fmt: skip


def log_at_two_steps(report_to: str, folder: Path, samples: tuple[Sample, ...] = SAMPLES) -> None:
    """Opens the tracker's run as training does, logs the samples at steps 1 and 20, and closes it."""
    callback = {"tensorboard": TensorBoardCallback, "wandb": WandbCallback, "trackio": TrackioCallback}[report_to]()
    args = TrainingArguments(output_dir=str(folder), report_to=report_to, use_cpu=True, run_name="samples")
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for step in (1, 20):
        log_samples(report_to, [callback], samples, step)
    callback.on_train_end(args, state, None)


def log_in_own_process(report_to: str, folder: Path, **environment: str) -> None:
    """The same in a process of its own: these libraries read the environment once, and W&B finishes at the end."""
    call = f"t.log_at_two_steps({report_to!r}, t.Path({str(folder)!r}), t.PLAIN_SAMPLES)"
    code = f"import tests.run.test_trackers as t; {call}"
    environment = {**os.environ, **environment}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert run.returncode == 0, run.stderr


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def frames(sample: Sample) -> list[tuple[tuple[int, ...], ...]]:
    """The colours of outer frame, inner frame and middle of each candidate."""
    pixels = np.asarray(contact_sheet(sample))
    return [
        tuple(tuple(pixels[CELL_PX // 2, left + x].tolist()) for x in (1, 5, CELL_PX // 2))
        for left in lefts_of(len(sample.images))
    ]


def lefts_of(num_candidates: int) -> list[int]:
    return [index * (CELL_PX + 8) for index in range(num_candidates)]


# the sample, then outer frame, inner frame and middle of its three candidates
SHEETS = {
    "right and chosen": (
        RIGHT_SAMPLE, [(SHEET, SHEET, RED), (GREEN_FRAME, ORANGE_FRAME, BLUE), (SHEET, SHEET, GREY)],
    ),
    "right, and another chosen": (
        WRONG_SAMPLE, [(SHEET, SHEET, RED), (GREEN_FRAME, SHEET, BLUE), (SHEET, ORANGE_FRAME, GREY)],
    ),
    "none chosen": (UNPARSABLE_SAMPLE, [(SHEET, SHEET, RED), (GREEN_FRAME, SHEET, BLUE), (SHEET, SHEET, GREY)]),
    "chosen out of range": (
        FAR_SAMPLE, [(SHEET, SHEET, RED), (GREEN_FRAME, SHEET, BLUE), (SHEET, SHEET, GREY)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sample", "expected"), SHEETS.values(), ids=SHEETS.keys())
def test_the_sheet_frames_the_right_and_the_chosen_one(sample, expected):
    assert frames(sample) == expected


def test_the_sheet_holds_each_candidate_whole_over_its_caption():
    pixels = np.asarray(contact_sheet(RIGHT_SAMPLE))
    assert pixels.shape == (CELL_PX + CAPTION_PX, 3 * CELL_PX + 2 * 8, 3)
    pictures, captions = pixels[:CELL_PX], pixels[CELL_PX:]
    areas = [int((pictures == colour).all(axis=2).sum()) for colour in (RED, BLUE, GREY)]
    assert areas == [160 * 160, 160 * 53, 80 * 160]
    assert all(captions[:, left : left + CELL_PX].min() < 100 for left in lefts_of(3))


def test_the_table_shows_hostile_text_as_text():
    table = markdown_table(SAMPLES)
    assert len(table.splitlines()) == 2 + len(SAMPLES)
    rendered = markdown_to_safe_html(table)
    cells = [html.unescape(cell.split("</td>")[0]) for cell in rendered.split("<td>")[1:]]
    assert len(cells) == 10 * len(SAMPLES)
    assert cells[:6] == ["0", "Pick the blue.", "0: red, 1: blue, 2: grey", "1", "1", call_text(1).replace("\n", "\\n")]
    assert cells[-6:] == ["", SHOWN, "unparsable", "no_call", "0.0", "0.7125"]
    assert all(f"<{tag}" not in rendered for tag in ("script", "strong", "code", "a ", "em", "h1"))


def test_tensorboard_gets_images_and_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    log_at_two_steps("tensorboard", tmp_path)
    events = read_events(tmp_path / "events")
    assert events.Tags()["images"] == ["samples/0", "samples/1", "samples/2"]
    for number, sample in enumerate(SAMPLES):
        images = events.Images(f"samples/{number}")
        assert [image.step for image in images] == [1, 20]
        decoded = Image.open(io.BytesIO(images[1].encoded_image_string))
        assert decoded.tobytes() == contact_sheet(sample).tobytes()
    texts = events.Tensors("samples/completions/text_summary")
    assert [text.step for text in texts] == [1, 20]
    text = html.unescape(texts[1].tensor_proto.string_val[0].decode())
    assert SHOWN in text and call_text(2).replace("\n", "\\n") in text


@pytest.mark.parametrize("report_to", ["wandb", "trackio"])
def test_a_tracker_with_tables_gets_one(report_to, monkeypatch):
    tracker, logged = ModuleType(report_to), list[Any]()
    stand_ins = {"run": object(), "Image": lambda image: image.size, "log": logged.append}
    vars(tracker).update(stand_ins, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, report_to, tracker)
    log_samples(report_to, [], PLAIN_SAMPLES, 20)
    ((columns, rows),) = (line["samples"] for line in logged)
    assert [line["train/global_step"] for line in logged] == [20]
    assert columns[:5] == ["images", "instruction", "candidates", "right", "chosen"]
    assert [row[3:5] for row in rows] == [["1", "1"], ["1", "2"], ["1", None]]
    assert [row[0] for row in rows] == [contact_sheet(PLAIN_SAMPLES[0]).size] * 3


@pytest.mark.slow
def test_wandb_gets_a_table_with_images(tmp_path):
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed; pip install wandb to run this")
    places = {f"WANDB_{kind}": str(tmp_path) for kind in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    log_in_own_process("wandb", tmp_path, WANDB_MODE="offline", **places)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))) == 2
    # an offline run keeps what it would upload, its tables and pictures, under names of no meaning
    kept = [path.read_bytes() for path in (tmp_path / "artifacts" / "staging").iterdir()]
    pictures = {hashlib.sha256(content).hexdigest(): content for content in kept if content.startswith(b"\x89PNG")}
    tables = [json.loads(content) for content in kept if content.startswith(b"{") and b'"_type": "table"' in content]
    assert len(tables) >= 2
    table = tables[-1]
    assert table["columns"] == [
        "images", "instruction", "candidates", "right", "chosen", "completion", "outcome", "parse_status", "reward",
        "advantage",
    ]  # fmt: skip
    assert [row[5] for row in table["data"]] == [sample.rollout.completion for sample in PLAIN_SAMPLES]
    assert [row[3:5] for row in table["data"]] == [["1", "1"], ["1", "2"], ["1", None]]
    for row, sample in zip(table["data"], PLAIN_SAMPLES, strict=True):
        picture = Image.open(io.BytesIO(pictures[row[0]["sha256"]]))
        assert picture.tobytes() == contact_sheet(sample).tobytes()


@pytest.mark.slow
def test_trackio_gets_a_table_with_images(tmp_path):
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed; pip install trackio to run this")
    log_in_own_process("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(line) for (line,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [line["train/global_step"] for line in logged] == [1, 20]
    assert [line["samples"]["_type"] for line in logged] == ["trackio.table"] * 2
    rows = logged[1]["samples"]["_value"]
    assert [row["completion"] for row in rows] == [sample.rollout.completion for sample in PLAIN_SAMPLES]
    for row, sample in zip(rows, PLAIN_SAMPLES, strict=True):
        picture = Image.open(tmp_path / "trackio" / "media" / row["images"]["file_path"])
        assert picture.convert("RGB").tobytes() == contact_sheet(sample).tobytes()


def test_no_tracker_gets_nothing(tmp_path):
    log_samples("none", [], SAMPLES, 1)
    log_samples("tensorboard", [], (), 1)


@pytest.mark.parametrize("callbacks", [[], [TensorBoardCallback()]], ids=["no callback", "training has not begun"])
def test_a_missing_writer_is_an_error(callbacks):
    with pytest.raises(RuntimeError, match="report_to='tensorboard', but no TensorBoardCallback with an open writer"):
        log_samples("tensorboard", callbacks, SAMPLES, 1)


@pytest.mark.parametrize("report_to", ["wandb", "trackio"])
def test_a_missing_run_is_an_error(report_to):
    if find_spec(report_to) is None:
        pytest.skip(f"{report_to} is not installed; pip install {report_to} to run this")
    with pytest.raises(RuntimeError, match=r"there is no W&B run|trackio\.init"):
        log_samples(report_to, [], SAMPLES, 1)


def test_another_tracker_is_refused():
    with pytest.raises(ValueError, match="report_to='mlflow', but samples go to tensorboard, wandb, trackio or none"):
        log_samples("mlflow", [], SAMPLES, 1)
