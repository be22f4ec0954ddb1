"""The passes of whole groups through a Qwen2.5-VL: a tree of tokens in one row, images as features, scores by edge.

The only code that leans on the model's internals: mrope positions, `rope_deltas`, precomputed image features. Works
on a bare model and under PEFT; each function says how it works under DDP or DeepSpeed. Knows no trainer.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dataset import EpisodeBatch
from fleet.qwen.edge_scores import Nucleus, Scores, scores_of
from fleet.qwen.flops import WorkComparison
from fleet.qwen.observations import Picture
from fleet.qwen.token_tree import Prompts, TokenTree, ancestry_mask

# Query-key pairs that a packed step may have. sdpa holds a byte or four for each, eager four for every head; flash
# attention takes no mask.
MAX_MASK_PAIRS = {"sdpa": 2**29, "eager": 2**25}


def base_qwen(model: nn.Module) -> Qwen2_5_VLForConditionalGeneration:
    """The Qwen2.5-VL inside a model that may be wrapped by PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_to_pack(attention: str, work: WorkComparison) -> str | None:
    """The reason to score a generation in unpacked rows; None if packed rows are right.

    attention: the language model's. work: of all devices together, so that all decide the same.
    """
    if attention not in MAX_MASK_PAIRS:
        return f"attention {attention} takes no mask that keeps branches apart; pass --attn_implementation sdpa"
    if work.packed_flops >= work.unpacked_flops:
        ratio = work.packed_flops / work.unpacked_flops
        return f"completions this long beside their prompts make packed rows {ratio:.1f} times the work"
    return problem_of_mask(attention, work)


def problem_of_mask(attention: str, work: WorkComparison) -> str | None:
    """The reason why a packed step's mask is too large, with the remedy; None if it is not. The arguments as above."""
    if work.largest_mask_pairs <= MAX_MASK_PAIRS[attention]:
        return None
    return (
        f"a packed step would have a mask of {work.largest_mask_pairs:,} pairs, wanted at most "
        f"{MAX_MASK_PAIRS[attention]:,}; lower --per_device_batch_size or --max_completion_length"
    )


def tree_prompts(model: nn.Module, batch: Mapping[str, Any]) -> Prompts:
    """A batch's prompts with the model's positions of their tokens, images included.

    batch: an EpisodeBatch, or the processor's outputs.
    """
    positions_3PL, _ = base_qwen(model).model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )
    return Prompts(batch["input_ids"], batch["attention_mask"], positions_3PL)


def image_inputs(
    batch: EpisodeBatch,
    groups: slice,
    features: Sequence[Tensor] | None,
    behind: Sequence[Sequence[Picture]] = (),
) -> dict[str, Any]:
    """A forward pass's arguments for these episodes' images: their features if there are any, else their pixels.

    features: of each image of the whole batch, (image tokens, width); with None the encoder runs. behind: the pictures
    in the tree of each of these groups, in the order of their slots; they have features if the prompts' images do.
    """
    starts = [sum(batch["num_images"][:episode]) for episode in (groups.start, groups.stop)]
    grids, counts = batch["image_grid_thw"], batch["num_images"][groups]
    own_grids = grids[slice(*starts)]
    # row after row, the prompt's images and then the tree's
    inputs: dict[str, Any] = {"image_grid_thw": _interleaved(own_grids, counts, behind, "grid_3")}
    if features is None:
        patches = [int(grids[:start].prod(dim=1).sum()) for start in starts]
        sizes = [int(of_prompt.prod(dim=1).sum()) for of_prompt in own_grids.split(counts)]
        own_pixels = batch["pixel_values"][slice(*patches)]
        return inputs | {"pixel_values": _interleaved(own_pixels, sizes, behind, "pixels")}
    known = iter(features[slice(*starts)])
    chosen = [
        values
        for count, pictures in zip(counts, behind or [()] * len(counts), strict=True)
        for values in (*itertools.islice(known, count), *(picture.features for picture in pictures))
    ]
    return inputs | as_encoded([values.to(grids.device) for values in chosen if values is not None])


