"""Trees: rows worked by hand, the mask against brute force, and a real Qwen2.5-VL against its own unpacked batch."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset import VLMDataCollator
from environment import Episode
from fleet.qwen.group_passes import image_inputs, score_tree, tree_prompts
from fleet.qwen.token_tree import (
    GivenToken,
    PathToken,
    Prompts,
    TokenTree,
    ancestry_mask,
    by_rollout,
    tree_of_rollouts,
)
from fleet.toy.model import make_toy_processor
from tests.helpers import toy_dataset, toy_model, toy_processor

PAD = 0


def rows(*values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


# --- by hand ----------------------------------------------------------------------------------------------------------


def prompts_by_hand() -> Prompts:
    """Prompts 1 2 3 and (padded) 4 5; the positions of 2 are those of an image token."""
    positions = torch.stack([rows([0, 1, 7], [0, 0, 1]), rows([0, 2, 7], [0, 0, 1]), rows([0, 3, 7], [0, 0, 1])])
    return Prompts(rows([1, 2, 3], [PAD, 4, 5]), rows([1, 1, 1], [0, 1, 1]), positions)


def tree_by_hand() -> TokenTree:
    # behind 3: 61 62 63, 61 62 64 and 71; behind 5: 81 twice, and nothing
    return tree_of_rollouts(prompts_by_hand(), [[[61, 62, 63], [61, 62, 64], [71]], [[81], [81], []]], PAD)


def test_rows_worked_by_hand() -> None:
    tree = tree_by_hand()
    # the prompt, then the nodes that have children
    assert tree.input_ids_PS.tolist() == [[1, 2, 3, 61, 62], [4, 5, PAD, PAD, PAD]]
    # time, height and width of an image token differ; text goes on behind the last prompt token
    assert tree.position_ids_3PS[:, 0].tolist() == [[0, 1, 7, 8, 9], [0, 2, 7, 8, 9], [0, 3, 7, 8, 9]]
    assert tree.next_position_PS[0].tolist()[2:] == [8, 9, 10]
    assert tree.is_given_PS.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    # 61, 62, 63, 64 and 71 in their order of arrival, and the slots that predict them
    assert tree.edge_token_PK[0].tolist() == [61, 62, 63, 64, 71]
    assert tree.edge_slot_PK[0].tolist() == [2, 3, 4, 4, 2]
    assert (tree.edge_token_PK[1, 0], tree.edge_slot_PK[1, 0]) == (81, 1)
    assert tree.edge_PGT.tolist() == [[[0, 1, 2], [0, 1, 3], [4, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert tree.is_token_PGT.sum(dim=2).tolist() == [[3, 3, 1], [1, 1, 0]]
    assert tree.slot_PGT[0, 1].tolist() == [2, 3, 4]
    seen = ancestry_mask(tree.end_PS)[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_siblings_do_not_see_each_other() -> None:
    prompts = Prompts(rows([1]), rows([1]), torch.zeros(3, 1, 1, dtype=torch.long))
    tree = tree_of_rollouts(prompts, [[[2, 3, 4], [2, 5, 6], [7, 8]]], PAD)
    assert tree.input_ids_PS.tolist() == [[1, 2, 3, 5, 7]]
    assert tree.end_PS.tolist() == [[5, 4, 3, 4, 5]]
    assert ancestry_mask(tree.end_PS)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]
    ]  # fmt: skip


def test_values_of_edges_are_each_rollouts_own_and_gradients_meet_where_it_is_shared() -> None:
    tree = tree_by_hand()
    values = torch.arange(1.0, 11).view(2, 5).requires_grad_()
    found = by_rollout(values, tree)
    assert found.tolist() == [[[1, 2, 3], [1, 2, 4], [5, 0, 0]], [[6, 0, 0], [6, 0, 0], [0, 0, 0]]]
    (found * torch.tensor([1.0, 10.0, 100.0])[None, :, None]).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[11, 11, 1, 10, 100], [11, 0, 0, 0, 0]]


def test_a_picture_inside_a_branch_has_its_own_places_and_text_goes_on_behind_it() -> None:
    # a text of 8, a picture of 2 x 2 tokens (9), a text of 8, and the same with another picture
    def picture(digest: bytes) -> list[PathToken]:
        places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
        return [GivenToken(9, digest, place, step=2 if place == (0, 1, 1) else 0) for place in places]

    paths = [[7, GivenToken(8), *picture(digest), GivenToken(8), 7] for digest in (b"a", b"b", b"a")]
    prompts = Prompts(rows([1, 2]), rows([1, 1]), torch.tensor([[[0, 5]]] * 3))
    tree = tree_of_rollouts(prompts, [paths], PAD)
    assert tree.input_ids_PS.tolist() == [[1, 2, 7, 8, 9, 9, 9, 9, 8, 9, 9, 9, 9, 8]], "two pictures, not three"
    assert tree.position_ids_3PS[:, 0, 2:9].tolist() == [
        [6, 7, 8, 8, 8, 8, 10],
        [6, 7, 8, 8, 9, 9, 10],
        [6, 7, 8, 9, 8, 9, 10],
    ]
    assert tree.position_ids_3PS[:, 0, 9:].tolist() == tree.position_ids_3PS[:, 0, 4:9].tolist()
    assert tree.is_given_PS[0].tolist() == [True, True, False] + [True] * 11
    # the edge of the last token is a sampled one again, behind either picture
    assert tree.slot_PGT[0, :, -1].tolist() == [8, 13, 8]


def test_a_right_padded_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="pad left"):
        Prompts(rows([1, PAD]), rows([1, 0]), torch.zeros(3, 1, 2))


def test_a_tree_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="1 trees, but 2 prompts"):
        tree_of_rollouts(prompts_by_hand(), [[[1]]], PAD)


# --- against brute force ----------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=3, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_every_token_sees_its_own_history_and_nothing_else(groups: list[tuple[int, list[list[int]]]]) -> None:
    longest = max(length for length, _ in groups)
    names = iter(range(10, 10_000))  # every token of a prompt has a name of its own; those of rollouts are few
    prompts = [[next(names) for _ in range(length)] for length, _ in groups]
    completions = [paths for _, paths in groups]
    tree = tree_of_rollouts(
        Prompts(
            torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]),
            torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            torch.arange(longest).expand(3, len(groups), longest),
        ),
        completions,
        PAD,
    )
    mask = ancestry_mask(tree.end_PS)[:, 0]
    for row, (prompt, paths) in enumerate(zip(prompts, completions, strict=True)):
        for rollout, ids in enumerate(paths):
            for place, token in enumerate(ids):
                slot, edge = int(tree.slot_PGT[row, rollout, place]), int(tree.edge_PGT[row, rollout, place])
                assert tree.edge_token_PK[row, edge] == token
                seen = tree.input_ids_PS[row][mask[row, slot]].tolist()
                assert seen == [*prompt, *ids[:place]], "what a rollout of its own would have before this token"
                assert tree.position_ids_3PS[0, row, slot] == longest - 1 + place
        for slot in range(len(prompt)):
            assert tree.input_ids_PS[row][mask[row, slot]].tolist() == prompt[: slot + 1]
        beginnings = {tuple(ids[:end]) for ids in paths for end in range(1, len(ids) + 1)}
        inner = {tuple(ids[:end]) for ids in paths for end in range(1, len(ids))}
        assert len(tree.slots[row]) == 1 + len(inner), "no token has two slots, and the last of a path has none"
        assert int((tree.edge_token_PK[row] != PAD).sum()) == len(beginnings)
    assert mask.diagonal(dim1=1, dim2=2).all(), "a slot that sees nothing would give NaN"
    assert tree.is_token_PGT.sum().item() == sum(len(ids) for paths in completions for ids in paths)


# --- against the unpacked batch, through a real model -----------------------------------------------------------------


def random_batch(rng: random.Random, group_size: int, num_pictures: Sequence[int] = ()) -> Any:
    """Episodes of pictures of their own sizes, with prompts of their own lengths.

    num_pictures: of each episode; by default of one to three episodes, one to five.
    """
    processor = make_toy_processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    lines = []
    for number, num_shown in enumerate(num_pictures or [rng.randrange(1, 6) for _ in range(rng.randrange(1, 4))]):
        pictures = [
            Image.effect_noise((28 * rng.randrange(1, 4), 28 * rng.randrange(1, 4)), 80).convert("RGB")
            for _ in range(num_shown)
        ]
        words = " ".join(rng.choice(["red", "circle", "zebra", "42"]) for _ in range(rng.randrange(1, 20)))
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": words}]
        episode = Episode(tuple(pictures), ({"role": "user", "content": content},), 0, ("a",) * len(pictures), None, 0)
        line = {"episode_index": number, "prompt": list(episode.messages), "images": pictures, "episode": episode,
                "fault": None, "broken": None}  # fmt: skip
        lines += [line] * group_size
    return VLMDataCollator(processor, group_size)(lines)


def random_completions(rng: random.Random, num_prompts: int, group_size: int) -> list[list[list[int]]]:
    """Completions of 1 to 7 tokens, of which some begin alike and some are equal."""
    groups = []
    for _ in range(num_prompts):
        own = [[rng.randrange(8, 300) for _ in range(rng.randrange(1, 8))] for _ in range(group_size)]
        first = own[0]
        groups.append([rng.choice([ids, first, first[: rng.randrange(1, 8)] + ids[:2]]) for ids in own])
    return groups


def as_tensors(completions: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for group in completions for ids in group)
    ids = [[ids + [PAD] * (longest - len(ids)) for ids in group] for group in completions]
    return torch.tensor(ids), torch.tensor([[len(ids) for ids in group] for group in completions])


def unpacked_logps(
    model: Any, batch: Any, completion_ids_PGT: torch.Tensor, lengths_PG: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
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
            logps = (logits / temperature).log_softmax(-1)
            found[prompt, branch, :length] = logps.gather(1, completion_ids[:, None])[:, 0]
    return found


def gradients_of(model: Any, weighted_sum: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weighted_sum.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("seed", "num_pictures"), [*((seed, ()) for seed in range(6)), (6, (1, 16))])
def test_log_probabilities_and_gradients_equal_the_unpacked_batchs(
    seed: int, num_pictures: Sequence[int], attention: str
) -> None:
    rng, model = random.Random(seed), toy_model(attn_implementation=attention)
    torch.manual_seed(seed)
    batch = random_batch(rng, group_size := rng.randrange(2, 6), num_pictures)
    num_prompts = len(batch["prompts"])
    completions, temperature = random_completions(rng, num_prompts, group_size), rng.choice([1.0, 0.7])
    completion_ids, lengths = as_tensors(completions)
    weights = torch.randn(completion_ids.shape) * (torch.arange(completion_ids.shape[2]) < lengths[:, :, None])

    expected = unpacked_logps(model, batch, completion_ids, lengths, temperature)
    expected_gradients = gradients_of(model, (expected * weights).sum())

    tree = tree_of_rollouts(tree_prompts(model, batch), completions, PAD)
    images = image_inputs(batch, slice(0, num_prompts), None)
    logps, entropies, _ = score_tree(model, tree, images, attention, temperature)
    found = by_rollout(logps, tree)
    gradients = gradients_of(model, (found * weights).sum())

    # a log-probability of -15 has a rounding error of 1e-6 of its own
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    assert (by_rollout(entropies, tree)[tree.is_token_PGT] > 0).all()
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
    completions = random_completions(rng, num_prompts, 4)
    completion_ids, lengths = as_tensors(completions)
    exact, rounded = toy_model(), toy_model(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = unpacked_logps(exact, batch, completion_ids, lengths)
        own_rows = unpacked_logps(rounded, batch, completion_ids, lengths)
        tree = tree_of_rollouts(tree_prompts(exact, batch), completions, PAD)
        images = image_inputs(batch, slice(0, num_prompts), None)
        found = by_rollout(score_tree(rounded, tree, images, "sdpa", 1.0)[0], tree)
    noise, error = ((logps - expected)[tree.is_token_PGT].abs().mean() for logps in (own_rows, found))
    assert 0 < error <= 1.5 * noise


def test_a_group_is_an_episode_and_not_what_has_equal_token_ids() -> None:
    model, dataset = toy_model(), toy_dataset(fixed_correct_index=0)
    batch = VLMDataCollator(toy_processor(), 2)([dataset[number] for number in (0, 0, 1, 1)])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1]), "only pictures tell the two apart"
    completion_ids, lengths = torch.full((2, 2, 3), 40), torch.full((2, 2), 3)
    expected = unpacked_logps(model, batch, completion_ids, lengths)
    tree = tree_of_rollouts(tree_prompts(model, batch), [[[40] * 3] * 2] * 2, PAD)
    found = by_rollout(score_tree(model, tree, image_inputs(batch, slice(0, 2), None), "sdpa", 1.0)[0], tree)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    assert (found[0, 0] - found[1, 0]).abs().max() > 1e-4
