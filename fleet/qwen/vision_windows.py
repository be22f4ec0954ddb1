"""The vision tower's attention in one call a layer: all windows of one length together, instead of one by one.

Registered through transformers' public attention interface. A name with "flash" in it makes Qwen2.5-VL hand over all
windows at once, with their bounds, as it does for flash attention. Equal to its own loop but for rounding.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

# Axes: N patches, H heads, D channels of a head, W windows of one length L.

NAME = "flash_windows_of_fleet"

Windows = list[tuple[int, Tensor | None]]


class _LatestBounds:
    """The windows between the latest bounds: a pass gives all its layers the same tensors, reading which is slow."""

    def __init__(self, size: int = 4):
        self.size, self.known = size, list[tuple[weakref.ref[Tensor], Windows]]()

    def windows_of(self, bounds: Tensor) -> Windows:
        """By length, the patches of the windows of that length; None for all of them in their order."""
        for seen, windows in self.known:
            if seen() is bounds:
                return windows
        lengths, starts = bounds.diff(), bounds[:-1]
        different = lengths.unique().tolist()
        windows = [(different[0], None)] if len(different) == 1 else [
            (length, (starts[lengths == length, None] + torch.arange(length, device=bounds.device)).flatten())
            for length in different
            if length
        ]  # fmt: skip
        self.known = [(weakref.ref(bounds), windows), *self.known[: self.size - 1]]
        return windows


_latest_bounds = _LatestBounds()


def attend_by_length(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each patch to those of its window: (1, N, H, D), of the queries' dtype, and no weights.

    query, key, value: (1, H, N, D). cu_seq_lens_q: int32, the bounds of the windows, from 0 to N.
    """
    attended, windows = torch.empty_like(query), _latest_bounds.windows_of(cu_seq_lens_q)
    for length, patches in windows:
        query_WHLD, key_WHLD, value_WHLD = (
            (tensor[0] if patches is None else tensor[0, :, patches]).unflatten(1, (-1, length)).transpose(0, 1)
            for tensor in (query, key, value)
        )
        attended_WHLD = scaled_dot_product_attention(query_WHLD, key_WHLD, value_WHLD, scale=scaling)
        of_windows = attended_WHLD.transpose(0, 1).flatten(1, 2)
        if patches is None:
            attended = of_windows[None]
        else:
            attended = attended.index_copy(2, patches, of_windows[None])
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_by_length)
