"""Several turns with pictures between them: on the tree, and as a row of their own through the plain model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.turns_parity import GROUP_SIZE, Showing, gaps, row_inputs, two_prompts
from fleet.qwen import group_passes
from fleet.qwen.draws import named_uniforms
from fleet.qwen.sampling_pieces import sample_batch
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import PathToken
from fleet.qwen.tree_sampling import Samples, SamplingRequest
from tests.helpers import toy_model, toy_processor
from tests.qwen.test_tree_sampling import adapted_model, generation_config

NUM_TOKENS = 24  # of a turn


def sampled(
    model: Any, batch: Any, config: GenerationConfig, answers: Showing, drafts: Any = None, num_greedy: int = 0
) -> Samples:
    num_places = answers.max_turns * NUM_TOKENS
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, num_places)
    (samples,) = sample_batch(
        model,
        batch,
        None,
        SamplingRequest(
            SamplingRules(config),
            uniforms,
            drafts or [[]] * len(uniforms),
            config.pad_token_id,
            num_greedy=num_greedy,
            answers=answers,
            turn_end_id=toy_processor().tokenizer.eos_token_id,
        ),
    )
    return samples


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
@pytest.mark.parametrize("max_turns", [2, 4])
def test_turns_on_the_tree_score_as_rows_of_their_own(num_pictures: int, max_turns: int) -> None:
    gap_of_logps, gap_of_gradients = gaps(toy_model(), toy_processor(), num_pictures, max_turns)
    assert gap_of_logps <= 1e-5 and gap_of_gradients <= 1e-4


@pytest.mark.parametrize("make_model", [toy_model, adapted_model])
@pytest.mark.parametrize("num_pictures", [0, 2])
def test_turns_are_sampled_as_a_row_of_their_own_is(num_pictures: int, make_model: Any) -> None:
    model, batch = make_model(), two_prompts(toy_processor())
    config = generation_config(do_sample=True, top_k=0, max_new_tokens=NUM_TOKENS, temperature=1.3)
    answers, end = Showing(toy_processor(), num_pictures, 3), toy_processor().tokenizer.eos_token_id
    expected = [oracle(model, batch, row, answers, end) for row in range(2 * GROUP_SIZE)]
    first_turns = [[path_ids(turns[:1]) for turns in expected[start : start + GROUP_SIZE]] for start in (0, GROUP_SIZE)]
    seen = {}
    for name, drafts in (("none", None), ("first turns", first_turns)):
        samples = sampled(model, batch, config, answers, drafts)
        assert [path_ids(turns) for turns in expected] == samples.completion_ids
        assert [list(map(len, turns)) for turns in expected] == samples.turn_lengths
        seen[name] = samples.num_passes
    assert seen["first turns"] < seen["none"]


def test_groups_in_pieces_are_answered_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy_model(), two_prompts(toy_processor())
    config = generation_config(do_sample=True, top_k=0, max_new_tokens=NUM_TOKENS, temperature=1.3)
    whole = sampled(model, batch, config, Showing(toy_processor(), 1, 2))
    monkeypatch.setitem(group_passes.MAX_MASK_PAIRS, "sdpa", 1)
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, 2 * NUM_TOKENS)
    end = toy_processor().tokenizer.eos_token_id
    request = SamplingRequest(
        SamplingRules(config),
        uniforms,
        [[], []],
        config.pad_token_id,
        answers=Showing(toy_processor(), 1, 2),
        turn_end_id=end,
    )
    pieces = sample_batch(model, batch, None, request)
    assert len(pieces) == 2
    # what Showing shows depends on the group's number
    assert [path for piece in pieces for path in piece.paths] == whole.paths


def path_ids(turns: Sequence[Sequence[int]]) -> list[int]:
    return [token for turn in turns for token in turn]


@torch.no_grad()
def oracle(model: Any, batch: Any, row: int, answers: Showing, end: int) -> list[list[int]]:
    """One rollout's turns, every prefix computed anew by the plain model; tokens by a plain search of the uniform."""
    number, rollout = divmod(row, GROUP_SIZE)
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, answers.max_turns * NUM_TOKENS)[number, rollout]
    banned = [toy_processor().image_token_id, toy_processor().video_token_id]
    path, turns, count = list[PathToken](), list[list[int]]([[]]), 0
    while True:
        logits = model(**row_inputs(batch, number, path, answers)).logits[0, -1].float()
        logits[banned] = -torch.inf
        share = (logits / 1.3).double().softmax(0)
        token = int((share.cumsum(0) <= float(uniforms[count])).sum())
        count += 1
        path.append(token)
        turns[-1].append(token)
        if token == end:
            given = answers(number, turns)
            if not given:
                return turns
            path += given
            turns.append([])
        elif len(turns[-1]) == NUM_TOKENS:
            return turns
