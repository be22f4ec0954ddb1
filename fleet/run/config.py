"""The content of config.json: flags, images, and the versions that count. Imports no torch."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fleet.command.image_check import RunData
from utils.user_files import files_beside, folder_of

RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "pillow",
    "flash-attn", "bitsandbytes", "vllm",
)  # fmt: skip


def config_text(
    flags: Mapping[str, Any], idle: Sequence[str], code: Mapping[str, str], data: RunData, **others: Any
) -> str:
    """The text of config.json: the resolved flags, what is drawn from, processes, command, commit and versions.

    flags: by name; those in `idle` become null. code: the specs of the user's own code, by flag. others: num_episodes,
    num_processes, prediction (of what the run needs) and run_id, which a resumed run keeps and its checkpoints bear.
    """
    config = {
        "run_id": others["run_id"],
        "options": {name: None if name in idle else value for name, value in flags.items()},
        "idle_flags": idle,
        "num_episodes": others["num_episodes"],
        "num_processes": others["num_processes"],
        "data_digest": data.data_digest,
        "skipped_images": list(data.skipped_images),
        "user_files": sha256_of_user_files(code),
        "imported_files": sha256_of_imported_files(code),
        "model_files": sizes_of_model_files(flags["model_id"]),
        "command": sys.argv,
        "directory": os.getcwd(),
        "commit": git_commit(),
        "prediction": others.get("prediction"),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }
    return json.dumps(config, indent=2) + "\n"


def sha256_of_user_files(code: Mapping[str, str]) -> dict[str, str | None]:
    """The digest of each file of the user's own code, by its flag."""
    return {flag: sha256_of(Path(spec.rpartition(":")[0])) for flag, spec in code.items()}


def sha256_of_imported_files(code: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """The digests of the files that these have imported from beside them, by the flag and their place there."""
    return {
        flag: {place: sha256_of(folder_of(spec) / place) for place in files_beside(spec)} for flag, spec in code.items()
    }


def sha256_of(path: Path) -> str | None:
    """Hex of a file's SHA-256; None if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def what_changed_since(recorded: Mapping[str, Any], code: Mapping[str, str], model_id: str) -> list[str]:
    """The versions and files that differ from a run's config.json and may change a result."""
    before, now = recorded.get("versions", {}), installed_versions()
    changed = [
        f"{name} (was {before[name]}, now {now.get(name, 'gone')})"
        for name in sorted(before.keys() - {"python"})
        if before[name] != now.get(name)
    ]
    files_before, files_now = recorded.get("user_files", {}), sha256_of_user_files(code)
    changed += [f"the file of --{flag}" for flag, digest in files_now.items() if files_before.get(flag) != digest]
    changed += [
        f"{place} beside the file of --{flag}"
        for flag, digests in recorded.get("imported_files", {}).items()
        for place, digest in digests.items()
        # a file that is imported late is not yet imported now
        if flag in code and sha256_of(folder_of(code[flag]) / place) != digest
    ]
    model_before, model_now = recorded.get("model_files"), sizes_of_model_files(model_id)
    return changed + ([f"the files in --model_id {model_id}"] if model_before not in (None, model_now) else [])


def sizes_of_model_files(model_id: str) -> dict[str, int]:
    """Bytes of each file of weights or configuration in a folder, as contents take minutes; empty for a hub model."""
    paths = [path for pattern in ("*.safetensors", "*.json") for path in Path(model_id).glob(pattern)]
    return {path.name: path.stat().st_size for path in sorted(paths)}


def installed_versions() -> dict[str, str]:
    """The installed versions of the packages that can change a result."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None outside a git checkout."""
    here = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
