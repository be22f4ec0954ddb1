"""What training and evaluation do alike: their processes and cores, and a model loaded for them.

Imports no TRL, whose import alone takes as long as a small evaluation.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from command_line import result_or_problem
from flags import TOY_MODEL_ID, AgreedUsageError, UsageError
from image_check import Findings, RunData, first_difference, listing_of, settle
from model_files import base_of
from model_utils import load_qwen25_vl, require_loadable
from options import SharedOptions, starts_sighted
from toy_model import PLAIN, SIGHTED, CacheError
from toy_process import BuildError, build_in_own_process


def has_gpu() -> bool:
    """Whether a GPU will train: there is one, and the launcher was not told to use the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def has_bfloat16() -> bool:
    """Whether to compute in bfloat16: a GPU does so natively, or the launcher was told to."""
    asked_by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return asked_by_launcher or (has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False))


def use_every_core() -> None:
    """Without a GPU, gives this machine's processes its cores, up to 4 each; accelerate gives each a single thread.

    A number of threads above 1 that was asked for (OMP_NUM_THREADS, or accelerate's --num_cpu_threads_per_process)
    stays; 1 cannot be told from accelerate's own.
    """
    if not has_gpu() and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        num_cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(min(max(1, num_cores), 4))


def require_agreement(options: SharedOptions, problem: str | None) -> None:
    """Raises UsageError on every process if the checks of any failed, or any was started with other flags."""
    of_ranks = gather_object([(problem, asdict(options))])
    for rank, (found, _) in enumerate(of_ranks):
        if found is not None:
            raise AgreedUsageError(f"process {rank}: {found}" if len(of_ranks) > 1 else found)
    first = of_ranks[0][1]
    differing = [
        f"{name}={sorted({str(flags[name]) for _, flags in of_ranks})}"
        for name in sorted(first)
        if any(flags[name] != first[name] for _, flags in of_ranks)
    ]
    if differing:
        raise AgreedUsageError(
            f"processes were started with different flags: {', '.join(differing)}; give all the same"
        )


def agree_on_data(options: SharedOptions, findings: Findings) -> RunData:
    """What the run draws from, the same on every process. Every process takes part.

    Raises UsageError on every process if images are bad and stop the run, or if machines hold different folders.
    """
    if findings.data is not None:
        return findings.data
    found = gather_object([findings.share])
    if len({None if share is None else share.names_digest for share in found}) > 1:
        listings = gather_object([listing_of(findings.env, options.data_root)])
        raise AgreedUsageError(
            f"the machines hold different images: {first_difference(listings)}; give every machine the same data folder"
        )
    return settle(options, findings.env, found, findings.beginning)


def local_model_path(options: SharedOptions) -> str:
    """What `from_pretrained` is to open; builds the toy model if need be. Every process takes part.

    Raises UsageError on every process if the toy model cannot be built or kept on any.
    """
    if options.model_id != TOY_MODEL_ID:
        return options.model_id
    path, problem = result_or_problem(lambda: _built_toy(SIGHTED if starts_sighted(options) else PLAIN))
    require_agreement(options, problem)
    return str(path)


def _built_toy(kind: str) -> Path:
    try:
        return build_in_own_process(kind)
    except CacheError as error:
        raise UsageError(f"the toy model cannot be kept ({error}); set FLEET_CACHE to a folder to write to") from error
    except BuildError as error:
        raise UsageError(
            f"the toy model could not be built ({error}); mend that, or pass another --model_id"
        ) from error


def problem_of_models(*model_ids: str) -> str | None:
    """What is wrong with the files of these models, by names and shapes alone; None if nothing is.

    Of models in folders, adapters' bases too: a hub model's files may not be here yet, and are checked as they load.
    Started alone, a process raises UsageError itself. Must come before a DeepSpeed configuration is made.
    """
    return result_or_problem(lambda: _require_loadable_folders(model_ids))[1]


def _require_loadable_folders(model_ids: Sequence[str]) -> None:
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # its table of weights would stand above the one line that says what is wrong
    transformers_logging.set_verbosity_error()
    try:
        for model_id in model_ids:
            if Path(base_of(model_id)).is_dir():
                with naming_the_model(model_id):
                    require_loadable(model_id)
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def naming_the_model(model_id: str) -> Iterator[None]:
    """Within it, what the libraries and model_utils say of files that do not open becomes a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"model {model_id} does not fit into the GPU's memory ({reason}); pass a smaller one, or more GPUs under "
            "ZeRO-3"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model {model_id} cannot be loaded ({reason}); correct it or pass another") from error


def load_model(
    options: SharedOptions,
    model_path: str,
    *,
    dtype: torch.dtype,
    trains_adapter: bool = False,
    freeze_vision: bool = False,
) -> tuple[Any, Any]:
    """(model, processor). Raises UsageError if the model cannot be found or opened."""
    transformers_logging.disable_progress_bar()
    with naming_the_model(options.model_id):
        return load_qwen25_vl(
            model_path,
            use_lora=trains_adapter,
            freeze_vision=freeze_vision,
            load_in_4bit=options.load_in_4bit,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            revision=options.revision,
        )
