"""The ratio that arithmetic alone would give: operations of stock TRL's passes over those of Fleet's.

Of completions that share nothing and that no draft guesses, each sampled in one pass and trained on in another.

Counts the query-key pairs that a mask allows, not those a kernel computes, so a share below 1 also shows what dense
masks cost.
"""

import argparse
from typing import Any

import torch

from fleet.qwen.flops import TextWork, text_flops, vision_flops

Costs = tuple[float, float]  # stock's operations, Fleet's


class Work:
    """The arithmetic of one episode's step under step_time.py's settings."""

    def __init__(self, arguments: argparse.Namespace, trainer: Any, encoded_share: float | None):
        """encoded_share: of the images that Fleet's cache has to encode; None without a cache."""
        self.arguments, self.config = arguments, trainer.model.config
        row = trainer.train_dataset[0]
        self.prompt = int(trainer.data_collator([row] * arguments.num_rollouts)["attention_mask"].sum())
        side = arguments.image_side_px // self.config.vision_config.patch_size
        images = vision_flops(self.config, [(1, side, side)] * arguments.num_images)
        self.vision = arguments.num_rollouts * images, images if encoded_share is None else 0.0
        self.encoding = self.vision[0], images if encoded_share is None else images * encoded_share
        ids_of, env = trainer.processing_class.tokenizer, trainer.env
        drafts = [ids_of(text)["input_ids"] for text in env.drafts(env.episode(0))]
        self.drafted = {tuple(ids[:end]) for ids in drafts for end in range(1, len(ids) + 1)}

    def step_ratio(self) -> float:
        """Of a whole step's passes."""
        stock, fleet = self.step_costs()
        return stock / fleet

    def step_costs(self) -> Costs:
        """Of generation, scoring where there is any, and training; LoRA's own small products are left out."""
        parts = [self._generate(), self._score(), self._train()]
        return sum(stock for stock, _ in parts), sum(fleet for _, fleet in parts)

    def train_ratio(self) -> float:
        """Of the training pass, forward and backward."""
        stock, fleet = self._train()
        return stock / fleet

    def _train(self) -> Costs:
        arguments, text = self.arguments, self._text()
        # a trained weight costs a pass for its input's gradient and one for its own
        text_passes = 2 if arguments.use_lora else 3
        vision_passes = 1 if arguments.use_lora or arguments.freeze else 3
        if arguments.gradient_checkpointing:
            text_passes, vision_passes = text_passes + 1, vision_passes + (vision_passes == 3)
        stock, fleet = (text_passes * text[kind] + vision_passes * self.vision[kind] for kind in (0, 1))
        return stock, fleet

    def _score(self) -> Costs:
        text, of_reference = self._text(), 1 if self.arguments.beta else 0
        return (1 + of_reference) * (text[0] + self.vision[0]), of_reference * (text[1] + self.vision[1])

    def _generate(self) -> Costs:
        length, size = self.arguments.completion_tokens, self.arguments.num_rollouts
        row, prompt = self.prompt + length - 1, self.prompt
        stock = TextWork(size * row, size * _triangle(row), size * length)
        # drafts are computed in vain: none of them is right
        depths = [len(beginning) for beginning in self.drafted if len(beginning) < length]
        behind = len(depths) + size * (length - 1)
        decoded_pairs = size * (_triangle(row) - _triangle(prompt))
        drafted_pairs = len(depths) * prompt + sum(depths)
        fleet = TextWork(prompt + behind, _triangle(prompt) + drafted_pairs + decoded_pairs, 1 + behind)
        return text_flops(self.config, stock) + self.encoding[0], text_flops(self.config, fleet) + self.encoding[1]

    def _text(self) -> Costs:
        """The language model forward over completions and their prompts."""
        length, size = self.arguments.completion_tokens, self.arguments.num_rollouts
        row, prompt = self.prompt + length, self.prompt
        branch_pairs = size * (_triangle(row - 1) - _triangle(prompt))
        tokens = size * row, prompt + size * (length - 1)
        pairs = size * _triangle(row), _triangle(prompt) + branch_pairs
        # TRL's fused head projects the scored tokens alone on a GPU, and every token on a CPU
        scored = size * length if torch.cuda.is_available() else tokens[0], size * length
        stock, fleet = (text_flops(self.config, TextWork(tokens[kind], pairs[kind], scored[kind])) for kind in (0, 1))
        return stock, fleet


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
