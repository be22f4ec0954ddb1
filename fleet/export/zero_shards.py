"""ZeRO-3 shards become a model without the processes that wrote them: DeepSpeed's own conversion, read lazily.

Leans on deepspeed.utils.zero_to_fp32 for the layout of shards, padding and tied weights included. Unlike it, unpickles
nothing but tensors and plain values unless the shards are trusted, and writes the names that the hub has.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

from fleet.errors import UsageError, one_line
from fleet.model_folder.files import GENERATION_CONFIG_NAME
from model_utils import load_processor


def open_shards(folder: Path, *, dtype: torch.dtype | None, is_trusted: bool) -> tuple[PreTrainedModel, Any]:
    """(model, processor) of a checkpoint or final/ that holds ZeRO-3's shards.

    dtype: of the weights, by default what the run computed in, to which it rounded the float32 copy in the shards.
    Raises UsageError if shards are missing, would run code, or hold other weights than config.json asks for.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    processor = load_processor(str(folder))
    dtype = dtype or config.dtype or torch.float32
    weights = {name: weight.contiguous().to(dtype) for name, weight in _weights_by_name(folder, is_trusted).items()}
    with no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise UsageError(
            f"{folder} has other weights in its shards than its config.json asks for ({one_line(error)[:300]}); "
            "restore the files that were saved together"
        ) from error
    # assigned one by one, they are tied no longer
    model.tie_weights()
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), processor


def _weights_by_name(folder: Path, is_trusted: bool) -> dict[str, Any]:
    """What gives each whole float32 weight by `.contiguous()`; the files stay on the disk until then."""
    # DeepSpeed and TRL take seconds to import, and most exports need neither
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from fleet.rl.checkpoints import ProcessPlace
    from fleet.rl.resumable_trainer import nothing_unpickled_unless, require_plain_pickles

    if not is_trusted:
        require_plain_pickles(folder, ProcessPlace(), who="export")
    words = io.StringIO()
    try:
        with (
            nothing_unpickled_unless(is_trusted),
            contextlib.redirect_stdout(words),
            contextlib.redirect_stderr(words),
        ):
            return get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise UsageError(
            f"the ZeRO-3 shards in {folder} cannot be put together ({one_line(error)}); restore the files of all "
            "processes, and the file latest beside them"
        ) from error
