"""The forward passes of sampling: over one key-value cache a group, or one a rollout where groups have grown apart.

Knows which slot of a cache holds which node, and which slots a node sees; not what is drawn, nor why.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from fleet.qwen.group_passes import as_model_mask, tree_logits
from fleet.qwen.token_tree import ROOT, Branches, Prompts, TokenTree, lay_out

# Axes: P prompts, S slots of a cache, Q nodes of a pass in one group, K slots with logits, R rows, V vocabulary.

# slots of a cache for each that a node sees, from which on a copy of what it sees is less work
MAX_SLOTS_PER_SEEN = 2.0

WaitingNode = tuple[int, int]  # a group's number and a node of it


class FirstPass(NamedTuple):
    """Round 1: what it predicts where. Its logits have a gradient if it was run with one."""

    tree: TokenTree  # of the drafts
    kept: list[dict[int, int]]  # P; place among the logits, by node
    logits_PKV: Tensor


class TreePasses:
    """Passes over trees: a group's rollouts share one row and its cache."""

    def __init__(self, model: nn.Module, prompts: Prompts, attention: str, padding_id: int):
        """model: unwrapped."""
        self.model, self.prompts, self.attention, self.padding_id = model, prompts, attention, padding_id
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.next_positions = prompts.next_positions_P
        self.device = prompts.ids_PL.device
        # which slots the nodes of the latest pass see
        self._sees: dict[WaitingNode, np.ndarray] = {}

    def begin(
        self, groups: Sequence[Branches], open_nodes: Sequence[Sequence[int]], images: dict[str, Any], model: nn.Module
    ) -> FirstPass:
        """The pass over prompts and drafts; keeps the logits of each group's open nodes. model: may be wrapped."""
        tree = lay_out(self.prompts, groups, padding_id=self.padding_id, leaves=open_nodes)
        kept = [{node: place for place, node in enumerate(nodes)} for nodes in open_nodes]
        most = max(map(len, open_nodes))
        slots = [
            [slots[node] for node in nodes] + [0] * (most - len(nodes))
            for slots, nodes in zip(tree.slots, open_nodes, strict=True)
        ]
        slots_PK = torch.tensor(slots, device=self.device)
        logits_PKV = tree_logits(model, tree, slots_PK, images, self.attention, self.cache)
        ends, places = tree.end_PS.cpu().numpy(), np.arange(tree.end_PS.shape[1])
        for number, nodes in enumerate(open_nodes):
            for node in nodes:
                slot = tree.slots[number][node]
                self._sees[number, node] = (places <= slot) & (slot < ends[number])
        return FirstPass(tree, kept, logits_PKV)

    def extend(
        self,
        groups: Sequence[Branches],
        nodes: Sequence[WaitingNode],
        wanted: Sequence[WaitingNode] | None = None,
        images: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """Logits (N, V) of these new nodes, each a child of one that was in the pass before, or is earlier in this.

        wanted: those among them whose logits are returned; all by default. images: the arguments for pictures
        that the nodes show, in the order of their slots.
        """
        by_group: list[list[int]] = [[] for _ in groups]
        for number, node in nodes:
            by_group[number].append(node)
        kept: list[list[int]] = [[] for _ in groups]
        rows, columns = [], []
        for number, node in nodes if wanted is None else wanted:
            rows.append(number)
            columns.append(len(kept[number]))
            kept[number].append(by_group[number].index(node))
        most_kept = max(1, *map(len, kept))
        kept_PK = torch.tensor([[*places, *[0] * (most_kept - len(places))] for places in kept], device=self.device)
        # a rank that has nothing to add takes part in the pass with padding
        num_queries, num_before = max(1, *map(len, by_group)), self.cache.get_seq_length()
        shape = len(groups), num_queries
        ids, positions = np.full(shape, self.padding_id), np.zeros((3, *shape), dtype=np.int64)
        sees = np.zeros((*shape, num_before + num_queries), dtype=bool)
        sees[:, range(num_queries), range(num_before, num_before + num_queries)] = True
        latest: dict[WaitingNode, np.ndarray] = {}
        for number, group_nodes in enumerate(by_group):
            for place, node in enumerate(group_nodes):
                group = groups[number]
                ids[number, place] = group.token_id(node)
                positions[:, number, place] = np.add(group.position(node), self.next_positions[number])
                parent = number, group.parents[node]
                before = latest[parent] if parent in latest else self._sees[parent]
                sees[number, place, : len(before)] |= before
                latest[number, node] = sees[number, place]
        self._sees = latest
        logits_PKV = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=as_model_mask(torch.from_numpy(sees)[:, None].to(self.device), self.attention),
            position_ids=torch.from_numpy(positions).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=kept_PK,
            **images,
        ).logits
        return logits_PKV[rows, columns]

    def is_wasteful_for(self, nodes: Sequence[WaitingNode], groups: Sequence[Branches]) -> bool:
        """True if the next pass over these nodes would mostly score slots that a node does not see."""
        seen = [int(self._sees[number, groups[number].parents[node]].sum()) for number, node in nodes]
        return len(nodes) > 1 and self.cache.get_seq_length() > MAX_SLOTS_PER_SEEN * max(seen)

    def into_rows(self, nodes: Sequence[WaitingNode], groups: Sequence[Branches]) -> "RowPasses":
        """Passes that go on to these nodes in rows of their own: what each sees of the cache, copied."""
        parents = list(dict.fromkeys((number, groups[number].parents[node]) for number, node in nodes))
        slots = [torch.from_numpy(self._sees[parent].nonzero()[0]) for parent in parents]
        slots_RS = pad_sequence(slots, batch_first=True, padding_side="left").to(self.device)
        mask_RS = pad_sequence([torch.ones_like(row) for row in slots], batch_first=True, padding_side="left")
        rows_R1 = torch.tensor([[number] for number, _ in parents], device=self.device)
        cache = DynamicCache(config=self.model.config.get_text_config())
        for number, layer in enumerate(self.cache.layers):
            copies = (values[rows_R1, :, slots_RS].transpose(1, 2) for values in (layer.keys, layer.values))
            cache.update(*copies, number)
        rows = {parent: row for row, parent in enumerate(parents)}
        return RowPasses(self.model, cache, mask_RS.to(self.device), rows, self.next_positions, self.padding_id)


