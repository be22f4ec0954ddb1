"""Every draw of a run has a name: the token at one place of one rollout depends on its name and its distribution alone.

So completions do not depend on how many processes draw them, in which batches, or whether the run was resumed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Axes: P episodes, G rollouts of each, T places of a rollout, N distributions, V vocabulary.

# float64 numbers of the distributions that are worked on at a time: a few such copies are small beside the logits
CHUNK_SIZE = 2**23


def named_uniforms(
    seed: int, generation: int, episodes: Sequence[int], num_rollouts: int, num_places: int
) -> np.ndarray:
    """The uniform of each place of each rollout: (P, G, T) float64 in [0, 1).

    The one of (seed, generation, episode, rollout, place) is always the same. All are integers from 0 up to 2^64.
    Source: Philox 4x64, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): keyed, so that no state is kept.
    """
    key, draws = np.array([seed, generation], dtype=np.uint64), np.empty((len(episodes), num_rollouts, num_places))
    for number, episode in enumerate(episodes):
        for rollout in range(num_rollouts):
            counter = np.array([0, rollout, episode, 0], dtype=np.uint64)  # its first word counts places
            bits = np.random.Philox(key=key, counter=counter).random_raw(num_places)
            draws[number, rollout] = (bits >> np.uint64(11)) * 2.0**-53
    return draws


def draw_tokens(scores_NV: Tensor, uniforms_NG: Tensor, num_greedy: int = 0) -> tuple[Tensor, Tensor]:
    """What G rollouts would say at each of N places, and its log-probability: (N, G) int64 and float64.

    scores_NV: float; softmax makes them distributions, minus infinity rules a token out. uniforms_NG: float64 in
    [0, 1). A token is where the cumulative distribution, in float64 and in the vocabulary's order, first passes the
    uniform. The first `num_greedy` rollouts take the likeliest token, the first of equal ones.
    """
    logps_NV = scores_NV.double().log_softmax(dim=1)
    probabilities_NV = logps_NV.exp()
    tokens_NG = torch.searchsorted(probabilities_NV.cumsum(dim=1), uniforms_NG, right=True)
    # rounding may leave the whole sum below the uniform
    places_V = torch.arange(scores_NV.shape[1], device=scores_NV.device)
    last_possible_N1 = torch.where(probabilities_NV > 0, places_V, 0).amax(dim=1, keepdim=True)
    tokens_NG = torch.minimum(tokens_NG, last_possible_N1)
    if num_greedy:
        tokens_NG[:, :num_greedy] = scores_NV.argmax(dim=1, keepdim=True)
    return tokens_NG, logps_NV.gather(1, tokens_NG)
