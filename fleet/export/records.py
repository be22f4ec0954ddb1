"""What a run's folder says of an exported model: its flags, data, curve and evaluations, without this machine's paths.

Reads files alone, and imports no torch. model_card.py writes them down.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.command.data_sets import is_data_set
from fleet.command.evaluate_options import run_options
from fleet.command.image_check import image_name
from fleet.errors import refused
from fleet.export.trained_model import TrainedModel
from fleet.model_folder.files import base_of, read_json
from fleet.run_folder import (
    EVALUATION_SCHEMA_VERSION,
    EVALUATIONS_NAME,
    IMAGES_NAME,
    METRICS_NAME,
    SEPARATE_EVALUATION_NAME,
    finite,
    read_jsonl,
)
from utils.images import list_labelled_images

logger = logging.getLogger("fleet")

WINDOW_STEPS = 5  # logged steps that a figure of the curve's start or end is the mean of
# what config.json says of the run itself; its command, folder and model files are this machine's
PUBLISHED = (
    "run_id", "options", "idle_flags", "num_episodes", "num_processes", "data_digest", "skipped_images", "user_files",
    "imported_files", "commit", "versions",
)  # fmt: skip
PRIVATE_FLAGS = ("output_dir", "vllm_server_host", "vllm_server_port")


@dataclass(frozen=True)
class Figure:
    """The means of a metric over the first and the last logged steps."""

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class Curve:
    """A run's figures. num_steps: those that the means are over. last_step: of the exported weights."""

    figures: tuple[Figure, ...]
    num_steps: int
    last_step: int


@dataclass(frozen=True)
class Data:
    """The pictures of a run; None for what nothing tells any more."""

    num_images: int | None
    num_labels: int | None


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json without paths and hosts of this machine; empty for an empty one."""
    kept = {name: config[name] for name in PUBLISHED if name in config}
    if "options" in kept:
        options = {name: None if name in PRIVATE_FLAGS else value for name, value in kept["options"].items()}
        if isinstance(arguments := options.get("env_args"), str):
            options["env_args"] = json.dumps(without_places(json.loads(arguments)))
        kept["options"] = {name: without_places(value) for name, value in options.items()}
    return kept


def without_places(value: Any) -> Any:
    """A value whose paths, wherever it holds any, that lead out of a working directory are names alone.

    >>> without_places(["/home/me/photos", "toy_images", "~/mine/env.py:Env", "Qwen/Qwen2.5-VL-3B-Instruct"])
    ['photos', 'toy_images', 'env.py:Env', 'Qwen/Qwen2.5-VL-3B-Instruct']
    """
    if isinstance(value, str):
        leads_out = value.startswith(("/", "~")) or ".." in Path(value).parts
        return Path(value).name if leads_out else value
    if isinstance(value, list):
        return [without_places(part) for part in value]
    return {name: without_places(part) for name, part in value.items()} if isinstance(value, dict) else value


def origin_of(trained: TrainedModel) -> str:
    """The model that all training began with, through the runs in between: a hub id, toy, or a folder's name."""
    model_id, seen = str(trained.options.get("model_id") or base_of(str(trained.folder))), set[str]()
    while model_id not in seen and Path(model_id).is_dir():
        seen.add(model_id)
        model_id = str(run_options(model_id).get("model_id") or base_of(model_id))
    return Path(model_id).resolve().name if Path(model_id).is_dir() else without_places(model_id)


def read_curve(trained: TrainedModel) -> Curve | None:
    """Reward and accuracy at the start and at the end of training; None without records of it."""
    lines = _lines(trained, METRICS_NAME)
    lines = [line for line in lines if "reward" in line and (trained.step is None or line["step"] <= trained.step)]
    if not lines:
        return None
    window = max(1, min(WINDOW_STEPS, len(lines) // 2))
    figures = []
    for name in ("reward", "accuracy"):
        first, last = (_mean(part, name) for part in (lines[:window], lines[-window:]))
        if first is not None and last is not None:
            figures.append(Figure(name, first, last))
    return Curve(tuple(figures), window, int(lines[-1]["step"]))


def read_evaluations(trained: TrainedModel) -> list[dict[str, Any]]:
    """The held-out evaluations of exactly these weights: the run's own of their step, then evaluate.py's."""
    if trained.run is None:
        return []
    documents = [line for line in _lines(trained, EVALUATIONS_NAME) if line.get("step") == trained.step][-1:]
    separate = trained.run / SEPARATE_EVALUATION_NAME
    if separate.is_file():
        document = read_json(separate)
        # it names the model as the command line did
        if Path(str(document.get("model"))).parts[-2:] == trained.folder.resolve().parts[-2:]:
            written_s = max((path.stat().st_mtime for path in trained.folder.rglob("*")), default=0.0)
            if separate.stat().st_mtime < written_s:
                logger.warning(f"{separate} is older than {trained.folder}, which it scored, so the card leaves it out")
            else:
                documents.append(document)
    return [document for document in documents if document.get("schema_version") == EVALUATION_SCHEMA_VERSION]


def read_data(trained: TrainedModel) -> Data:
    """How many pictures and labels the run drew from, as it recorded them and as its folder still shows them."""
    if trained.run is None or not (trained.run / IMAGES_NAME).is_file():
        return Data(None, None)
    names = read_json(trained.run / IMAGES_NAME).keys()
    root = str(run_options(str(trained.folder)).get("data_root"))
    if is_data_set(root) or not Path(root).is_dir() or trained.options.get("env"):
        return Data(len(names), None)
    try:
        images = list_labelled_images(root)
    except (OSError, ValueError):
        return Data(len(names), None)
    labels = {image_name(image.path, root): image.label for image in images}
    return Data(len(names), len({labels[name] for name in names}) if names <= labels.keys() else None)


def _lines(trained: TrainedModel, name: str) -> list[dict[str, Any]]:
    path = None if trained.run is None else trained.run / name
    with refused(ValueError, OSError):
        return read_jsonl(path) if path is not None and path.is_file() else []


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    found = [value for line in lines if (value := finite(line.get(name))) is not None]
    return sum(found) / len(found) if found else None