class RowPasses:
    """Passes over rows, one a path: for paths that share little, and for attention that takes no mask of a tree."""

    def __init__(
        self,
        model: nn.Module,
        cache: DynamicCache,
        mask_RS: Tensor,
        rows: dict[WaitingNode, int],
        next_positions: Sequence[int],
        padding_id: int,
    ):
        """cache: R rows of S slots, mask_RS: int64, 0 on padding. rows: by the last node of each."""
        self.model, self.cache, self.mask_RS, self.rows = model, cache, mask_RS, rows
        self.next_positions, self.padding_id = next_positions, padding_id

    @classmethod
    def of_prompts(
        cls, model: nn.Module, prompts: Prompts, images: dict[str, Any], padding_id: int
    ) -> tuple["RowPasses", Tensor]:
        """The passes once the P prompts are in the cache, and what comes behind each of them: logits (P, V)."""
        cache = DynamicCache(config=model.config.get_text_config())
        logits_P1V = model(
            input_ids=prompts.ids_PL,
            attention_mask=prompts.mask_PL,
            position_ids=prompts.positions_3PL,
            logits_to_keep=1,
            past_key_values=cache,
            use_cache=True,
            **images,
        ).logits
        rows = {(number, ROOT): number for number in range(len(prompts.ids_PL))}
        return cls(model, cache, prompts.mask_PL, rows, prompts.next_positions_P, padding_id), logits_P1V[:, 0]

    def extend(self, groups: Sequence[Branches], nodes: Sequence[WaitingNode]) -> Tensor:
        """Logits (N, V) of these new nodes, each a child of one whose logits were had before."""
        # rows that no rollout goes on in are dropped; one stays, for a rank that has nothing to add
        sources = [self.rows[number, groups[number].parents[node]] for number, node in nodes] or [0]
        device = self.mask_RS.device
        if sources != list(range(len(self.mask_RS))):
            sources_R = torch.tensor(sources, device=device)
            self.cache.batch_select_indices(sources_R)
            self.mask_RS = self.mask_RS[sources_R]
        self.mask_RS = torch.cat([self.mask_RS, self.mask_RS.new_ones(len(sources), 1)], dim=1)
        ids = [groups[number].token_id(node) for number, node in nodes] or [self.padding_id]
        positions = [np.add(groups[number].position(node), self.next_positions[number]) for number, node in nodes]
        positions_R3 = np.array(positions or [[0, 0, 0]], dtype=np.int64)
        logits_R1V = self.model(
            input_ids=torch.tensor(ids, device=device)[:, None],
            attention_mask=self.mask_RS,
            position_ids=torch.from_numpy(positions_R3).T[:, :, None].to(device),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.rows = {pair: row for row, pair in enumerate(nodes)}
        return logits_R1V[: len(nodes), 0]
