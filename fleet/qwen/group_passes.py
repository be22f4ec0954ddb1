"""The passes of whole groups through a Qwen2.5-VL: prefill once and decode, score packed rows, encode images.

The only code that leans on the model's internals: mrope positions, `rope_deltas`, precomputed image features. Works
on a bare model and under PEFT; each function says how it works under DDP or DeepSpeed. Knows no trainer.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dataset import EpisodeBatch
from fleet.qwen.flops import WorkComparison
from fleet.qwen.shared_prefix import PackedGroups, attention_mask

# Query-key pairs that a packed step may have. sdpa holds a byte or four for each, eager four for every head; flash
# attention takes no mask.
MAX_MASK_PAIRS = {"sdpa": 2**29, "eager": 2**25}


def base_qwen(model: nn.Module) -> Qwen2_5_VLForConditionalGeneration:
    """The Qwen2.5-VL inside a model that may be wrapped by PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_image_features() -> bool:
    """True if this version of transformers (from 5.18 on) lets a model be given its images' features."""
    return "mm_encoder_outputs" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters


def why_not_to_pack(attention: str, work: WorkComparison) -> str | None:
    """The reason to score a generation in unpacked rows; None if packed rows are right.

    attention: the language model's. work: of all devices together, so that all decide the same.
    """
    if attention not in MAX_MASK_PAIRS:
        return f"attention {attention} takes no mask that keeps branches apart; pass --attn_implementation sdpa"
    if work.packed_flops >= work.unpacked_flops:
        ratio = work.packed_flops / work.unpacked_flops
        return f"completions this long beside their prompts make packed rows {ratio:.1f} times the work"
    if work.largest_mask_pairs > MAX_MASK_PAIRS[attention]:
        return (
            f"a packed step would have a mask of {work.largest_mask_pairs:,} pairs, wanted at most "
            f"{MAX_MASK_PAIRS[attention]:,}; lower --per_device_batch_size or --max_completion_length"
        )
    return None


def prompt_positions(model: nn.Module, batch: EpisodeBatch) -> Tensor:
    """Positions of the prompts' tokens, images included: (3, P, L) int64, L as in the batch."""
    return base_qwen(model).model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]


def image_inputs(batch: EpisodeBatch, groups: slice, features: Sequence[Tensor] | None) -> dict[str, Any]:
    """A forward pass's arguments for these episodes' images: their features if there are any, else their pixels.

    features: of each image of the whole batch, (image tokens, width); with None the encoder runs.
    """
    starts = [sum(batch["num_images"][:episode]) for episode in (groups.start, groups.stop)]
    grids = batch["image_grid_thw"]
    inputs: dict[str, Any] = {"image_grid_thw": grids[slice(*starts)]}
    if features is None:
        patches = [int(grids[:start].prod(dim=1).sum()) for start in starts]
        return inputs | {"pixel_values": batch["pixel_values"][slice(*patches)]}
    chosen = tuple(values.to(grids.device) for values in features[slice(*starts)])
    return inputs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=chosen)}}


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


@torch.no_grad()
def generate_groups(
    model: nn.Module,
    batch: EpisodeBatch,
    features: Sequence[Tensor] | None,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList | None = None,
) -> Tensor:
    """G completions of each prompt, which is computed once: (P * G, T) int64, group after group.

    Equal, token for token, to `generate` on every prompt repeated G times. model: unwrapped, as for `generate`. Under
    ZeRO-3 every rank must call it with the same number of prompts; completions may have any lengths.
    """
    group_size, config = batch["group_size"], model.config.get_text_config()
    cache = DynamicCache(config=config)
    # `generate` needs at least one token to go on from, so the last one is left out here
    model(
        input_ids=batch["input_ids"][:, :-1],
        attention_mask=batch["attention_mask"][:, :-1],
        mm_token_type_ids=batch["mm_token_type_ids"][:, :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **image_inputs(batch, slice(0, len(batch["prompts"])), features),
    )
    cache.batch_repeat_interleave(group_size)
    # the distance of positions from token counts; the last token is text, so a prompt has the distance of its prefix
    qwen = base_qwen(model).model
    qwen.rope_deltas = qwen.rope_deltas.repeat_interleave(group_size, dim=0)
    sequences = model.generate(
        input_ids=batch["input_ids"].repeat_interleave(group_size, dim=0),
        attention_mask=batch["attention_mask"].repeat_interleave(group_size, dim=0),
        past_key_values=cache,
        generation_config=generation_config,
        logits_processor=logits_processor,
    )
    return sequences[:, batch["input_ids"].shape[1] :]


def score_packed(
    model: nn.Module, packed: PackedGroups, images: dict[str, Any], attention: str
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of the token that each slot predicts, (P, S) float each, from one forward pass.

    model: with TRL's fused head, which gives an entropy only if it was made to; may be wrapped by DDP or DeepSpeed.
    images: from image_inputs. attention: the language model's, one of MAX_MASK_PAIRS.
    """
    mask_P1SS = attention_mask(packed.branch_PS)
    if attention == "eager":
        # eager attention adds its mask to the scores
        mask_P1SS = torch.where(mask_P1SS, 0.0, torch.finfo(torch.float32).min)
    outputs = model(
        input_ids=packed.input_ids_PS,
        attention_mask=mask_P1SS,
        position_ids=packed.position_ids_3PS,
        shift_labels=packed.shift_labels_PS,
        fused_lm_head=True,
        **images,
    )
    return outputs.log_probs, outputs.entropy
