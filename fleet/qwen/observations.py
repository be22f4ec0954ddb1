"""What a tool answers, as tokens given behind a call, and its pictures as the model takes them.

Qwen2.5-VL's chat template has no place for a tool's answer, so the form is fixed here: a user's turn that holds it.
What the model said stays as it was sampled, and is never encoded again. Knows no environment and no tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from fleet.qwen.token_tree import GivenToken
from utils.images import image_digest

TURN_END = "<|im_end|>"  # of the model's own turn, behind which a tool may answer
OPENING = "\n<|im_start|>user\n<tool_response>\n"
CLOSING = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Picture:
    """One picture of an observation as the model takes it."""

    pixels: Tensor  # (patches, width of one) float32
    grid_3: Tensor  # int64: time, height and width in patches
    features: Tensor | None = None  # (image tokens, width), in host memory, where vision is frozen


def encode_observation(
    processor: Any, text: str, images: Sequence[Image.Image]
) -> tuple[list[GivenToken], dict[bytes, Picture]]:
    """The tokens of an observation, its text before its pictures, and the pictures by their digests.

    images: opened, within the pixel budget. A picture's tokens have places on a grid of their own, as the model's
    get_rope_index has them; text goes on behind the larger of its sides.
    """
    fragment = f"{OPENING}{text}{PICTURE * len(images)}{CLOSING}"
    encoded = processor(text=[fragment], images=list(images) or None, return_tensors="pt")
    digests = [image_digest(image) for image in images]
    sides = [
        tuple(side // processor.image_processor.merge_size for side in grid[1:])
        for grid in (encoded["image_grid_thw"].tolist() if digests else [])
    ]
    tokens, ids = list[GivenToken](), iter(encoded["input_ids"][0].tolist())
    waiting = iter(zip(digests, sides, strict=True))
    for token in ids:
        if token != processor.image_token_id:
            tokens.append(GivenToken(token))
            continue
        digest, (height, width) = next(waiting)
        places = [(row, column) for row in range(height) for column in range(width)]
        for number, (row, column) in enumerate(places):
            is_last = number == len(places) - 1
            tokens.append(GivenToken(token, digest, (0, row, column), step=max(height, width) if is_last else 0))
            if not is_last:
                next(ids)
    if not digests:
        return tokens, {}
    grids = encoded["image_grid_thw"]
    pixels = encoded["pixel_values"].split([int(grid.prod()) for grid in grids])
    return tokens, {
        digest: Picture(patches, grid) for digest, patches, grid in zip(digests, pixels, grids, strict=True)
    }