def as_encoded(features: Sequence[Tensor]) -> dict[str, Any]:
    """A forward pass's argument for images that are encoded already."""
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))}}


def _interleaved(own: Tensor, sizes: Sequence[int], behind: Sequence[Sequence[Picture]], name: str) -> Tensor:
    """The rows of `own`, as many of each prompt as `sizes` says, and behind them this field of its tree's pictures."""
    if not any(behind):
        return own
    parts = []
    for of_prompt, pictures in zip(own.split(list(sizes)), behind, strict=True):
        parts += [of_prompt, *(getattr(picture, name).to(own).view(-1, own.shape[1]) for picture in pictures)]
    return torch.cat(parts)


@torch.no_grad()
def encode_pictures(model: nn.Module, pictures: Sequence[Picture]) -> list[Tensor]:
    """Features (image tokens, width) of each picture, from one call of the encoder; of one without pictures, if none.

    The latter is for a rank that takes part in a call of the others'.
    """
    base = base_qwen(model)
    config, device = base.config.vision_config, base.device
    if pictures:
        pixels = torch.cat([picture.pixels for picture in pictures]).to(device)
        grids = torch.stack([picture.grid_3 for picture in pictures]).to(device)
    else:
        side = config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixels, grids = torch.zeros(side**2, width, device=device), torch.tensor([[1, side, side]], device=device)
    encoded = base.model.get_image_features(pixels, grids, return_dict=True).pooler_output
    return list(encoded)[: len(pictures)]


@torch.no_grad()
def encode_image(model: nn.Module, batch: EpisodeBatch, place: int) -> Tensor:
    """Features (image tokens, width) of the batch's image at this place; the encoder sees it alone.

    A matrix library chooses its kernel by the number of rows, so other images in the call would change the last bits.
    Alone, an image has the same bits in every batch and every resumed run.
    """
    grids = batch["image_grid_thw"]
    first = int(grids[:place].prod(dim=1).sum())
    pixels = batch["pixel_values"][first : first + int(grids[place].prod())]
    encoded = base_qwen(model).model.get_image_features(pixels, grids[place : place + 1], return_dict=True)
    return encoded.pooler_output[0]


def tree_logits(
    model: nn.Module, tree: TokenTree, slots_PK: Tensor, images: dict[str, Any], attention: str, cache: Any = None
) -> Tensor:
    """What these slots predict, (P, K, vocabulary), from one forward pass over the whole rows.

    model: may be wrapped by DDP or DeepSpeed. images: from image_inputs. attention: the language model's, one of
    MAX_MASK_PAIRS. cache: of transformers, that the rows' keys and values are to fill.
    """
    return model(
        input_ids=tree.input_ids_PS,
        attention_mask=as_model_mask(ancestry_mask(tree.end_PS), attention),
        position_ids=tree.position_ids_3PS,
        logits_to_keep=slots_PK,
        past_key_values=cache,
        use_cache=cache is not None,
        **images,
    ).logits


def as_model_mask(sees: Tensor, attention: str) -> Tensor:
    """A bool mask, True where a query sees a key, as this attention takes it: eager adds its mask to the scores."""
    return torch.where(sees, 0.0, torch.finfo(torch.float32).min) if attention == "eager" else sees


def score_tree(
    model: nn.Module,
    tree: TokenTree,
    images: dict[str, Any],
    attention: str,
    temperature: float,
    nucleus: Nucleus | None = None,
) -> Scores:
    """The scores of each edge's token, (P, K) each, from one forward pass.

    The arguments are tree_logits'. temperature: of the distribution. nucleus: of the sampler whose log-probabilities
    are asked for too.
    """
    logits_PKV = tree_logits(model, tree, tree.edge_slot_PK, images, attention)
    return scores_of(logits_PKV, tree.edge_token_PK, temperature, nucleus)
