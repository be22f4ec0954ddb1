"""A group of rollouts as one tree of tokens behind one copy of its prompt, and back. Knows no model.

`Branches` is the tree while it grows: rollouts that begin alike share their tokens. `lay_out` makes it a row: the
prompt, then the tree depth first. Position and history of a node are those that its token has in a row of its own, so
a slot computes what it would behind a prompt of its own. Every rollout's every token is an edge of the tree: a slot
predicts it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# Axes: P prompts, L tokens of the longest prompt, S slots of a packed row, K edges of the largest tree, G rollouts of a
# prompt, T tokens of the longest rollout. Qwen2.5-VL gives every token three positions (mrope): time, height, width.

ROOT = 0


class GivenToken(NamedTuple):
    """A token on a rollout's path that was not sampled: of a tool's answer, text or part of a picture.

    picture: the digest of the picture that an image token stands for, as tokens of two pictures are not the same.
    offset: of its three positions from the position that its parent leaves to children. step: from there to the
    position that it leaves to its own: 1 for text. All tokens of a picture but the last have step 0; the last has the
    larger of the picture's height and width in image tokens.
    """

    token: int
    picture: bytes | None = None
    offset: tuple[int, int, int] = (0, 0, 0)
    step: int = 1

    @property
    def begins_picture(self) -> bool:
        """True for the first of a picture's tokens."""
        return self.picture is not None and self.offset == (0, 0, 0)


PathToken: TypeAlias = int | GivenToken  # an int was sampled, or is a guess of what may be


