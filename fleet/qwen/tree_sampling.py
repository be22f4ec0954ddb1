"""Completions of whole groups, drawn on their trees of tokens: one forward pass where drafts guess right.

Round 1 is one pass over the prompts with drafts behind them. It gives the exact distribution at every node, and every
rollout walks down, drawing each token, until it ends or leaves the drafts. Each further round adds the nodes that
rollouts have come to. A draft decides only which distributions are at hand: it never changes what is drawn.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import EpisodeBatch
from fleet.qwen.draws import draw_tokens
from fleet.qwen.group_passes import MAX_MASK_PAIRS, base_qwen, image_inputs, tree_prompts
from fleet.qwen.sampling_passes import FirstPass, RowPasses, TreePasses, WaitingNode
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.token_tree import ROOT, Branches, PathToken, Prompts

# Axes: P prompts, G rollouts of each, B = P * G of them group after group, T places of a rollout.

# tokens that are put behind a rollout which has left the drafts, once it says what a draft says
MAX_CONTINUATION = 32


@dataclass(frozen=True)
class SamplingRequest:
    """What is to be sampled behind P prompts.

    drafts: of each group, guesses of token ids. uniforms_PGT: float64, of
    draws.named_uniforms. num_greedy: the first rollouts of each group that take the likeliest token instead.
    """

    rules: SamplingRules
    uniforms_PGT: np.ndarray
    drafts: Sequence[Sequence[Sequence[int]]]
    padding_id: int
    num_greedy: int = 0

    def __getitem__(self, groups: slice) -> "SamplingRequest":
        return replace(self, uniforms_PGT=self.uniforms_PGT[groups], drafts=self.drafts[groups])


@dataclass
class Samples:
    """The completions of P groups, and how they came about."""

    completion_ids: list[list[int]]  # B; up to and with the first end token, at most T
    logps: list[list[float]]  # B; of each token under the distribution that it was drawn from
    groups: list[Branches]  # P; the drafts and all that was drawn
    nodes: list[list[list[int]]]  # P x G; of each token that was drawn
    num_passes: int  # forward passes of the model
    num_ended_in_first: int  # of the B
    first: FirstPass | None


def sample_batch(
    model: nn.Module,
    batch: EpisodeBatch,
    features: Sequence[Tensor] | None,
    request: SamplingRequest,
    *,
    most_of_ranks: Callable[[int], int] = lambda count: count,
    model_of_first_pass: nn.Module | None = None,
) -> list[Samples]:
    """G completions of each of the batch's P episodes, in one piece unless the mask of round 1 would be too large.

    features: of group_passes.image_inputs. The others are sample_on_trees'; a first pass in pieces has no gradient.
    """
    attention = base_qwen(model).config.get_text_config()._attn_implementation
    prompts, num_groups = tree_prompts(model, batch), len(request.drafts)
    num_slots = prompts.ids_PL.shape[1] + max(len(Branches(group)) for group in request.drafts)
    most_pairs = MAX_MASK_PAIRS.get(attention, 2**62)
    num_pieces = most_of_ranks(min(num_groups, -(-num_groups * num_slots**2 // most_pairs)))
    ends = [num_groups * number // num_pieces for number in range(num_pieces + 1)]
    return [
        sample_on_trees(
            model,
            prompts[groups],
            image_inputs(batch, groups, features),
            attention,
            request[groups],
            most_of_ranks=most_of_ranks,
            model_of_first_pass=model_of_first_pass if num_pieces == 1 else None,
        )
        for groups in (slice(*pair) for pair in itertools.pairwise(ends))
    ]


@dataclass
class _Rollout:
    """One rollout on its way down the tree of its group."""

    number: int  # within its group
    node: int = ROOT
    nodes: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    is_done: bool = False


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
            if isinstance(passes, TreePasses) and passes.is_wasteful_for(waiting, sampler.groups):
                passes = passes.into_rows(waiting, sampler.groups)
            nodes = sampler.with_continuations(waiting) if isinstance(passes, TreePasses) else waiting
            sampler.draw(passes.extend(sampler.groups, nodes), nodes)
            waiting, num_passes = sampler.walk(), num_passes + 1
    rollouts = [rollout for group in sampler.rollouts for rollout in group]
    return Samples(
        [rollout.ids for rollout in rollouts],
        [rollout.logps for rollout in rollouts],
        sampler.groups,
        [[rollout.nodes for rollout in group] for group in sampler.rollouts],
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
        sayable = [[self._sayable(ids) for ids in guesses] for guesses in drafts]
        self.groups = [Branches(guesses) for guesses in sayable]
        self.continuations = [_continuations(guesses) for guesses in sayable]
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
        self.draw(first.logits_PKV.detach().flatten(0, 1)[rows], nodes)
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
        return node == ROOT or (group.depths[node] < self.rules.max_tokens and group.token_id(node) not in self.ends)

    @torch.no_grad()
    def draw(self, logits_NV: Tensor, nodes: Sequence[WaitingNode]) -> None:
        """Draws what every rollout of a group would say behind each of these nodes of it."""
        if not nodes:
            return
        numbers, depths = zip(*((number, self.groups[number].depths[node]) for number, node in nodes), strict=True)
        uniforms_NG = self.uniforms_PTG[list(numbers), list(depths)].to(logits_NV.device)
        scores_NV = self.rules.scores(logits_NV, self.prompts, self.groups, nodes)
        tokens_NG, logps_NG = draw_tokens(scores_NV, uniforms_NG, self.request.num_greedy)
        self.drawn |= zip(nodes, zip(tokens_NG.tolist(), logps_NG.tolist(), strict=True), strict=True)

    def walk(self) -> list[WaitingNode]:
        """Takes every rollout as far as distributions are at hand. Returns the nodes that are to have theirs next."""
        waiting: dict[WaitingNode, None] = {}
        for number, (group, rollouts) in enumerate(zip(self.groups, self.rollouts, strict=True)):
            for rollout in rollouts:
                while not rollout.is_done and (number, rollout.node) in self.drawn:
                    tokens, logps = self.drawn[number, rollout.node]
                    rollout.node = group.child(rollout.node, tokens[rollout.number])
                    rollout.nodes.append(rollout.node)
                    rollout.ids.append(tokens[rollout.number])
                    rollout.logps.append(logps[rollout.number])
                    rollout.is_done = not self._is_open(group, rollout.node)
                if not rollout.is_done:
                    waiting[number, rollout.node] = None
        return list(waiting)

    def with_continuations(self, waiting: Sequence[WaitingNode]) -> list[WaitingNode]:
        """The nodes, each followed by what drafts have behind its last two tokens: rollouts may come back to them."""
        nodes = []
        for number, node in waiting:
            nodes.append((number, node))
            group = self.groups[number]
            last_two = group.tokens[group.parents[node]], group.tokens[node]
            for token in self.continuations[number].get(last_two, ()):
                if not self._is_open(group, node):
                    break
                node = group.child(node, token)
                if self._is_open(group, node):
                    nodes.append((number, node))
        return nodes


def _continuations(drafts: Sequence[Sequence[int]]) -> dict[tuple[PathToken, PathToken], Sequence[int]]:
    """What stands behind each two neighbouring tokens, where they are first found in the drafts."""
    found: dict[tuple[PathToken, PathToken], Sequence[int]] = {}
    for ids in drafts:
        for place in range(len(ids) - 2):
            found.setdefault((ids[place], ids[place + 1]), ids[place + 2 : place + 2 + MAX_CONTINUATION])
    return found
