"""The model as a policy says what it says to each episode alone, whatever the batch, the samples and the processes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from environment import PickImageEnv
from fleet.controls import blanked
from fleet.evaluation.answering import AnswerSettings, ModelPolicy
from fleet.evaluation.figures import Answers
from fleet.toy.model import SIGHTED, TOY_DATA_ROOT, TOY_IMAGE_PIXELS, toy_model_path
from model_utils import generate_tool_call, load_qwen25_vl
from tests.helpers import toy_model, toy_processor
from tests.turning_env import LookAgainEnv

SETTINGS = AnswerSettings(episodes_per_batch=5, max_completion_length=32, max_pixels=TOY_IMAGE_PIXELS)
ENV = PickImageEnv(TOY_DATA_ROOT, 4, None, seed=123)
EPISODES = [ENV.episode(number) for number in range(12)]


@pytest.fixture(scope="module")
def sighted() -> tuple[Any, Any]:
    model, processor = load_qwen25_vl(str(toy_model_path(SIGHTED)))
    return model.eval(), processor


def test_greedy_answers_are_those_of_each_episode_alone(sighted: tuple[Any, Any]) -> None:
    model, processor = sighted
    alone = [generate_tool_call(model, processor, episode, max_pixels=TOY_IMAGE_PIXELS) for episode in EPISODES]
    assert len(set(alone)) > 1 and alone[:5] != alone[5:10], "the episodes tell batches apart"
    told: list[int] = []
    policy = ModelPolicy(model, processor, SETTINGS, on_progress=told.append)
    assert [said.greedy for said in policy(EPISODES, 0)] == alone
    assert told == [5, 5, 2, 0]
    with_samples = policy(EPISODES, 3)
    assert [said.greedy for said in with_samples] == alone, "greedy beside samples, from one prefill"
    assert {len(said.samples) for said in with_samples} == {3}


def test_a_prompt_that_comes_again_is_answered_once(sighted: tuple[Any, Any]) -> None:
    model, processor = sighted
    blank = [blanked(episode) for episode in EPISODES]
    told: list[int] = []
    answers = ModelPolicy(model, processor, SETTINGS, on_progress=told.append)([*blank, *EPISODES[:2]], 0)
    num_distinct = len({episode.target for episode in EPISODES}) + 2
    assert sum(told) == 14 and told[-1] == 14 - num_distinct > 0
    alone = [generate_tool_call(model, processor, episode, max_pixels=TOY_IMAGE_PIXELS) for episode in blank]
    assert [said.greedy for said in answers[:12]] == alone


def test_samples_are_of_the_policy_and_repeat(sighted: tuple[Any, Any]) -> None:
    model, processor = sighted
    policy = ModelPolicy(model, processor, replace(SETTINGS, episodes_per_batch=64))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = policy(EPISODES[:4], 40)
    assert torch.equal(torch.get_rng_state(), before), "the caller's randomness is left alone"
    assert policy(EPISODES[:4], 40) == first
    other = ModelPolicy(model, processor, replace(SETTINGS, episodes_per_batch=64, seed=1))(EPISODES[:4], 40)
    assert other != first and [said.greedy for said in other] == [said.greedy for said in first]
    # the toy's habit splits its answers; greedy takes one side of it alone
    assert any(len(set(said.samples)) > 1 for said in first)
    nearly_greedy = ModelPolicy(model, processor, replace(SETTINGS, temperature=0.01))(EPISODES[:4], 4)
    assert all(set(said.samples) == {said.greedy} for said in nearly_greedy)


def test_processes_split_the_episodes_between_them(sighted: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = sighted
    whole = ModelPolicy(model, processor, SETTINGS)(EPISODES[:7], 0)
    shares: list[dict[int, Answers]] = []

    def gather(answered: list[tuple[int, Answers]]) -> list[tuple[int, Answers]]:
        """Notes one rank's own answers, and gives those of all."""
        shares.append(dict(answered))
        return list(enumerate(whole))

    monkeypatch.setattr("fleet.evaluation.answering.gather_object", gather)
    for rank in range(3):
        # 7 over 3 ranks, which under ZeRO-3 must generate equally often
        assert ModelPolicy(model, processor, SETTINGS, rank=rank, num_ranks=3)(EPISODES[:7], 0) == whole
    assert [sorted(share) for share in shares] == [[0, 3, 6], [0, 1, 4], [1, 2, 5]]
    assert all(said == whole[number] for share in shares for number, said in share.items())


def test_turns_are_answered_by_the_environments_tools() -> None:
    env = LookAgainEnv(TOY_DATA_ROOT, 4, 0)
    episodes = [env.with_messages(env.episode(number)) for number in range(5)]
    model = toy_model().eval()
    one = ModelPolicy(model, toy_processor(), SETTINGS)(episodes, 1)
    two = ModelPolicy(model, toy_processor(), replace(SETTINGS, max_turns=2), env=env)(episodes, 1)
    for alone, talked in zip(one, two, strict=True):
        # the first turn is what the only one would be, and its call is answered
        assert isinstance(talked.greedy, tuple) and talked.greedy[0] == alone.greedy
        assert len(talked.greedy) == 2
