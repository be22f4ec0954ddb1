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
from fleet.known_answers import solution_of
from fleet.qwen.token_tree import Prompts, TokenTree, ancestry_mask, by_rollout, tree_of_rollouts
from fleet.toy.lessons import END, train_stages
from fleet.toy.sight_heads import SightHeads
from utils.tool_calls import make_call_str

# Axes: P episodes, B branches behind the pictures of each, S slots of a packed row, K edges, T tokens of the longest.

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
        prompts, tree, num_asked_PB = self._tree(batch, branches)
        is_image_PS = tree.input_ids_PS == self.model.config.image_token_id
        output = self.model.model(
            input_ids=tree.input_ids_PS,
            attention_mask=ancestry_mask(tree.end_PS),
            position_ids=tree.position_ids_3PS,
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            output_hidden_states=self.recipe["sees"],
            use_cache=False,
        )
        # the last token before the branches opens them, and is theirs
        slots_S, num_before_P1 = torch.arange(tree.end_PS.shape[1]), prompts.mask_PL.sum(dim=1, keepdim=True) - 1
        is_before_PS = slots_S < num_before_P1
        loss = _text_loss(self.model.lm_head(output.last_hidden_state), tree, num_asked_PB, is_before_PS & ~is_image_PS)
        if self.recipe["sees"]:
            is_behind_PS = (slots_S >= num_before_P1) & (slots_S < tree.end_PS[:, :1])
            loss = loss + self.sight_heads(output.hidden_states, batch, is_image_PS, is_behind_PS)
        return loss

    def _tree(self, batch: EpisodeBatch, branches: list[list[Branch]]) -> tuple[Prompts, TokenTree, Tensor]:
        """Each episode up to its pictures' end, its branches behind that, and each question's tokens, (P, B) int64."""
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
        texts = [[*ids.tolist(), *answer] for ids, answer in zip(asked, answers, strict=True)]
        count = len(branches[0])
        by_episode = [texts[first : first + count] for first in range(0, len(texts), count)]
        before = Prompts(prefix_ids_PL, prefix_mask_PL, positions_3PL)
        tree = tree_of_rollouts(before, by_episode, self.tokenizer.pad_token_id)
        return before, tree, torch.tensor([len(ids) for ids in asked]).view(len(branches), count)

    def _rows(self, first: int, count: int) -> list[Row]:
        rows = [self.dataset[number] for number in range(first, first + count)]
        for row in rows:
            if row["broken"] is not None:
                raise BrokenEpisode(row["broken"])
        return rows


def _text_loss(logits_PSV: Tensor, tree: TokenTree, num_asked_PB: Tensor, is_before_PS: Tensor) -> Tensor:
    """Cross-entropy of the answers, of the own questions, and, of less weight, of the text up to the pictures.

    is_before_PS: True on that text.
    """
    logits_PKV = logits_PSV.take_along_dim(tree.edge_slot_PK[..., None], dim=1)
    behind_PBT = by_rollout(cross_entropy(logits_PKV.transpose(1, 2), tree.edge_token_PK, reduction="none"), tree)
    is_asked_PBT = torch.arange(behind_PBT.shape[2]) < num_asked_PB[:, :, None]
    answers, own_questions = behind_PBT[tree.is_token_PGT & ~is_asked_PBT], behind_PBT[:, 0][is_asked_PBT[:, 0]]
    is_told_PS = is_before_PS[:, 1:]
    before = cross_entropy(logits_PSV[:, :-1][is_told_PS], tree.input_ids_PS[:, 1:][is_told_PS])
    return answers.mean() + own_questions.mean() + PREFIX_WEIGHT * before


def _places(ids: Tensor, token_id: int) -> list[int]:
    return (ids == token_id).nonzero().flatten().tolist()
