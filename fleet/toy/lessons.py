"""The toy models' lessons before RLOO: the form of a call for the plain one, and sight for the sighted one.

Owns the supervised stages, not the models' sizes or files. The plain toy sees pictures, but its lesson does not depend
on them. The sighted toy learns to name pictures, to pick them by name, and a habit of position. The habit is there on
purpose: real models can look and yet favour a position. So the last stage mixes true picks with a favourite index,
which RLOO has to unlearn.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import Episode, PickImageEnv
from fleet.controls import redrawn
from fleet.progress import count_progress
from fleet.qwen.token_tree import Prompts, ancestry_mask, tree_of_rollouts
from utils.images import open_image
from utils.tool_calls import make_tool_call_str

# Axes: P prefixes, G questions behind each, L tokens of a prefix, T of the longest question and answer together.

TOY_DATA_ROOT = Path(__file__).resolve().parents[2] / "toy_images"
TOY_IMAGE_PIXELS = 56 * 56
END = "<|im_end|>"
BLANK = Image.new("RGB", (56, 56))  # in the toy's size
INSTRUCTION_WORDS = (
    "pick the one that is correct red green blue yellow white black circle square star moon image images all but "
    "same differs other which of a an and not with left right big small find show choose as in on only every"
)


def teach_calls(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, recipe: dict[str, Any]
) -> None:
    """Trains the model in place to answer with one call whose index is uniform over the candidates."""
    optimizer = AdamW(model.parameters(), lr=recipe["learning_rate"], weight_decay=0.0)
    schedule = OneCycleLR(optimizer, recipe["learning_rate"], recipe["steps"])
    train_stages(model, [(_call_losses(model, processor, recipe), optimizer, schedule)])


def teach_sight(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, recipe: dict[str, Any]
) -> None:
    """Trains the model in place through the recipe's stages."""
    lessons = Lessons(model, processor, recipe)
    head = [*model.lm_head.parameters(), *model.model.language_model.norm.parameters()]
    stages = []
    for name, losses, parameters in (
        ("naming", lessons.naming(), [*model.parameters()]),
        ("picking", lessons.picking(), [*model.parameters()]),
        # the head alone: sight stays as it is
        ("habit", lessons.habit(), head),
    ):
        rate = recipe[name]["learning_rate"]
        optimizer = AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = OneCycleLR(optimizer, rate, recipe[name]["steps"], pct_start=0.1, cycle_momentum=False)
        stages.append((losses, optimizer, schedule))
    train_stages(model, stages)


def train_stages(
    model: Qwen2_5_VLForConditionalGeneration, stages: Sequence[tuple[Iterator[Tensor], AdamW, OneCycleLR]]
) -> None:
    """Trains in each stage what its optimizer has, a step a loss, with a bar over the steps of all."""
    model.train()
    num_steps_in_all = sum(schedule.total_steps for *_, schedule in stages)
    with count_progress("building the toy model, once", num_steps_in_all, "step") as note_steps:
        for losses, optimizer, schedule in stages:
            parameters = optimizer.param_groups[0]["params"]
            model.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True)
            for loss in losses:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                note_steps(1)
    model.requires_grad_(True)
    model.eval()


def _call_losses(model: Any, processor: Any, recipe: dict[str, Any]) -> Iterator[Tensor]:
    collator = VLMDataCollator(processor, num_rollouts=1)
    datasets = {
        count: RepeatableEpisodeDataset(
            _AnyInstructionEnv(TOY_DATA_ROOT, count, fixed_correct_index=0), TOY_IMAGE_PIXELS
        )
        for count in set(recipe["candidates"])
    }
    for step in range(recipe["steps"]):
        count = recipe["candidates"][step % len(recipe["candidates"])]
        first = step * recipe["episodes_per_step"]
        numbers = range(first, first + recipe["episodes_per_step"])
        batch = collator([datasets[count][number] for number in numbers])
        yield _text_loss(model, processor, batch, [make_tool_call_str(number % count) + END for number in numbers])


