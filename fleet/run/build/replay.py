"""A logged group shown token by token, and drawn again where the weights that it was drawn with still exist.

    python evaluate.py --replay runs/look --step 51 --group 3

The draws of a run have names (fleet/qwen/draws.py), so the same weights say the same again, but for rounding. Owns this
view alone; evaluate.py calls it in place of an evaluation.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from fleet.command.evaluate_options import (
    parse_evaluate_options,
    resolve_evaluate_options,
    run_options,
)
from fleet.command.flags import AT_LEAST_0, AT_LEAST_1, ModelFlags, TaskFlags
from fleet.command.options import refuse_numbers
from fleet.command.parser import flag, make_parser, parse_flags, user_path
from fleet.errors import UsageError
from fleet.evaluation.held_out import runs_behind
from fleet.qwen.draws import named_uniforms
from fleet.qwen.observations import TURN_END
from fleet.qwen.sampling_pieces import sample_batch
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.tool_answers import TurnSettings, tool_answers
from fleet.qwen.tree_sampling import SamplingRequest
from fleet.rl.rollouts import GroupRecord, RolloutRecord
from fleet.run import model_setup
from fleet.run.records import rendered
from fleet.run_folder import CONFIG_NAME, ROLLOUTS_NAME, read_jsonl
from fleet.schedule import optimizer_steps_per_generation
from model_utils import answer_config, decode_completion, load_processor
from utils.plain_text import printable


# fmt: off
@dataclass(frozen=True)
class ReplayFlags:
    """The group to show."""

    replay: str | None = flag(None, "the folder of a run", "required", metavar="RUN", parse=user_path)
    step: int | None = flag(None, "the optimizer step that logged the group", "the last that is logged",
        bounds=(AT_LEAST_1,))
    group: int = flag(0, "the group's number in its step", bounds=(AT_LEAST_0,))
# fmt: on


@dataclass(frozen=True)
class Redrawn:
    """A group drawn again: G completions as token ids, and the log-probability of each token."""

    completion_ids: list[list[int]]
    logps: list[list[float]]


def build_replay_parser() -> argparse.ArgumentParser:
    """The parser of evaluate.py with --replay."""
    description = (
        "Show a group of rollouts that a run has logged token by token, and draw it again if its weights exist."
    )
    return make_parser("evaluate.py", description, {"replay": (ReplayFlags,)}, ReplayFlags)


def main(argv: Sequence[str]) -> None:
    """Prints a logged group. Raises UsageError if there is none, or it holds no tokens."""
    flags = ReplayFlags(**parse_flags(build_replay_parser(), argv))
    refuse_numbers(flags)
    run = Path(str(flags.replay))
    logged = logged_group(run, flags.step, flags.group)
    options = run_options(str(a_folder_of(run)))
    settings, _ = resolve_evaluate_options(
        parse_evaluate_options(["--model_id", str(a_folder_of(run))]), has_bf16_gpu=model_setup.has_bfloat16()
    )
    settings = replace(settings, dtype=options["dtype"])
    model_id, reason = model_before(run, options, logged.step)
    redrawn = None
    if model_id is not None:
        redrawn, reason = draw_again(replace(settings, model_id=model_id), settings, run, options, logged)
    path = model_setup.local_model_path(str(model_id or options["model_id"]), settings)
    processor = load_processor(model_setup.base_of(path))
    print(as_text(logged, processor.tokenizer, redrawn, reason))


def logged_group(run: Path, step: int | None, number: int) -> GroupRecord:
    """The group with this number of a logged step, the last one for None. Raises UsageError if it is not there."""
    path = run / ROLLOUTS_NAME
    if not (run / CONFIG_NAME).is_file() or not path.is_file():
        raise UsageError(f"replay={run} is no folder of a run that has logged rollouts; pass the --output_dir of one")
    try:
        groups = [GroupRecord.from_json(line) for line in read_jsonl(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore it") from error
    steps = sorted({group.step for group in groups})
    if not steps:
        raise UsageError(f"{path} is empty; replay a run that has taken a step")
    step = steps[-1] if step is None else step
    of_step = [group for group in groups if group.step == step]
    found = next((group for group in of_step if group.number == number), None)
    if not of_step:
        raise UsageError(f"step={step} is not logged in {path}, which has {len(steps)} from {steps[0]} to {steps[-1]}")
    if found is None:
        raise UsageError(
            f"group={number}, but step {step} has logged groups 0 to {len(of_step) - 1}; pass one of these"
        )
    if not all(rollout.token_ids for rollout in found.rollouts):
        raise UsageError(f"{path} is of an older Fleet and holds no tokens; only runs from now on can be replayed")
    return found


def a_folder_of(run: Path) -> Path:
    """A folder within a run's, by which its flags and episodes are found; there may be no model in it yet."""
    return next((path for path in sorted(run.iterdir()) if path.is_dir()), run)


def first_step_of_generation(options: dict[str, Any], step: int) -> int:
    """The optimizer steps that were taken before the generation that was logged at `step` was drawn."""
    accumulation = options["gradient_accumulation_steps"]
    per_generation = options["steps_per_generation"] or accumulation
    cycle = max(1, optimizer_steps_per_generation(per_generation, options["num_iterations"], accumulation))
    return (step - 1) // cycle * cycle


