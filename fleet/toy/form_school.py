"""The school of an environment's own toy: the form of its calls, and to see what its pictures show where.

Teaches nothing of the task. The calls that it shows are right answers to other episodes. What a picture shows is learnt
from the pixels alone, by linear heads on hidden states that are thrown away afterwards: at an image token, the colours
of its four patches and its place; at the text behind the pictures, a thumbnail of all of them. Without them a model of
this size does not know where its image tokens are, and RLOO finds nothing to reward.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import EpisodeBatch, RepeatableEpisodeDataset, Row, VLMDataCollator
from environment import EpisodeSource
from fleet.episodes import BrokenEpisode
from fleet.qwen.shared_prefix import PackedGroups, attention_mask, pack_groups, unpack
from fleet.toy.lessons import END, train_stages
from fleet.toy.sight_heads import SightHeads
from fleet.verdicts import solution_of
from utils.tool_calls import make_call_str

# Axes: P episodes, B branches behind the pictures of each, S slots of a packed row, T tokens of the longest branch.

NO_CALL = "I do not know."
PREFIX_WEIGHT = 0.3
NUM_PROBED = 32  # episodes that tell how many pictures there are


def teach_form(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    env: EpisodeSource,
    recipe: dict[str, Any],
) -> None:
    """Trains the model in place to answer an environment's prompts with calls that other episodes ask for.

    So it knows the form of a call and which arguments there are, and nothing of the answer to an episode. A share of
    the answers, `1 - call_share`, is no call. Raises BrokenEpisode if the environment fails.
    """
    school = FormSchool(model, processor, env, recipe)
    parameters = [*model.parameters(), *(school.sight_heads.parameters() if recipe["sees"] else ())]
    rate = recipe["learning_rate"]
    optimizer = AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = OneCycleLR(optimizer, rate, recipe["steps"], pct_start=0.1, cycle_momentum=False)
    train_stages(model, [(school.losses(), optimizer, schedule)])


@dataclass(frozen=True)
class Branch:
    """What stands behind the pictures of an episode: a question, of whose text the prompt is, and an answer."""

    asked: int  # the place in the batch of the episode whose question it is
    answer: str


class FormSchool:
    """The lessons of one environment, step by step."""

    def __init__(self, model: Any, processor: Any, env: EpisodeSource, recipe: dict[str, Any]):
        self.model, self.tokenizer, self.env, self.recipe = model, processor.tokenizer, env, recipe
        self.dataset = RepeatableEpisodeDataset(env, recipe["max_pixels"])
        self.collator = VLMDataCollator(processor, num_rollouts=1)
        probed = self.collator(self._rows(0, NUM_PROBED))
        num_tokens = int((probed["mm_token_type_ids"] == 1).sum(dim=1).max())
        self.sight_heads = SightHeads(model.config.get_text_config(), max(probed["num_images"]), num_tokens)
        self.rng = random.Random(recipe["seed"])

    def losses(self) -> Iterator[Tensor]:
        """Cross-entropy of prompts and answers, so that the tokens of the prompts are learnt too, and of sight."""
        size = self.recipe["episodes_per_step"]
        for step in range(self.recipe["steps"]):
            rows = self._rows(step * size, size)
            yield self._loss(rows, self.branches(rows))

    def branches(self, rows: list[Row]) -> list[list[Branch]]:
        """Behind each episode's pictures its own question and others, with a right answer to yet another episode."""
        calls, count = [make_call_str(solution_of(self.env, row["episode"])) for row in rows], len(rows)
        return [
            [
                Branch(
                    asked=(place + number) % count,
                    answer=self._said(calls[(place + number + 1) % count]) + END,
                )
                for number in range(self.recipe["questions_per_episode"])
            ]
            for place in range(count)
        ]

    def _said(self, call: str) -> str:
        return call if self.rng.random() < self.recipe["call_share"] else NO_CALL

    def _loss(self, rows: list[Row], branches: list[list[Branch]]) -> Tensor:
        batch = self.collator(rows)
        packed, num_asked_PB = self._packed(batch, branches)
        is_image_PS = packed.input_ids_PS == self.model.config.image_token_id
        output = self.model.model(
            input_ids=packed.input_ids_PS,
            attention_mask=attention_mask(packed.branch_PS),
            position_ids=packed.position_ids_3PS,
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            output_hidden_states=self.recipe["sees"],
            use_cache=False,
        )
        loss = _text_loss(self.model.lm_head(output.last_hidden_state), packed, num_asked_PB, is_image_PS)
        if self.recipe["sees"]:
            loss = loss + self.sight_heads(output.hidden_states, batch, is_image_PS, packed.branch_PS > 0)
        return loss

    def _packed(self, batch: EpisodeBatch, branches: list[list[Branch]]) -> tuple[PackedGroups, Tensor]:
        """A row an episode, its branches behind its pictures; and each question's tokens, (P, B) int64."""
        config = self.model.config
        prompts = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        ends = [_places(ids, config.vision_end_token_id)[-1] + 1 for ids in prompts]
        prefixes = [ids[:end] for ids, end in zip(prompts, ends, strict=True)]
        prefix_ids_PL = pad_sequence(prefixes, True, self.tokenizer.pad_token_id, padding_side="left")
        prefix_mask_PL = pad_sequence([torch.ones_like(ids) for ids in prefixes], True, padding_side="left")
        positions_3PL, _ = self.model.model.get_rope_index(
            prefix_ids_PL,
            mm_token_type_ids=(prefix_ids_PL == config.image_token_id).long(),
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=prefix_mask_PL,
        )
        answers = self.tokenizer([branch.answer for row in branches for branch in row])["input_ids"]
        asked = [prompts[branch.asked][ends[branch.asked] :] for row in branches for branch in row]
        texts = [torch.cat([ids, torch.tensor(answer)]) for ids, answer in zip(asked, answers, strict=True)]
        shape = len(branches), len(branches[0])
        packed = pack_groups(
            prefix_ids_PL,
            prefix_mask_PL,
            positions_3PL,
            pad_sequence(texts, True, self.tokenizer.pad_token_id).view(*shape, -1),
            torch.tensor([len(ids) for ids in texts]).view(shape),
            self.tokenizer.pad_token_id,
        )
        return packed, torch.tensor([len(ids) for ids in asked]).view(shape)

    def _rows(self, first: int, count: int) -> list[Row]:
        rows = [self.dataset[number] for number in range(first, first + count)]
        for row in rows:
            if row["broken"] is not None:
                raise BrokenEpisode(row["broken"])
        return rows


def _text_loss(logits_PSV: Tensor, packed: PackedGroups, num_asked_PB: Tensor, is_image_PS: Tensor) -> Tensor:
    """Cross-entropy of the answers, of the own questions, and, of less weight, of the text up to the pictures."""
    behind_PS = cross_entropy(logits_PSV.transpose(1, 2), packed.shift_labels_PS, reduction="none")
    behind_PBT = unpack(behind_PS, packed)
    is_asked_PBT = torch.arange(behind_PBT.shape[2]) < num_asked_PB[:, :, None]
    answers, own_questions = behind_PBT[packed.is_token_PGT & ~is_asked_PBT], behind_PBT[:, 0][is_asked_PBT[:, 0]]
    is_before_PS = (packed.branch_PS[:, 1:] == 0) & ~is_image_PS[:, 1:]
    before = cross_entropy(logits_PSV[:, :-1][is_before_PS], packed.input_ids_PS[:, 1:][is_before_PS])
    return answers.mean() + own_questions.mean() + PREFIX_WEIGHT * before


def _places(ids: Tensor, token_id: int) -> list[int]:
    return (ids == token_id).nonzero().flatten().tolist()