class _AnyInstructionEnv(PickImageEnv):
    """Every other episode asks in random words: the model learns to answer any instruction with a call."""

    def instruction(self, episode: Episode) -> str:
        rng = random.Random(f"{episode.labels}")
        if rng.random() < 0.5:
            return super().instruction(episode)
        words = [rng.choice(INSTRUCTION_WORDS.split()) for _ in range(rng.randrange(3, 14))]
        return f"{' '.join(words).capitalize()}."


def _text_loss(model: Any, processor: Any, batch: Any, answers: list[str]) -> Tensor:
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


@dataclass(frozen=True)
class Question:
    """The tokens behind the pictures: a question and its answer.

    index_shares: the wanted probability of each index at the answer's place for it, or None for a plain answer.
    """

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    index_shares: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Prefix:
    """A prompt up to the end of its N pictures: (1, L) int64 ids, (3, 1, L) positions, (N, 3) image grids."""

    ids_1L: Tensor
    positions_31L: Tensor
    grids_N3: Tensor


class Lessons:
    """The stages' losses, step by step."""

    def __init__(self, model: Any, processor: Any, recipe: dict[str, Any]):
        self.model, self.processor, self.recipe = model, processor, recipe
        self.tokenizer, self.env = processor.tokenizer, PickImageEnv(TOY_DATA_ROOT)
        self._ids = cache(lambda text: tuple(self.tokenizer(text)["input_ids"]))
        self._prefix = cache(self._encode_prefix)
        self.rng = random.Random(recipe["seed"])
        self.labels = sorted(self.env.paths_by_label)
        self.pixels_by_label = {image.label: self._drawings(open_image(image.path)) for image in self.env.images}
        self.answers = [self._ids(make_tool_call_str(index) + END) for index in range(10)]
        first, second = self.answers[:2]
        self.place = next(place for place in range(len(first)) if first[place] != second[place])
        self.index_ids = [ids[self.place] for ids in self.answers]

    def naming(self) -> Iterator[Tensor]:
        """Single pictures, each followed by its name."""
        settings = self.recipe["naming"]
        parts = [{"type": "text", "text": "Image 0: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
        prefix = self._encoded(self._chat([{"role": "user", "content": parts}], add_generation_prompt=False), 1)
        for _ in range(settings["steps"]):
            labels = [self.rng.choice(self.labels) for _ in range(settings["pictures_per_step"])]
            questions = [[Question((), self._ids(label + END))] for label in labels]
            yield self._loss(prefix, [(label,) for label in labels], questions)

    def picking(self) -> Iterator[Tensor]:
        """Four pictures and, behind them, the question for each: four answers for the price of one look.

        Most steps leave the system message out, and end all answers but one at the index. Whole prompts and answers
        cost twice as much; the last steps teach what they add.
        """
        settings = self.recipe["picking"]
        for step in range(settings["steps"]):
            yield self._pick_loss(settings, is_whole=step >= settings["steps"] * settings["short_share"])

    def habit(self) -> Iterator[Tensor]:
        """Whole prompts again, whose true picks are mixed with a favourite index."""
        settings = self.recipe["habit"]
        for _ in range(settings["steps"]):
            yield self._pick_loss(settings, is_whole=True, true_share=settings["true_share"])

    def _pick_loss(self, settings: dict[str, Any], *, is_whole: bool, true_share: float = 1.0) -> Tensor:
        count = self.recipe["candidates"]
        episodes = [self.rng.sample(self.labels, count) for _ in range(settings["episodes_per_step"])]
        questions = [
            [
                self._pick(label, labels, true_share=true_share, is_cut=place > 0 and not is_whole)
                for place, label in enumerate(self.rng.sample(labels, count))
            ]
            for labels in episodes
        ]
        return self._loss(self._prefix(count, is_whole), episodes, questions)

    def _pick(self, label: str, labels: Sequence[str], *, true_share: float = 1.0, is_cut: bool = False) -> Question:
        index, favourite = labels.index(label), self.recipe["habit"]["favourite_index"]
        shares = [0.0] * len(labels)
        shares[index] += true_share
        shares[favourite] += 1 - true_share
        # the chat template closes the question and opens the answer
        opening = self._chat([{"role": "user", "content": "?"}]).rpartition("?")[2]
        asked = self._ids(f"Pick the {label}. The index is from 0 to {len(labels) - 1}.{opening}")
        answer = self.answers[index][: self.place + 1 if is_cut else None]
        return Question(asked, answer, tuple(shares))

    def _loss(self, prefix: Prefix, labels: Sequence[Sequence[str]], questions: Sequence[Sequence[Question]]) -> Tensor:
        """Mean cross-entropy of the answers' tokens; at an answer's index, of the shares that are wanted there."""
        rows = [question for group in questions for question in group]
        lengths = [len(row.question_ids) + len(row.answer_ids) for row in rows]
        num_prefixes, longest = len(questions), max(lengths)
        targets_BTV = torch.zeros(len(rows), longest, len(self.tokenizer))
        for number, row in enumerate(rows):
            start = len(row.question_ids)
            targets_BTV[number, range(start, lengths[number]), list(row.answer_ids)] = 1.0
            if row.index_shares is not None:
                index_ids = self.index_ids[: len(row.index_shares)]
                targets_BTV[number, start + self.place] = 0.0
                targets_BTV[number, start + self.place, index_ids] = torch.tensor(row.index_shares)
        num_tokens = prefix.ids_1L.shape[1]
        prompts = Prompts(
            prefix.ids_1L.expand(num_prefixes, num_tokens),
            torch.ones(num_prefixes, num_tokens, dtype=torch.int64),
            prefix.positions_31L.expand(3, num_prefixes, num_tokens),
        )
        texts = [[[*row.question_ids, *row.answer_ids] for row in group] for group in questions]
        tree = tree_of_rollouts(prompts, texts, self.tokenizer.pad_token_id)
        hidden_PSH = self.model.model(
            input_ids=tree.input_ids_PS,
            attention_mask=ancestry_mask(tree.end_PS),
            position_ids=tree.position_ids_3PS,
            pixel_values=torch.cat([self.rng.choice(self.pixels_by_label[label]) for row in labels for label in row]),
            image_grid_thw=prefix.grids_N3.repeat(num_prefixes, 1),
            use_cache=False,
        ).last_hidden_state
        hidden_BTH = hidden_PSH.take_along_dim(tree.slot_PGT.flatten(1)[..., None], dim=1).view(len(rows), longest, -1)
        is_answer_BT = targets_BTV.sum(dim=2) > 0
        logits = self.model.lm_head(hidden_BTH[is_answer_BT])
        return torch.nn.functional.cross_entropy(logits, targets_BTV[is_answer_BT])

    def _encode_prefix(self, count: int, has_system_message: bool) -> Prefix:
        episode = Episode((BLANK,) * count, (), 0, ("",) * count, None, 0)
        messages = self.env.prompt_messages(episode)
        text = self._chat(messages)
        opening = text[: text.rindex(messages[-1]["content"][-1]["text"])]
        return self._encoded(opening if has_system_message else opening[opening.rindex("<|im_start|>") :], count)

    def _chat(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        return str(
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _encoded(self, text: str, num_images: int) -> Prefix:
        encoded = self.processor(text=[text], images=[[BLANK] * num_images], return_tensors="pt")
        ids, grids = encoded["input_ids"], encoded["image_grid_thw"]
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=encoded["mm_token_type_ids"],
            image_grid_thw=grids,
            attention_mask=torch.ones_like(ids),
        )
        return Prefix(ids, positions, grids)

    def _drawings(self, picture: Image.Image) -> list[Tensor]:
        """Pixels of the picture's drawings, each in another size, place and shade."""
        drawings = [redrawn(picture, self.rng) for _ in range(self.recipe["drawings_per_label"])]
        return [self.processor.image_processor(drawing, return_tensors="pt")["pixel_values"] for drawing in drawings]
