"""Sampling's first pass as the one that is trained on: where that is possible, and what it gives the loss."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import RLOOConfig

from fleet.qwen.edge_scores import Scores, edge_scores
from fleet.qwen.group_passes import MAX_MASK_PAIRS
from fleet.qwen.token_tree import ROOT, Branches, TokenTree, by_rollout
from fleet.qwen.tree_sampling import Samples
from fleet.schedule import optimizer_steps_per_generation

# Axes: P groups, K edges, B rollouts group after group, T completion tokens.


def why_not_one_pass(args: RLOOConfig, policy: Any, attention: str) -> str | None:
    """The reason why an optimizer step needs two passes over a generation, the same on every rank; None if one will do.

    policy: unwrapped. attention: the language model's.
    """
    if args.gradient_accumulation_steps > 1:
        return f"an optimizer step has {args.gradient_accumulation_steps} micro-batches"
    generation = args.steps_per_generation, args.num_iterations, args.gradient_accumulation_steps
    if (steps := optimizer_steps_per_generation(*generation)) > 1:
        return f"a generation serves {steps} optimizer steps"
    if args.gradient_checkpointing:
        return "gradient checkpointing drops what it would need"
    if is_deepspeed_zero3_enabled() and args.ds3_gather_for_generation:
        return "ZeRO-3 gathers the weights for generation alone"
    if policy.config.get_text_config().attention_dropout or any(
        isinstance(module, nn.Dropout) and module.p for module in policy.modules()
    ):
        return "dropout draws anew in each pass"
    if attention not in MAX_MASK_PAIRS:
        return f"attention {attention} takes no mask of a tree"
    return None


def scores_of_first_pass(samples: Samples, branches: list[Branches], tree: TokenTree, temperature: float) -> Scores:
    """Log-probabilities, with gradient, and entropies (B, t) of completions that all ended in the first pass.

    branches, tree: of the completions alone, without what nobody said; t tokens of the longest.
    """
    assert samples.first is not None
    # their nodes were nodes of the drafts' trees, under other numbers
    places_PK = torch.zeros_like(tree.edge_slot_PK, device="cpu")
    for number, (group, drawn_from) in enumerate(zip(branches, samples.groups, strict=True)):
        for node in range(1, len(group)):
            parents = drawn_from.add(group.path_to(group.parents[node]))
            places_PK[number, node - 1] = samples.first.kept[number][parents[-1] if parents else ROOT]
    with torch.enable_grad():
        logits_PKV = samples.first.logits_PKV
        logits_PKV = logits_PKV.take_along_dim(places_PK.to(logits_PKV.device)[..., None], dim=1)
        scores = edge_scores(logits_PKV, tree.edge_token_PK, temperature)
        logps_BT, entropies_BT = (by_rollout(values, tree).flatten(0, 1) for values in scores)
    return Scores(logps_BT, entropies_BT)


def as_wide_as(ids_BT: Tensor, scores: Scores) -> Scores:
    """The scores with as many columns as the ids, 0 behind: completions that are left out take no place in a tree."""
    missing = (0, ids_BT.shape[1] - scores.logps.shape[1])
    return Scores(*(None if values is None else pad(values, missing) for values in scores))
