"""The options of an evaluation: its own flags, those of the run that left the model, and their checks.

flags.py has the flags that it shares with training. Imports no torch.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fleet.command.data_sets import HUB
from fleet.command.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
    TOY_MODEL_ID,
    Case,
    HeldOutFlags,
    ModelFlags,
    SamplingFlags,
    TaskFlags,
    by_model,
)
from fleet.command.idle_flags import IDLE_IN_EVALUATION, refuse_idle
from fleet.command.options import PATH_FLAGS, ResolvedDefault, fill_in, refuse_numbers, require_room_to_end
from fleet.command.parser import as_arguments, as_seen_from, flag, make_parser, parse_flags, replace_default, user_path
from fleet.errors import UsageError
from fleet.model_folder.files import read_json
from fleet.run_folder import CONFIG_NAME, RUN_CONFIG_NAME


# fmt: off
@dataclass(frozen=True)
class ScoringFlags:
    """The scoring of answers, and the file of figures."""

    baseline: str | None = flag(None, "another model, scored on the same episodes and compared", "none", metavar="ID",
        parse=user_path)
    prompt_style: str | None = flag(None, "compare prompts under one parser, which then accepts text before the call "
        "for both", "the prompt and parser of --allow_reasoning", choices=("direct", "reasoning"))
    num_samples: int = flag(4, "samples per episode, 0 for none", bounds=(AT_LEAST_0,))
    pass_k: str | None = flag(None, "each k of pass@k", "1, 2 and num_samples", metavar="K,...")
    per_device_batch_size: int | None = flag(None, "episodes that a device answers at a time, each with its samples",
        "128 for the toy, else 4", bounds=(AT_LEAST_1,), default_of=by_model(toy=(128, "the toy is small"),
        real=(4, "20 rows of a real model with 4 samples each")))
    seed: int = flag(0, "of the samples", bounds=(AT_LEAST_0,))
    output: str | None = flag(None, "where the figures go as JSON", "nowhere", metavar="FILE", parse=user_path)
    overwrite: bool = flag(False, "replace an output file that exists")
    # fmt: on

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of each pass@k."""
        if self.pass_k is None:
            return tuple(sorted({k for k in (1, 2, self.num_samples) if 1 <= k <= self.num_samples}))
        return tuple(int(k) for k in self.pass_k.split(","))


