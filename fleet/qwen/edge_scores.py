"""Log-probabilities and entropies of the tokens that slots predict, from logits, a few rows at a time. Pure tensors.

Logits are taken over the temperature, in float32, as TRL's fused head does. Unlike it, a slot may predict several
tokens, and only slots that predict any are projected, on every device.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Axes: P prompts, K edges, V vocabulary.

# float32 numbers of one chunk: a few chunks' temporaries are small beside the logits themselves
CHUNK_SIZE = 2**24


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
