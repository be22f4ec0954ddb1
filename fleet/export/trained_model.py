"""The trained model that a command line names: a run's final/, a checkpoint, or any model's or adapter's folder.

Owns which folder that is, what kind of weights it holds and which step they are of. Reads no weight, imports no torch.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fleet.command.evaluate_options import run_config
from fleet.command.output_dir import is_run_folder
from fleet.command.preflight import require_model
from fleet.errors import UsageError, refused
from fleet.model_folder.files import ADAPTER_CONFIG_NAME, base_of, is_adapter, read_json
from fleet.rl.checkpoints import MANIFEST_NAME, checkpoint_step, find_damage, list_checkpoints
from fleet.run_folder import CONFIG_NAME, FINAL_NAME, METRICS_NAME, RUN_CONFIG_NAME, read_jsonl
from utils.file_kinds import kind_of

BEST = "best"
STATE_NAME = "trainer_state.json"


class Kind(StrEnum):
    """How a folder holds its weights."""

    WHOLE = "all weights"
    ADAPTER = "a LoRA adapter"
    SHARDS = "ZeRO-3 shards"


@dataclass(frozen=True)
class TrainedModel:
    """A folder of trained weights, and the run that left it.

    run: its folder; None for a model from elsewhere. step: the optimizer step; None where nothing tells. config: the
    run's config.json, else empty. revision: of an adapter's base on the hub.
    """

    folder: Path
    kind: Kind
    run: Path | None
    step: int | None
    config: dict[str, Any]
    revision: str | None

    @property
    def options(self) -> dict[str, Any]:
        """The resolved flags of the run; empty for a model from elsewhere."""
        return self.config.get("options", {})


def find_trained_model(named: str, checkpoint: str | None) -> TrainedModel:
    """The model in the folder `named`, a run's or a model's own. checkpoint: final, best or checkpoint-N of a run.

    Raises UsageError if there is none, it is broken, or an adapter's base is gone.
    """
    folder = Path(named)
    with refused(OSError, before=f"run={named} cannot be read (", after="); pass a folder"):
        kind = kind_of(folder)
    if kind != "a folder":
        raise UsageError(
            f"run={named} is {kind or 'no folder'}; pass the folder of a run (--output_dir of training.py), or of a "
            "model or an adapter"
        )
    if is_run_folder(folder):
        return _of_run(folder, checkpoint or FINAL_NAME)
    if checkpoint is not None:
        raise UsageError(f"checkpoint={checkpoint}, but run={named} is no run's folder; drop --checkpoint")
    is_named_by_run = folder.resolve().name == FINAL_NAME or checkpoint_step(folder.resolve()) >= 0
    if is_named_by_run and is_run_folder(folder.resolve().parent):
        return _of_run(folder.resolve().parent, folder.resolve().name)
    return _checked(folder, None, None)


def _of_run(run: Path, name: str) -> TrainedModel:
    """The model that a run's folder has under this name."""
    name = _best_checkpoint(run) if name == BEST else name
    folder = run / name
    if name != FINAL_NAME and checkpoint_step(folder) < 0:
        raise UsageError(f"checkpoint={name}, but wanted final, best or checkpoint-N; correct --checkpoint")
    if not folder.is_dir():
        found = ", ".join(path.name for path in list_checkpoints(run))
        remedy = f"pass --checkpoint with one of {found}" if found else "train on until it saves"
        raise UsageError(f"run {run} has no {name}{'/' if name == FINAL_NAME else ''}; {remedy}")
    if (folder / MANIFEST_NAME).is_file() and (damage := find_damage(folder)):
        raise UsageError(f"{folder} is damaged: {damage}; restore it, or pass another --checkpoint")
    step = _step_of_final(run) if name == FINAL_NAME else checkpoint_step(folder)
    return _checked(folder, run, step)


def _best_checkpoint(run: Path) -> str:
    """The name of the checkpoint that the newest one counts as the best."""
    for checkpoint in list_checkpoints(run):
        if (checkpoint / STATE_NAME).is_file():
            best = read_json(checkpoint / STATE_NAME).get("best_global_step")
            if best is not None:
                return f"checkpoint-{best}"
    raise UsageError(
        f"checkpoint=best, but no checkpoint of run {run} says which is; pass a step's, or train with --eval_steps and "
        "--keep_best true"
    )


def _step_of_final(run: Path) -> int | None:
    """The last step of a run that has ended; None if it went on since, towards a later end."""
    wanted = read_json(run / CONFIG_NAME)["options"].get("train_steps")
    with refused(ValueError):
        steps = [line.get("step") for line in read_jsonl(run / METRICS_NAME)] if (run / METRICS_NAME).is_file() else []
    return wanted if steps and steps[-1] == wanted else None


def _checked(folder: Path, run: Path | None, step: int | None) -> TrainedModel:
    require_model(str(folder), "run", takes_shards=True)
    # a run beside a folder that it did not leave says nothing about it
    is_of_run = run is not None or (folder / RUN_CONFIG_NAME).is_file()
    config = run_config(str(folder)) if is_of_run else {}
    revision, kind = config.get("options", {}).get("revision"), Kind.WHOLE
    if is_adapter(str(folder)):
        kind = Kind.ADAPTER
        revision = revision or read_json(folder / ADAPTER_CONFIG_NAME).get("revision")
    elif not any(folder.glob("*.safetensors")):
        kind = Kind.SHARDS
    return TrainedModel(folder, kind, run, step, config, revision)


def folders_read(trained: TrainedModel) -> list[str]:
    """The folders that an export of it reads: the weights', the run's and an adapter's base."""
    run = [] if trained.run is None else [str(trained.run)]
    return [str(trained.folder), base_of(str(trained.folder)), *run]
