"""Log-probabilities by plain transformers and PEFT alone, and the hub's names: what an export is compared with."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tests.helpers import REPOSITORY

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Answer by a call of pick_image."}]},
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Pick the red circle."}],
    },
]

# the names of Qwen/Qwen2.5-VL-3B-Instruct on the hub
HUB_NAMES = re.compile(
    r"visual\.(patch_embed\.proj|merger\.(ln_q|mlp\.[02])|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.\w+_proj))"
    r"\.(weight|bias)|model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj|\w+_layernorm)\.(weight|bias)"
)


def plain_model(
    folder: Path | str, adapter: Path | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def logprobs_T(folder: Path | str, adapter: Path | str | None = None) -> torch.Tensor:
    """Of a model's folder, with an adapter on it if one is given. See logprobs_of."""
    return logprobs_of(plain_model(folder, adapter), folder)


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, folder: Path | str) -> torch.Tensor:
    """(T,) of every token of a prompt with two pictures and its answer, given those before. folder: a processor's."""
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[text_of(processor)], images=pictures_shown(), return_tensors="pt")
    logits = model.eval()(**inputs).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]


def text_of(processor: Any) -> str:
    """The prompt and its answer, with a placeholder for each picture."""
    prompt = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return prompt + '<tool_call>\n{"name": "pick_image", "arguments": {"index": 0}}\n</tool_call><|im_end|>'


def pictures_shown() -> list[Image.Image]:
    paths = [REPOSITORY / "toy_images" / f"{name}.png" for name in ("red_circle", "cyan_ring")]
    return [Image.open(path).convert("RGB") for path in paths]
