"""Sampling on trees against plain `generate` and against every prefix computed anew; features against pixels."""

import dataclasses
import inspect
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import GenerationConfig

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.qwen import group_passes, sampling_passes, sampling_pieces, tree_sampling
from fleet.qwen.draws import draw_tokens, named_uniforms
from fleet.qwen.flops import WorkComparison
from fleet.qwen.group_passes import base_qwen, encode_image, why_not_to_pack
from fleet.qwen.sampling_pieces import num_pieces_of, sample_batch
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import Branches
from fleet.qwen.tree_sampling import Samples, SamplingRequest
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from model_utils import make_lora_config
from tests.helpers import toy_model, toy_processor
from tests.qwen.test_token_tree import random_batch

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
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    banned = [toy_processor().image_token_id, toy_processor().video_token_id]
    return GenerationConfig(**{"max_new_tokens": 32, "suppress_tokens": banned, **ends, **settings})


def drafts_of_kind(kind: str, completions: list[list[int]]) -> list[list[list[int]]]:
    """Guesses for each group: what was said, what was not, what was said in part, some of everything, and none."""
    starts = range(0, len(completions), GROUP_SIZE)
    said = [[list(ids) for ids in completions[start : start + GROUP_SIZE]] for start in starts]
    media, end = toy_processor().image_token_id, toy_processor().tokenizer.eos_token_id
    if kind == "right":
        return said
    if kind == "wrong":
        return [[[9, 9, 9, 9], [11, end]] for _ in said]
    if kind == "partly right":
        return [[ids[: 1 + len(ids) // 2] + [9, 10] for ids in group[:2]] for group in said]
    if kind == "odd":
        # longer than anything may be, ended in the middle, empty, twice, and with a picture's token in it
        return [[group[0] + [9] * 99, [group[1][0], end, 9, 9], [], group[2], group[2], [media, 9]] for group in said]
    return [[] for _ in said]


def sampled(
    model: Any, batch: Any, config: GenerationConfig, drafts: Any = None, *, num_greedy: int = 0, **settings: Any
) -> Samples:
    """Samples of a batch under the uniforms of seed 5."""
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, config.max_new_tokens)
    request = SamplingRequest(
        SamplingRules(config), uniforms, drafts or [[]] * len(uniforms), config.pad_token_id, num_greedy=num_greedy
    )
    (samples,) = sample_batch(model, batch, settings.pop("features", None), request, **settings)
    return samples


def padded(completions: list[list[int]], length: int) -> torch.Tensor:
    pad = toy_processor().tokenizer.pad_token_id
    return torch.tensor([ids + [pad] * (length - len(ids)) for ids in completions])


@torch.no_grad()
def oracle(model: Any, batch: Any, config: GenerationConfig) -> tuple[list[list[int]], list[list[float]]]:
    """Every prefix computed anew for every token, as a row of its own; tokens by a plain search of the uniform.

    Transformers' own `generate` decides the distribution: it is asked for one token, and for the scores behind it.
    """
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, config.max_new_tokens)
    grids = batch["image_grid_thw"].split(batch["num_images"])
    pixels = batch["pixel_values"].split([int(grid.prod(dim=1).sum()) for grid in grids])
    completions, margins = [], []
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        prompt, kinds = ids[mask], batch["mm_token_type_ids"][number][mask]
        for rollout in range(GROUP_SIZE):
            said: list[int] = []
            apart: list[float] = []
            while len(said) < config.max_new_tokens and config.eos_token_id not in said:
                sequence = torch.cat([prompt, torch.tensor(said, dtype=torch.long)])
                logits = model(
                    input_ids=sequence[None],
                    mm_token_type_ids=torch.cat([kinds, torch.zeros(len(said), dtype=torch.long)])[None],
                    pixel_values=pixels[number],
                    image_grid_thw=grids[number],
                ).logits[:, -1]
                processors = model._get_logits_processor(
                    prepared_config(model, config),
                    input_ids_seq_length=len(prompt),
                    model_kwargs={"attention_mask": torch.ones_like(prompt)[None]},
                )
                share = processors(sequence[None], logits.float())[0].double().softmax(0)
                uniform, cumulative = float(uniforms[number, rollout, len(said)]), 0.0
                token, probability = -1, 0.0
                while cumulative <= uniform:
                    token += 1
                    probability = float(share[token])
                    cumulative += probability
                apart.append(min(abs(cumulative - uniform), abs(cumulative - probability - uniform)))
                said.append(token)
            completions.append(said)
            margins.append(apart)
    return completions, margins


def prepared_config(model: Any, config: GenerationConfig) -> GenerationConfig:
    """As `generate` has it when it makes its processors."""
    prepared, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(prepared, True, device="cpu")
    return prepared


def assert_equal_but_for_rounding(
    found: list[list[int]], expected: list[list[int]], margins: list[list[float]]
) -> None:
    """Completions are equal up to a place, if any, where the uniform fell on an edge of the distribution."""
    for ours, theirs, apart in zip(found, expected, margins, strict=True):
        first = next(
            (place for place, (our, their) in enumerate(zip(ours, theirs, strict=False)) if our != their), None
        )
        assert (ours == theirs) if first is None else apart[first] < 1e-5, (ours, theirs, apart)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make_model", [toy_model, adapted_model])
def test_greedy_output_equals_plain_generate_token_for_token(make_model: Any, attention: str) -> None:
    model, batch, config = make_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    base_qwen(model).set_attn_implementation({"text_config": attention})
    expected, scores = repeated_generate_with_scores(model, batch, config)
    found = sampled(model, batch, config, num_greedy=GROUP_SIZE)
    assert_equal_but_for_ties(padded(found.completion_ids, expected.shape[1]), expected, scores)
    # once more, with drafts: what one call left behind must not reach the next
    drafts = drafts_of_kind("right", found.completion_ids)
    again = sampled(model, batch, config, drafts, num_greedy=GROUP_SIZE)
    assert again.completion_ids == found.completion_ids
    assert (found.num_passes, again.num_passes) == (max(map(len, found.completion_ids)), 1)


SAMPLING: dict[str, dict[str, Any]] = {
    "as it is": {},
    "hot": {"temperature": 1.5},
    "with everything": {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "min_new_tokens": 12,
        "suppress_tokens": [4, 5, 6, 7, 40, 41],
        "sequence_bias": [[[42, 43], 3.0], [[9], 2.0]],
    },
}


@pytest.mark.parametrize("name", SAMPLING)
def test_drafts_never_change_what_is_sampled(name: str) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(**{"do_sample": True, "top_k": 0, "max_new_tokens": 20} | SAMPLING[name])
    expected, margins = oracle(model, batch, config)
    assert len({tuple(ids) for ids in expected}) > GROUP_SIZE, "rollouts of one group differ from each other"
    passes = {}
    for kind in ("none", "right", "wrong", "partly right", "odd"):
        found = sampled(model, batch, config, drafts_of_kind(kind, expected))
        assert_equal_but_for_rounding(found.completion_ids, expected, margins)
        passes[kind] = found.num_passes
    assert passes["right"] == 1 < passes["partly right"] < passes["none"] == max(map(len, expected))


def test_one_picture_and_sixteen() -> None:
    model, batch = toy_model(), random_batch(random.Random(6), GROUP_SIZE, (1, 16))
    assert batch["num_images"] == [1, 16]
    config = generation_config(do_sample=True, top_k=0, max_new_tokens=8, temperature=1.5)
    expected, margins = oracle(model, batch, config)
    for kind in ("none", "right"):
        found = sampled(model, batch, config, drafts_of_kind(kind, expected))
        assert_equal_but_for_rounding(found.completion_ids, expected, margins)


def test_a_rollout_that_says_again_what_a_draft_says_goes_on_in_one_pass() -> None:
    model, batch, config = toy_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    said = sampled(model, batch, config, num_greedy=GROUP_SIZE)
    # the drafts open with another word, so every rollout leaves them at once; two tokens later it is back
    drafts = [[[9, *ids]] for ids in said.completion_ids[::GROUP_SIZE]]
    found = sampled(model, batch, config, drafts, num_greedy=GROUP_SIZE)
    assert found.completion_ids == said.completion_ids
    assert found.num_passes == 3 < said.num_passes


def test_rows_of_their_own_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(do_sample=True, temperature=1.5, top_k=0, max_new_tokens=40)
    expected, margins = oracle(model, batch, config)
    monkeypatch.setattr(sampling_passes, "MAX_SLOTS_PER_SEEN", 1.05)
    rows = rows_of_passes(model)
    found = sampled(model, batch, config)
    assert_equal_but_for_rounding(found.completion_ids, expected, margins)
    assert rows[0] == 3 < max(rows), "once groups have grown apart, every rollout has a row"
    assert rows[-1] < 9, "a row is dropped when its rollout has ended"


def test_attention_without_a_mask_of_a_tree_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(do_sample=True, temperature=1.5, top_k=0, max_new_tokens=20)
    expected, margins = oracle(model, batch, config)
    # flash attention cannot run here; what is done for it is done for sdpa, which takes padding masks too
    for module in (tree_sampling, group_passes):
        monkeypatch.setattr(module, "MAX_MASK_PAIRS", {"eager": 2**25})
    found = sampled(model, batch, config, drafts_of_kind("right", expected))
    assert_equal_but_for_rounding(found.completion_ids, expected, margins)
    assert found.first is None and found.num_passes == max(map(len, expected)), "drafts need the mask"


@pytest.mark.parametrize("limit", ["mask", "logits"])
def test_a_pass_that_is_too_large_is_split_by_groups(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(do_sample=True, temperature=1.5, top_k=0, max_new_tokens=20)
    expected, margins = oracle(model, batch, config)
    if limit == "mask":
        monkeypatch.setattr(sampling_pieces, "MAX_MASK_PAIRS", {"sdpa": 2 * (batch["input_ids"].shape[1] + 1) ** 2})
    else:
        monkeypatch.setattr(sampling_pieces, "MAX_LOGITS", 2 * model.config.get_text_config().vocab_size)
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, config.max_new_tokens)
    request = SamplingRequest(SamplingRules(config), uniforms, [[]] * 3, config.pad_token_id)
    rows = rows_of_passes(model)
    found = sample_batch(model, batch, None, request)
    assert [len(samples.completion_ids) for samples in found] == [3, 6] and set(rows) == {1, 2}
    completions = [ids for samples in found for ids in samples.completion_ids]
    assert_equal_but_for_rounding(completions, expected, margins)
    # another rank may need more pieces
    assert len(sample_batch(model, batch, None, request, most_of_ranks=lambda count: count and max(count, 3))) == 3


def test_pieces_are_as_few_as_the_limits_allow() -> None:
    # 76 million logits of 2,147 million, and 4 million pairs of 537 million, a prompt
    pieces = {count: num_pieces_of(count, 1500, 501, 151_936, "sdpa") for count in (1, 28, 29, 56, 57, 1000)}
    assert pieces == {1: 1, 28: 1, 29: 2, 56: 2, 57: 3, 1000: 36}
    # a prompt beyond all limits still has one, and without a mask or drafts many go together
    assert num_pieces_of(2, 10**6, 501, 151_936, "sdpa") == 2
    assert num_pieces_of(1000, 1500, 1, 151_936, "flash_attention_2") == 1


def test_draws_of_a_few_nodes_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy_model(), batch_of_unequal_prompts()
    config = generation_config(do_sample=True, temperature=1.5, top_k=0, top_p=0.9, max_new_tokens=12)
    drafts = drafts_of_kind("right", oracle(model, batch, config)[0])
    found = sampled(model, batch, config, drafts)
    sizes, scores = list[int](), SamplingRules.scores

    def noted(*arguments: Any) -> torch.Tensor:
        sizes.append(len(arguments[-1]))
        return scores(*arguments)

    monkeypatch.setattr(SamplingRules, "scores", noted)
    monkeypatch.setattr(tree_sampling, "CHUNK_SIZE", 5 * model.config.get_text_config().vocab_size)
    again = sampled(model, batch, config, drafts)
    assert max(sizes) == 5 and sum(sizes) > 20
    assert again.completion_ids == found.completion_ids
    for ours, theirs in zip(again.logps, found.logps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_rank_that_has_ended_goes_on_for_the_others() -> None:
    model, batch, config = toy_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    alone = sampled(model, batch, config, num_greedy=GROUP_SIZE)
    rows = rows_of_passes(model)
    calls: list[int] = []

    def most_of_ranks(count: int) -> int:
        calls.append(count)
        return 1 if len(calls) < 40 else 0

    found = sampled(model, batch, config, num_greedy=GROUP_SIZE, most_of_ranks=most_of_ranks)
    assert found.completion_ids == alone.completion_ids
    assert len(rows) == 39 > alone.num_passes


def test_frequencies_on_a_tiny_vocabulary_are_the_exact_probabilities() -> None:
    # two tokens out of four, by hand; chi-square with 15 degrees of freedom is above 45 once in 10,000
    first = torch.tensor([0.1, 0.2, 0.3, 0.4])
    behind = torch.tensor([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.0, 0.5], [0.05, 0.15, 0.3, 0.5]])
    uniforms = torch.from_numpy(named_uniforms(3, 7, [12], 5000, 2)[0])
    tokens, logps = draw_tokens(first.log()[None], uniforms[None, :, 0])
    following, _ = draw_tokens(behind.log()[tokens[0]], uniforms[:, 1:])
    counts = torch.zeros(4, 4).index_put_((tokens[0], following[:, 0]), torch.ones(5000), accumulate=True)
    expected = 5000 * first[:, None] * behind
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert ((counts - expected)[possible].square() / expected[possible]).sum() < 45
    torch.testing.assert_close(logps[0].exp().float(), first[tokens[0]])


def test_a_uniform_draws_where_the_cumulative_distribution_passes_it() -> None:
    shares = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = torch.tensor([[0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(shares.log(), uniforms)[0].tolist() == [[1, 1, 3, 3, 4, 4]]
    # a sum that rounding leaves below the uniform
    assert draw_tokens(torch.full((1, 7), -1.0), torch.tensor([[1.0]], dtype=torch.float64))[0].tolist() == [[6]]
    assert draw_tokens(shares.log(), uniforms, num_greedy=2)[0].tolist() == [[3, 3, 3, 3, 4, 4]]


def test_a_draw_depends_on_its_name_alone() -> None:
    both = named_uniforms(1, 2, [10, 11], 3, 5)
    assert (named_uniforms(1, 2, [11], 3, 5) == both[1:]).all()
    assert (named_uniforms(1, 2, [10], 2, 9)[:, :, :5] == both[:1, :2]).all()
    names = [(1, 2, [10]), (1, 2, [11]), (1, 3, [10]), (2, 2, [10])]
    assert len({named_uniforms(*name, 1, 1).item() for name in names}) == 4
    everything = named_uniforms(2**62, 10**7, range(64), 64, 64)
    assert len(np.unique(everything)) == 64**3 and everything.min() >= 0 and everything.max() < 1
    assert abs(everything.mean() - 0.5) < 0.003
    # the first two doubles of Philox 4x64 with this key, from numpy itself
    generator = np.random.Generator(np.random.Philox(key=np.array([1, 2], np.uint64), counter=[0, 0, 10, 0]))
    assert both[0, 0, :2].tolist() == generator.random(2).tolist()


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"no_repeat_ngram_size": 3}, {"typical_p": 0.2}, {"stop_strings": ["x"]}]
)
def test_what_sampling_on_trees_does_not_do_is_refused(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    words = re.escape(f"generation asks for {name}={value}, but sampling behind a shared prompt takes")
    with pytest.raises(ValueError, match=words + ".* pass --shared_prefix false"):
        SamplingRules(generation_config(do_sample=True, **settings))


def rows_of_passes(model: Any) -> list[int]:
    """The rows of every pass of the language model from now on."""
    rows: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    return rows


def test_features_stand_for_pixels() -> None:
    model, batch, config = toy_model(), batch_of_unequal_prompts(), generation_config(do_sample=False)
    features = [encode_image(model, batch, place) for place in range(10)]
    assert [tuple(image.shape) for image in features] == [(4, 96)] * 10
    expected, scores = repeated_generate_with_scores(model, batch, config)
    found = sampled(model, batch, config, num_greedy=GROUP_SIZE, features=features)
    assert_equal_but_for_ties(padded(found.completion_ids, expected.shape[1]), expected, scores)
    # and the model does read them: another picture has other features
    assert (features[9] - features[0]).abs().max() > 0.01


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
    inner = toy_model().model
    gone = "transformers changed Qwen2_5_VLModel: fleet/qwen/group_passes.py must follow before transformers' pin moves"
    taken = inspect.signature(inner.get_rope_index).parameters.keys()
    assert {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"} <= taken, gone
    assert hasattr(inner, "rope_deltas") and hasattr(inner, "visual") and hasattr(inner, "language_model"), gone
    assert {"pixel_values", "image_grid_thw"} <= inspect.signature(inner.get_image_features).parameters.keys(), gone


def test_padding_of_a_prompt_is_no_repetition() -> None:
    batch = batch_of_unequal_prompts()
    prompts = group_passes.tree_prompts(toy_model(), batch)
    rules = SamplingRules(generation_config(do_sample=True, top_k=0, repetition_penalty=2.0))
    scores = rules.scores(torch.ones(3, 402), prompts, [Branches() for _ in range(3)], [(0, 0), (1, 0), (2, 0)])
    padding = toy_processor().tokenizer.pad_token_id
    for row, ids in enumerate(batch["input_ids"]):
        seen = set(ids[batch["attention_mask"][row].bool()].tolist()) - {6, 7}
        assert padding not in seen and scores[row, padding] == 1.0
        assert {float(scores[row, token]) for token in seen} == {0.5}
