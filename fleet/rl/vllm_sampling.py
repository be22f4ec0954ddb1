"""Completions from vLLM, and proof that it saw the prompt and the weights that the trainer scores with.

The only code that leans on vLLM and on TRL's VLLMGeneration. Unlike TRL, a colocated vLLM gets one placeholder an
image, as it expands placeholders itself (trl#6718). It forgets the features of images with the weights that made
them, and never samples image and video tokens. Its prompt ids and log-probabilities are compared with the trainer's.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from dataset import EpisodeBatch, prompts_of_rollouts
from fleet.errors import RunRefused, RunStopped, UsageError
from fleet.processes import gather_by_rank, raise_first

# vLLM's lowest bias: the token is never drawn.
NEVER = -100.0


def sampling_kwargs(media_ids: Sequence[int], end_ids: Sequence[int]) -> dict[str, Any]:
    """Additions to vLLM's SamplingParams, for TRL's `generation_kwargs`: media tokens are banned, Fleet's ends end."""
    return {"logit_bias": dict.fromkeys(media_ids, NEVER), "stop_token_ids": list(end_ids)}


def require_dtype(generation: VLLMGeneration, dtype: torch.dtype) -> None:
    """Raises UsageError if a colocated vLLM computes in another dtype than the trainer.

    TRL 1.16 names none to vLLM, which then takes the model folder's, and 16 bits for float32. A server has its own.
    """
    if generation.mode != "colocate" or generation.llm.model_config.dtype == dtype:
        return
    theirs, ours = (str(found).removeprefix("torch.") for found in (generation.llm.model_config.dtype, dtype))
    raise UsageError(
        f"vLLM computes in {theirs} beside a trainer in {ours}, and TRL 1.16 cannot tell it otherwise; pass --dtype "
        f"bfloat16, or --vllm_mode server with a server that was started with --dtype {ours}"
    )


class VLLMSampler:
    """Draws completions with TRL's VLLMGeneration, with the latest weights, and compares its figures with Fleet's.

    A difference raises RunRefused in the first generation, RunStopped in a later one.
    """

    def __init__(self, generation: VLLMGeneration, processor: Any, max_gap: float):
        """max_gap: the largest accepted mean difference of log-probabilities in the first generation, in nats."""
        # asks for the log-probability of each token that is drawn
        generation.logprobs = 0
        self.generation, self.processor, self.max_gap = generation, processor, max_gap
        self._synced_step: int | None = None
        self._gaps: list[Tensor] = []
        self._is_sound = False

    def sample(self, batch: EpisodeBatch, step: int) -> tuple[list[list[int]], list[list[float]]]:
        """G completions of each of the batch's P episodes as ids, and the log-probability that each token had.

        Both B = P * G lists, group after group; a completion that ended has its end token. Log-probabilities are of the
        distribution sampled from, after temperature, top_p and bias; NaN where vLLM has none. step: the optimizer steps
        so far; weights are sent when it changes. Every process takes part. Raises, on every process, if vLLM used other
        prompts than the batch has.
        """
        if step != self._synced_step:
            self._send_weights()
            self._synced_step = step
        prompts, images = prompts_of_rollouts(batch)
        self._raise_together(self._lack_of_room(max(map(len, prompts))))
        pad = self.processor.image_token_id
        is_colocated = self.generation.mode == "colocate"
        sent = [collapse_runs(ids, pad) for ids in prompts] if is_colocated else prompts
        used, completion_ids, logps, _ = self.generation.generate(sent, images, batch["group_size"])
        pairs = ((ours, list(theirs)) for ours, theirs in zip(prompts, used, strict=True))
        differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
        self._raise_together(None if differing is None else where_prompts_part(*differing, self.processor))
        known = [[math.nan if value is None else value for (value, *_) in row] for row in logps]
        return [list(ids) for ids in completion_ids], known

    def compare(
        self, own_logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, top_p: float, is_last: bool
    ) -> dict[str, float]:
        """The metrics of a generation with its last rows (`is_last`); none with earlier ones.

        own_logps, sampler_logps, mask: of the same tokens, one shape. top_p: 1 where own_logps are of the nucleus.
        Every process takes part. Raises RunRefused on all of them if the first generation's mean gap is above
        `max_gap`.
        """
        gaps = logprob_gaps(own_logps.float(), sampler_logps, top_p)
        self._gaps.append(gaps[mask.bool() & ~sampler_logps.isnan()])
        if not is_last:
            return {}
        own, self._gaps = torch.cat(self._gaps), []
        sums = gather_object([(own.sum().item(), own.max().item() if len(own) else 0.0, len(own))])
        totals, maxima, counts = zip(*sums, strict=True)
        mean, largest = sum(totals) / max(sum(counts), 1), max(maxima)
        if not self._is_sound:
            require_small_gap(mean, largest, self.max_gap)
        self._is_sound = True
        return {"vllm/logprob_gap": mean, "vllm/logprob_gap_max": largest}

    def _lack_of_room(self, num_prompt_tokens: int) -> str | None:
        """The problem of a prompt this long: vLLM would end its completion early without a word. None if it fits."""
        room, num_more = self.generation.max_model_length, self.generation.max_completion_length
        if room is None or num_prompt_tokens + num_more <= room:
            return None
        return (
            f"a prompt has {num_prompt_tokens:,} tokens and a completion up to {num_more:,}, but vLLM has room for "
            f"{room:,} (--vllm_max_model_length); pass --vllm_max_model_length {num_prompt_tokens + num_more}, or "
            "lower --max_completion_length or --image_max_pixels"
        )

    def _send_weights(self) -> None:
        """Gives vLLM the policy's weights, and empties its caches of prompts and images that earlier weights made."""
        self.generation.sync_weights()
        # TRL empties the prefix cache, never the encoder's
        if self.generation.mode == "colocate":
            self.generation.llm.llm_engine.reset_encoder_cache()
            return
        problem = None
        if self.generation.accelerator.is_main_process:
            client = self.generation.vllm_client
            answer = client.session.post(f"{client.base_url}/reset_encoder_cache")
            if answer.status_code != 200:
                problem = (
                    f"the vLLM server at {client.base_url} answered {answer.status_code} to /reset_encoder_cache, so "
                    "it would go on with the features that earlier weights made of images; start it with "
                    "VLLM_SERVER_DEV_MODE=1, in a version from 0.22 to 0.31"
                )
        self._raise_together(problem)

    def _raise_together(self, problem: str | None) -> None:
        """Raises the first problem of any process on all of them."""
        raise_first(gather_by_rank(problem), RunStopped if self._is_sound else RunRefused, who="")


