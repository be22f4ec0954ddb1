"""Tasks of one's own through the real trainer: tools, outcomes, rewards and metrics, each worked out by hand."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dataset import RepeatableEpisodeDataset
from environment import load_environment_class
from fleet.errors import RunStopped
from fleet.own_code.reward_process import RewardProcess
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from tests.helpers import ScriptedFleetTrainer, fleet_trainer, rloo_config, toy_processor
from tests.helpers_env import write_env
from utils.tool_calls import ToolCall

CLICK_ENV = '''
from enum import StrEnum
from PIL import Image
from environment import Environment, Episode, ToolCall, Verdict

class Outcome(StrEnum):
    HIT = "hit"
    NEAR = "near"
    FAR = "far"

class Click(Environment):
    """Click at the point (10 i, 5) in episode i."""

    tools = [{
        "name": "click",
        "description": "Click a point.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        },
    }]
    outcomes = Outcome

    def episode(self, index):
        return Episode([Image.new("RGB", (56, 56), (40 * index, 0, 0))], answer={"x": 10 * index, "y": 5})

    def instruction(self, episode):
        return "Click the spot."

    def respond(self, episode, turns):
        x, y = turns[-1].arguments["x"], turns[-1].arguments["y"]
        if x < 0:
            raise KeyError(x)
        distance = abs(x - episode.answer["x"]) + abs(y - episode.answer["y"])
        outcome = Outcome.HIT if distance == 0 else Outcome.NEAR if distance == 1 else Outcome.FAR
        components = {"correct": distance == 0, "valid_call": 1, "closeness": 1 / (1 + distance)}
        return Verdict(outcome, distance == 0, components)

    def solution(self, episode, turns):
        return ToolCall("click", dict(episode.answer))
'''


def click(x: Any, y: Any) -> str:
    return f'<tool_call>\n{{"name": "click", "arguments": {{"x": {x}, "y": {y}}}}}\n</tool_call>'


def answers(episode: int) -> list[str]:
    """A hit, one beside it, a call that is refused, and one farther off."""
    x = 10 * episode
    return [click(x, 5), click(x + 1, 5), click(x, "5.0"), click(x + 3, 5)]


# of episodes 0 and 1 in the first step, of 2 and 3 in the second
SCRIPT = [[*answers(0), *answers(1)], [*["no"] * 4, *answers(3)]]


class SayingTrainer(FleetRLOOTrainer):
    """The real trainer with its sampling replaced by texts."""

    script: Sequence[Sequence[str]] = SCRIPT
    num_generations_done = 0

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        texts = self.script[self.num_generations_done]
        self.num_generations_done += 1
        return Drawn([toy_processor().tokenizer(f"{text}<|im_end|>")["input_ids"] for text in texts])


def click_dataset(folder: Path) -> RepeatableEpisodeDataset:
    (folder / "click_env.py").write_text(CLICK_ENV, encoding="utf-8")
    return RepeatableEpisodeDataset(load_environment_class(f"{folder / 'click_env.py'}:Click")())


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    families = ("outcome/", "groups/", "chosen/", "correct/", "rewards/verdict")
    names = [name for name in line if name in ("reward", "accuracy", "valid_call") or name.startswith(families)]
    names = [name for name in names if name != "groups/skipped"]
    return {name: line[name] for name in names if not name.endswith("std")}


def test_a_task_with_a_tool_of_its_own_is_trained_on(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path), SayingTrainer, dataset=click_dataset(tmp_path))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    # rewards of a group of answers: 0.95 + 0.05 + 1, 0.05 + 1/2, 0, 0.05 + 1/4
    assert figures_of(lines[0]) == pytest.approx(
        {
            "reward": 0.7125, "rewards/verdict_reward/mean": 0.7125, "accuracy": 2 / 8, "valid_call": 6 / 8,
            "outcome/hit": 2 / 8, "outcome/near": 2 / 8, "outcome/far": 2 / 8, "outcome/unparsable": 2 / 8,
            "groups/all_right": 0, "groups/all_wrong": 0, "groups/mixed": 1,
        }
    )  # fmt: skip
    assert figures_of(lines[1]) == pytest.approx(
        {
            "reward": 0.35625, "rewards/verdict_reward/mean": 0.35625, "accuracy": 1 / 8, "valid_call": 3 / 8,
            "outcome/hit": 1 / 8, "outcome/near": 1 / 8, "outcome/far": 1 / 8, "outcome/unparsable": 5 / 8,
            "groups/all_right": 0, "groups/all_wrong": 1 / 2, "groups/mixed": 1 / 2,
        }
    )  # fmt: skip
    assert (lines[1]["parse/ok"], lines[1]["parse/no_call"], lines[1]["parse/bad_arguments"]) == (3 / 8, 4 / 8, 1 / 8)
    assert all(line["grad_norm"] > 0 for line in lines)
    last = trainer.latest_rollouts[4:]
    assert [rollout.verdict.outcome for rollout in last] == ["hit", "near", "unparsable", "far"]
    calls = [ToolCall("click", {"x": x, "y": 5}) for x in (30, 31, 33)]
    assert [rollout.verdict.call for rollout in last] == [calls[0], calls[1], None, calls[2]]
    assert [rollout.reward for rollout in last] == pytest.approx([2.0, 0.55, 0.0, 0.3])
    # each over the mean of its three siblings
    advantages = [2 - 0.85 / 3, 0.55 - 2.3 / 3, -2.85 / 3, 0.3 - 2.55 / 3]
    assert [rollout.advantage for rollout in last] == pytest.approx(advantages, rel=1e-5)
    assert {rollout.advantage for rollout in trainer.latest_rollouts[:4]} == {0.0}
    episode = last[0].episode
    assert (episode.instruction, episode.solution, episode.choices) == ("Click the spot.", '{"x": 30, "y": 5}', ())
    assert (episode.correct_index, episode.labels, len(episode.images)) == (None, (), 1)


REWARDS = """
from click_env import Outcome

