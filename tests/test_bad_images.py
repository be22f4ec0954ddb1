"""Whole runs on folders with bad images, and on images that go bad while the run goes on."""

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evaluate
import training
from fleet.command.options import parse_options
from fleet.errors import RunStopped, UsageError
from fleet.evaluation.answering import sound_part
from fleet.evaluation.held_out import make_plan
from fleet.run_folder import read_jsonl
from fleet.toy.model import TOY_DATA_ROOT
from tests.conftest import save_truncated
from tests.helpers import toy_path
from tests.test_resume import entire

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--train_steps", "2"]
VANISHING_ENV = '''
from environment import Episode, PickImageEnv

class VanishingEnv(PickImageEnv):
    """From its episode 2 on, red pictures are gone."""

    def episode(self, index: int) -> Episode:
        if index == 2:
            for image in self.images:
                if image.label.startswith("red"):
                    image.path.unlink(missing_ok=True)
        return super().episode(index)
'''


@pytest.fixture(autouse=True)
def toy() -> None:
    toy_path()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The toy's pictures, to break some of them."""
    return Path(shutil.copytree(TOY_DATA_ROOT, tmp_path / "data"))


def spoil_three(data: Path) -> list[str]:
    """Breaks three pictures; returns their names."""
    cut, empty, page = sorted(data.glob("*.png"))[3:6]
    save_truncated(cut)
    empty.write_bytes(b"")
    page.write_text("<html></html>")
    return [cut.name, empty.name, page.name]


def run(output_dir: Path, data: Path, *flags: str) -> list[dict[str, Any]]:
    """The run's metrics without its times."""
    training.main([*QUICK, "--data_root", str(data), "--output_dir", str(output_dir), *flags])
    times = ("step_time_s", "rollouts_per_s", "epoch", "images/episodes_replaced")
    return [{k: v for k, v in line.items() if k not in times} for line in read_jsonl(output_dir / "metrics.jsonl")]


@pytest.mark.parametrize("main", [training.main, evaluate.main], ids=["training", "evaluation"])
def test_bad_images_stop_a_run_before_a_weight_loads(main: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, empty, page = spoil_three(data)
    monkeypatch.setattr(
        "fleet.run.model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded")
    )
    with pytest.raises(UsageError) as refusal:
        main(["--data_root", str(data), "--dry_run"] if main is training.main else ["--data_root", str(data)])
    message = str(refusal.value)
    assert f"3 of {len(list(data.glob('*.png')))} images in {data} cannot be used: {cut} cannot be decoded (" in message
    assert f"{empty} is empty; {page} is not in a format" in message and "pass --bad_images skip" in message


