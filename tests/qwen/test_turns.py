"""Several turns with pictures between them: on the tree, and as a row of their own through the plain model."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.qwen import group_passes
from fleet.qwen.draws import named_uniforms
from fleet.qwen.group_passes import encode_pictures, image_inputs, score_tree, tree_prompts
from fleet.qwen.observations import Picture, encode_observation
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import GivenToken, PathToken, by_rollout, tree_of_rollouts
from fleet.qwen.tree_sampling import Samples, SamplingRequest, sample_batch
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from tests.helpers import toy_model, toy_processor
from tests.qwen.test_token_tree import PAD, gradients_of
from tests.qwen.test_tree_sampling import adapted_model, generation_config

GROUP_SIZE = 4
NUM_TOKENS = 24  # of a turn


def two_prompts() -> Any:
    """Prompts of 2 and 3 pictures, one of them padded."""
    lines = []
    for number, candidates in enumerate((2, 3)):
        dataset = RepeatableEpisodeDataset(PickImageEnv(TOY_DATA_ROOT, candidates, None, seed=3), TOY_IMAGE_PIXELS)
        lines += [dataset[number]] * GROUP_SIZE
    return VLMDataCollator(toy_processor(), GROUP_SIZE)(lines)


class Showing:
    """Answers a turn by its last words' number: in one of three ways."""

    def __init__(self, num_pictures: int, max_turns: int):
        self.num_pictures, self.max_turns = num_pictures, max_turns
        self.pictures: dict[bytes, Picture] = {}
        self.num_asked = 0

    def shown(
        self, model: Any, digests: Sequence[bytes], most_of_ranks: Any
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        pictures = [self.pictures[digest] for digest in digests]
        if not pictures:
            return [], torch.empty(0, 3)
        return encode_pictures(model, pictures), torch.stack([picture.grid_3 for picture in pictures])

    def __call__(self, group: int, turns: Sequence[Sequence[int]]) -> Sequence[GivenToken]:
        self.num_asked += 1
        if len(turns) >= self.max_turns:
            return ()
        kind = sum(turns[-1]) % 3
        rng = random.Random(f"{group} {kind} {len(turns)}")
        sides = [(28 * rng.randrange(1, 4), 28 * rng.randrange(1, 4)) for _ in range(self.num_pictures)]
        images = [Image.new("RGB", side, (rng.randrange(256), 90, kind * 90)) for side in sides]
        tokens, pictures = encode_observation(toy_processor(), f"answer {kind}", images)
        self.pictures |= pictures
        return tokens


def scripted_path(row: int, answers: Showing) -> list[PathToken]:
    """A rollout of as many turns as its place says, up to `max_turns`; siblings begin alike, as far as both go."""
    group, rollout = divmod(row, GROUP_SIZE)
    rng, end = random.Random(group), toy_processor().tokenizer.eos_token_id
    path, turns = list[PathToken](), list[list[int]]()
    for number in range(1 + rollout % answers.max_turns):
        # the last two rollouts say something else in their second turn
        start = 100 if number == 1 and rollout > 1 else 8
        turns.append([rng.randrange(start, 300) for _ in range(1 + number)] + [end])
        path += turns[-1]
        if number < rollout % answers.max_turns:
            path += answers(group, turns)
    return path


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


def row_inputs(batch: Any, number: int, path: Sequence[PathToken], answers: Showing) -> dict[str, Any]:
    """A conversation as the plain model takes it: one row, its images in order, its positions left to the model."""
    mask = batch["attention_mask"][number].bool()
    starts = [sum(batch["num_images"][:end]) for end in (number, number + 1)]
    grids = batch["image_grid_thw"]
    patches = [int(grids[:start].prod(dim=1).sum()) for start in starts]
    shown = [
        answers.pictures[token.picture]
        for token in path
        if isinstance(token, GivenToken) and token.picture is not None and token.begins_picture
    ]
    ids = torch.tensor([token.token if isinstance(token, GivenToken) else token for token in path], dtype=torch.long)
    row = torch.cat([batch["input_ids"][number][mask], ids])
    return {
        "input_ids": row[None],
        "mm_token_type_ids": (row == toy_processor().image_token_id).long()[None],
        "pixel_values": torch.cat([batch["pixel_values"][slice(*patches)], *(picture.pixels for picture in shown)]),
        "image_grid_thw": torch.cat([grids[slice(*starts)], *(picture.grid_3[None] for picture in shown)]),
    }


def row_logps(model: Any, batch: Any, number: int, path: Sequence[PathToken], answers: Showing) -> torch.Tensor:
    """The oracle: log-probabilities of the sampled tokens of one conversation, through the plain model's logits."""
    inputs = row_inputs(batch, number, path, answers)
    places = [place for place, token in enumerate(path) if not isinstance(token, GivenToken)]
    logits = model(**inputs).logits[0, -len(path) - 1 : -1]
    return logits.log_softmax(-1)[places].gather(1, inputs["input_ids"][0, -len(path) :][places][:, None])[:, 0]


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
@pytest.mark.parametrize("max_turns", [2, 4])
def test_turns_on_the_tree_score_as_rows_of_their_own(num_pictures: int, max_turns: int) -> None:
    model, batch = toy_model(), two_prompts()
    answers = Showing(num_pictures, max_turns)
    rows = [scripted_path(row, answers) for row in range(2 * GROUP_SIZE)]
    paths = [rows[:GROUP_SIZE], rows[GROUP_SIZE:]]
    tree = tree_of_rollouts(tree_prompts(model, batch), paths, PAD)
    behind = [[answers.pictures[digest] for digest in row] for row in tree.pictures]
    images = image_inputs(batch, slice(0, len(paths)), None, behind)
    logps, _ = score_tree(model, tree, images, "sdpa", 1.0)
    found = by_rollout(logps, tree).flatten(0, 1)
    expected = torch.zeros_like(found)
    for row, path in enumerate(rows):
        own = row_logps(model, batch, row // GROUP_SIZE, path, answers)
        expected[row, : len(own)] = own
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)

    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = gradients_of(model, (found * weights).sum())
    expected_gradients = gradients_of(model, (expected * weights).sum())
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        scale = max(gradient.norm(), 1e-5 * largest)
        assert (gradients[name] - gradient).norm() <= 1e-4 * scale, name


@pytest.mark.parametrize("make_model", [toy_model, adapted_model])
@pytest.mark.parametrize("num_pictures", [0, 2])
def test_turns_are_sampled_as_a_row_of_their_own_is(num_pictures: int, make_model: Any) -> None:
    model, batch = make_model(), two_prompts()
    config = generation_config(do_sample=True, top_k=0, max_new_tokens=NUM_TOKENS, temperature=1.3)
    answers, end = Showing(num_pictures, 3), toy_processor().tokenizer.eos_token_id
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
    model, batch = toy_model(), two_prompts()
    config = generation_config(do_sample=True, top_k=0, max_new_tokens=NUM_TOKENS, temperature=1.3)
    whole = sampled(model, batch, config, Showing(1, 2))
    monkeypatch.setitem(group_passes.MAX_MASK_PAIRS, "sdpa", 1)
    uniforms = named_uniforms(5, 0, batch["numbers"], GROUP_SIZE, 2 * NUM_TOKENS)
    end = toy_processor().tokenizer.eos_token_id
    request = SamplingRequest(
        SamplingRules(config), uniforms, [[], []], config.pad_token_id, answers=Showing(1, 2), turn_end_id=end
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
