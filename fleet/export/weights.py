"""A trained model's files become one model of whole weights: an adapter merged into its base, shards put together.

Knows folders, not runs. zero_shards.py reads the shards.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from fleet.export.trained_model import Kind, TrainedModel
from fleet.export.zero_shards import open_shards
from model_utils import open_base, read_adapter_config


def open_trained(
    trained: TrainedModel, *, dtype: torch.dtype | None, trusts_shards: bool
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """(model, processor) as they were trained, on the CPU; an adapter is still beside its base.

    dtype: of the weights, by default that of the files (of an adapter: its base's). A base is opened with all its bits,
    also where training held it in 4. trusts_shards: shards are unpickled whatever they hold. Raises as open_base.
    """
    if trained.kind is Kind.SHARDS:
        return open_shards(trained.folder, dtype=dtype, is_trusted=trusts_shards)
    if trained.kind is Kind.ADAPTER:
        return open_adapter(trained.folder, revision=trained.revision, dtype=dtype)
    model, processor, _ = open_base(str(trained.folder), dtype=dtype or "auto")
    return model, processor


def open_adapter(
    folder: Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PeftModel, Any]:
    """(adapter on its base, processor). dtype: of the base, by default that of its files."""
    base, processor, _ = open_base(str(folder), revision, dtype=dtype or "auto")
    return PeftModel.from_pretrained(base, str(folder)), processor


def merge_adapter(adapter_path: Path, merged_path: Path, *, revision: str | None = None) -> None:
    """Writes the adapter's base model with the adapter added to its weights, and the processor, to `merged_path`."""
    if read_adapter_config(str(adapter_path)) is None:
        raise FileNotFoundError(f"{adapter_path} holds no adapter_config.json; pass a folder that LoRA training wrote")
    # one process merges whole weights, so ZeRO-3 must not shard them as they load
    unset_hf_deepspeed_config()
    model, processor = open_adapter(adapter_path, revision=revision)
    merged(model).save_pretrained(merged_path)
    processor.save_pretrained(merged_path)


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapter, if it has one, added to its weights in place."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


@torch.no_grad()
def share_lost_to_rounding(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> float | None:
    """The norm of what rounding to `dtype` changes in merged weights, over the norm of the adapter's update.

    None for a model without an adapter, in float32, and for DoRA, whose update is no sum. Near 1 the rounded weights
    no longer hold what was trained: bfloat16 keeps 8 bits of a weight, and an update may be less than the last of them.
    """
    if not isinstance(model, PeftModel) or dtype == torch.float32:
        return None
    lost, update = 0.0, 0.0
    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        (name,) = layer.active_adapters
        if layer.use_dora[name]:
            return None
        delta = layer.get_delta_weight(name).float()
        exact = layer.get_base_layer().weight.float() + delta
        lost += float((exact.to(dtype).float() - exact).square().sum())
        update += float(delta.square().sum())
    return (lost / update) ** 0.5 if update else None
