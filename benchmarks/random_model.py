"""Qwen2.5-VL models of chosen sizes with random weights, and pictures of noise: what a benchmark needs and no hub.

The sizes of 3b, 7b and 32b are those of the published models; 30m keeps 3b's proportions (see docs/performance.md). The
processor is the toy's, whose vocabulary is a part of every size's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fleet.planning.published import PUBLISHED
from fleet.toy.model import make_toy_processor

# text: width, MLP width, layers, heads, key-value heads, vocabulary; vision: depth, width, MLP width, heads
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "2m": ((128, 512, 4, 4, 2, 512), (3, 64, 192, 4)),
    "30m": ((512, 2304, 5, 8, 2, 4096), (5, 288, 768, 4)),
    "150m": ((768, 3072, 12, 12, 2, 32_768), (6, 384, 1024, 6)),
    **{size.lower(): (tuple(text), (32, 1280, vision_mlp, 16)) for size, (*text, _, vision_mlp) in PUBLISHED.items()},
}


def build(folder: Path, size: str, image_side_px: int, dtype: torch.dtype, seed: int = 0) -> int:
    """Writes a model and its processor to a folder that `from_pretrained` opens; returns the number of parameters.

    image_side_px: a multiple of 28, the side of a patch after merging; pictures of that side are left as they are.
    """
    processor = make_toy_processor()
    pixels = {"shortest_edge": image_side_px**2, "longest_edge": image_side_px**2}
    processor.image_processor.size = pixels
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = Qwen2_5_VLForConditionalGeneration(configuration(size, processor))
        torch.set_default_dtype(default)
    stops = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**stops)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def configuration(size: str, processor: Any) -> Qwen2_5_VLConfig:
    """The configuration of a size, with the processor's special tokens."""
    (width, mlp, layers, heads, kv_heads, vocabulary), (depth, vision_width, vision_mlp, vision_heads) = SIZES[size]
    token_id = processor.tokenizer.convert_tokens_to_ids
    half_head = width // heads // 2
    quarter = half_head // 4  # as published: a quarter for time, the rest halved between height and width
    section = [half_head - 2 * ((half_head - quarter) // 2), *[(half_head - quarter) // 2] * 2]
    full_attention = list(range(7, depth, 8)) or [depth - 1]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_mlp,
            "num_heads": vision_heads,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": full_attention,
        },
        tie_word_embeddings=size in ("2m", "30m", "3b"),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def draw_noise(folder: Path, count: int, side_px: int, seed: int = 0) -> None:
    """Writes `count` square pictures of random pixels, named so that each has a label of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        name = "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")
        Image.fromarray(pixels).save(folder / f"noise_{name}.png")
