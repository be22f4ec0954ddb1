"""Completions of whole groups, drawn on their trees of tokens: one forward pass where drafts guess right.

Round 1 is one pass over the prompts with drafts behind them. It gives the exact distribution at every node, and every
rollout walks down, drawing each token, until it ends or leaves the drafts. Each further round adds the nodes that
rollouts have come to. A draft decides only which distributions are at hand: it never changes what is drawn.

Where a turn ends that a tool answers, the answer's tokens are nodes like any other, but given. Rollouts that were
answered alike go on from the same ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fleet.qwen.draws import CHUNK_SIZE, draw_tokens
from fleet.qwen.group_passes import MAX_MASK_PAIRS, as_encoded
from fleet.qwen.sampling_passes import FirstPass, RowPasses, TreePasses, WaitingNode
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import ROOT, Branches, GivenToken, PathToken, Prompts
from utils.pieces import in_pieces

# Axes: P prompts, G rollouts of each, B = P * G of them group after group, T places of a rollout.

# tokens that are put behind a rollout which has left the drafts, once it says what a draft says
MAX_CONTINUATION = 32


class Answers(Protocol):
    """What tools answer. A pure function of the group and of what was said."""

    def __call__(self, group: int, turns: Sequence[Sequence[int]]) -> Sequence[GivenToken]:
        """The tokens that are given behind these turns of a rollout of this group; none if it ends there."""

    def shown(
        self, model: nn.Module, digests: Sequence[bytes], most_of_ranks: Callable[[int], int]
    ) -> tuple[list[Tensor], Tensor]:
        """Features of these pictures, (image tokens, width) each, and their grids (N, 3). Every rank takes part."""


@dataclass(frozen=True)
class SamplingRequest:
    """What is to be sampled behind P prompts.

    drafts: of each group, guesses of a turn's token ids. uniforms_PGT: float64, of draws.named_uniforms; T sampled
    tokens of all turns. num_greedy: the first rollouts of each group that take the likeliest token instead. answers: of
    tools; with None a rollout has one turn. turn_end_id: the end token that they answer behind; behind any other, and
    behind a turn that reached its longest, a rollout ends. first_group: its number to `answers`.
    """

    rules: SamplingRules
    uniforms_PGT: np.ndarray
    drafts: Sequence[Sequence[Sequence[int]]]
    padding_id: int
    num_greedy: int = 0
    answers: Answers | None = None
    turn_end_id: int = -1
    first_group: int = 0

    def __getitem__(self, groups: slice) -> "SamplingRequest":
        first_group = self.first_group + groups.start
        return replace(
            self, uniforms_PGT=self.uniforms_PGT[groups], drafts=self.drafts[groups], first_group=first_group
        )


@dataclass
class Samples:
    """The completions of P groups, and how they came about."""

    completion_ids: list[list[int]]  # B; the sampled tokens, each turn up to and with its first end token
    turn_lengths: list[list[int]]  # B; of each turn
    logps: list[list[float]]  # B; of each token under the distribution that it was drawn from
    groups: list[Branches]  # P; the drafts and all that was drawn
    nodes: list[list[list[int]]]  # P x G; of each token that was drawn
    paths: list[list[PathToken]]  # B; all tokens behind the prompt
    num_passes: int  # forward passes of the model
    num_ended_in_first: int  # of the B
    first: FirstPass | None

    @property
    def turns(self) -> list[list[list[int]]]:
        """B; the sampled tokens of each turn."""
        return list(map(in_pieces, self.completion_ids, self.turn_lengths))


@dataclass
class _Rollout:
    """One rollout on its way down the tree of its group."""

    number: int  # within its group
    node: int = ROOT
    nodes: list[int] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=lambda: [[]])
    logps: list[float] = field(default_factory=list)
    is_done: bool = False

    @property
    def ids(self) -> list[int]:
        return [token for turn in self.turns for token in turn]


def sample_on_trees(
    model: nn.Module,
    prompts: Prompts,
    images: dict[str, Any],
    attention: str,
    request: SamplingRequest,
    *,
    most_of_ranks: Callable[[int], int] = lambda count: count,
    model_of_first_pass: nn.Module | None = None,
) -> Samples:
    """G completions of each prompt.

    model: unwrapped. images: of group_passes.image_inputs. attention: the language model's; without a mask, as flash
    attention is, there are no drafts and every rollout goes on in a row of its own. most_of_ranks: the maximum of a
    number over the ranks; under ZeRO-3 with sharded weights all ranks must do the same passes. model_of_first_pass:
    runs round 1 with gradients; may be wrapped.
    """
    sampler = _Sampler(model, prompts, attention, request)
    passes: TreePasses | RowPasses
    if attention in MAX_MASK_PAIRS:
        passes = TreePasses(model, prompts, attention, request.padding_id)
        with torch.set_grad_enabled(model_of_first_pass is not None):
            first = sampler.begin(passes, images, model_of_first_pass or model)
    else:
        with torch.no_grad():
            passes, logits_PV = RowPasses.of_prompts(model, prompts, images, request.padding_id)
        first = None
        sampler.draw(logits_PV, [(number, ROOT) for number in range(len(prompts.ids_PL))])
    waiting, num_passes = sampler.walk(), 1
    num_ended_in_first = sum(rollout.is_done for group in sampler.rollouts for rollout in group)
    with torch.no_grad():
        while most_of_ranks(len(waiting)):
            has_turns = request.answers is not None
            if isinstance(passes, TreePasses) and not has_turns and passes.is_wasteful_for(waiting, sampler.groups):
                passes = passes.into_rows(waiting, sampler.groups)
            if isinstance(passes, TreePasses):
                nodes, open_nodes = sampler.with_continuations(waiting)
                images = sampler.images_of(model, nodes, most_of_ranks)
                sampler.draw(passes.extend(sampler.groups, nodes, open_nodes, images), open_nodes)
            else:
                sampler.draw(passes.extend(sampler.groups, waiting), waiting)
            waiting, num_passes = sampler.walk(), num_passes + 1
    rollouts = [rollout for group in sampler.rollouts for rollout in group]
    return Samples(
        [rollout.ids for rollout in rollouts],
        [list(map(len, rollout.turns)) for rollout in rollouts],
        [rollout.logps for rollout in rollouts],
        sampler.groups,
        [[rollout.nodes for rollout in group] for group in sampler.rollouts],
        [
            group.path_to(rollout.node)
            for group, of_group in zip(sampler.groups, sampler.rollouts, strict=True)
            for rollout in of_group
        ],
        num_passes,
        num_ended_in_first,
        first,
    )


class _Sampler:
    """The trees as they grow, what every rollout would say at each node, and how far each has come."""

    def __init__(self, model: nn.Module, prompts: Prompts, attention: str, request: SamplingRequest):
        self.prompts, self.request, self.rules = prompts, request, request.rules
        num_prompts, num_rollouts, _ = request.uniforms_PGT.shape
        self.ends = set(self.rules.end_ids)
        drafts = request.drafts if attention in MAX_MASK_PAIRS else [()] * num_prompts
        self.sayable = [[self._sayable(ids) for ids in guesses] for guesses in drafts]
        self.groups = [Branches(guesses) for guesses in self.sayable]
        self.continuations = [_continuations(guesses) for guesses in self.sayable]
        # by the last node of an answer, all of them, behind the end of the turn that it answers
        self.given: dict[WaitingNode, list[int]] = {}
        self.answered: dict[WaitingNode, int | None] = {}  # by the end of a turn, the last node of its answer
        self.rollouts = [[_Rollout(number) for number in range(num_rollouts)] for _ in range(num_prompts)]
        self.uniforms_PTG = torch.from_numpy(request.uniforms_PGT).transpose(1, 2)
        # by group and node, what its G rollouts say there, and the log-probability of that
        self.drawn: dict[WaitingNode, tuple[list[int], list[float]]] = {}

    def begin(self, passes: TreePasses, images: dict[str, Any], model: nn.Module) -> FirstPass:
        """Round 1, over the prompts and the drafts."""
        open_nodes = [[node for node in range(len(group)) if self._is_open(group, node)] for group in self.groups]
        first = passes.begin(self.groups, open_nodes, images, model)
        nodes = [(number, node) for number, group_nodes in enumerate(open_nodes) for node in group_nodes]
        rows = [first.kept[number][node] + number * first.logits_PKV.shape[1] for number, node in nodes]
        self.draw(first.logits_PKV.detach().flatten(0, 1), nodes, rows)
        return first

    def _sayable(self, draft: Sequence[int]) -> Sequence[int]:
        """The draft up to the first token that is never drawn, such as one for pixels, or that ends a completion."""
        banned, length = set(self.rules.config.suppress_tokens or ()), min(len(draft), self.rules.max_tokens)
        for place, token in enumerate(draft[:length]):
            if token in banned:
                return draft[:place]
            if token in self.ends:
                return draft[: place + 1]
        return draft[:length]

    def _is_open(self, group: Branches, node: int) -> bool:
        """True if a rollout at this node goes on."""
        if node == ROOT or isinstance(group.tokens[node], GivenToken):
            return True
        return group.turn_lengths[node] < self.rules.max_tokens and group.tokens[node] not in self.ends

    def _answer(self, number: int, rollout: _Rollout) -> int | None:
        """The node that a rollout of this group goes on from once its turn is answered; None if it has ended."""
        group, end = self.groups[number], rollout.node
        if self.request.answers is None or group.tokens[end] != self.request.turn_end_id:
            return None
        if (number, end) not in self.answered:
            given = self.request.answers(self.request.first_group + number, rollout.turns)
            nodes = [end]
            for token in given:
                nodes.append(group.child(nodes[-1], token))
            self.answered[number, end] = nodes[-1] if given else None
            self.given[number, nodes[-1]] = nodes
        return self.answered[number, end]

    @torch.no_grad()
    def draw(self, logits_KV: Tensor, nodes: Sequence[WaitingNode], rows: Sequence[int] | None = None) -> None:
        """Draws what every rollout of a group would say behind each of these nodes of it.

        rows: of the nodes among the logits; in their order by default.
        """
        rows = range(len(nodes)) if rows is None else rows
        # of some nodes at a time, as scores take several times the room of logits
        size = max(1, CHUNK_SIZE // logits_KV.shape[1])
        drawn = [
            self._draw(logits_KV[list(rows[start : start + size])], nodes[start : start + size])
            for start in range(0, len(nodes), size)
        ]
        if drawn:
            tokens_NG, logps_NG = (torch.cat(parts).tolist() for parts in zip(*drawn, strict=True))
            self.drawn |= zip(nodes, zip(tokens_NG, logps_NG, strict=True), strict=True)

    def _draw(self, logits_NV: Tensor, nodes: Sequence[WaitingNode]) -> tuple[Tensor, Tensor]:
        numbers, counts = zip(*((number, self.groups[number].num_sampled[node]) for number, node in nodes), strict=True)
        uniforms_NG = self.uniforms_PTG[list(numbers), list(counts)].to(logits_NV.device)
        scores_NV = self.rules.scores(logits_NV, self.prompts, self.groups, nodes)
        return draw_tokens(scores_NV, uniforms_NG, self.request.num_greedy)

    def walk(self) -> list[WaitingNode]:
        """Takes every rollout as far as distributions are at hand. Returns the nodes that are to have theirs next."""
        waiting: dict[WaitingNode, None] = {}
        for number, (group, rollouts) in enumerate(zip(self.groups, self.rollouts, strict=True)):
            for rollout in rollouts:
                while not rollout.is_done and (number, rollout.node) in self.drawn:
                    tokens, logps = self.drawn[number, rollout.node]
                    rollout.node = group.child(rollout.node, tokens[rollout.number])
                    rollout.nodes.append(rollout.node)
                    rollout.turns[-1].append(tokens[rollout.number])
                    rollout.logps.append(logps[rollout.number])
                    if not self._is_open(group, rollout.node):
                        answered = self._answer(number, rollout)
                        rollout.is_done = answered is None
                        if answered is not None:
                            rollout.node = answered
                            rollout.turns.append([])
                if not rollout.is_done:
                    waiting[number, rollout.node] = None
        return list(waiting)

    def images_of(
        self, model: nn.Module, nodes: Sequence[WaitingNode], most_of_ranks: Callable[[int], int]
    ) -> dict[str, Any]:
        """A pass's arguments for the pictures that begin at these nodes of it, in the order of their slots."""
        if self.request.answers is None:
            return {}
        tokens = [self.groups[number].tokens[node] for number, node in sorted(nodes, key=lambda pair: pair[0])]
        begun = [token for token in tokens if isinstance(token, GivenToken) and token.begins_picture]
        digests = [token.picture for token in begun if token.picture is not None]
        features, grids_N3 = self.request.answers.shown(model, digests, most_of_ranks)
        return {"image_grid_thw": grids_N3, **as_encoded(features)} if digests else {}

    def with_continuations(self, waiting: Sequence[WaitingNode]) -> tuple[list[WaitingNode], list[WaitingNode]]:
        """What the next pass is over, parents first, and those of it that rollouts may go on from.

        Behind each waiting node comes what drafts have behind its last two tokens, as rollouts may come back to them;
        behind an answer, all drafts. An answer comes with all of its tokens.
        """
        nodes, open_nodes = list[WaitingNode](), list[WaitingNode]()
        for number, node in waiting:
            group = self.groups[number]
            nodes += [(number, given) for given in self.given.get((number, node), [node])]
            open_nodes.append((number, node))
            last_two = group.tokens[group.parents[node]], group.tokens[node]
            is_turn_start = isinstance(group.tokens[node], GivenToken)
            guesses = self.sayable[number] if is_turn_start else [self.continuations[number].get(last_two, ())]
            found = dict[int, None]()
            for guess in guesses:
                place = node
                for token in guess:
                    if not self._is_open(group, place):
                        break
                    place = group.child(place, token)
                    if self._is_open(group, place):
                        found[place] = None
            nodes += [(number, place) for place in found]
            open_nodes += [(number, place) for place in found]
        return nodes, open_nodes


def _continuations(drafts: Sequence[Sequence[int]]) -> dict[tuple[PathToken, PathToken], Sequence[int]]:
    """What stands behind each two neighbouring tokens, where they are first found in the drafts."""
    found: dict[tuple[PathToken, PathToken], Sequence[int]] = {}
    for ids in drafts:
        for place in range(len(ids) - 2):
            found.setdefault((ids[place], ids[place + 1]), ids[place + 2 : place + 2 + MAX_CONTINUATION])
    return found
