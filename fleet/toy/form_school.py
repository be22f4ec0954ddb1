"""The school of an environment's own toy: the form of its calls, and to see what its pictures show where.

Teaches nothing of the task. The calls that it shows are right answers to other episodes; where tools answer, behind
each of the gold calls, and of any turn. What a picture shows is learnt from the pixels alone, by linear heads on hidden
states that are thrown away afterwards: at an image token, the colours of its four patches and its place; at the text
behind the pictures, a thumbnail of all of them. Without them a model of this size does not know where its image tokens
are, and RLOO finds nothing to reward.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import EpisodeBatch, RepeatableEpisodeDataset, Row, VLMDataCollator
from environment import EpisodeSource
from fleet.episodes import BrokenEpisode
from fleet.known_answers import solutions_of
from fleet.qwen.group_passes import image_inputs
from fleet.qwen.observations import Picture, encode_observation
from fleet.qwen.token_tree import GivenToken, Prompts, TokenTree, ancestry_mask, by_rollout, tree_of_rollouts
from fleet.toy.lessons import END, train_stages
from fleet.toy.sight_heads import SightHeads
from fleet.verdicts import Observation, answer_to, shown_images
from utils.tool_calls import ToolCall, make_call_str

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
    teach_at(FormSchool(model, processor, env, recipe))


def teach_at(school: "FormSchool") -> None:
    """Trains a school's model in place on all of its lessons."""
    rate = school.recipe["learning_rate"]
    optimizer = AdamW([*school.model.parameters(), *school.head_parameters()], rate, (0.9, 0.99), weight_decay=0.0)
    schedule = OneCycleLR(optimizer, rate, school.num_steps, pct_start=0.1, cycle_momentum=False)
    train_stages(school.model, [(school.losses(), optimizer, schedule)])


@dataclass(frozen=True)
class Branch:
    """What stands behind the pictures of an episode: a question, of whose text the prompt is, and an answer.

    before: what stands between the two, in later turns: gold calls, and what the tools answer to them. pictures: in it,
    by their digests. is_own: True for the question's own answer.
    """

    asked: int  # the place in the batch of the episode whose question it is
    answer: str
    before: tuple[GivenToken, ...] = ()
    pictures: Mapping[bytes, Picture] = field(default_factory=dict)
    is_own: bool = False