@dataclass(frozen=True)
class EvaluateOptions(ScoringFlags, SamplingFlags, HeldOutFlags, ModelFlags):
    """An evaluation as asked for. It scores more episodes than training does, of another seed."""

    eval_episodes: int = replace_default(HeldOutFlags, "eval_episodes", 512)
    eval_seed: int = replace_default(HeldOutFlags, "eval_seed", 2 * 10**9)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are scored, the baseline last."""
        return (self.model_id,) if self.baseline is None else (self.model_id, self.baseline)


GROUPS = {
    "model": (ModelFlags,),
    "task": (TaskFlags,),
    "generation": (SamplingFlags,),
    "evaluation": (HeldOutFlags, ScoringFlags),
}
# the flags that an evaluation takes over from the run that left the model
INHERITED = {field.name for flags in (ModelFlags, TaskFlags, SamplingFlags) for field in fields(flags)} - {
    "model_id", "revision", "dtype",
}  # fmt: skip


def build_evaluate_parser() -> argparse.ArgumentParser:
    """The parser of evaluate.py."""
    description = (
        "Score a Qwen2.5-VL, a checkpoint or an adapter on held-out episodes, with intervals and controls. For a model "
        "that a run of training.py left, flags that are not given are the run's own. A flag that would do nothing "
        "beside the others is refused. With --replay RUN, and --step and --group, it shows a group that a run logged "
        "token by token instead, and draws it again where the weights still exist."
    )
    return make_parser("evaluate.py", description, GROUPS, EvaluateOptions)


def parse_evaluate_options(argv: Sequence[str], launch_variables: Mapping[str, str] = os.environ) -> EvaluateOptions:
    """The options of a command line. Raises UsageError for flags that are invalid or would do nothing.

    For a model in a run's folder, the task, the prompt and the sampling are the run's unless they are given.
    """
    parser = build_evaluate_parser()
    given = parse_flags(parser, argv)
    run = run_options(given.get("model_id", TOY_MODEL_ID))
    # a run of bare calls leaves no room to reason
    inherited = INHERITED - {"max_completion_length"} if "prompt_style" in given else INHERITED
    runs_flags = as_arguments({name: value for name, value in run.items() if name in inherited})
    options = EvaluateOptions(**parse_flags(parser, runs_flags) | given)
    refuse_numbers(options)
    require_room_to_end(options)
    words = [] if options.pass_k is None else options.pass_k.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"pass_k={options.pass_k!r}, but wanted whole numbers with commas between; pass --pass_k 1,8")
    for k in options.ks:
        if not 1 <= k <= options.num_samples:
            raise UsageError(
                f"pass_k={k}, but with num_samples={options.num_samples} k is from 1 to {options.num_samples}; draw "
                f"more samples (--num_samples {max(k, 1)}) or lower --pass_k"
            )
    refuse_idle(IDLE_IN_EVALUATION, options, given, launch_variables)
    for name, model in zip(("model_id", "baseline"), options.models, strict=False):
        if run_options(model).get("seed") == options.eval_seed:
            raise UsageError(
                f"eval_seed={options.eval_seed} is the seed that {name}={model} was trained with, so it would be "
                "scored on its own training episodes; pass another --eval_seed"
            )
    return options


def resolve_evaluate_options(
    options: EvaluateOptions, *, has_bf16_gpu: bool
) -> tuple[EvaluateOptions, list[ResolvedDefault]]:
    """The options with every case-dependent default filled in, and the list of these."""
    is_toy = TOY_MODEL_ID in (options.model_id, run_options(options.model_id).get("model_id"))
    model = "toy" if is_toy else "real"
    # prompts that are compared have the same room
    reasons = options.prompt_style is not None or (options.allow_reasoning and not is_toy)
    resolved, filled = fill_in(Case(options, has_bf16_gpu, ("reasoning", model) if reasons else (model,)))
    require_room_to_end(resolved)
    return resolved, filled


def run_config(model_id: str) -> dict[str, Any]:
    """The config.json of the run that left this folder (a checkpoint, final/ or an export); empty for any other model.

    An export's own has no paths of the machine, so beside its run the run's is taken. Its weights have all their bits.
    """
    folder = Path(model_id).resolve()
    own, beside = (_config_in(path) for path in (folder / RUN_CONFIG_NAME, folder.parent / CONFIG_NAME))
    if not folder.is_dir():
        return {}
    if "export" in own and own.get("run_id") == beside.get("run_id"):
        return beside | {"options": beside["options"] | {"load_in_4bit": False}}
    return own or beside


def _config_in(path: Path) -> dict[str, Any]:
    config = read_json(path) if path.is_file() else {}
    return config if isinstance(config.get("options"), dict) else {}


def run_options(model_id: str) -> dict[str, Any]:
    """The resolved flags of the run that left this folder; empty for any other model.

    A path that leads nowhere from the working directory is taken from the one in which the run was started.
    """
    config = run_config(model_id)
    options = dict(config.get("options", {}))
    for name in PATH_FLAGS if "directory" in config else ():
        value = options.get(name)
        if not isinstance(value, str) or (name == "data_root" and value.startswith(HUB)):
            continue
        if not Path(value if name == "data_root" else value.rpartition(":")[0]).exists():
            options[name] = as_seen_from(config["directory"], value)
    return options


def require_output(output: str | None, *, overwrite: bool) -> None:
    """Raises UsageError if the figures would replace others, or have no folder to go to."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"output={path} is a folder; name a file in it, such as {path / 'evaluation.json'}")
    if path.exists() and not overwrite:
        raise UsageError(f"output={path} exists; pass --overwrite to replace it, or another file")
    nearest = next(parent for parent in path.resolve().parents if parent.exists())
    if not nearest.is_dir() or not os.access(path if path.exists() else nearest, os.W_OK):
        raise UsageError(f"output={path} cannot be written under {nearest}; pass a file in a folder to write to")
