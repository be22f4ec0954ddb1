"""The count of operations against PyTorch's own counter on a real model, and work compared by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fleet.qwen.flops import TextWork, WorkComparison, add_up, compare_work, text_flops, vision_flops
from tests.helpers import toy_model


def counted(model: Any, **inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def test_text_operations_equal_pytorchs_count() -> None:
    # eager attention computes every pair of query and key
    model = toy_model(attn_implementation="eager")
    ids = torch.randint(8, 300, (2, 50))
    work = TextWork(num_tokens=100, num_pairs=2 * 50**2, num_scored=100)
    # rotary angles are a matrix product as well, of no weight
    rotary = counted(model.model.language_model.rotary_emb, x=torch.zeros(1), position_ids=torch.zeros(3, 2, 50).long())
    assert text_flops(model.config, work) == counted(model, input_ids=ids) - rotary


@pytest.mark.parametrize("side", [56, 112, 140])
def test_vision_operations_equal_pytorchs_count(side: int) -> None:
    model = toy_model(attn_implementation="eager")
    patches = side // 14
    grid = torch.tensor([[1, patches, patches]] * 3)
    pixels = torch.randn(3 * patches**2, 3 * 2 * 14 * 14)
    found = counted(model.model.visual, hidden_states=pixels, grid_thw=grid)
    assert vision_flops(model.config, grid.tolist()) == pytest.approx(found, rel=0.01)


def compare(prompts: list[int], completions: list[list[int]], step: int, **changes: Any) -> WorkComparison:
    """Completions of these lengths that share nothing: each leaf has an edge and no slot."""
    padded = max(prompts), max(map(max, completions))
    trees = [(sum(lengths) - len(lengths), sum(lengths)) for lengths in completions]
    settings = {"grids_thw": [(1, 4, 4)], "are_features_known": False, "groups_per_step": step, **changes}
    return compare_work(
        toy_model().config, prompts, trees, group_size=len(completions[0]), padded_lengths=padded, **settings
    )


def test_packing_compared_by_hand() -> None:
    # two steps of one group each: prompts of 10 and 4 tokens, completions of 1 + 2 and 5 + 5
    work = compare([10, 4], [[1, 2], [5, 5]], 1)
    assert work.packed_tokens == (10 + 0 + 1) + (4 + 4 + 4)
    assert work.unpacked_tokens == 4 * (10 + 5)
    assert work.largest_mask_pairs == 12**2
    # both groups in one step: every packed row is as long as the longest
    together = compare([10, 4], [[1, 2], [5, 5]], 2)
    assert together.packed_tokens == 2 * 12 and together.unpacked_tokens == 4 * 15
    assert together.largest_mask_pairs == 2 * 12**2


def test_known_features_save_the_encoder_in_packed_rows_alone() -> None:
    picture = vision_flops(toy_model().config, [(1, 4, 4)])
    fresh, known = (compare([97], [[20] * 8], 1, are_features_known=is_known) for is_known in (False, True))
    assert fresh.packed_flops - known.packed_flops == picture
    assert fresh.unpacked_flops == known.unpacked_flops


def test_long_completions_behind_a_short_prompt_are_more_work_packed() -> None:
    short, long = compare([97], [[20] * 8], 1), compare([97], [[2000] * 8], 1)
    assert short.packed_flops < short.unpacked_flops / 2
    assert long.packed_flops > long.unpacked_flops


def test_ranks_are_added_up_except_for_their_masks() -> None:
    assert add_up([WorkComparison(1, 2, 3, 4, 5), WorkComparison(10, 20, 30, 40, 3)]) == WorkComparison(
        11, 22, 33, 44, 5
    )
