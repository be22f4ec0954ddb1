"""A model's folder by its files' names, JSON and headers: adapter or model, its base, its shards. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from fleet.errors import UsageError, refused
from utils.file_kinds import kind_of

ADAPTER_CONFIG_NAME = "adapter_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SHARDS_INDEX_NAME = "model.safetensors.index.json"
HEADER_LENGTH_BYTES = 8  # little-endian, at the start of a safetensors file
LFS_BEGINNING = b"version https://git-lfs"
MODEL_FILE_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".jinja"})  # what transformers and PEFT open


def is_adapter(model_id: str) -> bool:
    """True if this is the folder of an adapter."""
    return (Path(model_id) / ADAPTER_CONFIG_NAME).is_file()


def holds_shards(folder: Path) -> bool:
    """True if DeepSpeed has left the weights of ZeRO-3 here, a file of each process's share."""
    return any(folder.glob("global_step*/*_optim_states.pt"))


def base_of(model_id: str) -> str:
    """The model whose weights are opened: an adapter's base, else the model itself. Raises as read_json."""
    if not is_adapter(model_id):
        return model_id
    return str(read_json(Path(model_id) / ADAPTER_CONFIG_NAME).get("base_model_name_or_path"))


def require_whole_folder(folder: Path) -> None:
    """Raises UsageError if a folder's index names a missing file, or its generation settings are not JSON."""
    settings, index = folder / GENERATION_CONFIG_NAME, folder / SHARDS_INDEX_NAME
    if settings.is_file():
        read_json(settings)  # for which the libraries would make up settings of their own
    if not index.is_file():
        return
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UsageError(f"{index} has no weight_map of names and files; restore it")
    named = set(map(str, places.values()))
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise UsageError(
            f"model folder {folder} lacks {len(missing)} of the {len(named)} files that its {SHARDS_INDEX_NAME} names, "
            f"{missing[0]} among them; copy them there from the original model"
        )


def require_whole_weights(folder: Path) -> None:
    """Raises UsageError if a weights file is cut off by a broken download, or is a pointer of Git LFS.

    A safetensors file begins with its header's length, and the header says how many bytes follow. Reads headers alone.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            problem = _problem_of_weights(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); make it readable or replace it") from error
        if problem is not None:
            raise UsageError(f"weights {path} {problem}")


def _problem_of_weights(path: Path) -> str | None:
    remedy = "copy it there from the original model again"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_LENGTH_BYTES)
        if LFS_BEGINNING.startswith(head) and head:
            return "is a pointer of Git LFS, not the weights; run git lfs pull in the folder it was cloned to"
        length = int.from_bytes(head, "little")
        if size < HEADER_LENGTH_BYTES or length > size - HEADER_LENGTH_BYTES:
            return f"has {size:,} bytes, which is not even its header; {remedy}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            wanted = HEADER_LENGTH_BYTES + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return f"has a header that cannot be read; {remedy}"
    return None if size == wanted else f"has {size:,} bytes, but by its header {wanted:,}; {remedy}"


def require_regular_files(folder: Path) -> None:
    """Raises UsageError if a pipe, a device or a link to nothing has the name of a model's file."""
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILE_SUFFIXES and (kind := kind_of(path)) not in ("a file", "a folder"):
            raise UsageError(f"model folder {folder}: {path.name} is {kind}; put the original model's file there")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError if the file is missing or holds anything else."""
    with refused(OSError, ValueError, before=f"{path} cannot be read (", after="); restore it"):
        kind = kind_of(path) or "a file"
        content = json.loads(path.read_text(encoding="utf-8")) if kind == "a file" else None
    if kind != "a file":
        raise UsageError(f"{path} is {kind}, wanted a file; restore it")
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, wanted a JSON object; restore it")
    return content
