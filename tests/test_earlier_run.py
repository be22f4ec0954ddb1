"""A run of before the package: its folder, checkpoint and adapter are read, resumed, scored and shown as they are.

tests/data/earlier_run was left by commit 65b906f, whose modules lay in the root, with
`training.py --use_lora true --lora_rank 2 --lora_alpha 4 --train_steps 4 --per_device_batch_size 2 --save_steps 2
--save_total_limit 1 --eval_steps 2 --eval_episodes 8 --sample_steps 2`. The path of its base model, which was another
machine's, reads BASE_MODEL.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import evaluate
import training
from fleet.command.evaluate_options import run_options
from fleet.rl.checkpoints import find_damage
from fleet.run_folder import read_jsonl
from report import write_report
from tests.helpers import REPOSITORY, toy_path

EARLIER = REPOSITORY / "tests" / "data" / "earlier_run"
FLAGS = [
    "--use_lora", "--lora_rank", "2", "--lora_alpha", "4", "--per_device_batch_size", "2", "--save_steps", "2",
    "--save_total_limit", "1", "--eval_steps", "2", "--eval_episodes", "8", "--sample_steps", "2",
    "--report_to", "none",
]  # fmt: skip


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy of the run, whose base model is this machine's toy."""
    folder = shutil.copytree(EARLIER, tmp_path / "run")
    for config in folder.rglob("adapter_config.json"):
        config.write_text(config.read_text().replace("BASE_MODEL", toy_path()))
    config, manifest_path = folder / "checkpoint-4/adapter_config.json", folder / "checkpoint-4/manifest.json"
    manifest = json.loads(manifest_path.read_text())
    content = config.read_bytes()
    manifest["files"][config.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    return folder


def test_it_is_resumed_where_it_was(earlier: Path) -> None:
    assert find_damage(earlier / "checkpoint-4") is None
    run_id = json.loads((earlier / "config.json").read_text())["run_id"]
    before = {name: read_jsonl(earlier / name) for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")}
    training.main([*FLAGS, "--train_steps", "6", "--output_dir", str(earlier), "--resume"])
    for name, lines in before.items():
        now = read_jsonl(earlier / name)
        assert now[: len(lines)] == lines
        assert {line["step"] for line in now[len(lines) :]} == ({6} if name == "evaluations.jsonl" else {5, 6})
    assert json.loads((earlier / "config.json").read_text())["run_id"] == run_id, "it is the same run"
    assert (earlier / "checkpoint-6").is_dir() and not (earlier / "checkpoint-4").exists()


def test_another_seed_is_another_run(earlier: Path) -> None:
    with pytest.raises(Exception, match=r"had other flags: seed \(was 0, now 1\)"):
        training.main([*FLAGS, "--train_steps", "6", "--output_dir", str(earlier), "--resume", "--seed", "1"])


def test_its_adapter_is_scored_as_its_run_had_it(earlier: Path, tmp_path: Path) -> None:
    assert run_options(str(earlier / "final"))["candidates_per_episode"] == 4
    output = tmp_path / "evaluation.json"
    evaluate.main(
        ["--model_id", str(earlier / "final"), "--eval_episodes", "8", "--num_samples", "0", "--output", str(output)]
    )
    assert json.loads(output.read_text())["episodes"] == 8


def test_its_page_is_drawn(earlier: Path) -> None:
    page = write_report(earlier).read_text()
    assert "held-out" in page and '"step": 4' in page.replace('"step":4', '"step": 4')
