"""What an evaluation is asked: its own flags, what it takes over from the run that a model is from, and its checks.

The flags it shares with training are in flags.py. Imports no torch.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fleet.command.flags import (
    PATH_FLAGS,
    TOY_MODEL_ID,
    add_held_out_flags,
    add_model_flags,
    add_sampling_flags,
    add_switch,
    add_task_flags,
    as_flag_value,
    as_seen_from,
    make_parser,
    parse_flags,
    user_path,
)
from fleet.command.idle_flags import IDLE_IN_EVALUATION, refuse_idle
from fleet.command.options import (
    Options,
    ResolvedDefault,
    SharedOptions,
    fill_in,
    refuse_impossible_shared_numbers,
    require_numbers,
    resolve_shared,
)
from fleet.errors import UsageError
from fleet.model_folder.files import read_json

PROMPT_STYLES = ("direct", "reasoning")


@dataclass(frozen=True)
class EvaluateOptions(SharedOptions):
    """An evaluation as asked for."""

    baseline: str | None
    prompt_style: str | None
    num_samples: int
    pass_k: str | None
    per_device_batch_size: int | None
    output: str | None
    overwrite: bool

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of each pass@k."""
        if self.pass_k is None:
            return tuple(sorted({k for k in (1, 2, self.num_samples) if 1 <= k <= self.num_samples}))
        return tuple(int(k) for k in self.pass_k.split(","))