def test_a_run_that_skips_bad_images_is_the_run_without_them(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = spoil_three(data)
    skipping = run(tmp_path / "skip", data, "--bad_images", "skip", "--train_steps", "1")
    assert f"left out: 3 of {len(list(data.glob('*.png')))} images in {data} cannot be used" in capfd.readouterr().err
    for name in names:
        (data / name).unlink()
    assert skipping == run(tmp_path / "stop", data, "--train_steps", "1") and len(skipping) == 1
    counts = [
        read_jsonl(tmp_path / name / "metrics.jsonl")[0].get("images/episodes_replaced") for name in ("skip", "stop")
    ]
    assert counts == [0.0, None]
    groups = [read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("skip", "stop")]
    assert groups[0] == groups[1]


def test_held_out_episodes_are_of_the_rest_too(data: Path) -> None:
    options = parse_options(["--data_root", str(data), "--eval_steps", "1", "--eval_episodes", "20"])
    names = sorted(path.name for path in data.glob("*.png"))[3:6]
    plan = make_plan(options, [], skipped_images=names)
    for name in names:
        (data / name).unlink()
    assert plan.episodes == make_plan(options, []).episodes


@pytest.fixture
def vanishing(tmp_path: Path) -> list[str]:
    (tmp_path / "vanishing.py").write_text(VANISHING_ENV)
    return ["--env", f"{tmp_path / 'vanishing.py'}:VanishingEnv"]


def test_an_image_that_vanishes_stops_the_run_in_one_line(data: Path, tmp_path: Path, vanishing: list[str]) -> None:
    with pytest.raises(RunStopped) as stop:
        run(tmp_path / "run", data, *vanishing)
    message = str(stop.value)
    assert message.startswith("process 0: episode ") and "\n" not in message
    assert f"image {data}/red_" in message and "cannot be read (No such file or directory)" in message
    assert "pass --bad_images skip to have the episode replaced" in message


def test_a_run_goes_on_without_an_image_that_vanishes_the_same_each_time(
    data: Path, tmp_path: Path, vanishing: list[str]
) -> None:
    again = Path(shutil.copytree(data, tmp_path / "again" / "data"))
    flags = [*vanishing, "--bad_images", "skip"]
    first = run(tmp_path / "one", data, *flags)
    # the data set lives in another process then
    second = run(tmp_path / "two", again, *flags, "--dataloader_num_workers", "1")
    assert first == second and len(first) == 2
    for folder in ("one", "two"):
        lines = read_jsonl(tmp_path / folder / "metrics.jsonl")
        assert [line["images/episodes_replaced"] for line in lines] == [0.0, 1.0]
    shown = [label for line in read_jsonl(tmp_path / "one" / "rollouts.jsonl") if line["step"] == 2
             for label in line["labels"]]  # fmt: skip
    assert len(shown) == 8 and not any(label.startswith("red") for label in shown)


BREAKING_ENV = VANISHING_ENV.replace("image.path.unlink(missing_ok=True)", "image.path.write_bytes(b'torn')")


@pytest.mark.slow
@pytest.mark.exhaustive  # the next one compares with such a run
def test_resumed_after_an_image_broke_a_run_ends_in_the_same_bits(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "breaking.py").write_text(BREAKING_ENV)
    flags = ["--env", f"{tmp_path / 'breaking.py'}:VanishingEnv", "--save_steps", "1", "--eval_steps", "2",
             "--eval_episodes", "8", "--train_steps"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, data, "--bad_images", "skip", *flags, "3")
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / f"checkpoint-{step}")
    # red pictures are broken since the second of these steps
    with pytest.raises(UsageError, match="images in .* cannot be used: red_.*or pass --bad_images skip"):
        run(cut, data, "--resume", *flags, "3")
    run(cut, data, "--resume", "--bad_images", "skip", *flags, "3")
    assert "replaced since the run began: " in capfd.readouterr().err
    assert entire(cut / "checkpoint-3") == entire(whole / "checkpoint-3")
    for name in ("rollouts.jsonl", "images.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    # what can be read is another picture, though, and one that is not there is none
    shutil.copyfile(data / "blue_square.png", data / "black_cross.png")
    (data / "blue_square.png").unlink()
    with pytest.raises(UsageError, match="began with .lost: blue_square.png; changed: black_cross.png., so its"):
        run(cut, data, "--resume", "--bad_images", "skip", *flags, "4")


@pytest.mark.slow
def test_resumed_after_an_image_was_deleted_a_run_ends_as_after_it_broke(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--fixed_correct_index", "none", "--save_steps", "1", "--eval_steps", "2", "--eval_episodes", "8",
             "--train_steps"]  # fmt: skip
    broke, deleted = tmp_path / "broke", tmp_path / "deleted"
    run(broke, data, *flags, "1")
    shutil.copytree(broke, deleted)
    reds = list(data.glob("red_*.png"))
    for path in reds:
        path.write_bytes(b"")
    run(broke, data, "--resume", "--bad_images", "skip", *flags, "4")
    for path in reds:
        path.unlink()
    with pytest.raises(UsageError, match="began with .lost: red_.* restore them, pass --bad_images skip, or start"):
        run(deleted, data, "--resume", *flags, "4")
    capfd.readouterr()
    run(deleted, data, "--resume", "--bad_images", "skip", *flags, "4")
    assert "replaced since the run began: " in capfd.readouterr().err
    assert sum(line.get("images/episodes_replaced", 0) for line in read_jsonl(deleted / "metrics.jsonl")) > 0
    assert entire(deleted / "checkpoint-4") == entire(broke / "checkpoint-4")
    for name in ("rollouts.jsonl", "images.json", "evaluations.jsonl"):
        assert (deleted / name).read_bytes() == (broke / name).read_bytes()
    # one that came instead is another one
    shutil.copyfile(data / "blue_square.png", data / reds[0].name)
    with pytest.raises(UsageError, match="began with .changed: red_"):
        run(deleted, data, "--resume", "--bad_images", "skip", *flags, "5")


def test_an_image_that_vanishes_is_no_longer_evaluated_on(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan(parse_options(["--data_root", str(data), "--eval_steps", "1", "--eval_episodes", "20"]), [])
    assert sound_part(plan, rank=0, num_ranks=1, skips_bad_images=False) is plan
    gone = data / "red_circle.png"
    gone.unlink()
    rest = tuple(episode for episode in plan.episodes if gone not in episode.images)
    assert 0 < len(rest) < 20
    with caplog.at_level(logging.INFO, logger="fleet"):
        assert sound_part(plan, rank=0, num_ranks=1, skips_bad_images=True) == replace(plan, episodes=rest)
    (line,) = [record.message for record in caplog.records]
    first = next(number for number, episode in enumerate(plan.episodes) if gone in episode.images)
    assert line.startswith(f"{20 - len(rest)} of 20 held-out episodes are left out of this evaluation: process 0: ")
    words = f"process 0: held-out episode {first}: image {gone} cannot be read"
    assert words in line
    with pytest.raises(RunStopped, match=re.escape(words)):
        sound_part(plan, rank=0, num_ranks=1, skips_bad_images=False)
    shutil.rmtree(data)
    with pytest.raises(RunStopped, match="process 0: held-out episode 0: image "):
        sound_part(plan, rank=0, num_ranks=1, skips_bad_images=True)
