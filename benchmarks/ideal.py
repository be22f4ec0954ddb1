"""The ratio that arithmetic alone would give: operations of stock TRL's passes over those of Fleet's.

Counts the query-key pairs that a mask allows, not those a kernel computes, so a share below 1 also shows what dense
masks cost.
"""

import argparse
from typing import Any

from flops import TextWork, text_flops, vision_flops

Costs = tuple[float, float]  # stock, fleet


def prompt_tokens(trainer: Any) -> int:
    """Tokens of the first prompt, images included."""
    row = trainer.train_dataset[0]
    return int(trainer.data_collator([row] * trainer.num_generations)["attention_mask"].sum())


def train_ratio(arguments: argparse.Namespace, trainer: Any) -> float:
    """Of the training pass, forward and backward."""
    stock, fleet = _train(arguments, trainer)
    return stock / fleet


def step_ratio(arguments: argparse.Namespace, trainer: Any) -> float:
    """Of a whole step's passes: generation, scoring where there is any, training."""
    parts = [_generate(arguments, trainer), _score(arguments, trainer), _train(arguments, trainer)]
    return sum(stock for stock, _ in parts) / sum(fleet for _, fleet in parts)


def _train(arguments: argparse.Namespace, trainer: Any) -> Costs:
    text, vision = _forward(arguments, trainer)
    # a trained weight costs a pass for its input's gradient and one for its own
    text_passes = 2 if arguments.use_lora else 3
    vision_passes = 1 if arguments.use_lora or arguments.freeze_vision else 3
    if arguments.gradient_checkpointing:
        text_passes, vision_passes = text_passes + 1, vision_passes + (vision_passes == 3)
    return text_passes * text[0] + vision_passes * vision[0], text_passes * text[1] + vision_passes * vision[1]


def _score(arguments: argparse.Namespace, trainer: Any) -> Costs:
    text, vision = _forward(arguments, trainer)
    of_reference = 1 if arguments.beta else 0
    return (1 + of_reference) * (text[0] + vision[0]), of_reference * (text[1] + vision[1])


def _generate(arguments: argparse.Namespace, trainer: Any) -> Costs:
    config, prompt = trainer.model.config, prompt_tokens(trainer)
    length, size = arguments.completion_tokens, arguments.num_rollouts
    _, vision = _forward(arguments, trainer)
    stock = TextWork(size * (prompt + length - 1), size * _triangle(prompt + length - 1), size * length)
    prefix = prompt - 1
    decoding = size * (_triangle(prefix + length) - _triangle(prefix))
    fleet = TextWork(prefix + size * length, _triangle(prefix) + decoding, size * length)
    return text_flops(config, stock) + vision[0], text_flops(config, fleet) + vision[1]


def _forward(arguments: argparse.Namespace, trainer: Any) -> tuple[Costs, Costs]:
    """Language model and vision tower, one episode forward: stock's operations and Fleet's."""
    config, prompt = trainer.model.config, prompt_tokens(trainer)
    length, size = arguments.completion_tokens, arguments.num_rollouts
    stock = TextWork(size * (prompt + length), size * _triangle(prompt + length), size * length)
    branches = size * (_triangle(prompt - 1 + length) - _triangle(prompt - 1))
    fleet = TextWork(prompt - 1 + size * length, _triangle(prompt - 1) + branches, size * length)
    side = arguments.image_side_px // config.vision_config.patch_size
    images = vision_flops(config, [(1, side, side)] * arguments.num_images)
    is_cached = trainer.vision_cache is not None
    return (text_flops(config, stock), text_flops(config, fleet)), (size * images, 0 if is_cached else images)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
