"""What a generation config asks of sampling, on the nodes of a tree, through transformers' own processors.

`generate` builds its processors for rows that grow together. A tree's nodes are rows of unequal lengths, so those
processors that read what came before are called depth by depth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fleet.qwen.token_tree import Branches, Prompts

# Axes: N nodes, V vocabulary, P prompts, L tokens of the longest.

# what a config may set; all else that it sets is refused
HONOURED = (
    "do_sample", "max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "temperature",
    "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens", "sequence_bias",
)  # fmt: skip
WITHOUT_EFFECT = ("disable_compile", "use_cache", "cache_implementation", "transformers_version")


class SamplingRules:
    """The scores that a config makes of a node's logits, as `generate` makes them of a row's."""

    def __init__(self, config: GenerationConfig):
        """Raises ValueError if the config asks for anything that sampling on a tree does not do."""
        neutral = GenerationConfig(num_beams=1, use_cache=True).to_dict()
        asked = {
            name: value
            for name, value in config.to_diff_dict().items()
            if value is not None and value != neutral.get(name) and not name.startswith("_")
        }
        refused = [f"{name}={asked[name]}" for name in sorted(asked.keys() - {*HONOURED, *WITHOUT_EFFECT})]
        if refused:
            raise ValueError(
                f"generation asks for {', '.join(refused)}, but sampling behind a shared prompt takes "
                f"{', '.join(HONOURED)} alone; drop it, or pass --shared_prefix false for TRL's own generation"
            )
        self.config = config
        ends = config.eos_token_id
        self.end_ids: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        self.max_tokens = int(config.max_new_tokens)
        self._reads_the_path = bool(
            config.sequence_bias or config.min_new_tokens or config.repetition_penalty not in (None, 1.0)
        )

    def scores(
        self, logits_NV: Tensor, prompts: Prompts, groups: Sequence[Branches], nodes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The scores that decide what comes behind each node: (N, V) float32, minus infinity where a token is banned.

        nodes: N pairs of a group's number and its node.
        """
        scores_NV = logits_NV.float()
        if self._reads_the_path:
            scores_NV = scores_NV.clone()
            rows_by_depths: dict[tuple[int, int], list[int]] = {}
            for row, (number, node) in enumerate(nodes):
                depths = groups[number].depths[node], groups[number].turn_lengths[node]
                rows_by_depths.setdefault(depths, []).append(row)
            for (depth, turn_length), rows in rows_by_depths.items():
                scores_NV[rows] = self._by_path(
                    scores_NV[rows], prompts, groups, [nodes[row] for row in rows], depth - turn_length
                )
        no_ids = torch.empty(0, dtype=torch.int64)
        return self._by_score(logits_NV.device)(no_ids, scores_NV)

    def _by_path(
        self,
        scores_NV: Tensor,
        prompts: Prompts,
        groups: Sequence[Branches],
        nodes: Sequence[tuple[int, int]],
        turn_start: int,
    ) -> Tensor:
        """The scores of nodes of one depth after the processors that read the tokens so far.

        turn_start: the depth at which their turn began, from where on its length counts.
        """
        config, device, processors = self.config, scores_NV.device, LogitsProcessorList()
        numbers = [number for number, _ in nodes]
        paths = torch.tensor([groups[number].ids_to(node) for number, node in nodes], dtype=torch.int64, device=device)
        ids = torch.cat([prompts.ids_PL[numbers], paths.view(len(nodes), -1)], dim=1)
        if config.sequence_bias:
            processors.append(SequenceBiasLogitsProcessor(config.sequence_bias))
        if config.repetition_penalty not in (None, 1.0):
            num_padding_N = (prompts.mask_PL[numbers] == 0).sum(dim=1)
            processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, num_padding_N))
        if config.min_new_tokens:
            length = prompts.ids_PL.shape[1] + turn_start
            ends = torch.tensor(self.end_ids, device=device)
            processors.append(MinNewTokensLengthLogitsProcessor(length, config.min_new_tokens, ends, device=device))
        return processors(ids, scores_NV)

    def _by_score(self, device: torch.device) -> LogitsProcessorList:
        """The processors that read scores alone, which `generate` has behind those that read tokens."""
        config, processors = self.config, LogitsProcessorList()
        if config.suppress_tokens:
            processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
        if config.do_sample:
            if config.temperature not in (None, 1.0):
                processors.append(TemperatureLogitsWarper(config.temperature))
            if config.top_k:
                processors.append(TopKLogitsWarper(config.top_k))
            if config.top_p is not None and config.top_p < 1.0:
                processors.append(TopPLogitsWarper(config.top_p))
            if config.min_p:
                processors.append(MinPLogitsWarper(config.min_p))
        return processors
