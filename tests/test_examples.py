"""The example environment does what its page says, and trains by the command its page gives."""

from pathlib import Path

import pytest

import training
from environment import load_environment_class
from fleet.run_folder import read_jsonl
from tests.helpers import REPOSITORY
from utils.tool_calls import make_tool_call_str


def test_odd_one_out_shows_one_other_picture_and_never_names_it() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(
        data_root=REPOSITORY / "toy_images", candidates_per_episode=4, fixed_correct_index=None, seed=0
    )
    places = set()
    for index in range(40):
        episode = env.episode(index)
        odd = episode.labels[episode.correct_index]
        assert episode.labels.count(odd) == 1 and len(set(episode.labels)) == 2
        assert odd not in str(episode.messages) and episode == env.episode(index)
        places.add(episode.correct_index)
    assert places == {0, 1, 2, 3}


def test_gold_answer_earns_the_most() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(REPOSITORY / "toy_images")
    _, info = env.reset(seed=4)
    assert env.step(make_tool_call_str(info["episode"].correct_index))[1] == 1.0


def test_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    training.main([
        "--env", "examples/odd_one_out.py:OddOneOutEnv", "--fixed_correct_index", "none", "--train_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--sample_steps", "0",
    ])  # fmt: skip
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1
