"""The run as asked for: flags and YAML become one checked, resolved Options.

Owns the values that exclude each other; flags.py and training_flags.py declare the flags.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fleet.command.flags import TOY_MODEL_ID, Case, HeldOutFlags, ModelFlags, SamplingFlags, TaskFlags
from fleet.command.idle_flags import IDLE_IN_TRAINING, refuse_idle
from fleet.command.parser import flag_of, make_parser, parse_flags
from fleet.command.training_flags import (
    EvaluationFlags,
    GenerationFlags,
    RewardFlags,
    RLOOFlags,
    RunFlags,
    TrainedPartFlags,
)
from fleet.errors import UsageError, refused
from fleet.model_folder.parts import PARTS
from reward import RewardWeights


@dataclass(frozen=True)
class Options(
    RunFlags, EvaluationFlags, GenerationFlags, RLOOFlags, RewardFlags, TrainedPartFlags,
    SamplingFlags, HeldOutFlags, ModelFlags,
):  # fmt: skip
    """A training run as asked for. None stands for a default that is filled in, or for "no limit"."""


GROUPS = {
    "model": (ModelFlags,),
    "what trains": (TrainedPartFlags,),
    "task": (TaskFlags,),
    "RLOO (names as in TRL's RLOOConfig)": (RewardFlags, RLOOFlags),
    "generation": (SamplingFlags, GenerationFlags),
    "held-out evaluation": (EvaluationFlags, HeldOutFlags),
    "run": (RunFlags,),
}
# flags that name a file or a folder of the user's own
PATH_FLAGS = tuple(field.name for field in fields(Options) if flag_of(field).is_file)
# with any other flag changed, a resumed run would be another run
MAY_CHANGE_ON_RESUME = frozenset(field.name for field in fields(Options) if flag_of(field).may_change)


@dataclass(frozen=True)
class ResolvedDefault:
    """A default that depended on the case, with the reason, for the start of the log."""

    flag: str
    value: Any
    reason: str


def build_parser() -> argparse.ArgumentParser:
    """The parser of training.py."""
    description = (
        "Train a Qwen2.5-VL model by RLOO (REINFORCE leave-one-out) to pick an image by one tool call. A flag that "
        "would do nothing beside the others is refused."
    )
    return make_parser("training.py", description, GROUPS, Options)


def parse_options(argv: Sequence[str], launch_variables: Mapping[str, str] = os.environ) -> Options:
    """The options of a command line, `--config` file included; flags on the command line win over the file.

    launch_variables: the launcher's part of the process environment. Raises UsageError for an unknown flag or key
    (naming the nearest), an invalid value, a flag that would do nothing, or a bad config file. `--help` prints and
    exits.
    """
    given = parse_flags(build_parser(), argv)
    options = Options(**given)
    refuse_contradictions(options)
    refuse_idle(IDLE_IN_TRAINING, options, given, launch_variables)
    return options


def own_code(options: Any) -> dict[str, str]:
    """The specs `path/to/file.py:name` that are given, by their flag."""
    return {name: spec for name in PATH_FLAGS if name != "data_root" and (spec := getattr(options, name)) is not None}


def starts_sighted(model_id: str, task: TaskFlags) -> bool:
    """True if this task takes the sighted toy: sight helps only where pictures are asked for by name."""
    return model_id == TOY_MODEL_ID and task.env is None and task.fixed_correct_index is None


def fill_in(case: Case) -> tuple[Any, list[ResolvedDefault]]:
    """The case's options with its defaults where nothing was given, and these."""
    filled = []
    for declared in fields(case.options):
        default_of = flag_of(declared).default_of
        if getattr(case.options, declared.name) is None and default_of is not None:
            filled.append(ResolvedDefault(declared.name, *default_of(case)))
    return replace(case.options, **{default.flag: default.value for default in filled}), filled


def resolve_options(options: Options, *, has_bf16_gpu: bool) -> tuple[Options, list[ResolvedDefault]]:
    """The options with all defaults filled in, and these. has_bf16_gpu: a GPU that computes in bfloat16 trains.

    Raises UsageError if no completion could end within the length that is filled in.
    """
    models: tuple[str, ...] = ("reasoning", "real") if options.allow_reasoning else ("real",)
    if options.model_id == TOY_MODEL_ID:
        models = ("look", "toy") if starts_sighted(options.model_id, options) else ("toy",)
        models = ("own", "toy") if options.env is not None else models
    resolved, filled = fill_in(Case(options, has_bf16_gpu, models))
    require_room_to_end(resolved)
    return resolved, filled


