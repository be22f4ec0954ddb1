"""Generation behind one prefill against plain `generate`, features against pixels, and what is not packed."""

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.qwen.flops import WorkComparison
from fleet.qwen.group_passes import encode_image, generate_groups, takes_image_features, why_not_to_pack
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from model_utils import make_lora_config
from tests.helpers import toy_model, toy_processor

GROUP_SIZE = 3


def batch_of_unequal_prompts() -> Any:
    """Prompts of 2, 5 and 3 pictures, so that two of them are padded."""
    lines = []
    for number, candidates in enumerate((2, 5, 3)):
        dataset = RepeatableEpisodeDataset(PickImageEnv(TOY_DATA_ROOT, candidates, None, seed=3), TOY_IMAGE_PIXELS)
        lines += [dataset[number]] * GROUP_SIZE
    batch = VLMDataCollator(toy_processor(), GROUP_SIZE)(lines)
    assert (batch["attention_mask"] == 0).any(dim=1).tolist() == [True, False, True]
    return batch


def adapted_model() -> Any:
    config = make_lora_config(rank=4)
    config.init_lora_weights = False  # the adapter counts from the start
    torch.manual_seed(0)
    return get_peft_model(toy_model(), config)


def repeated_generate(model: Any, batch: Any, config: GenerationConfig) -> torch.Tensor:
    """The oracle: transformers' own `generate` on every prompt and its pictures G times over."""
    return repeated_generate_with_scores(model, batch, config)[0]


def repeated_generate_with_scores(
    model: Any, batch: Any, config: GenerationConfig
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The oracle's completions (R, T), and for each of T places the scores (R, vocabulary) that decided it."""
    grids = batch["image_grid_thw"].split(batch["num_images"])
    pixels = batch["pixel_values"].split([int(grid.prod(dim=1).sum()) for grid in grids])
    order = [prompt for prompt in range(len(grids)) for _ in range(GROUP_SIZE)]
    done = model.generate(
        input_ids=batch["input_ids"][order],
        attention_mask=batch["attention_mask"][order],
        mm_token_type_ids=batch["mm_token_type_ids"][order],
        pixel_values=torch.cat([pixels[prompt] for prompt in order]),
        image_grid_thw=torch.cat([grids[prompt] for prompt in order]),
        generation_config=config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return done.sequences[:, batch["input_ids"].shape[1] :], done.scores


def assert_equal_but_for_ties(found: torch.Tensor, expected: torch.Tensor, scores: tuple[torch.Tensor, ...]) -> None:
    """Rows of tokens are equal up to a place, if any, where the two best scores are equal but for rounding."""
    best_2RT = torch.stack([at_place.topk(2).values for at_place in scores]).permute(2, 1, 0)
    margins = (best_2RT[0] - best_2RT[1]).tolist()
    for ours, theirs, margins_of_row in zip(found.tolist(), expected.tolist(), margins, strict=True):
        pairs = zip(ours, theirs, margins_of_row, strict=False)
        first = next(((place, margin) for place, (our, their, margin) in enumerate(pairs) if our != their), None)
        assert first is None or first[1] < 1e-4, f"place {first[0]}, decided by {first[1]}: {ours}, {theirs}"


def generation_config(**settings: Any) -> GenerationConfig:
    tokenizer = toy_processor().tokenizer
    return GenerationConfig(
        max_new_tokens=32, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **settings
    )


@pytest.mark.parametrize("make_model", [toy_model, adapted_model])
def test_greedy_output_equals_plain_generate_token_for_token(make_model: Any) -> None:
    model, batch, config = make_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    expected, scores = repeated_generate_with_scores(model, batch, config)
    found = generate_groups(model, batch, None, config)
    assert_equal_but_for_ties(found, expected, scores)
    # once more: positions left behind by one call must not reach the next
    assert torch.equal(generate_groups(model, batch, None, config), found)
    assert torch.equal(repeated_generate(model, batch, config), expected)


@pytest.mark.parametrize("seed", range(3))
def test_sampling_draws_what_plain_generate_draws_from_the_same_seed(seed: int) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(do_sample=True, temperature=1.5, top_k=0, top_p=1.0)
    torch.manual_seed(seed)
    expected = repeated_generate(model, batch, config)
    torch.manual_seed(seed)
    found = generate_groups(model, batch, None, config)
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) > GROUP_SIZE, "rollouts of one group differ from each other"


@pytest.mark.skipif(not takes_image_features(), reason="this transformers takes no image features")
def test_features_stand_for_pixels() -> None:
    model, batch, config = toy_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    features = [encode_image(model, batch, place) for place in range(10)]
    assert [tuple(image.shape) for image in features] == [(4, 96)] * 10
    found = generate_groups(model, batch, features, config)
    assert_equal_but_for_ties(found, *repeated_generate_with_scores(model, batch, config))
    # and the model does read them: another picture has other features
    assert (features[9] - features[0]).abs().max() > 0.01


@pytest.mark.skipif(not takes_image_features(), reason="this transformers takes no image features")
def test_an_image_is_encoded_alone_so_that_its_features_are_the_same_bits_in_any_company() -> None:
    model, passes = toy_model(), []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((args[0], kwargs["grid_thw"])), with_kwargs=True
    )
    pictures = [Image.effect_noise(size, 99).convert("RGB") for size in ((56, 56), (56, 112), (112, 56))]
    company = toy_processor().image_processor(pictures, return_tensors="pt")
    # of 16 patches, 8 and 8
    for place, patches in enumerate([slice(0, 16), slice(16, 24), slice(24, 32)]):
        alone: Any = {
            "pixel_values": company["pixel_values"][patches].clone(),
            "image_grid_thw": company["image_grid_thw"][place : place + 1].clone(),
        }
        passes.clear()
        features = [encode_image(model, company, place), encode_image(model, alone, 0)]
        for pixels, grid in passes:
            assert torch.equal(pixels, alone["pixel_values"]) and torch.equal(grid, alone["image_grid_thw"])
        assert len(passes) == 2 and torch.equal(*features)
        # a cache that counts these bytes holds no others
        assert features[0].untyped_storage().nbytes() == features[0].nbytes


