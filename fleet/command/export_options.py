"""The options of an export, and the checks of the folder and of the hub that it goes to. Imports no torch."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fleet.command.options import refuse_numbers
from fleet.command.output_dir import is_run_folder, require_can_be_made
from fleet.command.parser import flag, make_parser, parse_flags, user_path
from fleet.errors import UsageError, one_line
from fleet.model_folder.files import read_json
from fleet.run_folder import EXPORT_NAME, RUN_CONFIG_NAME

AS_TRAINED = "as_trained"
HUB_REMEDY = "drop --push_to_hub; the folder can be sent later, by hf upload OWNER/NAME FOLDER"


# fmt: off
@dataclass(frozen=True)
class ExportOptions:
    """An export as asked for: what is exported, and where to."""

    run: str | None = flag(None, "folder of a run, or of any Qwen2.5-VL or LoRA adapter; its flag may be left out",
        "required", metavar="RUN", parse=user_path)
    checkpoint: str | None = flag(None, "of a run: final, checkpoint-N, or best, which --keep_best of training kept",
        "final", metavar="NAME")
    output: str | None = flag(None, "folder of the export", f"RUN/{EXPORT_NAME}", metavar="DIR", parse=user_path)
    overwrite: bool = flag(False, "replace an earlier export in --output, and nothing else")
    dtype: str = flag(AS_TRAINED, "of the weights; as_trained: that of the trained files, of an adapter its base's",
        "so that log-probabilities stay as they are", choices=(AS_TRAINED, "bfloat16", "float32"))
    trust_checkpoint: bool = flag(False, "unpickle whatever ZeRO-3 shards hold, code included")
    push_to_hub: str | None = flag(None, "also send the export to this repository of the hub", "nothing is sent",
        metavar="OWNER/NAME")
    private: bool = flag(True, "of a repository that --push_to_hub makes", "as publishing cannot be undone")
    # fmt: on


def build_export_parser() -> argparse.ArgumentParser:
    """The parser of export.py."""
    description = (
        "Make one folder of a trained model: merged weights, tokenizer, chat template and a model card. "
        "from_pretrained, evaluate.py, training.py and vLLM open it."
    )
    return make_parser("export.py", description, {"export": (ExportOptions,)}, ExportOptions)


def parse_export_options(argv: Sequence[str]) -> ExportOptions:
    """The options of a command line, whose first word may be the run. Raises UsageError."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[0] = f"--run={words[0]}"
    given = parse_flags(build_export_parser(), words)
    options = ExportOptions(**given)
    refuse_numbers(options)
    if not options.run:
        raise UsageError("run is missing; pass the folder of a run, as in python export.py runs/look")
    if "private" in given and options.push_to_hub is None:
        raise UsageError("private does nothing without push_to_hub; drop --private")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("an export is the work of one process; start it as python export.py, without a launcher")
    return options


def output_folder(options: ExportOptions, run: Path) -> Path:
    """Where the export goes. run: the folder of the run, or of a model from elsewhere."""
    return run / EXPORT_NAME if options.output is None else Path(options.output)


def require_output_folder(folder: Path, read: Iterable[str], *, overwrite: bool) -> None:
    """Raises UsageError unless an export can go there. read: the folders that it is made from, which must stay."""
    require_can_be_made(folder, f"output={folder}", "output")
    for path in read:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"output={folder} holds {path}, which is exported; pass another --output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"output={folder} is not empty; pass --overwrite to replace an earlier export, or another")
    config = folder / RUN_CONFIG_NAME
    if folder.is_symlink() or is_run_folder(folder) or not config.is_file() or "export" not in read_json(config):
        raise UsageError(f"overwrite: output={folder} is no earlier export, so nothing in it is deleted; pass another")


def require_hub(repository: str | None) -> None:
    """Raises UsageError if the hub cannot be sent to: offline, without a token, or under a name that it refuses."""
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"push_to_hub={repository} is no name on the hub ({one_line(error)}); correct it") from error
    if repository.count("/") != 1:
        raise UsageError(f"push_to_hub={repository}, but wanted OWNER/NAME; name the account or organization too")
    if constants.is_offline_mode():
        raise UsageError(f"push_to_hub={repository}, but HF_HUB_OFFLINE says that there is no hub; {HUB_REMEDY}")
    try:
        HfApi().whoami()
    # no token, one that is refused, or whatever error of the HTTP library says that there is no connection
    except Exception as error:
        raise UsageError(
            f"push_to_hub={repository}, but the hub does not let you in ({one_line(error)[:200]}); run hf auth login "
            f"where there is a connection, or {HUB_REMEDY}"
        ) from error
