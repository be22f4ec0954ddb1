"""A checked export becomes a folder: weights loaded, merged, written, read back and compared, and put in place at once.

Runs in one process on the CPU, in memory for one copy of the weights.
"""

import gc
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fleet.command.export_options import AS_TRAINED, ExportOptions
from fleet.errors import RunStopped, UsageError, one_line, refused
from fleet.export.model_card import CardFacts, model_card
from fleet.export.parity import LogprobGap, gap_between, prompt_logprobs, require_parity
from fleet.export.records import origin_of, published_config, read_curve, read_data, read_evaluations
from fleet.export.trained_model import Kind, TrainedModel
from fleet.export.weights import merged, open_trained, share_lost_to_rounding
from fleet.model_folder.weights import first_weight_not_finite
from fleet.rl.checkpoints import remedy_of
from fleet.run import model_setup
from fleet.run.config import installed_versions
from fleet.run_folder import CURVE_NAME, RUN_CONFIG_NAME, flush_folder, replace_folder
from model_utils import open_base
from utils.plain_text import printable

logger = logging.getLogger("fleet")

CARD_NAME = "README.md"
MUCH_IS_LOST = 0.1  # of an adapter's update, from which on the log says so


def require_loadable(trained: TrainedModel) -> None:
    """Raises UsageError if the files do not fit by names and shapes; reads no weight, and no shard."""
    if trained.kind is not Kind.SHARDS:
        model_setup.require_loadable_models(str(trained.folder), revision=trained.revision)


def write_export(trained: TrainedModel, folder: Path, options: ExportOptions) -> None:
    """Writes the export to `folder`, which appears whole or not at all.

    Raises UsageError if the weights do not load, RunStopped if they are not those that were trained once written, or
    if a write fails.
    """
    transformers_logging.disable_progress_bar()
    model_setup.use_every_core()
    logger.info(f"exporting {printable(trained.folder)} ({trained.kind})")
    # a kill leaves it, and the next export begins it again
    scratch = folder.with_name(f"{folder.name}.unfinished")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        staged = scratch / folder.name
        staged.mkdir(parents=True)
        _fill(staged, folder.name, trained, options)
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(staged)
        replace_folder(staged, folder)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunStopped(
            f"the export could not be written to {folder} ({one_line(error)}); {remedy_of(error, folder.parent)}, and "
            "start again",
            can_resume=False,
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info(f"exported to {printable(folder)}; {CARD_NAME} says what it is")


def push(folder: Path, repository: str, *, is_private: bool) -> None:
    """Sends a whole export to the hub. Raises RunStopped if the hub does not take it; the folder stays."""
    try:
        api = HfApi()
        api.create_repo(repository, private=is_private, exist_ok=True)
        address = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by Fleet")
    # whatever error of the hub or of the HTTP library
    except Exception as error:
        raise RunStopped(
            f"the export is in {folder}, but could not be sent to {repository} ({one_line(error)[:200]}); send it by "
            f"hf upload {repository} {folder}",
            can_resume=False,
        ) from error
    logger.info(f"sent to {address}")


def _fill(staged: Path, name: str, trained: TrainedModel, options: ExportOptions) -> None:
    """Writes every file of an export into an empty folder. name: of the export, for its card."""
    dtype, trained_T, lost = _write_weights(staged, trained, options)
    gap = gap_between(trained_T, _logprobs_of(staged))
    require_parity(gap, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    facts = _describe_weights(trained, dtype_name, gap, lost)
    logger.info("\n".join(facts))
    curve_image = None if trained.run is None else trained.run / CURVE_NAME
    has_curve_image = curve_image is not None and curve_image.is_file()
    if curve_image is not None and has_curve_image:
        shutil.copyfile(curve_image, staged / CURVE_NAME)
    config = published_config(trained.config)
    versions = installed_versions()
    card = CardFacts(
        name=(trained.run or trained.folder).resolve().name if options.output is None else name,
        origin=origin_of(trained),
        kind=trained.kind,
        step=trained.step,
        config=config,
        data=read_data(trained),
        curve=read_curve(trained),
        has_curve_image=has_curve_image,
        evaluations=read_evaluations(trained),
        weights=facts,
        versions=versions,
    )
    (staged / CARD_NAME).write_text(model_card(card), encoding="utf-8")
    export = {
        "source": trained.folder.name,
        "step": trained.step,
        "dtype": dtype_name,
        "logprob_gap": gap.as_json(),
        "versions": versions,
    }
    (staged / RUN_CONFIG_NAME).write_text(json.dumps(config | {"export": export}, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    staged: Path, trained: TrainedModel, options: ExportOptions
) -> tuple[torch.dtype, Tensor, float | None]:
    """(dtype of the written weights, log-probabilities before they were merged and rounded, share lost to rounding).

    Writes the model and its processor.
    """
    wanted = None if options.dtype == AS_TRAINED else getattr(torch, options.dtype)
    with model_setup.naming_the_model(str(trained.folder)):
        model, processor = open_trained(
            trained,
            # rounding comes last
            dtype=torch.float32 if wanted == torch.float32 else None,
            trusts_shards=options.trust_checkpoint,
        )
    if name := first_weight_not_finite(model):
        raise UsageError(
            f"{trained.folder} has weights that are not finite numbers, {name} the first of them; export a checkpoint "
            "from before its training failed"
        )
    dtype = wanted or model.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"{trained.folder} has weights in {str(dtype).removeprefix('torch.')}, but wanted bfloat16 or float32; "
            "pass --dtype with one of them"
        )
    trained_T, lost = prompt_logprobs(model, processor), share_lost_to_rounding(model, dtype)
    _save(merged(model).to(dtype), processor, staged)
    return dtype, trained_T, lost


def _save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    # training without a cache leaves its setting behind, with which others would generate slowly
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # processor_config.json, which holds both, is read by transformers 5 alone
    processor.image_processor.save_pretrained(folder)
    processor.video_processor.save_pretrained(folder)


def _logprobs_of(folder: Path) -> Tensor:
    """The log-probabilities of what was written, read back."""
    gc.collect()
    with refused(ValueError, before="the written export does not load: "):
        model, processor, _ = open_base(str(folder), dtype="auto")
    return prompt_logprobs(model, processor)


def _describe_weights(trained: TrainedModel, dtype: str, gap: LogprobGap, lost: float | None) -> list[str]:
    """The sentences that say how the weights were made."""
    source = trained.folder.name if trained.run is not None else trained.kind
    facts = [f"Made of {source} ({trained.kind}), in {dtype}."]
    if trained.kind is Kind.ADAPTER and trained.options.get("load_in_4bit"):
        facts.append(
            "The adapter was trained over 4-bit base weights and is merged into those with all bits, so answers differ "
            "somewhat from those of training."
        )
    if lost is not None:
        keeps = " `--dtype float32` keeps all of it." if lost > MUCH_IS_LOST else ""
        facts.append(f"Rounding to {dtype} changed the adapter's update by {100 * lost:.1f} % of its norm.{keeps}")
    facts.append(
        f"Read back, the weights give the {gap.num_tokens} tokens of a fixed prompt with a picture the trained model's "
        f"log-probabilities, to {gap.mean:.2g} nats on average and {gap.greatest:.2g} at most."
    )
    return facts
