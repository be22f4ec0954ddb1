"""A logged group is shown token by token, and drawn again from the weights that it was drawn with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import evaluate
import training
from fleet.errors import UsageError
from fleet.run.build import replay
from fleet.run_folder import read_jsonl
from tests.helpers import REPOSITORY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "run"
    training.main([
        "--fixed_correct_index", "none", "--train_steps", "4", "--per_device_batch_size", "3", "--save_steps", "2",
        "--report_to", "none", "--temperature", "1.3", "--top_p", "0.95", "--repetition_penalty", "1.05",
        "--output_dir", str(folder),
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize(("step", "group"), [(1, 0), (3, 2)])
def test_a_group_is_drawn_again_token_for_token(step: int, group: int, run: Path, capsys: Any) -> None:
    capsys.readouterr()
    evaluate.main(["--replay", str(run), "--step", str(step), "--group", str(group)])
    shown = capsys.readouterr().out
    (line,) = [line for line in read_jsonl(run / "rollouts.jsonl") if (line["step"], line["group"]) == (step, group)]
    assert shown.startswith(f"step {step}, group {group}: {line['instruction']} Right: {line['solution']}")
    for number, rollout in enumerate(line["rollouts"]):
        assert f"rollout {number}: {rollout['outcome']}, reward {rollout['reward']:.2f}" in shown
        assert len(rollout["token_ids"]) == len(rollout["logps"]) > 5
        # a table of what sampling drew from: the nucleus makes most tokens of a call certain
        assert all(logp <= 1e-6 for logp in rollout["logps"])
    assert shown.count("<tool_call>") >= 3 and "100.00%" in shown
    assert "drawn again: 4 of 4 rollouts token for token" in shown
    assert float(shown.rsplit("at most ", 1)[1].split()[0]) < 1e-4


def test_several_turns_are_shown_with_their_answers_and_drawn_again(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    training.main([
        "--env", str(REPOSITORY / "tests" / "turning_env.py") + ":LookAgainEnv", "--max_turns", "2", "--train_steps",
        "2", "--per_device_batch_size", "2", "--save_steps", "1", "--report_to", "none", "--temperature", "1.2",
        "--output_dir", str(run), "--reward", str(REPOSITORY / "tests" / "length_reward.py") + ":score",
    ])  # fmt: skip
    capsys.readouterr()
    evaluate.main(["--replay", str(run), "--step", "2"])
    shown = capsys.readouterr().out
    (line,) = [line for line in read_jsonl(run / "rollouts.jsonl") if (line["step"], line["group"]) == (2, 0)]
    answers = [turn["observation"] for rollout in line["rollouts"] for turn in rollout["turns"] if turn["observation"]]
    assert len(answers) > 1 and all(f"[tool: {answer}" in shown for answer in answers)
    assert "drawn again: 4 of 4 rollouts token for token" in shown


def test_the_last_step_is_the_default_and_weights_that_are_gone_are_said(run: Path, capsys: Any) -> None:
    capsys.readouterr()
    evaluate.main(["--replay", str(run)])
    shown = capsys.readouterr().out
    assert shown.startswith("step 4, group 0:")
    words = "not drawn again: the weights of step 3 are gone (checkpoints: checkpoint-2, checkpoint-4)"
    assert words in " ".join(shown.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step", "9"], "step=9 is not logged in .*, which has 4 from 1 to 4"),
        (["--group", "3"], "group=3, but step 4 has logged groups 0 to 2; pass one of these"),
        (["--step", "0"], "step=0, but it must be at least 1"),
        (["--model_id", "toy"], "unknown flag --model_id; see --help"),
    ],
)
def test_a_group_that_is_not_there_is_refused(flags: list[str], words: str, run: Path) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate.main(["--replay", str(run), *flags])


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder of a run that has logged rollouts; pass the --output_dir of"):
        evaluate.main([f"--replay={tmp_path}"])


def test_a_run_of_an_older_fleet_is_told_as_one(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    lines = read_jsonl(old / "rollouts.jsonl")
    for line in lines:
        for rollout in line["rollouts"]:
            del rollout["token_ids"], rollout["logps"]
    (old / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match="is of an older Fleet and holds no tokens"):
        evaluate.main(["--replay", str(old)])


def test_a_line_that_lost_some_figures_is_told_as_broken(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    lines = read_jsonl(broken / "rollouts.jsonl")
    del lines[-1]["rollouts"][0]["logps"][-3:]
    (broken / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match="a rollout has .* tokens and .* log-probabilities.; restore it"):
        evaluate.main(["--replay", str(broken)])


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, [0, 1, 2, 3]),
        ({"num_iterations": 2}, [0, 0, 2, 2]),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, [0, 0, 2, 2]),
        ({"gradient_accumulation_steps": 4}, [0, 1, 2, 3]),
    ],
)
def test_the_weights_are_those_before_the_generation(changes: dict[str, Any], starts: list[int]) -> None:
    options = {"gradient_accumulation_steps": 1, "steps_per_generation": None, "num_iterations": 1} | changes
    assert [replay.first_step_of_generation(options, step) for step in (1, 2, 3, 4)] == starts