POINTS = {Outcome.HIT: 3.0, Outcome.NEAR: 1.0, "unparsable": -1.0}

def by_name(completions, verdict, **columns):
    assert "episode" in columns and all(found.call is None or found.call.name == "click" for found in verdict)
    return [POINTS.get(found.outcome, 0.0) for found in verdict]

def among_columns(completions, **columns):
    return by_name(completions, **columns)

def of_older_keywords(prompts, completions, completion_ids, correct_index, num_candidates, episode, trainer_state):
    assert set(correct_index) == {None} and set(num_candidates) == {1}
    return [float(len(episode[0].answer)) for _ in completions]
"""
BY_OUTCOME = [3.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "rewards"),
    [("by_name", BY_OUTCOME), ("among_columns", BY_OUTCOME), ("of_older_keywords", [2.0] * 4)],
)
def test_a_reward_of_ones_own_is_given_the_verdicts_of_a_file_that_is_run_after_it(
    name: str, rewards: list[float], tmp_path: Path
) -> None:
    (tmp_path / "click_env.py").write_text(CLICK_ENV, encoding="utf-8")
    (tmp_path / "my_reward.py").write_text(REWARDS, encoding="utf-8")
    with contextlib.closing(RewardProcess(f"{tmp_path / 'my_reward.py'}:{name}")) as reward:
        dataset = click_dataset(tmp_path)
        trainer = fleet_trainer(
            rloo_config(tmp_path, max_steps=1), SayingTrainer, dataset=dataset, reward_function=reward
        )
        trainer.train()
    assert [rollout.reward for rollout in trainer.latest_rollouts] == rewards * 2
    line = trainer.state.log_history[0]
    assert line["reward"] == line[f"rewards/{name}/mean"] == pytest.approx(sum(rewards) / 4)
    assert line["accuracy"] == 2 / 8, "the environment's judgement stays"


def test_an_environment_that_breaks_on_a_call_stops_the_run_by_name(tmp_path: Path) -> None:
    class Breaking(SayingTrainer):
        script = [SCRIPT[0], [*answers(2), *answers(3)[:3], click(-7, 0)]]

    trainer = fleet_trainer(rloo_config(tmp_path), Breaking, dataset=click_dataset(tmp_path))
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert str(stop.value).startswith(
        'process 0: the environment is broken: the verdict on the call {"x": -7, "y": 0} failed with KeyError: -7 (in '
        f"respond(): {tmp_path / 'click_env.py'}, line "
    )
    assert stop.value.is_of_all and trainer.state.global_step == 1


FORGETFUL = """
from click_env import Click

class Forgetful(Click):
    judged = ()

    def respond(self, episode, turns):
        self.judged += (episode.answer["x"],)
        return super().respond(episode, turns)

    def choices(self, episode):
        if 30 in self.judged:
            raise KeyError(30)
        return []
"""


def test_choices_that_are_lost_after_the_verdict_stop_the_run_as_a_verdict_would(tmp_path: Path) -> None:
    (tmp_path / "click_env.py").write_text(CLICK_ENV, encoding="utf-8")
    (tmp_path / "forgetful.py").write_text(FORGETFUL, encoding="utf-8")
    env = load_environment_class(f"{tmp_path / 'forgetful.py'}:Forgetful")()
    trainer = fleet_trainer(rloo_config(tmp_path), SayingTrainer, dataset=RepeatableEpisodeDataset(env))
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert str(stop.value).startswith("process 0: the environment is broken: ")
    assert "KeyError: 30 (in choices()" in str(stop.value)
    assert stop.value.is_of_all and trainer.state.global_step == 1


def test_a_class_of_two_methods_that_inherits_nothing_picks_an_image(tmp_path: Path) -> None:
    env_class = load_environment_class(write_env(tmp_path))
    trainer = fleet_trainer(
        rloo_config(tmp_path, max_steps=1), ScriptedFleetTrainer, dataset=RepeatableEpisodeDataset(env_class())
    )
    trainer.train()
    # by the script, calls 1, 7, 0, none of episode 0 and none, 2, 1, 7 of episode 1; 0 is right, then 1, of three
    found = [str(rollout.verdict.outcome) for rollout in trainer.latest_rollouts]
    assert found[:4] == ["wrong_index", "index_out_of_range", "correct", "unparsable"]
    assert found[4:] == ["unparsable", "wrong_index", "correct", "index_out_of_range"]
    line = trainer.state.log_history[0]
    assert line["reward"] == pytest.approx((1 + 0.05 + 1 + 0.05) / 8)
    assert {name: share for name, share in line.items() if name.startswith(("chosen/", "correct/"))} == {
        "chosen/0": 1 / 8, "chosen/1": 2 / 8, "chosen/2": 1 / 8, "correct/0": 1 / 2, "correct/1": 1 / 2, "correct/2": 0,
    }  # fmt: skip