def build_evaluate_parser() -> argparse.ArgumentParser:
    """The parser of evaluate.py."""
    parser = make_parser(
        "evaluate.py",
        "Score a Qwen2.5-VL, a checkpoint or an adapter on held-out episodes, with intervals and controls. For a model "
        "that a run of training.py left, flags that are not given are the run's own. A flag that would do nothing "
        "beside the others is refused.",
    )
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_task_flags(parser.add_argument_group("task").add_argument)
    add_sampling_flags(parser.add_argument_group("generation").add_argument)
    add = parser.add_argument_group("evaluation").add_argument
    add_held_out_flags(add, 512, 2 * 10**9)
    add(
        "--baseline",
        type=user_path,
        metavar="ID",
        help="another model, scored on the same episodes and compared (default: none)",
    )
    add(
        "--prompt_style",
        choices=PROMPT_STYLES,
        help="compare prompts under one parser, which then accepts text before the call for both (default: the prompt "
        "and parser of --allow_reasoning)",
    )
    add("--num_samples", type=int, default=4, metavar="N", help="samples per episode, 0 for none (default: 4)")
    add("--pass_k", metavar="K,...", help="each k of pass@k (default: 1, 2 and num_samples)")
    add(
        "--per_device_batch_size",
        type=int,
        metavar="N",
        help="episodes that a device answers at a time, each with its samples (default: 128 for the toy, else 4)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    add("--output", type=user_path, metavar="FILE", help="where the figures go as JSON (default: nowhere)")
    add_switch(add, "--overwrite", False, "replace an output file that exists")
    return parser


def parse_evaluate_options(argv: Sequence[str], launch_variables: Mapping[str, str] = os.environ) -> EvaluateOptions:
    """The options of a command line. Raises UsageError for flags or numbers that cannot be, or would do nothing.

    For a model in a run's folder, the task, the prompt and the sampling are the run's unless they are given.
    """
    parser = build_evaluate_parser()
    given = parse_flags(parser, argv).values
    not_inherited = {"model_id", "revision", "dtype", "eval_episodes", "eval_seed", "seed"}
    if given["prompt_style"] is not None:
        # a run of bare calls leaves no room to reason
        not_inherited.add("max_completion_length")
    inherited = {field.name for field in fields(SharedOptions)} - not_inherited
    own_flags = [
        f"--{name}={as_flag_value(value)}"
        for name, value in run_options(given["model_id"]).items()
        if name in inherited and (value is not None or name == "fixed_correct_index")
    ]
    flags = parse_flags(parser, argv, own_flags)
    options = EvaluateOptions(**flags.values)
    refuse_impossible_shared_numbers(options)
    _refuse_impossible_numbers(options)
    refuse_idle(IDLE_IN_EVALUATION, options, flags.given, launch_variables)
    for name, model in (("model_id", options.model_id), ("baseline", options.baseline)):
        if model is not None and run_options(model).get("seed") == options.eval_seed:
            raise UsageError(
                f"eval_seed={options.eval_seed} is the seed that {name}={model} was trained with, so it would be "
                "scored on its own training episodes; pass another --eval_seed"
            )
    return options


def resolve_evaluate_options(
    options: EvaluateOptions, *, has_bf16_gpu: bool
) -> tuple[EvaluateOptions, list[ResolvedDefault]]:
    """The options with every case-dependent default filled in, and what was filled in why."""
    is_toy = TOY_MODEL_ID in (options.model_id, run_options(options.model_id).get("model_id"))
    size = (128, "the toy is small") if is_toy else (4, "20 rows of a real model with 4 samples each")
    defaults = resolve_shared(options, has_bf16_gpu=has_bf16_gpu) | {"per_device_batch_size": size}
    if options.prompt_style is not None:
        defaults["max_completion_length"] = (512, "room to reason, for either prompt")
    return fill_in(options, defaults)


def run_config(model_id: str) -> dict[str, Any]:
    """What the run that left this folder (a checkpoint or final/) wrote of itself; empty for any other model."""
    folder = Path(model_id).resolve()
    for path in (folder / "run_config.json", folder.parent / "config.json"):
        if folder.is_dir() and path.is_file():
            config = read_json(path)
            if isinstance(config.get("options"), dict):
                return config
    return {}


def run_options(model_id: str) -> dict[str, Any]:
    """The resolved flags of the run that left this folder; empty for any other model.

    A path that leads nowhere from the folder we are in is taken from the one in which the run was started.
    """
    known = {field.name for field in fields(Options)}
    config = run_config(model_id)
    options = {name: value for name, value in config.get("options", {}).items() if name in known}
    for name in PATH_FLAGS:
        path = options.get(name)
        if isinstance(path, str) and "directory" in config and not Path(_without_name(name, path)).exists():
            options[name] = as_seen_from(config["directory"], path)
    return options


def _without_name(flag: str, path: str) -> str:
    return path if flag == "data_root" else path.rpartition(":")[0]


def require_output(options: EvaluateOptions) -> None:
    """Raises UsageError if the figures could not be written, or would replace others, once all is measured."""
    if options.output is None:
        return
    path = Path(options.output)
    if path.is_dir():
        raise UsageError(f"output={path} is a folder; name a file in it, such as {path / 'evaluation.json'}")
    if path.exists() and not options.overwrite:
        raise UsageError(f"output={path} exists; pass --overwrite to replace it, or another file")
    nearest = next(parent for parent in path.resolve().parents if parent.exists())
    if not nearest.is_dir() or not os.access(path if path.exists() else nearest, os.W_OK):
        raise UsageError(f"output={path} cannot be written under {nearest}; pass a file in a folder to write to")


def _refuse_impossible_numbers(options: EvaluateOptions) -> None:
    require_numbers(options, ("per_device_batch_size",), "at least 1", lambda value: value >= 1)
    require_numbers(options, ("num_samples", "seed"), "at least 0", lambda value: value >= 0)
    words = [] if options.pass_k is None else options.pass_k.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"pass_k={options.pass_k!r}, but wanted whole numbers with commas between; pass --pass_k 1,8")
    for k in options.ks:
        if not 1 <= k <= options.num_samples:
            raise UsageError(
                f"pass_k={k}, but with num_samples={options.num_samples} k is from 1 to {options.num_samples}; draw "
                f"more samples (--num_samples {max(k, 1)}) or lower --pass_k"
            )