def refuse_numbers(options: Any) -> None:
    """Raises UsageError if a flag has a number that is not finite or beyond its bounds. options: of any command."""
    for declared in fields(options):
        value = getattr(options, declared.name)
        for bound in flag_of(declared).bounds if value is not None else ():
            if (isinstance(value, float) and not math.isfinite(value)) or not bound.holds(value):
                raise UsageError(
                    f"{declared.name}={str(value)[:40]}, but it must be {bound.words}; correct --{declared.name}"
                )


def require_room_to_end(flags: SamplingFlags) -> None:
    """Raises UsageError if no completion could end within its greatest length."""
    shortest, longest = flags.min_completion_length, flags.max_completion_length
    if longest is not None and shortest >= longest:
        raise UsageError(
            f"min_completion_length={shortest} is not below max_completion_length={longest}, so no completion could "
            "end; lower one or raise the other"
        )


def refuse_contradictions(options: Options) -> None:
    """Raises UsageError for numbers beyond their bounds, and for values that exclude each other."""
    refuse_numbers(options)
    require_room_to_end(options)
    with refused(ValueError, before="reward_correct, reward_valid_call: "):
        RewardWeights(options.reward_correct, options.reward_valid_call)
    accumulation, per_generation = options.gradient_accumulation_steps, options.steps_per_generation
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_completion_length": 0}
    reshaped = next((name for name, value in neutral.items() if getattr(options, name) != value), None)
    # fmt: off
    contradictions = (
        (options.num_rollouts < 2,
         f"num_rollouts={options.num_rollouts}, but leave-one-out needs at least 2 rollouts per episode; pass "
         "--num_rollouts 4"),
        (options.reward is not None and options.reward_timeout_s >= options.step_timeout_s,
         f"reward_timeout_s={options.reward_timeout_s:g} is not below step_timeout_s={options.step_timeout_s:g}, which "
         "would end the run first; lower one or raise the other"),
        (per_generation and per_generation % accumulation,
         f"steps_per_generation={per_generation} is not a multiple of gradient_accumulation_steps={accumulation}, so a "
         "step would mix two generations; make it one"),
        (len(options.frozen_parts) == len(PARTS) and not options.use_lora,
         f"freeze={options.freeze} leaves nothing to train; name fewer parts, or pass --use_lora true in its place"),
        (options.load_in_4bit and not options.use_lora,
         "load_in_4bit=true, but 4-bit weights do not train themselves; add --use_lora true"),
        ((options.eval_steps or options.control_steps) and options.eval_seed == options.seed,
         f"eval_seed={options.eval_seed} is the run's own seed, so it would be evaluated on its training episodes; "
         "pass another --eval_seed"),
        (options.resume and options.overwrite,
         "resume and overwrite are both given, but one keeps the run and one deletes it; drop one"),
        (options.resume and options.output_dir is None,
         "resume is given without output_dir; pass --output_dir with the run to continue"),
        (options.use_vllm and reshaped,
         f"use_vllm=true with {reshaped}: vLLM's log-probabilities are compared with the trainer's, and the comparison "
         "knows temperature and top_p alone; drop one of the two"),
        (options.max_turns > 1 and (options.use_vllm or not options.shared_prefix),
         f"max_turns={options.max_turns}, but tools answer in Fleet's own sampling alone, behind a shared prompt; drop "
         "--use_vllm and --shared_prefix false"),
        (options.max_turns > 1 and options.attn_implementation == "flash_attention_2",
         f"max_turns={options.max_turns}, but flash_attention_2 takes no mask that keeps branches apart; pass "
         "--attn_implementation sdpa"),
        (options.keep_best and options.save_total_limit == 1,
         "keep_best=true with save_total_limit=1 would leave no place for the newest checkpoint; pass "
         "--save_total_limit 2"),
    )
    # fmt: on
    for contradicts, message in contradictions:
        if contradicts:
            raise UsageError(message)
    cycle = options.optimizer_steps_per_generation
    for flag, value in (("eval_steps", options.eval_steps), ("train_steps", options.train_steps)):
        if options.keep_best and value is not None and value % cycle:
            raise UsageError(
                f"keep_best=true, but {flag}={value} is not a multiple of the {cycle} optimizer steps that a "
                "generation serves, between which nothing is saved; make it one"
            )
