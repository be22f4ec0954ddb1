"""A model for the tests of a real vLLM: the toy's parts at the smallest sizes that its CPU kernels take."""

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fleet.toy.model import make_toy_model, make_toy_processor


def build(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2.5-VL with heads of 32; its vocabulary is so large that a banned token is of no weight."""
    processor = make_toy_processor()
    toy = make_toy_model(processor)
    settings = toy.config.to_dict()
    rope = settings["text_config"]["rope_parameters"] | {"mrope_section": [4, 6, 6]}
    settings["text_config"] |= {"hidden_size": 128, "vocab_size": 8192, "rope_parameters": rope}
    settings["vision_config"] |= {"out_hidden_size": 128}
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    model.generation_config = toy.generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
