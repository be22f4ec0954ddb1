"""The school of the toy of two turns: to say which of the words in its question a tool's picture shows.

Behind gold calls it teaches the right last call, and so what a picture is called; before them it teaches the form of
all calls alone, not when to use which. A model of this size does not find out by itself which number stands before a
word and what a picture has shown: linear heads teach it to hold both where it needs them, and are thrown away.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dataset import EpisodeBatch
from fleet.qwen.token_tree import TokenTree
from fleet.toy.form_school import Branch, FormSchool, places_of
from fleet.toy.lessons import END
from utils.tool_calls import make_call_str

# Axes: P episodes, B branches behind the pictures of each, S slots of a packed row, H hidden size.

MAX_PICTURES = 64  # that are told apart


class ReadingSchool(FormSchool):
    """First to read, on prompts without their system message; then whole prompts, with the form of all calls."""

    def __init__(self, model: Any, processor: Any, env: Any, recipe: dict[str, Any]):
        super().__init__(model, processor, env, recipe)
        self.num_steps = recipe["reading_steps"] + recipe["steps"]
        self.reading_heads = ReadingHeads(model.config.get_text_config(), processor.tokenizer)
        self.is_short = False
        self._ids_of_questions: list[list[int]] = []

    def head_parameters(self) -> list[nn.Parameter]:
        """Of the heads that are thrown away behind the lessons."""
        return [*super().head_parameters(), *self.reading_heads.parameters()]

    def losses(self) -> Iterator[Tensor]:
        """Of both stages, a step each."""
        size, self.is_short = self.recipe["reading_episodes_per_step"], True
        for step in range(self.recipe["reading_steps"]):
            rows = self._rows(step * size, size)
            yield self.loss(rows, [branches[-1:] for branches in self.own_answers(rows)])
        self.is_short = False
        yield from super().losses()

    def own_answers(self, rows: list[Any]) -> list[list[Branch]]:
        """The right call to each episode's own question, behind each of the gold calls."""
        return [
            [
                Branch(place, make_call_str(call) + END, *seen, is_own=True)
                for call, seen in zip(gold, self.conversations(row, gold), strict=True)
            ]
            for place, (row, gold) in enumerate(zip(rows, self.golds_of(rows), strict=True))
        ]

    def branches(self, rows: list[Any]) -> list[list[Branch]]:
        """As FormSchool's, but behind all gold calls but the last the question's own answer."""
        last = [of_episode[-1] for of_episode in self.own_answers(rows)]
        return [
            [
                replace(branch, answer=last[branch.asked].answer, is_own=True)
                if branch.before == last[branch.asked].before
                else branch
                for branch in of_episode
            ]
            for of_episode in super().branches(rows)
        ]

    def prompts_of(self, batch: EpisodeBatch) -> list[Tensor]:
        """From the turn on that shows the pictures, in the first stage."""
        prompts = super().prompts_of(batch)
        if self.is_short:
            opening, image = self.tokenizer.convert_tokens_to_ids("<|im_start|>"), self.model.config.image_token_id
            prompts = [ids[places_of(ids[: places_of(ids, image)[0]], opening)[-1] :] for ids in prompts]
        end = self.model.config.vision_end_token_id
        self._ids_of_questions = [ids[places_of(ids, end)[-1] + 1 :].tolist() for ids in prompts]
        return prompts

    def further_loss(
        self, hidden_states: tuple[Tensor, ...], tree: TokenTree, num_asked_PB: Tensor, branches: list[list[Branch]]
    ) -> Tensor | float:
        """What the heads have to say."""
        return self.reading_heads(hidden_states, tree, self._ids_of_questions, branches)


class ReadingHeads(nn.Module):
    """Linear heads on the language model's hidden states after every layer, for the lesson alone."""

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__()
        texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
        self.digits = {token: int(text) for token, text in texts.items() if text in list("0123456789")}
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        layers = range(config.num_hidden_layers)
        self.numbers = nn.ModuleList(nn.Linear(config.hidden_size, 10) for _ in layers)
        self.pictures = nn.ModuleList(nn.Linear(config.hidden_size, MAX_PICTURES) for _ in layers)
        self._numbers_of_pictures: dict[bytes, int] = {}

    def forward(
        self,
        hidden_states: tuple[Tensor, ...],
        tree: TokenTree,
        questions: list[list[int]],
        branches: list[list[Branch]],
    ) -> Tensor:
        """The mean cross-entropies of the digit read last, in questions, and of the picture shown last, in answers.

        hidden_states: (P, S, H) of each layer, embeddings first. questions: the ids of each episode's.
        """
        digits, pictures = list[tuple[int, int]](), list[tuple[int, int]]()
        for row, of_row in enumerate(branches):
            for place, branch in enumerate(of_row):
                slots = tree.slot_PGT[row, place][tree.is_token_PGT[row, place]] + row * hidden_states[0].shape[1]
                ids, latest = questions[branch.asked], None
                # a slot predicts the token behind its own
                for token, slot in zip(ids[:-1], slots[1:].tolist(), strict=False):
                    latest = self.digits.get(token, latest)
                    if latest is not None:
                        digits.append((slot, latest))
                shown = [token.picture for token in branch.before if token.picture is not None]
                if shown:
                    number = self._numbers_of_pictures.setdefault(shown[-1], len(self._numbers_of_pictures))
                    pictures += [(slot, number) for slot in slots[len(ids) :].tolist() if number < MAX_PICTURES]
        losses = [
            cross_entropy(head(self.norm(states.flatten(0, 1)[slots])), wanted) / len(heads)
            for heads, found in ((self.numbers, digits), (self.pictures, pictures))
            if found
            for slots, wanted in [torch.tensor(found).unbind(dim=1)]
            for head, states in zip(heads, hidden_states[1:], strict=True)
        ]
        return torch.stack(losses).sum()