def model_before(run: Path, options: dict[str, Any], step: int) -> tuple[str | None, str]:
    """(the model that drew the generation of a step, ""), or None and the reason why it cannot be had."""
    if options.get("use_vllm") or not options.get("shared_prefix", True):
        return None, "vLLM or TRL drew it, whose draws have no names"
    start = first_step_of_generation(options, step)
    if start == 0:
        return str(options["model_id"]), ""
    checkpoint = run / f"checkpoint-{start}"
    if checkpoint.is_dir():
        return str(checkpoint), ""
    kept = ", ".join(sorted(path.name for path in run.glob("checkpoint-*"))) or "none"
    return None, f"the weights of step {start} are gone (checkpoints: {kept}); train with a smaller --save_steps"


def draw_again(
    model_flags: ModelFlags, task: TaskFlags, run: Path, options: dict[str, Any], logged: GroupRecord
) -> tuple[Redrawn | None, str]:
    """(the group drawn again, ""), or None and the reason why it cannot be.

    model_flags: of the model that drew it. options: the run's.
    """
    if logged.episode.episode_index is None:
        return None, "the run is of an older Fleet"
    runs = runs_behind(task, str(a_folder_of(run)))
    if not runs:
        return None, "the run's environment cannot be made any more"
    model, processor = model_setup.load_policy(model_flags, task)
    row = RepeatableEpisodeDataset(runs[0].env, options["image_max_pixels"])[logged.episode.episode_index]
    if row["broken"] is not None:
        return None, str(row["broken"])
    size = len(logged.rollouts)
    batch = VLMDataCollator(processor, size)([row] * size)
    rules = SamplingRules(
        answer_config(
            model,
            int(options["max_completion_length"]),
            options["temperature"],
            **{name: options[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
            min_completion_length=options["min_completion_length"],
        )
    )
    start, max_turns = first_step_of_generation(options, logged.step), int(options.get("max_turns", 1))
    turns = TurnSettings(
        max_turns,
        rules.max_tokens,
        options.get("max_context_length"),
        options["image_max_pixels"],
        options["allow_reasoning"],
    )
    request = SamplingRequest(
        rules,
        named_uniforms(options["seed"], start, batch["numbers"], size, max_turns * rules.max_tokens),
        [[list(ids) for rollout in logged.rollouts for ids in rollout.turn_ids]],
        padding_id=rules.config.pad_token_id,
        answers=tool_answers(
            runs[0].env, batch, model, processor, lambda ids: decode_completion(processor, ids, rules.end_ids), turns
        ),
        turn_end_id=processor.tokenizer.convert_tokens_to_ids(TURN_END),
    )
    on_device: Any = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    with torch.no_grad():
        (samples,) = sample_batch(model, on_device, None, request)
    return Redrawn(samples.completion_ids, samples.logps), ""


def as_text(logged: GroupRecord, tokenizer: Any, redrawn: Redrawn | None, reason: str) -> str:
    """The group for the terminal: a table a rollout, with what was drawn again beside what was logged."""
    episode = logged.episode
    lines = [f"step {logged.step}, group {logged.number}: {printable(episode.instruction)} Right: {episode.solution}"]
    for number, rollout in enumerate(logged.rollouts):
        verdict = rollout.verdict
        heading = (
            f"rollout {number}: {verdict.outcome}, reward {rollout.reward:.2f}, advantage {rollout.advantage:+.2f}"
        )
        again = None if redrawn is None else (redrawn.completion_ids[number], redrawn.logps[number])
        lines += ["", heading, rendered(_token_table(rollout, tokenizer, again), 100)]
    if redrawn is None:
        return "\n".join([*lines, "", f"not drawn again: {reason}"])
    same = sum(
        list(rollout.token_ids) == ids for rollout, ids in zip(logged.rollouts, redrawn.completion_ids, strict=True)
    )
    gaps = [
        abs(logp - again)
        for rollout, ids, logps in zip(logged.rollouts, redrawn.completion_ids, redrawn.logps, strict=True)
        for token, logp, other, again in zip(rollout.token_ids, rollout.logps, ids, logps, strict=False)
        if token == other
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"drawn again: {same} of {len(logged.rollouts)} rollouts token for token; log-probabilities at most "
            f"{max(gaps, default=math.nan):.1e} apart",
        ]
    )


def _token_table(rollout: RolloutRecord, tokenizer: Any, again: tuple[list[int], list[float]] | None) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None)
    table.add_column("place", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("probability", justify="right")
    if again is not None:
        table.add_column("drawn again", justify="right")
    logps = rollout.logps or (math.nan,) * len(rollout.token_ids)
    ends = itertools.accumulate(turn.num_tokens for turn in rollout.turns)
    answers = {end - 1: turn.answer for end, turn in zip(ends, rollout.turns, strict=True)}
    for place, (token, logp) in enumerate(zip(rollout.token_ids, logps, strict=True)):
        cells: list[str | Text] = [
            str(place),
            Text(repr(tokenizer.decode([token], skip_special_tokens=False))),
            _share(logp),
        ]
        if again is not None:
            ids, others = again
            is_there = place < len(ids)
            has_parted = is_there and ids[: place + 1] != list(rollout.token_ids[: place + 1])
            shown = _share(others[place]) if is_there else ""
            cells.append(f"{tokenizer.decode([ids[place]])!r} {shown}" if has_parted else shown)
        table.add_row(*cells)
        if (answer := answers.get(place)) is not None:
            table.add_row("", Text(printable(answer), style="italic"))
    return table


def _share(logp: float) -> str:
    return "unknown" if math.isnan(logp) else f"{math.exp(logp):.2%}"
