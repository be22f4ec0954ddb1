"""Whatever its intervals, a finished run has its last step on record, its curve and its page."""

from pathlib import Path

import pytest
from PIL import Image

import training
from fleet.run.records import draw_curve
from fleet.run_folder import read_jsonl
from report import headline, read_run

BEYOND = "--logging_steps 10 --save_steps 10 --sample_steps 10"
EVALUATED = "--eval_steps 10 --eval_episodes 4"

# flags, the steps that are logged, (step, group) of the rollouts that are kept
RUNS = [
    (f"--train_steps 1 {BEYOND} {EVALUATED}", [1], [(1, 0), (1, 1)]),
    ("--train_steps 3 --logging_steps 2 --save_steps 2 --sample_steps 2", [2, 3], [(2, 0), (2, 1), (3, 0), (3, 1)]),
    # a generation serves two steps, so step 4 draws nothing: its line has the loss, and no reward
    ("--train_steps 4 --logging_steps 3 --save_steps 3 --num_iterations 2", [3, 4], [(3, 0), (3, 1)]),
    # the run ends in the middle of a generation, whose groups are those of two steps
    (
        f"--train_steps 3 {BEYOND} --steps_per_generation 2 --gradient_accumulation_steps 1",
        [3],
        [(3, 0), (3, 1), (3, 2), (3, 3)],
    ),
]


def run(folder: Path, flags: str) -> None:
    quick = "--per_device_batch_size 2 --report_to none"
    training.main([*quick.split(), "--output_dir", str(folder), *flags.split()])


def logged_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


def tiles(folder: Path) -> dict[str, tuple[str, str]]:
    return {tile.name: (tile.text, tile.detail) for tile in headline(read_run(folder))}


@pytest.mark.parametrize(("flags", "steps", "kept"), RUNS)
def test_the_last_step_is_on_record(
    flags: str, steps: list[int], kept: list[tuple[int, int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, flags)
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == steps
    assert sorted({step for step, _ in kept}) == [line["step"] for line in lines if "reward" in line]
    assert all(line["grad_norm"] is not None and line["step_time_s"] > 0 for line in lines)
    groups = read_jsonl(folder / "rollouts.jsonl")
    assert [(group["step"], group["group"]) for group in groups] == kept
    assert Image.open(folder / "curve.png").width > 600
    assert f"of {steps[-1]} planned" in (folder / "report.html").read_text()
    assert tiles(folder)["Steps"] == (str(steps[-1]), f"of {steps[-1]} planned")
    assert "mean reward 0." in capfd.readouterr().err
    assert (folder / "final" / "model.safetensors").is_file()


def test_a_run_resumed_at_its_end_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, f"--train_steps 2 {BEYOND}")
    records = [(folder / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl")]
    run(folder, f"--train_steps 2 {BEYOND} --resume")
    assert [(folder / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl")] == records
    assert logged_steps(folder) == [2] and tiles(folder)["Steps"] == ("2", "of 2 planned")


def test_a_run_that_ends_at_a_checkpoint_before_its_first_log_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, "--train_steps 2 --save_steps 1 --logging_steps 10")
    # as after a kill behind the first save, when the user wants no more steps than that
    (folder / "checkpoint-2").rename(folder / "unfinished")
    run(folder, "--train_steps 1 --save_steps 1 --logging_steps 10 --resume")
    assert logged_steps(folder) == []
    assert "no step was logged" in capfd.readouterr().err
    assert Image.open(folder / "curve.png").width > 600
    assert "no step was logged" in (folder / "report.html").read_text()


def num_red_pixels(folder: Path, metrics: list[dict[str, float]]) -> int:
    """The pixels of curve.png in the colour of the reward."""
    draw_curve(metrics, folder / "curve.png", "title")
    colours = Image.open(folder / "curve.png").convert("RGB").getcolors(maxcolors=1_000_000) or []
    return {colour: count for count, colour in colours}.get((0xD1, 0x49, 0x5B), 0)


def test_the_curve_of_one_step_shows_its_points(tmp_path: Path) -> None:
    of_legend = num_red_pixels(tmp_path, [])
    assert num_red_pixels(tmp_path, [{"step": 1, "reward": 0.5, "accuracy": 0.2}]) > of_legend + 20


@pytest.mark.parametrize("reward", [-3.0, 0.5, 12.0])
def test_the_curve_shows_rewards_below_0_and_above_1(reward: float, tmp_path: Path) -> None:
    of_legend = num_red_pixels(tmp_path, [])
    assert num_red_pixels(tmp_path, [{"step": step, "reward": reward} for step in (1, 2)]) > of_legend + 200
