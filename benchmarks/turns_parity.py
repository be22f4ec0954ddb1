"""Rollouts of several turns on the token tree against rows of their own through the plain model: a table of gaps.

    python benchmarks/turns_parity.py

Two groups of four rollouts that end after different numbers of turns, on the toy, in float32; tools answer with text
and 0, 1 or 2 pictures. The rows' images, positions and masks are left to transformers. tests/qwen/test_turns.py holds
the same gaps to 1e-5 and 1e-4.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.qwen.group_passes import encode_pictures, image_inputs, score_tree, tree_prompts
from fleet.qwen.observations import Picture, encode_observation
from fleet.qwen.token_tree import GivenToken, PathToken, by_rollout, tree_of_rollouts
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS, toy_model_path
from model_utils import load_qwen25_vl

GROUP_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_turns", type=int, nargs="+", default=[2, 4], help="(default: 2 4)")
    parser.add_argument("--num_pictures", type=int, nargs="+", default=[0, 1, 2], help="an answer (default: 0 1 2)")
    arguments = parser.parse_args()
    model, processor = load_qwen25_vl(str(toy_model_path()))
    print("| turns | pictures an answer | log-probabilities, largest gap | gradients, largest relative gap |")
    print("|---|---|---|---|")
    for max_turns in arguments.max_turns:
        for num_pictures in arguments.num_pictures:
            gap_of_logps, gap_of_gradients = gaps(model, processor, num_pictures, max_turns)
            print(f"| {max_turns} | {num_pictures} | {gap_of_logps:.1e} | {gap_of_gradients:.1e} |")


def gaps(model: Any, processor: Any, num_pictures: int, max_turns: int) -> tuple[float, float]:
    """(largest absolute gap of a token's log-probability, largest gap of a parameter's gradient over its norm).

    num_pictures: in each answer of a tool. The gradients are of a random weighting of all log-probabilities; one below
    1e-5 of the largest counts as that large.
    """
    batch, answers = two_prompts(processor), Showing(processor, num_pictures, max_turns)
    rows = [scripted_path(row, answers) for row in range(2 * GROUP_SIZE)]
    paths = [rows[:GROUP_SIZE], rows[GROUP_SIZE:]]
    tree = tree_of_rollouts(tree_prompts(model, batch), paths, processor.tokenizer.pad_token_id)
    behind = [[answers.pictures[digest] for digest in row] for row in tree.pictures]
    images = image_inputs(batch, slice(0, len(paths)), None, behind)
    logps = score_tree(model, tree, images, "sdpa", 1.0).logps
    found = by_rollout(logps, tree).flatten(0, 1)
    expected = torch.zeros_like(found)
    for row, path in enumerate(rows):
        own = row_logps(model, batch, row // GROUP_SIZE, path, answers)
        expected[row, : len(own)] = own
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = gradients_of(model, (found * weights).sum())
    wanted = gradients_of(model, (expected * weights).sum())
    largest = max(gradient.norm() for gradient in wanted.values())
    relative = [
        (gradients[name] - gradient).norm() / max(gradient.norm(), 1e-5 * largest) for name, gradient in wanted.items()
    ]
    return (found - expected).abs().max().item(), max(map(float, relative))


def gradients_of(model: Any, weighted_sum: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter."""
    model.zero_grad()
    weighted_sum.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def two_prompts(processor: Any) -> Any:
    """Prompts of 2 and 3 pictures, one of them padded."""
    lines = []
    for number, candidates in enumerate((2, 3)):
        dataset = RepeatableEpisodeDataset(PickImageEnv(TOY_DATA_ROOT, candidates, None, seed=3), TOY_IMAGE_PIXELS)
        lines += [dataset[number]] * GROUP_SIZE
    return VLMDataCollator(processor, GROUP_SIZE)(lines)


class Showing:
    """Answers a turn by its last words' number: in one of three ways."""

    def __init__(self, processor: Any, num_pictures: int, max_turns: int):
        self.processor = processor
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
        tokens, pictures = encode_observation(self.processor, f"answer {kind}", images)
        self.pictures |= pictures
        return tokens


def scripted_path(row: int, answers: Showing) -> list[PathToken]:
    """A rollout of as many turns as its place says, up to `max_turns`; siblings begin alike, as far as both go."""
    group, rollout = divmod(row, GROUP_SIZE)
    rng, end = random.Random(group), answers.processor.tokenizer.eos_token_id
    path, turns = list[PathToken](), list[list[int]]()
    for number in range(1 + rollout % answers.max_turns):
        # the last two rollouts say something else in their second turn
        start = 100 if number == 1 and rollout > 1 else 8
        turns.append([rng.randrange(start, 300) for _ in range(1 + number)] + [end])
        path += turns[-1]
        if number < rollout % answers.max_turns:
            path += answers(group, turns)
    return path


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
        "mm_token_type_ids": (row == answers.processor.image_token_id).long()[None],
        "pixel_values": torch.cat([batch["pixel_values"][slice(*patches)], *(picture.pixels for picture in shown)]),
        "image_grid_thw": torch.cat([grids[slice(*starts)], *(picture.grid_3[None] for picture in shown)]),
    }


def row_logps(model: Any, batch: Any, number: int, path: Sequence[PathToken], answers: Showing) -> torch.Tensor:
    """The oracle: log-probabilities of the sampled tokens of one conversation, through the plain model's logits."""
    inputs = row_inputs(batch, number, path, answers)
    places = [place for place, token in enumerate(path) if not isinstance(token, GivenToken)]
    logits = model(**inputs).logits[0, -len(path) - 1 : -1]
    return logits.log_softmax(-1)[places].gather(1, inputs["input_ids"][0, -len(path) :][places][:, None])[:, 0]


if __name__ == "__main__":
    main()
