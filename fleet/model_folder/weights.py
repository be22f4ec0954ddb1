"""The weights in a model's files are those that the model takes, and once loaded they are finite numbers.

The libraries start a missing weight at random and pass over an unknown one, with a warning. Here either stops the run.
Names and shapes are compared without reading a weight; numbers are checked after loading, where the weights are.
"""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# the names of the language model's layers before transformers 4.52, and since
OLD_PREFIX, PREFIX = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


def require_every_weight(loading: Mapping[str, Any]) -> None:
    """Raises ValueError if a weight is missing, unknown or of another shape. loading: `from_pretrained`'s info."""
    _refuse("its files", loading["missing_keys"], loading["unexpected_keys"])
    for name, saved, wanted in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"its files have {name} in shape {tuple(saved)}, but its config.json wants {tuple(wanted)}; restore the "
            "files that were saved together"
        )


def require_fitting_adapter(folder: str, adapter: LoraConfig, base_config: PreTrainedConfig) -> None:
    """Raises ValueError unless an adapter's file has each weight that its config asks for, in its shape, and no other.

    PEFT itself places the file's names and shapes, on a model without content.
    """
    # in training mode the adapter's weights, and no other, require a gradient; their first values do not matter
    wanted = copy.deepcopy(adapter)
    wanted.inference_mode, wanted.init_lora_weights = False, True
    with torch.device("meta"):
        model = get_peft_model(Qwen2_5_VLForConditionalGeneration(base_config), wanted)
    own = {name for name, weight in model.named_parameters() if weight.requires_grad}
    with safe_open(Path(folder) / ADAPTER_WEIGHTS_NAME, framework="pt") as file:
        names = list(file.keys())
        saved = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    try:
        result = set_peft_model_state_dict(model, saved)
    except KeyError as error:
        _refuse(f"adapter {folder}: its files", [str(error.args[0])], [])
    except RuntimeError as error:
        mismatch = str(error).split("\n")[1].strip()
        raise ValueError(
            f"adapter {folder}: its weights have other shapes than its adapter_config.json and its base give them "
            f"({mismatch}); restore the adapter_config.json that was saved with {ADAPTER_WEIGHTS_NAME}"
        ) from error
    else:
        _refuse(f"adapter {folder}: its files", own & set(result.missing_keys), result.unexpected_keys)


@torch.no_grad()
def first_weight_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight, or own shard, that holds an infinity or NaN; None if all are finite."""
    for name, parameter in model.named_parameters():
        for numbers in _local_tensors(parameter):
            can_be_infinite = numbers.is_floating_point() and numbers.numel() and not numbers.is_meta
            # the least and the greatest number are NaN where any is
            if can_be_infinite and not torch.stack(torch.aminmax(numbers)).float().isfinite().all():
                return name
    return None


def _local_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors on this process that a weight is made of."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None:
        size = int(shard.ds_numel)
        first = size * torch.distributed.get_rank(parameter.ds_process_group)
        # the last shard is filled up with whatever memory held; a shard that was moved to a disk is not here
        return [shard.view(-1)[: max(0, min(size, parameter.ds_numel - first))]] if shard.numel() == size else []
    scales = getattr(parameter, "quant_state", None)
    if scales is not None:
        held = (scales.absmax, scales.offset, getattr(scales.state2, "absmax", None))
        return [tensor for tensor in held if isinstance(tensor, Tensor)]
    return [parameter.detach()]


def _refuse(whose: str, missing: Collection[str], unknown: Collection[str]) -> None:
    """Raises ValueError if any weight is missing or unknown. whose: the start of the message."""
    kinds = (("lack", missing), ("have unknown", unknown))
    found = [f"{word} {len(names)} weights, {min(names)} among them" for word, names in kinds if names]
    if not found:
        return
    remedy = "restore the files that were saved together"
    if any(name.startswith(OLD_PREFIX) for name in unknown):
        remedy = f"rename {OLD_PREFIX}* in {ADAPTER_WEIGHTS_NAME}, as an older transformers wrote it, to {PREFIX}*"
    raise ValueError(f"{whose} {' and '.join(found)}, but wanted each weight that the model has and no other; {remedy}")
