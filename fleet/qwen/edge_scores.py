"""Log-probabilities and entropies of the tokens that slots predict, from logits, a few rows at a time. Pure tensors.

Logits are taken over the temperature, in float32, as TRL's fused head does. Unlike it, a slot may predict several
tokens, and only slots that predict any are projected, on every device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import TopPLogitsWarper

# Axes: P prompts, K edges, V vocabulary.

# float32 numbers of one chunk: a few chunks' temporaries are small beside the logits themselves
CHUNK_SIZE = 2**24


class Scores(NamedTuple):
    """The scores of tokens, all float32 and of one shape, in nats."""

    logps: Tensor  # log-probability of the token over the whole vocabulary, after temperature; with gradient
    entropies: Tensor | None  # of the distribution that it is from
    log_kept: Tensor | None = None  # of `log_kept_mass`, where a sampler may draw some tokens alone


@dataclass(frozen=True)
class Nucleus:
    """The tokens that a sampler may draw: the likeliest of mass `top_p` among all that are not banned."""

    top_p: float
    banned_ids: tuple[int, ...] = ()


def scores_of(logits_PKV: Tensor, tokens_PK: Tensor, temperature: float, nucleus: Nucleus | None) -> Scores:
    """The scores of each edge's token, (P, K) each. The arguments are those of the functions below."""
    logps_PK, entropies_PK = edge_scores(logits_PKV, tokens_PK, temperature)
    if nucleus is None:
        return Scores(logps_PK, entropies_PK)
    return Scores(logps_PK, entropies_PK, log_kept_mass(logits_PKV, tokens_PK, temperature, nucleus))


def edge_scores(logits_PKV: Tensor, tokens_PK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The log-probability of each edge's token, and the entropy of its distribution without gradient, in nats.

    logits_PKV: float of any precision. tokens_PK: int64. temperature: above 0. Returns two (P, K) float32.
    """
    logits_KV, tokens_K = logits_PKV.flatten(0, 1), tokens_PK.flatten()
    size = max(1, CHUNK_SIZE // logits_KV.shape[1])
    # of a chunk only its logits are kept for the backward pass; what is derived from them is computed again
    parts = [
        checkpoint(_chunk_scores, logits, tokens, temperature, use_reentrant=False, preserve_rng_state=False)
        for logits, tokens in zip(logits_KV.split(size), tokens_K.split(size), strict=True)
    ]
    logps, entropies = (torch.cat(values).view(tokens_PK.shape) for values in zip(*parts, strict=True))
    return logps, entropies


def _chunk_scores(logits_KV: Tensor, tokens_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled_KV = logits_KV.float() / temperature
    log_total_K = scaled_KV.logsumexp(dim=1)
    logps_K = scaled_KV.gather(1, tokens_K[:, None])[:, 0] - log_total_K
    with torch.no_grad():
        # a token of probability 0 has no part in it, and 0 times minus infinity would be no number
        terms_KV = (scaled_KV - log_total_K[:, None]).exp() * scaled_KV
        entropies_K = log_total_K - terms_KV.nan_to_num(nan=0.0).sum(dim=1)
    return logps_K, entropies_K


@torch.no_grad()
def log_kept_mass(logits_PKV: Tensor, tokens_PK: Tensor, temperature: float, nucleus: Nucleus) -> Tensor:
    """The log of the probability mass that a sampler keeps where it draws each edge's token: (P, K) float32, <= 0.

    A token's log-probability less this is the one under which the sampler draws it, renormalized over the nucleus. A
    token outside the nucleus is counted with it: another engine that rounds otherwise may keep the next token too.

    >>> logits_PKV = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    >>> log_kept_mass(logits_PKV, torch.tensor([[0]]), 1.0, Nucleus(0.7)).exp()
    tensor([[0.8000]])
    """
    logits_KV, tokens_K = logits_PKV.flatten(0, 1), tokens_PK.flatten()
    size = max(1, CHUNK_SIZE // logits_KV.shape[1])
    chunks = zip(logits_KV.split(size), tokens_K.split(size), strict=True)
    parts = [_chunk_log_kept(logits, tokens, temperature, nucleus) for logits, tokens in chunks]
    return torch.cat(parts).view(tokens_PK.shape)


def _chunk_log_kept(logits_KV: Tensor, tokens_K: Tensor, temperature: float, nucleus: Nucleus) -> Tensor:
    scaled_KV = logits_KV.float() / temperature
    banned = torch.tensor(nucleus.banned_ids, dtype=torch.int64, device=scaled_KV.device)
    allowed_KV = scaled_KV.index_fill(1, banned, -torch.inf)
    drawn_K1 = tokens_K[:, None]
    kept_KV = allowed_KV if nucleus.top_p == 1.0 else TopPLogitsWarper(nucleus.top_p)(drawn_K1, allowed_KV)
    kept_KV = kept_KV.scatter(1, drawn_K1, scaled_KV.gather(1, drawn_K1))
    return kept_KV.logsumexp(dim=1) - scaled_KV.logsumexp(dim=1)
