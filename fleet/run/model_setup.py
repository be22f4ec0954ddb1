"""The start that training and evaluation share: devices and cores, and a model checked and loaded.

Imports no TRL, whose import alone takes as long as a small evaluation.
"""

import logging
import os
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from fleet.command.evaluate_options import run_options
from fleet.command.flags import TOY_MODEL_ID, ModelFlags, TaskFlags
from fleet.command.options import starts_sighted
from fleet.errors import AgreedUsageError, RunStopped, UsageError, one_line
from fleet.model_folder.files import base_of
from fleet.model_folder.hub import require_qwen_on_hub
from fleet.model_folder.weights import first_weight_not_finite
from fleet.processes import gather_by_rank, together
from fleet.run.config import sha256_of
from fleet.run.watchdog import is_of_collective
from fleet.toy.model import TOY_DATA_ROOT
from fleet.toy.process import build_for
from model_utils import load_qwen25_vl, require_loadable
from utils.images import list_labelled_images

logger = logging.getLogger("fleet")


def has_gpu() -> bool:
    """True if there is a GPU, and the launcher was not told to use the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def has_bfloat16() -> bool:
    """True if a GPU computes in bfloat16 natively, or the launcher was told to."""
    asked_by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return asked_by_launcher or (has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False))


def use_every_core() -> None:
    """Without a GPU, gives this machine's processes its cores, up to 4 each, where accelerate gives one thread.

    A number above 1 in OMP_NUM_THREADS or accelerate's --num_cpu_threads_per_process stays.
    """
    if not has_gpu() and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        num_cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(min(max(1, num_cores), 4))


def local_model_path(model_id: str, task: TaskFlags) -> str:
    """The path or hub id for `from_pretrained`. All processes build the toy if need be, or raise UsageError."""
    if model_id != TOY_MODEL_ID:
        return model_id
    return str(together(lambda: build_for(task)))


def require_loadable_models(*model_ids: str, revision: str | None = None) -> None:
    """Raises UsageError if the files of models or of adapters' bases do not fit by names and shapes.

    One process of a machine asks for a hub model's kind alone. Must come before a DeepSpeed configuration is made.
    """
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # its table of weights would stand above the one line of the error
    transformers_logging.set_verbosity_error()
    try:
        for model_id in model_ids:
            base = base_of(model_id)
            if Path(base).is_dir():
                with naming_the_model(model_id):
                    require_loadable(model_id)
            elif base != TOY_MODEL_ID and os.environ.get("LOCAL_RANK", "0") == "0":
                require_qwen_on_hub(base, revision)
    finally:
        transformers_logging.set_verbosity(verbosity)


def say_what_the_toy_has_not_seen(model_id: str, task: TaskFlags, paths: Sequence[Path]) -> None:
    """Says in a line which share of the pictures the toy does not know, where it is to pick them by name."""
    is_toy = TOY_MODEL_ID in (model_id, run_options(model_id).get("model_id"))
    if is_toy and starts_sighted(TOY_MODEL_ID, task) and (unseen := untaught(paths)):
        logger.info(
            f"the toy model has been taught the pictures of toy_images alone, and not {len(unseen):,} of these "
            f"{len(paths):,}: it cannot know them by name; for pictures of your own pass --model_id with a real model\n"
        )


def untaught(paths: Sequence[Path]) -> list[Path]:
    """The files that are not a copy, byte for byte, of a picture that the toy was taught.

    A file that cannot be read is not among them: the check of images and --bad_images have decided about it.
    """
    taught = [image.path for image in list_labelled_images(TOY_DATA_ROOT)]
    sizes, digests = {path.stat().st_size for path in taught}, {sha256_of(path) for path in taught}
    found = []
    for path in paths:
        with suppress(OSError):
            # a copy has the same length: a large folder is not read for this
            if path.stat().st_size not in sizes or sha256_of(path) not in digests:
                found.append(path)
    return found


@contextmanager
def naming_the_model(model_id: str) -> Iterator[None]:
    """Within it, an error of the libraries or model_utils about a model's files becomes a UsageError.

    Raises RunStopped where another process was lost, which is no fault of the files.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"model {model_id} does not fit into the GPU's memory ({one_line(error)}); pass a smaller one, or more "
            "GPUs under ZeRO-3"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        if is_of_collective(traceback.extract_tb(error.__traceback__)):
            message = f"process {os.environ.get('RANK', '0')} lost another one while model {model_id} loaded ({reason})"
            remedy = "look at the others' last lines, and start the run again"
            raise RunStopped(f"{message}; {remedy}", is_of_all=False) from error
        raise UsageError(f"model {model_id} cannot be loaded ({reason}); correct it or pass another") from error


def load_model(
    flags: ModelFlags,
    model_path: str,
    *,
    dtype: torch.dtype | None = None,
    trains_adapter: bool = False,
    freeze: Collection[str] = (),
) -> tuple[Any, Any]:
    """(model, processor). Every process takes part. dtype: of the weights, by default the one that is computed in.

    Raises UsageError if the model does not open; on all processes if a weight on any of them is not finite.
    """
    computed = torch.bfloat16 if flags.dtype == "bfloat16" else torch.float32
    transformers_logging.disable_progress_bar()
    with naming_the_model(flags.model_id):
        model, processor = load_qwen25_vl(
            model_path,
            use_lora=trains_adapter,
            freeze=freeze,
            load_in_4bit=flags.load_in_4bit,
            dtype=dtype or computed,
            attn_implementation=flags.attn_implementation,
            revision=flags.revision,
        )
    # under ZeRO-3 a process sees its own shards alone
    if names := [name for name in gather_by_rank(first_weight_not_finite(model)) if name is not None]:
        raise AgreedUsageError(
            f"model {flags.model_id} has weights that are not finite numbers, {names[0]} the first of them, but wanted "
            "a model that can answer; pass another, or a checkpoint from before its training failed"
        )
    return model, processor


def load_policy(flags: ModelFlags, task: TaskFlags) -> tuple[Any, Any]:
    """(model, processor) that answer on this process's device. Raises UsageError if the model does not open."""
    model, processor = load_model(flags, local_model_path(flags.model_id, task))
    if has_gpu() and not flags.load_in_4bit:
        model = model.to("cuda")
    torch.manual_seed(0)
    return model.eval(), processor
