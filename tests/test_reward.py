"""What an answer earns: 1 if right, 0.05 if wrong but well formed, 0 otherwise, whatever tricks it plays."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import RewardWeights, compute_rewards_from_generations, make_trl_reward_function
from tests.conftest import call_text
from tests.exploits import EXPLOITS

pytestmark = pytest.mark.fast

# text, correct index, number of candidates, reward
CASES = {
    "right, first": (call_text(0), 0, 4, 1.0),
    "right, second": (call_text(1), 1, 4, 1.0),
    "right, last": (call_text(3), 3, 4, 1.0),
    "right, of two": (call_text(1), 1, 2, 1.0),
    "right, of a hundred": (call_text(99), 99, 100, 1.0),
    "right, fenced": (f"```json\n{call_text(2)}\n```", 2, 4, 1.0),
    "right, blanks around": (f"\n {call_text(2)}\n", 2, 4, 1.0),
    "wrong, one below": (call_text(1), 2, 4, 0.05),
    "wrong, one above": (call_text(3), 2, 4, 0.05),
    "wrong, first": (call_text(0), 3, 4, 0.05),
    "wrong, last": (call_text(3), 0, 4, 0.05),
    "out of range, N": (call_text(4), 3, 4, 0.0),
    "out of range, N of two": (call_text(2), 1, 2, 0.0),
    "out of range, far": (call_text(10**30), 0, 4, 0.0),
    "out of range, -1 is not the last": (call_text(-1), 3, 4, 0.0),
    "out of range, -4 is not the first": (call_text(-4), 0, 4, 0.0),
    "unparsable, nothing": ("", 0, 4, 0.0),
    "unparsable, prose": ("image 0", 0, 4, 0.0),
    "unparsable, no wrapper": ('{"name": "pick_image", "arguments": {"index": 0}}', 0, 4, 0.0),
    "unparsable, truncated": (call_text(0)[:-3], 0, 4, 0.0),
    "unparsable, another tool": (call_text(0).replace("pick_image", "pick"), 0, 4, 0.0),
    "unparsable, reasoning not allowed": (f"Red, so: {call_text(0)}", 0, 4, 0.0),
}


@pytest.mark.parametrize(("text", "correct_index", "num_candidates", "reward"), CASES.values(), ids=CASES.keys())
def test_reward(text, correct_index, num_candidates, reward):
    assert compute_rewards_from_generations([text], [correct_index], num_candidates) == [reward]


def test_guessing_one_index_is_right_for_that_one_only():
    assert compute_rewards_from_generations([call_text(2)] * 4, [0, 1, 2, 3], 4) == [0.05, 0.05, 1.0, 0.05]


def test_each_generation_has_its_own_number_of_candidates():
    assert compute_rewards_from_generations([call_text(3)] * 3, [3, 0, 0], [4, 4, 2]) == [1.0, 0.05, 0.0]


def test_weights_are_what_components_are_worth():
    texts = [call_text(0), call_text(1), call_text(9), "?"]
    assert compute_rewards_from_generations(texts, [0] * 4, 4, RewardWeights(2.0, 0.5)) == [2.5, 0.5, 0.0, 0.0]


def test_reasoning_earns_when_it_is_allowed():
    text = f"The red one is first. {call_text(0)}"
    assert compute_rewards_from_generations([text], [0], 4) == [0.0]
    assert compute_rewards_from_generations([text], [0], 4, allow_reasoning=True) == [1.0]


def test_no_generations_no_rewards():
    assert compute_rewards_from_generations([], [], 4) == []


@pytest.mark.parametrize(
    ("num_texts", "num_correct", "num_candidates", "words"),
    [
        (2, 1, 4, "2 generations, 1 correct_indices"),
        (1, 2, 4, "1 generations, 2 correct_indices"),
        (2, 2, [4], "1 num_candidates"),
        (2, 2, [4, 4, 4], "3 num_candidates"),
        (0, 1, 4, "0 generations, 1 correct_indices"),
    ],
)
def test_lengths_that_differ_are_refused(num_texts, num_correct, num_candidates, words):
    with pytest.raises(ValueError, match=words):
        compute_rewards_from_generations([call_text(0)] * num_texts, [0] * num_correct, num_candidates)


@pytest.mark.parametrize(
    ("correct", "valid_call", "words"),
    [
        (0.0, 0.05, "correct weight 0.0"),
        (-1.0, 0.05, "correct weight -1.0"),
        (math.nan, 0.05, "correct weight nan"),
        (math.inf, 0.05, "correct weight inf"),
        (0.95, -0.1, "valid_call weight -0.1"),
        (0.95, math.nan, "valid_call weight nan"),
        (0.95, math.inf, "valid_call weight inf"),
        (0.95, -math.inf, "valid_call weight -inf"),
    ],
)
def test_weights_out_of_range_are_refused(correct, valid_call, words):
    with pytest.raises(ValueError, match=words):
        RewardWeights(correct, valid_call)


def test_form_may_be_worth_nothing():
    weights = RewardWeights(correct=1.0, valid_call=0.0)
    assert compute_rewards_from_generations([call_text(0), call_text(1)], [0, 0], 4, weights) == [1.0, 0.0]


SHORT_EXPLOITS = [text for exploit in EXPLOITS.values() if len(text := exploit.write(4)) < 5000]
GENERATIONS = st.sampled_from([call_text(0), call_text(3), call_text(-1), *SHORT_EXPLOITS]) | st.text(
    st.characters(exclude_categories=()), max_size=20
)


@given(
    st.lists(st.tuples(GENERATIONS, st.integers(0, 3)), max_size=3),
    st.floats(1e-3, 1e3),
    st.floats(0.0, 1e3),
    st.booleans(),
)
def test_always_finite_and_only_the_right_call_earns_the_whole(answers, correct, valid_call, allow_reasoning):
    rewards = compute_rewards_from_generations(
        [text for text, _ in answers],
        [index for _, index in answers],
        4,
        RewardWeights(correct, valid_call),
        allow_reasoning=allow_reasoning,
    )
    assert len(rewards) == len(answers)
    for (text, index), reward in zip(answers, rewards, strict=True):
        assert type(reward) is float
        assert math.isfinite(reward)
        assert reward in (0.0, valid_call, correct + valid_call)
        if text == call_text(index):
            assert reward == correct + valid_call


@pytest.mark.parametrize(
    "completions",
    [
        [call_text(0), call_text(1), "?"],
        [[{"role": "assistant", "content": text}] for text in (call_text(0), call_text(1), "?")],
    ],
    ids=["plain", "conversational"],
)
def test_trl_reward_function(completions):
    reward_function = make_trl_reward_function()
    rewards = reward_function(
        prompts=["?"] * 3,
        completions=completions,
        completion_ids=[[1]] * 3,
        correct_index=[0, 0, 0],
        num_candidates=[4, 4, 4],
        episode_index=[5, 5, 5],
        trainer_state=None,
    )
    assert rewards == [1.0, 0.05, 0.0]


def test_trl_reward_function_has_a_name_to_log():
    assert make_trl_reward_function().__name__ == "verdict_reward"


def test_trl_reward_function_keeps_its_weights_and_its_leave_to_reason():
    reward_function = make_trl_reward_function(RewardWeights(2.0, 1.0), allow_reasoning=True)
    texts = [f"So: {call_text(0)}", f"So: {call_text(1)}", "So."]
    assert reward_function(completions=texts, correct_index=[0] * 3, num_candidates=[4] * 3) == [3.0, 1.0, 0.0]


@pytest.mark.parametrize(("correct", "valid_call"), [(1e308, 1e308), (1e-20, 1.0)])
def test_weights_whose_sum_is_infinite_or_a_tie_are_refused(correct, valid_call):
    with pytest.raises(ValueError, match="right must be worth finitely more than wrong"):
        RewardWeights(correct, valid_call)