class Branches:
    """One group's tree as it grows. Nodes have numbers in order of arrival; ROOT is the prompt's last token.

    A node's merge key is its token as given: sampled or not, and of which picture. Children of one node differ in it.

    >>> branches = Branches()
    >>> branches.add([7, 8]), branches.add([7, 9]), branches.add([7, 8])
    ([1, 2], [1, 3], [1, 2])
    """

    def __init__(self, paths: Sequence[Sequence[PathToken]] = ()):
        """paths: are added in their order."""
        self.tokens: list[PathToken] = [-1]  # of the root: whatever ends the prompt
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.num_sampled: list[int] = [0]  # of the tokens down to a node
        self.turn_lengths: list[int] = [0]  # the sampled ones behind the last that was given
        self.starts: list[int] = [0]  # the position that children take, less the one that the root's take
        self.children: list[dict[PathToken, int]] = [{}]
        for path in paths:
            self.add(path)

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: PathToken) -> int:
        """The child of a node that has this token; a new one if there is none."""
        children = self.children[node]
        if token not in children:
            children[token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(self.depths[node] + 1)
            is_given = isinstance(token, GivenToken)
            self.num_sampled.append(self.num_sampled[node] + (not is_given))
            self.turn_lengths.append(0 if is_given else self.turn_lengths[node] + 1)
            self.starts.append(self.starts[node] + (token.step if isinstance(token, GivenToken) else 1))
            self.children.append({})
        return children[token]

    def add(self, path: Sequence[PathToken]) -> list[int]:
        """The nodes of a path from the root, new ones where it leaves the tree."""
        node, nodes = ROOT, []
        for token in path:
            node = self.child(node, token)
            nodes.append(node)
        return nodes

    def add_sampled(self, path: Sequence[PathToken]) -> list[int]:
        """`add`, but returns the nodes of the tokens that were sampled alone."""
        return [node for node, token in zip(self.add(path), path, strict=True) if not isinstance(token, GivenToken)]

    def path_to(self, node: int) -> list[PathToken]:
        """The tokens from the prompt's end to a node, with its own."""
        path = []
        while node != ROOT:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def ids_to(self, node: int) -> list[int]:
        """The ids of path_to's tokens."""
        return [token.token if isinstance(token, GivenToken) else token for token in self.path_to(node)]

    def sampled_nodes(self) -> list[int]:
        """The nodes whose tokens were sampled, or may be, in order of arrival: each has an edge."""
        return [node for node in range(1, len(self.tokens)) if not isinstance(self.tokens[node], GivenToken)]

    def depth_first(self) -> Iterator[int]:
        """All nodes, each before its descendants and its later siblings."""
        waiting = [ROOT]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(self.children[node].values())

    def position(self, node: int) -> tuple[int, int, int]:
        """A node's three positions, less the one that the root's children take."""
        token, start = self.tokens[node], self.starts[self.parents[node]]
        time, height, width = token.offset if isinstance(token, GivenToken) else (0, 0, 0)
        return start + time, start + height, start + width

    def token_id(self, node: int) -> int:
        """The id of a node's token."""
        token = self.tokens[node]
        return token.token if isinstance(token, GivenToken) else token


@dataclass(frozen=True)
class Prompts:
    """P prompts of up to L tokens, padded on the left; int64. `mask_PL` is 0 on padding."""

    ids_PL: Tensor
    mask_PL: Tensor
    positions_3PL: Tensor  # the model's own

    def __post_init__(self) -> None:
        if not bool((self.mask_PL[:, -1] == 1).all()):
            raise ValueError(
                "a prompt is empty or padded on the right, but its last token is the tree's root; pad left"
            )

    def __getitem__(self, chosen: slice) -> "Prompts":
        return Prompts(self.ids_PL[chosen], self.mask_PL[chosen], self.positions_3PL[:, chosen])

    @property
    def next_positions_P(self) -> list[int]:
        """The position, on all three axes, of text behind each prompt."""
        return (self.positions_3PL[:, :, -1].amax(dim=0) + 1).tolist()


@dataclass(frozen=True)
class TokenTree:
    """P groups as P rows of S slots, ready for one forward pass.

    A row is the prompt, padding left out, whose last token is the root's slot; then the other nodes that have a slot,
    depth first; then padding. An edge leads from a slot to the token of a child node that was sampled; edges are in the
    order of Branches.sampled_nodes.
    """

    input_ids_PS: Tensor  # int64
    position_ids_3PS: Tensor  # int64
    next_position_PS: Tensor  # int64, that a child of text takes on all three axes
    end_PS: Tensor  # int64: the slots from a slot to this one, left out, are its descendants and itself
    is_given_PS: Tensor  # bool: not sampled; prompts are not
    slots: list[dict[int, int]]  # P; slot by node
    pictures: list[list[bytes]]  # P; the digests of those in the tree, in the order of their slots
    edge_slot_PK: Tensor  # int64; that predicts the edge's token; 0 behind a tree's last edge
    edge_token_PK: Tensor  # int64
    edge_PGT: Tensor  # int64, the edge of each rollout's each token; 0 behind its end
    is_token_PGT: Tensor  # bool; False behind a rollout's end. T counts sampled tokens alone

    @property
    def slot_PGT(self) -> Tensor:
        """The slot that predicts each rollout's each token: (P, G, T) int64; any behind its end."""
        return self.edge_slot_PK.gather(1, self.edge_PGT.flatten(1)).view(self.edge_PGT.shape)


def tree_of_rollouts(
    prompts: Prompts, completions: Sequence[Sequence[Sequence[PathToken]]], padding_id: int
) -> TokenTree:
    """P x G completions of any lengths behind their prompts. Only nodes with children have slots: the rest predict
    nothing. Raises ValueError if there are not as many groups as prompts."""
    groups = [Branches() for _ in completions]
    nodes = [[group.add_sampled(path) for path in paths] for group, paths in zip(groups, completions, strict=True)]
    return lay_out(prompts, groups, nodes, padding_id=padding_id)


def lay_out(
    prompts: Prompts,
    groups: Sequence[Branches],
    nodes: Sequence[Sequence[Sequence[int]]] = (),
    *,
    padding_id: int,
    leaves: Sequence[Collection[int]] = (),
) -> TokenTree:
    """P trees as rows. nodes: of each rollout's each sampled token, P x G lists, or () where there are no rollouts yet.

    A node has a slot if it has children or is one of its group's `leaves`; the root always has one.
    """
    if len(groups) != len(prompts.ids_PL):
        raise ValueError(f"{len(groups)} trees, but {len(prompts.ids_PL)} prompts; give one tree for each prompt")
    lengths = prompts.mask_PL.sum(dim=1).tolist()
    next_positions = prompts.next_positions_P
    rows = [
        _Row.of(group, set(leaves[number]) if leaves else set(), lengths[number], next_positions[number])
        for number, group in enumerate(groups)
    ]
    num_slots, device = max(row.end for row in rows), prompts.ids_PL.device
    input_ids_PS, positions_3PS = _prompt_slots(prompts, num_slots, padding_id)
    end_PS = torch.arange(1, num_slots + 1).repeat(len(rows), 1)
    next_position_PS = torch.zeros_like(end_PS)
    is_given_PS = torch.ones_like(end_PS, dtype=torch.bool)
    for number, row in enumerate(rows):
        end_PS[number, : row.start] = row.end
        end_PS[number, row.start : row.end] = torch.tensor(row.ends, dtype=torch.int64)
        next_position_PS[number, row.start - 1 : row.end] = torch.tensor([next_positions[number], *row.next_positions])
        is_given_PS[number, row.start : row.end] = torch.tensor(row.are_given, dtype=torch.bool)
        if row.ids:
            places = slice(row.start, row.end)
            input_ids_PS[number, places] = torch.tensor(row.ids, device=device)
            positions_3PS[:, number, places] = torch.tensor(row.positions, device=device).T
    sampled = [group.sampled_nodes() for group in groups]
    # at least one, so that a pass in which nobody said anything has gradients too, of zero
    edges = torch.zeros(2, len(groups), max(1, *map(len, sampled)), dtype=torch.int64)
    for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
        # a parent has children, so it has a slot
        edges[0, number, : len(sampled[number])] = torch.tensor(
            [row.slots[group.parents[node]] for node in sampled[number]], dtype=torch.int64
        )
        edges[1, number, : len(sampled[number])] = torch.tensor(
            [group.token_id(node) for node in sampled[number]], dtype=torch.int64
        )
    edge_of = [{node: edge for edge, node in enumerate(group_nodes)} for group_nodes in sampled]
    longest = max((len(path) for paths in nodes for path in paths), default=0)
    padded = [
        [[*(edge_of[number][node] for node in path), *[-1] * (longest - len(path))] for path in paths]
        for number, paths in enumerate(nodes)
    ]
    edge_PGT = torch.tensor(padded, dtype=torch.int64).view(len(nodes), len(nodes[0]) if nodes else 0, longest)
    is_token_PGT = edge_PGT >= 0
    return TokenTree(
        input_ids_PS,
        positions_3PS,
        next_position_PS.to(device),
        end_PS.to(device),
        is_given_PS.to(device),
        [row.slots for row in rows],
        [row.pictures for row in rows],
        edges[0].to(device),
        edges[1].to(device),
        edge_PGT.clamp(min=0).to(device),
        is_token_PGT.to(device),
    )


def ancestry_mask(end_PS: Tensor) -> Tensor:
    """True where a slot (first S) sees another (second S): itself, its ancestors and the prompt up to it.

    Returns (P, 1, S, S) bool. Padding sees itself alone.

    >>> ancestry_mask(torch.tensor([[3, 2, 3]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    slots_S = torch.arange(end_PS.shape[1], device=end_PS.device)
    return ((slots_S[:, None] >= slots_S) & (slots_S[:, None] < end_PS[:, None, :]))[:, None]


def by_rollout(values_PK: Tensor, tree: TokenTree) -> Tensor:
    """The edges' values by rollout: (P, G, T) of the values' dtype, 0 behind a rollout's end.

    Where rollouts share an edge, their gradients meet in it.
    """
    values_PGT = values_PK.gather(1, tree.edge_PGT.flatten(1)).view(tree.edge_PGT.shape)
    return values_PGT.masked_fill(~tree.is_token_PGT, 0)


@dataclass
class _Row:
    """A tree's slots behind its prompt, depth first."""

    start: int  # the slot behind the prompt
    slots: dict[int, int]  # by node
    ids: list[int]
    positions: list[tuple[int, int, int]]
    next_positions: list[int]
    ends: list[int]
    are_given: list[bool]
    pictures: list[bytes]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @classmethod
    def of(cls, group: Branches, leaves: set[int], prompt_length: int, next_position: int) -> "_Row":
        row = cls(prompt_length, {ROOT: prompt_length - 1}, [], [], [], [], [], [])
        order = [node for node in group.depth_first() if group.children[node] or node in leaves]
        for node in order:
            if node != ROOT:
                time, height, width = group.position(node)
                row.slots[node] = row.end
                row.ids.append(group.token_id(node))
                row.positions.append((next_position + time, next_position + height, next_position + width))
                row.next_positions.append(next_position + group.starts[node])
                token = group.tokens[node]
                row.are_given.append(isinstance(token, GivenToken))
                if isinstance(token, GivenToken) and token.picture is not None and token.begins_picture:
                    row.pictures.append(token.picture)
        row.ends = [0] * len(row.ids)
        # depth first, a node's descendants end where its last child's do
        last = {node: row.slots[node] + 1 for node in order}
        for node in reversed(order):
            if node != ROOT:
                row.ends[row.slots[node] - row.start] = last[node]
                last[group.parents[node]] = max(last.get(group.parents[node], 0), last[node])
        return row


def _prompt_slots(prompts: Prompts, num_slots: int, padding_id: int) -> tuple[Tensor, Tensor]:
    """Ids (P, S) and positions (3, P, S) of rows that hold the prompts, moved left over their padding."""
    longest, lengths_P1 = prompts.ids_PL.shape[1], prompts.mask_PL.sum(dim=1, keepdim=True)
    slots_S = torch.arange(num_slots, device=prompts.ids_PL.device)
    is_prompt_PS = slots_S < lengths_P1
    source_PS = torch.where(is_prompt_PS, slots_S + longest - lengths_P1, longest - 1)
    ids_PS = torch.where(is_prompt_PS, prompts.ids_PL.gather(1, source_PS), padding_id)
    return ids_PS, prompts.positions_3PL.gather(2, source_PS.expand(3, -1, -1))
