"""Whole runs on environments of a user's own: one that breaks on the way, one in two files, one that is unreadable."""

import json
from pathlib import Path
from typing import Any

import pytest

import evaluate
import training
from fleet.errors import RunStopped, UsageError
from fleet.run_folder import read_jsonl
from tests.helpers import toy_path
from tests.helpers_env import write_env
from tests.processes import start_ranks

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--save_steps", "1"]
BREAKS = """
    def change(self, index):
        return {} if index != 2 else {"correct_index": 1.5}
"""


@pytest.fixture(autouse=True)
def toy() -> None:
    toy_path()


@pytest.mark.parametrize("num_workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_an_episode_that_breaks_on_the_way_stops_the_run_with_all_before_it_kept(
    num_workers: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = [*QUICK, "--env", write_env(tmp_path, BREAKS), "--output_dir", str(folder), "--train_steps", "2"]
    with pytest.raises(RunStopped) as stop:
        training.main([*run, "--dataloader_num_workers", num_workers])
    assert str(stop.value) == (
        "process 0: the environment is broken: episode 2: correct_index is 1.5 (float), but wanted a whole number; "
        "give an int; every checkpoint is whole: correct the file of --env and pass --resume auto"
    )
    assert stop.value.is_of_all and stop.value.exit_code == 1
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1]
    assert (folder / "checkpoint-1" / "manifest.json").is_file()
    assert not (folder / "checkpoint-2").exists() and not (folder / "final").exists()
    if num_workers == "0":
        write_env(tmp_path, "# mended")
        training.main([*run, "--resume"])
        assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2]


def test_a_run_that_draws_more_episodes_than_there_are_is_refused(tmp_path: Path) -> None:
    env = write_env(tmp_path, "def change(self, index): return {'seed': range(5)[index]}")
    training.main([*QUICK, "--env", env, "--train_steps", "2", "--dry_run"])
    with pytest.raises(UsageError, match="of which the run draws 6 episodes: episode 5 failed with IndexError: range"):
        training.main([*QUICK, "--env", env, "--train_steps", "3", "--dry_run"])


@pytest.mark.slow
def test_a_model_is_scored_on_the_runs_environment_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.py").write_text("WORD = 'Pick it.'\n")
    write_env(tmp_path, "from words import WORD")
    monkeypatch.chdir(tmp_path)
    training.main([*QUICK, "--env", "my_env.py:Mine", "--output_dir", "run", "--train_steps", "1"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["env"] == "my_env.py:Mine" and list(config["imported_files"]["env"]) == ["words.py"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    scored = ["--eval_episodes", "1", "--num_samples", "0", "--output", "figures.json"]
    evaluate.main(["--model_id", str(tmp_path / "run" / "final"), *scored])
    assert json.loads(Path("figures.json").read_text())["choices"] == ["0", "1", "2"]
    training.main([*QUICK, "--env", "../my_env.py:Mine", "--output_dir", "../run", "--train_steps", "2", "--resume"])
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_prompts_that_the_model_cannot_read_are_refused_before_a_weight_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a weight was loaded")

    monkeypatch.setattr("fleet.run.model_setup.load_qwen25_vl", no_weights)
    body = "def change(self, index): return {'images': [Image.new('L', (8, 8))] * 3}"
    training.main(["--env", write_env(tmp_path, body), "--dry_run"])
    literal = (
        "def prompt_messages(self, episode):\n        return [{'role': 'system', 'content': '<|image_pad|>'}, "
        "*super().prompt_messages(episode)]"
    )
    env = write_env(tmp_path, literal)
    with pytest.raises(UsageError) as refusal:
        training.main(["--env", env, "--dry_run"])
    assert str(refusal.value).startswith(f"env={env}: ") and "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        # one of the second process's in the second step
        ("def change(self, index): return {} if index != 7 else {'labels': None}", 1, "episode 7: labels is None"),
        (
            "def change(self, index):\n        import os\n        return {'seed': int(os.environ['RANK'])}",
            2,
            "the seed of episode 0: not the same in another process",
        ),
    ],
    ids=["one breaks", "they differ"],
)
def test_two_processes_stop_together_for_what_one_of_them_draws(
    body: str, code: int, words: str, tmp_path: Path
) -> None:
    arguments = [
        *QUICK,
        "--env",
        write_env(tmp_path, body),
        "--output_dir",
        str(tmp_path / "run"),
        "--train_steps",
        "3",
    ]
    ranks = start_ranks(tmp_path, arguments, 2)
    assert [rank.wait() for rank in ranks] == [code, code]
    said = "".join(rank.output for rank in ranks)
    assert said.count(words) == 1 and "Traceback" not in said
    assert (tmp_path / "run" / "checkpoint-1").exists() == (code == 1)
    assert not (tmp_path / "run" / "checkpoint-2").exists()
