"""Packing: rows worked by hand, the mask against brute force, and a real Qwen2.5-VL against its own unpacked batch."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trl.trainer.utils import add_fused_lm_head

from dataset import VLMDataCollator
from environment import Episode
from fleet.qwen.group_passes import image_inputs, prompt_positions, score_packed
from fleet.qwen.shared_prefix import PADDING, PackedGroups, attention_mask, pack_groups, unpack
from fleet.toy.model import make_toy_processor
from tests.helpers import toy_dataset, toy_model, toy_processor

PAD = 0


def rows(*values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


# --- by hand ----------------------------------------------------------------------------------------------------------


def packed_by_hand() -> PackedGroups:
    # prompts 1 2 3 and (padded) 4 5; completions 61 62 and 71; 81 and 91 92, padded with 0
    positions = torch.stack([rows([0, 1, 7], [0, 0, 1]), rows([0, 2, 7], [0, 0, 1]), rows([0, 3, 7], [0, 0, 1])])
    return pack_groups(
        rows([1, 2, 3], [PAD, 4, 5]),
        rows([1, 1, 1], [0, 1, 1]),
        positions,
        torch.tensor([[[61, 62], [71, 0]], [[81, 0], [91, 92]]]),
        rows([2, 1], [1, 2]),
        PAD,
    )


def test_rows_worked_by_hand() -> None:
    packed = packed_by_hand()
    # the prompt without its last token, then branches that each open with it
    assert packed.input_ids_PS.tolist() == [[1, 2, 3, 61, 3], [4, 5, 5, 91, PAD]]
    assert packed.shift_labels_PS.tolist() == [[-100, -100, 61, 62, 71], [-100, 81, 91, 92, -100]]
    assert packed.branch_PS.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, PADDING]]
    # time, height and width of an image token differ; a branch goes on from the last prompt token's place
    assert packed.position_ids_3PS[:, 0].tolist() == [[0, 1, 7, 8, 7], [0, 2, 7, 8, 7], [0, 3, 7, 8, 7]]
    assert packed.position_ids_3PS[:, 1, :4].tolist() == [[0, 1, 1, 2]] * 3


def test_what_is_unpacked_is_each_completions_own() -> None:
    values = torch.arange(10, dtype=torch.float32).view(2, 5)
    assert unpack(values, packed_by_hand()).tolist() == [[[2, 3], [4, 0]], [[6, 0], [7, 8]]]


def test_a_completion_of_no_tokens_takes_no_slot() -> None:
    packed = pack_groups(
        rows([1, 2]),
        rows([1, 1]),
        torch.zeros(3, 1, 2, dtype=torch.long),
        torch.tensor([[[7], [8]]]),
        rows([0, 1]),
        PAD,
    )
    assert packed.input_ids_PS.tolist() == [[1, 2]]
    assert unpack(torch.tensor([[5.0, 6.0]]), packed).tolist() == [[[0.0], [6.0]]]


def test_a_right_padded_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="pad left"):
        pack_groups(rows([1, PAD]), rows([1, 0]), torch.zeros(3, 1, 2), torch.ones(1, 2, 3), rows([3, 3]), PAD)


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_that_no_completion_has_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="wanted 0 to 3 tokens"):
        pack_groups(rows([1, 2]), rows([1, 1]), torch.zeros(3, 1, 2), torch.ones(1, 2, 3), rows([1, length]), PAD)


# --- against brute force ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=3, max_size=3)), min_size=1, max_size=3)
)
def test_every_token_sees_its_own_history_and_nothing_else(groups: list[tuple[int, list[int]]]) -> None:
    longest = max(length for length, _ in groups)
    names = iter(range(1, 10_000))  # every token of the batch has a name of its own
    prompts = [[next(names) for _ in range(length)] for length, _ in groups]
    completions = [[[next(names) for _ in range(length)] for length in lengths] for _, lengths in groups]
    packed = pack_groups(
        torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]),
        torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        torch.zeros(3, len(groups), longest, dtype=torch.long),
        torch.tensor([[ids + [PAD] * (4 - len(ids)) for ids in group] for group in completions]),
        torch.tensor([lengths for _, lengths in groups]),
        PAD,
    )
    mask = attention_mask(packed.branch_PS)[:, 0]
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        for branch, ids in enumerate(group):
            for place, token in enumerate(ids):
                slot = int(packed.slot_PGT[row, branch, place])
                assert packed.shift_labels_PS[row, slot] == token
                seen = packed.input_ids_PS[row][mask[row, slot]].tolist()
                assert seen == [*prompt, *ids[:place]], "what a rollout of its own would have before this token"
        for slot in range(len(prompt) - 1):
            assert packed.input_ids_PS[row][mask[row, slot]].tolist() == prompt[: slot + 1]
    assert mask.diagonal(dim1=1, dim2=2).all(), "a slot that sees nothing would give NaN"
    assert int(packed.is_token_PGT.sum()) == sum(len(ids) for group in completions for ids in group)
    assert int((packed.shift_labels_PS != -100).sum()) == int(packed.is_token_PGT.sum())


# --- against the unpacked batch, through a real model -----------------------------------------------------------------


def random_batch(rng: random.Random, group_size: int) -> Any:
    """One to three episodes of one to five pictures of their own sizes, with prompts of their own lengths."""
    processor = make_toy_processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    lines = []
    for number in range(rng.randrange(1, 4)):
        pictures = [
            Image.effect_noise((28 * rng.randrange(1, 4), 28 * rng.randrange(1, 4)), 80).convert("RGB")
            for _ in range(rng.randrange(1, 6))
        ]
        words = " ".join(rng.choice(["red", "circle", "zebra", "42"]) for _ in range(rng.randrange(1, 20)))
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": words}]
        episode = Episode(tuple(pictures), ({"role": "user", "content": content},), 0, ("a",) * len(pictures), None, 0)
        line = {"episode_index": number, "prompt": list(episode.messages), "images": pictures, "episode": episode,
                "fault": None, "broken": None}  # fmt: skip
        lines += [line] * group_size
    return VLMDataCollator(processor, group_size)(lines)


def random_completions(rng: random.Random, num_prompts: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [[rng.randrange(1, 8) for _ in range(group_size)] for _ in range(num_prompts)]
    longest = max(map(max, lengths))
    ids = [
        [[rng.randrange(8, 300) if t < length else PAD for t in range(longest)] for length in row] for row in lengths
    ]
    return torch.tensor(ids), torch.tensor(lengths)


def unpacked_logps(model: Any, batch: Any, completion_ids_PGT: torch.Tensor, lengths_PG: torch.Tensor) -> torch.Tensor:
    """The oracle: every rollout on its own, as one row without padding, through the model's plain logits."""
    grids = batch["image_grid_thw"].split(batch["num_images"])
    pixels = batch["pixel_values"].split([int(grid.prod(dim=1).sum()) for grid in grids])
    found = torch.zeros(completion_ids_PGT.shape)
    for prompt, prompt_mask in enumerate(batch["attention_mask"].bool()):
        prompt_ids = batch["input_ids"][prompt][prompt_mask]
        kinds = batch["mm_token_type_ids"][prompt][prompt_mask]
        for branch, length in enumerate(lengths_PG[prompt].tolist()):
            completion_ids = completion_ids_PGT[prompt, branch, :length]
            logits = model(
                input_ids=torch.cat([prompt_ids, completion_ids])[None],
                mm_token_type_ids=torch.cat([kinds, torch.zeros_like(completion_ids)])[None],
                pixel_values=pixels[prompt],
                image_grid_thw=grids[prompt],
            ).logits[0, len(prompt_ids) - 1 : -1]
            found[prompt, branch, :length] = logits.log_softmax(-1).gather(1, completion_ids[:, None])[:, 0]
    return found


