"""The plain toy model's lesson before RLOO: the form of a call, and a uniform choice of index.

Owns one short supervised stage. The model sees pictures, but its lesson does not depend on them.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import Episode, PickImageEnv
from fleet.progress import count_progress
from utils.tool_calls import make_tool_call_str

INSTRUCTION_WORDS = (
    "pick the one that is correct red green blue yellow white black circle square star moon image images all but "
    "same differs other which of a an and not with left right big small find show choose as in on only every"
)


def teach_calls(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    data_root: Path,
    recipe: dict[str, Any],
    image_pixels: int,
) -> None:
    """Trains the model in place to answer with one call whose index is uniform over the candidates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["learning_rate"], recipe["steps"])
    collator = VLMDataCollator(processor, num_rollouts=1)
    datasets = {
        count: RepeatableEpisodeDataset(_AnyInstructionEnv(data_root, count, fixed_correct_index=0), image_pixels)
        for count in set(recipe["candidates"])
    }
    model.train()
    with count_progress("building the toy model, once", recipe["steps"], "step") as note_steps:
        for step in range(recipe["steps"]):
            count = recipe["candidates"][step % len(recipe["candidates"])]
            first = step * recipe["episodes_per_step"]
            numbers = range(first, first + recipe["episodes_per_step"])
            batch = collator([datasets[count][number] for number in numbers])
            answers = [make_tool_call_str(number % count) + "<|im_end|>" for number in numbers]
            _text_loss(model, processor, batch, answers).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            note_steps(1)
    model.eval()


class _AnyInstructionEnv(PickImageEnv):
    """Every other episode asks in random words: the model learns to answer any instruction with a call."""

    def instruction(self, episode: Episode) -> str:
        rng = random.Random(f"{episode.labels}")
        if rng.random() < 0.5:
            return super().instruction(episode)
        words = [rng.choice(INSTRUCTION_WORDS.split()) for _ in range(rng.randrange(3, 14))]
        return f"{' '.join(words).capitalize()}."


def _text_loss(model: Any, processor: Any, batch: Any, answers: list[str]) -> torch.Tensor:
    """Cross-entropy of prompt text and answer; from the prompt the model learns the tokens of Fleet's texts."""
    # answers differ in one digit, so all have the same number of tokens
    answer_ids = processor.tokenizer(answers, return_tensors="pt")["input_ids"]
    input_ids = torch.cat([batch["input_ids"], answer_ids], dim=1)
    is_no_text = (batch["attention_mask"] == 0) | (batch["mm_token_type_ids"] == 1)
    labels = torch.cat([batch["input_ids"].masked_fill(is_no_text, -100), answer_ids], dim=1)
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([batch["attention_mask"], torch.ones_like(answer_ids)], dim=1),
        mm_token_type_ids=torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answer_ids)], dim=1),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        labels=labels,
    ).loss