SOUND = WorkComparison(
    packed_flops=1, unpacked_flops=5, packed_tokens=100, unpacked_tokens=500, largest_mask_pairs=600 * 600
)


@pytest.mark.parametrize(
    ("attention", "changes", "words"),
    [
        ("sdpa", {}, None),
        ("eager", {}, None),
        ("flash_attention_2", {}, "flash_attention_2 takes no mask .* pass --attn_implementation sdpa"),
        ("sdpa", {"packed_flops": 10}, "packed rows 2.0 times the work"),
        ("sdpa", {"largest_mask_pairs": 40_000**2}, "1,600,000,000 pairs, wanted at most .* lower --per_device_batch"),
        ("sdpa", {"largest_mask_pairs": 8_000**2}, None),
        ("eager", {"largest_mask_pairs": 8_000**2}, "64,000,000 pairs, wanted at most 33,554,432"),
    ],
)
def test_what_is_not_packed_says_why(attention: str, changes: dict[str, int], words: str | None) -> None:
    reason = why_not_to_pack(attention, dataclasses.replace(SOUND, **changes))
    assert reason is None if words is None else reason is not None and re.search(words, reason)


def test_the_model_still_has_the_internals_we_lean_on() -> None:
    inner = Qwen2_5_VLForConditionalGeneration(toy_model().config).model
    gone = "transformers changed Qwen2_5_VLModel: fleet/qwen/group_passes.py must follow before transformers' pin moves"
    taken = inspect.signature(inner.get_rope_index).parameters.keys()
    assert {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"} <= taken, gone
    assert hasattr(inner, "rope_deltas") and hasattr(inner, "visual") and hasattr(inner, "language_model"), gone
    assert {"pixel_values", "image_grid_thw"} <= inspect.signature(inner.get_image_features).parameters.keys(), gone