def gradients_of(model: Any, weighted_sum: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weighted_sum.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(6))
def test_log_probabilities_and_gradients_equal_the_unpacked_batchs(seed: int, attention: str) -> None:
    rng, model = random.Random(seed), toy_model(attn_implementation=attention)
    torch.manual_seed(seed)
    batch = random_batch(rng, group_size := rng.randrange(2, 6))
    num_prompts = len(batch["prompts"])
    completion_ids, lengths = random_completions(rng, num_prompts, group_size)
    weights = torch.randn(completion_ids.shape) * (torch.arange(completion_ids.shape[2]) < lengths[:, :, None])

    expected = unpacked_logps(model, batch, completion_ids, lengths)
    expected_gradients = gradients_of(model, (expected * weights).sum())

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packed = pack_groups(
        batch["input_ids"], batch["attention_mask"], prompt_positions(model, batch), completion_ids, lengths, PAD
    )
    images = image_inputs(batch, slice(0, num_prompts), None)
    logps, entropies = score_packed(model, packed, images, attention)
    found = unpack(logps, packed)
    gradients = gradients_of(model, (found * weights).sum())

    # a log-probability of -15 has a rounding error of 1e-6 of its own
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    assert entropies is not None and (unpack(entropies, packed)[packed.is_token_PGT] > 0).all()
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 60
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # a gradient that is zero but for rounding is compared with the largest one instead of with itself
        scale = max(gradient.norm(), 1e-5 * largest)
        assert (gradients[name] - gradient).norm() <= 1e-4 * scale, name


def test_bfloat16_is_as_near_to_float32_packed_as_it_is_in_rows_of_their_own() -> None:
    # rounding depends on layout, so the measure is how far a second layout of the unpacked batch is off
    torch.manual_seed(0)
    rng = random.Random(0)
    batch = random_batch(rng, 4)
    num_prompts = len(batch["prompts"])
    completion_ids, lengths = random_completions(rng, num_prompts, 4)
    exact, rounded = toy_model(), toy_model(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = unpacked_logps(exact, batch, completion_ids, lengths)
        own_rows = unpacked_logps(rounded, batch, completion_ids, lengths)
        add_fused_lm_head(rounded)
        packed = pack_groups(
            batch["input_ids"], batch["attention_mask"], prompt_positions(exact, batch), completion_ids, lengths, PAD
        )
        images = image_inputs(batch, slice(0, num_prompts), None)
        found = unpack(score_packed(rounded, packed, images, "sdpa")[0], packed)
    noise, error = ((logps - expected)[packed.is_token_PGT].abs().mean() for logps in (own_rows, found))
    assert 0 < error <= 1.5 * noise


def test_a_group_is_an_episode_and_not_what_has_equal_token_ids() -> None:
    model, dataset = toy_model(), toy_dataset(fixed_correct_index=0)
    batch = VLMDataCollator(toy_processor(), 2)([dataset[number] for number in (0, 0, 1, 1)])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1]), "only pictures tell the two apart"
    completion_ids, lengths = torch.full((2, 2, 3), 40), torch.full((2, 2), 3)
    expected = unpacked_logps(model, batch, completion_ids, lengths)
    add_fused_lm_head(model)
    packed = pack_groups(
        batch["input_ids"], batch["attention_mask"], prompt_positions(model, batch), completion_ids, lengths, PAD
    )
    found = unpack(score_packed(model, packed, image_inputs(batch, slice(0, 2), None), "sdpa")[0], packed)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    assert (found[0, 0] - found[1, 0]).abs().max() > 1e-4
