"""The dimensions of the published Qwen2.5-VL models, for a plan where the hub cannot be asked.

As their config.json on the hub has them (Qwen2.5-VL Technical Report, arXiv 2502.13923, table 1, has the widths and
depths). A model's folder, or the hub's cache, is read instead where it is there.
"""

from typing import Any

from transformers import Qwen2_5_VLConfig

# text: width, MLP width, layers, heads, key-value heads, vocabulary, is the head tied to the embeddings; vision: MLP
# width. The towers are alike else.
PUBLISHED: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}
PIXELS_OF_PROCESSOR = (56 * 56, 28 * 28 * 16_384)  # least and most of one picture


def published_config(model_id: str) -> Any:
    """The configuration of `Qwen/Qwen2.5-VL-<size>-Instruct`; None for any other name."""
    size = model_id.removeprefix("Qwen/Qwen2.5-VL-").removesuffix("-Instruct")
    if model_id != f"Qwen/Qwen2.5-VL-{size}-Instruct" or size not in PUBLISHED:
        return None
    width, mlp, layers, heads, kv_heads, vocabulary, is_tied, vision_mlp = PUBLISHED[size]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_mlp,
            "num_heads": 16,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=is_tied,
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
    )
