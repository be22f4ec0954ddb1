"""--dry_run end to end: recipes on the machines they are for, one JSON object, exit codes, and what runs record."""

import json
from pathlib import Path

import pytest
import yaml

import training
from benchmarks.random_model import draw_noise
from fleet.errors import UsageError
from tests.helpers import REPOSITORY, toy_model

RECIPES = {
    "3b_1gpu": ("1x80:H100", None),
    "7b_1gpu_lora": ("1x80:H100", None),
    "7b_8gpus": ("8x80:H100", "recipes/zero3.yaml"),
    "32b_8gpus": ("8x80:H100", "accelerate_config.yaml"),
    "32b_2x8gpus": ("16x80:H100", "recipes/zero3_2x8.yaml"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures as large as the budget of a real model."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_noise(folder, 8, 448)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    training.main(["--dry_run", "--json", *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_machine_that_it_is_for(
    recipe: str, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    gpus, accelerate = RECIPES[recipe]
    launch = [] if accelerate is None else ["--assume_accelerate", accelerate]
    config = f"recipes/{recipe}.yaml"
    found = answer(capsys, "--config", config, "--data_root", str(pictures), "--assume_gpus", gpus, *launch)
    assert found["fits"] and found["problems"] == []
    assert found["image_tokens"] == {"least": 256, "mean": 256.0, "most": 256}
    assert found["largest_batch"] >= yaml.safe_load((REPOSITORY / config).read_text())["per_device_batch_size"]
    assert found["memory_gpu_gib"]["total"] < 76
    assert found["step_s"][0] < found["step_s"][1]


def test_every_recipe_is_tested() -> None:
    names = {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert names == {*RECIPES, "zero3", "zero3_2x8"}


def test_the_answer_has_the_promised_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys)
    promised = ("fits", "problems", "parameters", "image_tokens", "memory_gpu_gib", "memory_host_gib", "largest_batch",
                "checkpoint_gib", "step_tflop")  # fmt: skip
    assert set(promised) <= found.keys()
    assert found["memory_gpu_gib"]["total"] <= sum(found["memory_gpu_gib"].values())
    # three pictures of 56 px, of 14 px a patch, merged by twos
    assert found["image_tokens"]["most"] == 4


def test_a_run_that_does_not_fit_ends_with_its_problems(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="dry run: this run has a problem, the first: a GPU needs 1[0-9][0-9]"):
        answer(
            capsys, "--model_id", "Qwen/Qwen2.5-VL-7B-Instruct", "--data_root", str(pictures), "--assume_gpus", "1x80"
        )
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and "launch with --config_file accelerate_config.yaml (ZeRO-3)" in found["problems"][0]
    # float32 weights, gradients and two moments of 8.292 billion parameters
    assert found["memory_gpu_gib"]["total"] > 16 * 8.292e9 / 2**30


def test_a_run_that_a_check_refuses_answers_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        answer(capsys, "--data_root", "nowhere")
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and "data folder nowhere does not exist" in found["problems"][0]


def test_a_model_that_nobody_knows_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="the configuration of someone/other-vl is not on this machine"):
        training.main(["--dry_run", "--model_id", "someone/other-vl"])


@pytest.mark.parametrize("text", ["8", "8x", "x80", "0x80", "8x80x2", "-1x80", "8x80:", "1x1e9"])
def test_gpus_are_assumed_as_number_by_gib(text: str) -> None:
    with pytest.raises(UsageError, match="wanted the number of GPUs and GiB of each, as 8x80"):
        training.main(["--dry_run", f"--assume_gpus={text}"])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("a: [", "cannot be read"), ("a: 1", "has no distributed_type")],
)
def test_an_accelerate_file_that_is_none_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=words):
        training.main(["--dry_run", "--assume_gpus", "8x80", "--assume_accelerate", str(path)])


def test_an_adapter_that_goes_on_is_planned_as_one_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_model(use_lora=True, lora_rank=4).save_pretrained(tmp_path / "adapter")
    found = answer(capsys, "--use_lora", "--model_id", str(tmp_path / "adapter"), "--image_max_pixels", "3136")
    # rank 4, three layers: query and output 96 + 96, key and value 96 + 48, the MLP's three 96 + 256
    assert found["parameters"]["language_model"]["trainable"] == 4 * 3 * (
        2 * (96 + 96) + 2 * (96 + 48) + 3 * (96 + 256)
    )