class FormSchool:
    """The lessons of one environment, step by step."""

    def __init__(self, model: Any, processor: Any, env: EpisodeSource, recipe: dict[str, Any]):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.env, self.recipe, self.num_steps = env, recipe, recipe["steps"]
        self.dataset = RepeatableEpisodeDataset(env, recipe["max_pixels"])
        self.collator = VLMDataCollator(processor, num_rollouts=1)
        probed = self.collator(self._rows(0, NUM_PROBED))
        num_tokens = int((probed["mm_token_type_ids"] == 1).sum(dim=1).max())
        self.sight_heads = SightHeads(model.config.get_text_config(), max(probed["num_images"]), num_tokens)
        self.rng = random.Random(recipe["seed"])
        self._literals = frozenset(processor.tokenizer.get_added_vocab())

    def head_parameters(self) -> list[nn.Parameter]:
        """Of the heads that are thrown away behind the lessons."""
        return list(self.sight_heads.parameters()) if self.recipe["sees"] else []

    def losses(self) -> Iterator[Tensor]:
        """Cross-entropy of prompts and answers, so that the tokens of the prompts are learnt too, and of sight."""
        size = self.recipe["episodes_per_step"]
        for step in range(self.recipe["steps"]):
            rows = self._rows(step * size, size)
            yield self.loss(rows, self.branches(rows))

    def branches(self, rows: list[Row]) -> list[list[Branch]]:
        """Behind each episode's pictures its own question and others, with a right answer to yet another episode."""
        golds, count = self.golds_of(rows), len(rows)
        return [
            [
                Branch(
                    asked, self._said(make_call_str(self._call_of_any_turn(golds[(asked + 1) % count]))) + END, *seen
                )
                for number in range(self.recipe["questions_per_episode"])
                for asked in [(place + number) % count]
                for seen in self.conversations(rows[asked], golds[asked])
            ]
            for place in range(count)
        ]

    def golds_of(self, rows: list[Row]) -> list[list[ToolCall]]:
        """The gold calls of each episode, turn by turn."""
        return [solutions_of(self.env, row["episode"], max_turns=self.recipe["max_turns"]) for row in rows]

    def conversations(
        self, row: Row, gold: list[ToolCall]
    ) -> list[tuple[tuple[GivenToken, ...], dict[bytes, Picture]]]:
        """(what stands before it, the pictures in that) for each of the gold calls of an episode."""
        given, pictures = list[GivenToken](), dict[bytes, Picture]()
        found = [(tuple(given), dict(pictures))]
        for turn, call in enumerate(gold[:-1], start=1):
            answer = answer_to(self.env, row["episode"], gold[:turn], max_turns=len(gold))
            assert isinstance(answer, Observation), "solutions_of goes on behind an observation alone"
            images = shown_images(answer, self.recipe["max_pixels"], self._literals)
            tokens, shown = encode_observation(self.processor, answer.text, images)
            given += [*map(GivenToken, self.tokenizer(make_call_str(call) + END)["input_ids"]), *tokens]
            pictures |= shown
            found.append((tuple(given), dict(pictures)))
        return found

    def _call_of_any_turn(self, gold: list[ToolCall]) -> ToolCall:
        """The last of the gold calls, or in a share of cases one of those before it."""
        is_last = len(gold) == 1 or self.rng.random() >= self.recipe["look_share"]
        return gold[-1] if is_last else self.rng.choice(gold[:-1])

    def _said(self, call: str) -> str:
        return call if self.rng.random() < self.recipe["call_share"] else NO_CALL

    def loss(self, rows: list[Row], branches: list[list[Branch]]) -> Tensor:
        """Of one step on these episodes, with what stands behind the pictures of each."""
        batch = self.collator(rows)
        prompts, tree, num_asked_PB = self._tree(batch, branches)
        known = {digest: picture for row in branches for branch in row for digest, picture in branch.pictures.items()}
        behind = [[known[digest] for digest in digests] for digests in tree.pictures]
        is_image_PS = tree.input_ids_PS == self.model.config.image_token_id
        output = self.model.model(
            input_ids=tree.input_ids_PS,
            attention_mask=ancestry_mask(tree.end_PS),
            position_ids=tree.position_ids_3PS,
            **image_inputs(batch, slice(0, len(rows)), None, behind),
            output_hidden_states=True,
            use_cache=False,
        )
        # the last token before the branches opens them, and is theirs
        slots_S, num_before_P1 = torch.arange(tree.end_PS.shape[1]), prompts.mask_PL.sum(dim=1, keepdim=True) - 1
        is_before_PS = slots_S < num_before_P1
        logits_PSV = self.model.lm_head(output.last_hidden_state)
        is_own_PB = torch.tensor([[branch.is_own for branch in row] for row in branches])
        told, text = text_losses(logits_PSV, tree, num_asked_PB, is_own_PB, is_before_PS & ~is_image_PS)
        loss = told + self.recipe["text_share"] * text
        if self.recipe["sees"]:
            is_shown_PS = is_image_PS & (slots_S < num_before_P1)
            is_behind_PS = (slots_S >= num_before_P1) & (slots_S < tree.end_PS[:, :1])
            loss = loss + self.sight_heads(output.hidden_states, batch, is_shown_PS, is_behind_PS)
        return loss + self.further_loss(output.hidden_states, tree, num_asked_PB, branches)

    def further_loss(
        self, hidden_states: tuple[Tensor, ...], tree: TokenTree, num_asked_PB: Tensor, branches: list[list[Branch]]
    ) -> Tensor | float:
        """Of a school that teaches more. hidden_states: (P, S, H) of each layer, embeddings first."""
        return 0.0

    def prompts_of(self, batch: EpisodeBatch) -> list[Tensor]:
        """The ids of each episode's prompt, without padding."""
        return [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def _tree(self, batch: EpisodeBatch, branches: list[list[Branch]]) -> tuple[Prompts, TokenTree, Tensor]:
        """Each episode up to its pictures' end, its branches behind that, and each question's tokens, (P, B) int64."""
        config = self.model.config
        prompts = self.prompts_of(batch)
        ends = [places_of(ids, config.vision_end_token_id)[-1] + 1 for ids in prompts]
        prefixes = [ids[:end] for ids, end in zip(prompts, ends, strict=True)]
        prefix_ids_PL = pad_sequence(prefixes, True, self.tokenizer.pad_token_id, padding_side="left")
        prefix_mask_PL = pad_sequence([torch.ones_like(ids) for ids in prefixes], True, padding_side="left")
        positions_3PL, _ = self.model.model.get_rope_index(
            prefix_ids_PL,
            mm_token_type_ids=(prefix_ids_PL == config.image_token_id).long(),
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=prefix_mask_PL,
        )
        flat = [branch for row in branches for branch in row]
        answers = self.tokenizer([branch.answer for branch in flat])["input_ids"]
        asked = [prompts[branch.asked][ends[branch.asked] :] for branch in flat]
        texts = [
            [*ids.tolist(), *branch.before, *answer] for ids, branch, answer in zip(asked, flat, answers, strict=True)
        ]
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


def text_losses(
    logits_PSV: Tensor, tree: TokenTree, num_asked_PB: Tensor, is_own_PB: Tensor, is_before_PS: Tensor
) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the answers, of the own questions and, of less weight, of the text up to the pictures).

    An own answer counts once more, as a whole: most of its tokens are sure, and one says it. is_own_PB: True for these.
    is_before_PS: True on the text up to the pictures.
    """
    logits_PKV = logits_PSV.take_along_dim(tree.edge_slot_PK[..., None], dim=1)
    behind_PBT = by_rollout(cross_entropy(logits_PKV.transpose(1, 2), tree.edge_token_PK, reduction="none"), tree)
    is_asked_PBT = torch.arange(behind_PBT.shape[2]) < num_asked_PB[:, :, None]
    is_answer_PBT = tree.is_token_PGT & ~is_asked_PBT
    own_questions = behind_PBT[:, 0][is_asked_PBT[:, 0]]
    of_own = behind_PBT[is_answer_PBT & is_own_PB[:, :, None]].sum() / is_own_PB.sum().clamp(min=1)
    is_told_PS = is_before_PS[:, 1:]
    before = cross_entropy(logits_PSV[:, :-1][is_told_PS], tree.input_ids_PS[:, 1:][is_told_PS])
    return behind_PBT[is_answer_PBT].mean() + of_own, own_questions.mean() + PREFIX_WEIGHT * before


def places_of(ids: Tensor, token_id: int) -> list[int]:
    """Where a token stands."""
    return (ids == token_id).nonzero().flatten().tolist()
