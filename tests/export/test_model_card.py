"""What a card says of runs that no test can train: hub models, data sets, environments of one's own, other machines."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleet.export.model_card import CardFacts, model_card
from fleet.export.records import Curve, Data, Figure, origin_of, published_config, read_curve, read_evaluations
from fleet.export.trained_model import Kind, TrainedModel

pytestmark = pytest.mark.fast

CONFIG: dict[str, Any] = {
    "run_id": "7",
    "options": {
        "model_id": "Qwen/Qwen2.5-VL-3B-Instruct",
        "data_root": "/home/me/secret/photos",
        "env": "~/mine/click.py:ClickEnv",
        "env_args": '{"pictures": ["/mnt/disk/a.png"], "side": 3}',
        "reward": "../shared/my_reward.py:score",
        "output_dir": "/scratch/runs/one",
        "vllm_server_host": "gpu-17.internal",
        "image_max_pixels": 200704,
        "train_steps": 3,
        "max_turns": 2,
    },
    "num_episodes": 6,
    "num_processes": 8,
    "model_files": {"/home/me/x": 1},
    "command": ["training.py", "--data_root", "/home/me/secret/photos"],
    "directory": "/home/me/fleet",
    "commit": "abc",
    "versions": {"torch": "2.15.0"},
}


def trained(run: Path, step: int | None = 3, config: dict[str, Any] = CONFIG) -> TrainedModel:
    return TrainedModel(run / "final", Kind.ADAPTER, run, step, config, None)


def card(config: dict[str, Any] = CONFIG, **changes: Any) -> tuple[dict[str, Any], str]:
    facts: dict[str, Any] = {
        "name": "one",
        "origin": "Qwen/Qwen2.5-VL-3B-Instruct",
        "kind": Kind.ADAPTER,
        "step": 3,
        "config": published_config(config),
        "data": Data(12, None),
        "curve": Curve((Figure("reward", 0.25, 0.5),), 1, 3),
        "has_curve_image": False,
        "evaluations": (),
        "weights": ("Made of final.",),
        "versions": {"torch": "2.14.1"},
    }
    _, front, text = model_card(CardFacts(**facts | changes)).split("---\n", 2)
    return yaml.safe_load(front), text


def test_no_path_or_host_of_the_machine_is_published() -> None:
    text = json.dumps(published_config(CONFIG)) + card()[1]
    for private in ("/home", "/mnt", "/scratch", "secret", "~", "..", "internal"):
        assert private not in text, private
    options = published_config(CONFIG)["options"]
    assert (options["data_root"], options["env"], options["reward"]) == (
        "photos",
        "click.py:ClickEnv",
        "my_reward.py:score",
    )
    assert options["env_args"] == '{"pictures": ["a.png"], "side": 3}'


def test_the_front_matter_names_what_the_hub_knows() -> None:
    front, _ = card()
    assert front["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct" and front["base_model_relation"] == "finetune"
    assert "datasets" not in front
    front, text = card(CONFIG | {"options": CONFIG["options"] | {"data_root": "hub:me/birds", "env": None}})
    assert front["datasets"] == ["me/birds"] and "`hub:me/birds`: 12 images" in text
    front, _ = card(origin="photos-model")
    assert "base_model" not in front


def test_the_text_says_what_is_not_known() -> None:
    _, text = card()
    for words in (
        'the environment `click.py:ClickEnv` with `{"pictures"',
        "my_reward.py:score",
        "| mean reward | 0.250 | 0.500 |",
        "None. `python evaluate.py --model_id FOLDER",
        "- held-out accuracy of these weights",
        "Trained with commit `abc` of Fleet, torch 2.15.0. Exported with other versions: torch 2.14.1.",
    ):
        assert words in text, words
    assert "curve.png" not in text
    _, text = card({}, curve=None)
    assert "no run of Fleet left" in text and "## Training" not in text and "## Curve" not in text


def test_figures_are_of_the_exported_step(tmp_path: Path) -> None:
    lines = [{"step": step, "reward": step / 10, "accuracy": None} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"step": step, "schema_version": 2} for step in (2, 3, 4)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    assert read_curve(trained(tmp_path)) == Curve((Figure("reward", 0.1, 0.3),), 1, 3)
    assert read_evaluations(trained(tmp_path)) == [{"step": 3, "schema_version": 2}]
    assert read_evaluations(trained(tmp_path, None)) == [], "weights of an unknown step"
    (tmp_path / "evaluation.json").write_text(json.dumps({"schema_version": 2, "model": f"x/{tmp_path.name}/final"}))
    assert len(read_evaluations(trained(tmp_path))) == 2
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"")
    os.utime(tmp_path / "evaluation.json", (0, 0))
    assert len(read_evaluations(trained(tmp_path))) == 1, "the weights are younger than their score"
    (tmp_path / "evaluation.json").write_text(json.dumps({"schema_version": 2, "model": "x/other/final"}))
    assert len(read_evaluations(trained(tmp_path))) == 1


def test_the_origin_is_found_through_runs(tmp_path: Path) -> None:
    first = tmp_path / "first"
    (first / "final").mkdir(parents=True)
    (first / "config.json").write_text(json.dumps({"options": {"model_id": "Qwen/Qwen2.5-VL-7B-Instruct"}}))
    second = {"options": {"model_id": str(first / "final")}}
    assert origin_of(trained(tmp_path / "second", config=second)) == "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "base").mkdir()
    assert origin_of(trained(tmp_path, config={"options": {"model_id": str(tmp_path / "base")}})) == "base"
    assert origin_of(trained(tmp_path, config={"options": {"model_id": "toy"}})) == "toy"