def collapse_runs(ids: Sequence[int], token: int) -> list[int]:
    """The ids with each run of `token` as one of it.

    >>> collapse_runs([1, 7, 7, 7, 2, 7, 3, 7, 7], 7)
    [1, 7, 2, 7, 3, 7]
    """
    return [value for kept, run in groupby(ids) for value in ([token] if kept == token else run)]


def run_lengths(ids: Sequence[int], token: int) -> list[int]:
    """The length of each run of `token`, in order.

    >>> run_lengths([1, 7, 7, 7, 2, 7, 3], 7)
    [3, 1]
    """
    return [len(list(run)) for value, run in groupby(ids) if value == token]


def where_prompts_part(ours: Sequence[int], theirs: Sequence[int], processor: Any) -> str:
    """Two prompts that should be equal, in words: their lengths, their images' tokens, and the first difference."""
    pad = processor.image_token_id
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    shown = [
        processor.tokenizer.decode(ids[max(place - 4, 0) : place + 4], skip_special_tokens=False)
        for ids in (ours, theirs)
    ]
    return (
        f"vLLM used another prompt than Fleet scores: {len(theirs)} tokens for {len(ours)}, with "
        f"{run_lengths(theirs, pad)} tokens an image for {run_lengths(ours, pad)}. They part at token {place}: Fleet "
        f"has {shown[0]!r} there, vLLM {shown[1]!r}. Training on it would go towards noise; pass --use_vllm false, or "
        "restore the tokenizer and image processor of the model folder, which vLLM reads by itself"
    )


def logprob_gaps(own_logps: Tensor, sampler_logps: Tensor, top_p: float) -> Tensor:
    """The gaps between the sampler's log-probabilities of the sampled tokens and the trainer's, in nats; same shape.

    A nucleus of mass top_p or more raises the log-probabilities of its tokens by at most -log(top_p), which is no gap;
    with top_p 1 a gap is the absolute difference. NaN stays NaN.
    """
    excess = sampler_logps - own_logps
    return excess.clamp(max=0).abs() + (excess + math.log(top_p)).clamp(min=0)


def require_small_gap(mean: float, largest: float, max_gap: float) -> None:
    """Raises RunRefused if the first generation's mean gap, over all processes, is above `max_gap` or NaN."""
    if mean <= max_gap:
        return
    raise RunRefused(
        f"vLLM and the trainer disagree on the first generation's tokens: their log-probabilities are {mean:.3f} apart "
        f"on average and {largest:.3f} at most, wanted {max_gap:g} at most on average (--vllm_max_logprob_gap). One "
        "of them does not see the prompt, the images, the weights or the temperature of the other: on a server, look "
        "at its model, its pixel limits and --logprobs-mode processed_logprobs; else pass --use_vllm false"
    )


def weight_metrics(weights_N: Tensor, cap: float) -> dict[str, float]:
    """The metrics of the weights of all devices' rollouts; none without any.

    `vllm/correction_mean`: 1 where the engines agree. `vllm/correction_truncated`: the share that the cap bounds.
    `vllm/effective_samples`: (sum w)^2 / (N sum w^2), the share of the rollouts that the weights leave, in (0, 1].

    >>> weight_metrics(torch.tensor([1.0, 2.0]), cap=2.0)
    {'vllm/correction_mean': 1.5, 'vllm/correction_truncated': 0.5, 'vllm/effective_samples': 0.9}
    """
    if len(weights_N) == 0:
        return {}
    total, squares = weights_N.sum().item(), weights_N.square().sum().item()
    return {
        "vllm/correction_mean": weights_N.mean().item(),
        "vllm/correction_truncated": (weights_N >= cap).float().mean().item(),
        "vllm/effective_samples": total**2 / (len(weights_N) * squares) if squares else 0.0,
    }
