"""A group of rollouts behind one copy of its prompt, as one row, and back. Pure tensor functions; knows no model.

A packed row is the prompt without its last token, then G branches, then padding. Branch g is the last prompt token and
then completion g without its last token, so its slots predict all tokens of the completion. A branch continues the
prompt's positions and sees the prompt and itself, so each slot computes what it would behind a prompt of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Axes: P prompts, L tokens of the longest prompt, G rollouts of each, T tokens of the longest completion, S slots of a
# packed row. Qwen2.5-VL gives every token three positions (mrope): time, height, width.

PADDING = -1


@dataclass(frozen=True)
class PackedGroups:
    """P groups as P rows of S slots, ready for one forward pass."""

    input_ids_PS: Tensor  # int64
    position_ids_3PS: Tensor  # int64
    branch_PS: Tensor  # int64: 0 in the prompt, 1 to G in the branches, PADDING behind them
    shift_labels_PS: Tensor  # int64, the token that each slot predicts; -100 outside the branches
    slot_PGT: Tensor  # int64, the slot that predicts each completion token; 0 behind a completion's end
    is_token_PGT: Tensor  # bool, False behind a completion's end


def pack_groups(
    prompt_ids_PL: Tensor,
    prompt_mask_PL: Tensor,
    prompt_positions_3PL: Tensor,
    completion_ids_PGT: Tensor,
    completion_lengths_PG: Tensor,
    padding_id: int,
) -> PackedGroups:
    """P prompts, left-padded, and the G completions of each, right-padded, as P packed rows.

    All int64: prompt_mask_PL is 0 on padding, prompt_positions_3PL the model's own positions of the prompts,
    completion_lengths_PG from 0 to T. Only tokens take slots, so rows of unequal lengths are padded at their ends.
    Raises ValueError if a prompt is empty or does not end in its last column, or a length is not from 0 to T.
    """
    device, (num_prompts, longest_prompt) = prompt_ids_PL.device, prompt_ids_PL.shape
    num_rollouts, longest = completion_ids_PGT.shape[1:]
    if not bool((prompt_mask_PL[:, -1] == 1).all()):
        raise ValueError("a prompt is empty or padded on the right, but its last token opens every branch; pad left")
    if not bool(((completion_lengths_PG >= 0) & (completion_lengths_PG <= longest)).all()):
        raise ValueError(f"completion lengths {completion_lengths_PG.tolist()}, but wanted 0 to {longest} tokens")
    prefix_lengths_P = prompt_mask_PL.sum(dim=1) - 1
    ends_PG = prefix_lengths_P[:, None] + completion_lengths_PG.cumsum(dim=1)
    num_slots = int(ends_PG[:, -1].max())

    slots_S = torch.arange(num_slots, device=device)
    is_prefix_PS = slots_S < prefix_lengths_P[:, None]
    # the prompts' tokens, moved left over their padding
    source_PS = slots_S + longest_prompt - 1 - prefix_lengths_P[:, None]
    source_PS = torch.where(is_prefix_PS, source_PS, longest_prompt - 1)
    input_ids_PS = torch.where(is_prefix_PS, prompt_ids_PL.gather(1, source_PS), padding_id)
    position_ids_3PS = prompt_positions_3PL.gather(2, source_PS.expand(3, -1, -1))
    branch_PS = torch.where(is_prefix_PS, 0, PADDING)
    shift_labels_PS = torch.full_like(input_ids_PS, -100)

    steps_T = torch.arange(longest, device=device)
    is_token_PGT = steps_T < completion_lengths_PG[:, :, None]
    slot_PGT = torch.where(is_token_PGT, (ends_PG - completion_lengths_PG)[:, :, None] + steps_T, 0)
    prompts_PGT = torch.arange(num_prompts, device=device)[:, None, None].expand_as(slot_PGT)
    targets = prompts_PGT[is_token_PGT], slot_PGT[is_token_PGT]

    last_PG1 = prompt_ids_PL[:, -1, None, None].expand(-1, num_rollouts, 1)
    branch_ids_PGT = torch.cat([last_PG1, completion_ids_PGT[:, :, :-1]], dim=2)
    branches_G = torch.arange(1, num_rollouts + 1, device=device)
    input_ids_PS[targets] = branch_ids_PGT[is_token_PGT]
    branch_PS[targets] = branches_G[None, :, None].expand_as(slot_PGT)[is_token_PGT]
    shift_labels_PS[targets] = completion_ids_PGT[is_token_PGT]
    # a branch opens at the last prompt token's place and counts on from there, on all three axes
    branch_positions_3PGT = (prompt_positions_3PL[:, :, -1, None, None] + steps_T).expand(3, *slot_PGT.shape)
    position_ids_3PS[:, *targets] = branch_positions_3PGT[:, is_token_PGT]
    return PackedGroups(input_ids_PS, position_ids_3PS, branch_PS, shift_labels_PS, slot_PGT, is_token_PGT)


def attention_mask(branch_PS: Tensor) -> Tensor:
    """True where a slot (first S) sees another (second S): (P, 1, S, S) bool.

    A slot sees itself and, before it, the prompt and its own branch. Padding sees itself too.

    >>> attention_mask(torch.tensor([[0, 1, 2]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    query_PS1, key_P1S = branch_PS[:, :, None], branch_PS[:, None, :]
    return ((key_P1S == 0) | (key_P1S == query_PS1)).tril()[:, None]


def unpack(values_PS: Tensor, packed: PackedGroups) -> Tensor:
    """The rows' values by completion token: (P, G, T) of the values' dtype, 0 behind a completion's end."""
    values_PGT = values_PS.gather(1, packed.slot_PGT.flatten(1)).view(packed.slot_PGT.shape)
    return values_PGT.masked_fill(~packed.is_token_PGT, 0)
