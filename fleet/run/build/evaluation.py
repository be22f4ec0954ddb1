"""A checked evaluation becomes answers and a table: loads each model, alone or sharded, and scores it."""

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState
from rich.table import Table
from rich.text import Text
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import unwrap_model_for_generation

from fleet.command.command_line import COLOURED
from fleet.command.evaluate_options import EvaluateOptions, resolve_evaluate_options
from fleet.command.image_check import Findings, RunData, images_of
from fleet.command.options import ResolvedDefault
from fleet.controls import CONTROL_MEANINGS, NO_SUCH_CONTROL
from fleet.evaluation.answering import AnswerSettings, ModelPolicy, sound_part
from fleet.evaluation.figures import Evaluation, EvaluationPlan, evaluate, offered_controls, percent_at, with_baseline
from fleet.evaluation.held_out import make_plan, runs_behind
from fleet.processes import (
    first_problem,
    gather_by_rank,
    most_of_ranks,
    raise_first,
    require_same_flags,
    together,
)
from fleet.progress import count_progress
from fleet.run import model_setup
from fleet.run.data import agree_on_data, require_encodable_prompts
from fleet.run.records import rendered, resolved_table
from utils.plain_text import printable

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that has passed all checks that need no weight, the same on every process."""

    options: EvaluateOptions
    accelerator: Accelerator
    plan: EvaluationPlan


def prepare(options: EvaluateOptions, findings: Findings | None, problem: str | None) -> PreparedEvaluation:
    """Resolves the options, and has all processes agree on the evaluation. Writes nothing.

    findings, problem: of this process's checks. Raises UsageError on all processes if any has a problem.
    """
    options, filled = resolve_evaluate_options(options, has_bf16_gpu=model_setup.has_bfloat16())
    problem = first_problem(
        problem,
        lambda: model_setup.require_loadable_models(*options.models, revision=options.revision),
        lambda: require_encodable_prompts(options, findings, options.model_id),
    )
    model_setup.use_every_core()
    # as TrainingArguments does it: an Accelerator that is told to use the CPU would pass over DeepSpeed
    PartialState(cpu=not model_setup.has_gpu())
    accelerator = Accelerator()
    raise_first(gather_by_rank(problem))
    require_same_flags(asdict(options))
    data = agree_on_data(options, findings)
    plan = together(lambda: plan_evaluation(options, data))
    logger.info(describe(options.model_id, plan, filled), extra=COLOURED)
    paths = [image.path for image in images_of(data.env) or ()]
    model_setup.say_what_the_toy_has_not_seen(options.model_id, options, paths)
    return PreparedEvaluation(options, accelerator, plan)


def plan_evaluation(options: EvaluateOptions, data: RunData) -> EvaluationPlan:
    """The evaluation of these flags, on episodes that no run behind the models draws. Raises UsageError."""
    return make_plan(
        options,
        [run for model in options.models for run in runs_behind(options, model)],
        skipped_images=data.skipped_images,
        num_samples=options.num_samples,
        ks=options.ks,
        prompt_style=options.prompt_style,
    )


def describe(model_id: str, plan: EvaluationPlan, filled: Sequence[ResolvedDefault]) -> str:
    """The start of the log: the measurement, and the defaults that were chosen for it."""
    passed_over = f", {plan.num_passed_over} like the run's own passed over" if plan.num_passed_over else ""
    return (
        f"Fleet: {printable(model_id)} on {len(plan.episodes)} held-out episodes of seed {plan.seed}{passed_over}; "
        f"a greedy answer, {plan.num_samples} samples and {len(offered_controls(plan))} controls each\n\n"
        f"{resolved_table(filled)}"
    )


def score_all(run: PreparedEvaluation) -> Evaluation:
    """The evaluation of the model, with that of the baseline beside it if there is one."""
    evaluation = score(run, run.options.model_id)
    if run.options.baseline is None:
        return evaluation
    return with_baseline(evaluation, score(run, run.options.baseline))


def score(run: PreparedEvaluation, model_id: str) -> Evaluation:
    """The evaluation of one model, which is loaded for it and let go. Every process takes part.

    Raises UsageError if an image has gone bad: models are compared on the same episodes, so all must be shown.
    """
    options, plan, accelerator = replace(run.options, model_id=model_id), run.plan, run.accelerator
    place = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    sound_part(plan, **place, skips_bad_images=False)
    model, processor = model_setup.load_model(options, model_setup.local_model_path(model_id, options))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        wrapped = accelerator.prepare(model)
    else:
        # 4-bit weights are where they belong since they were loaded
        wrapped = model if options.load_in_4bit else model.to(accelerator.device)
    wrapped.eval()
    settings = AnswerSettings(
        episodes_per_batch=int(options.per_device_batch_size or 0),
        max_completion_length=int(options.max_completion_length or 0),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        min_completion_length=options.min_completion_length,
        max_pixels=options.image_max_pixels,
        allow_reasoning=plan.allow_reasoning,
        max_turns=options.max_turns,
        max_context=options.max_context_length,
        seed=options.seed,
    )
    num_rows = len(plan.episodes) * (1 + plan.num_samples + len(offered_controls(plan)))
    with (
        unwrap_model_for_generation(
            wrapped, accelerator, gather_deepspeed3_params=options.ds3_gather_for_generation
        ) as policy_model,
        count_progress(f"scoring {model_id}", num_rows, "answer", is_shown=accelerator.is_main_process) as note_answers,
    ):
        # ranks that hold shards must make the same passes
        is_sharded = is_deepspeed_zero3_enabled()
        policy = ModelPolicy(
            policy_model,
            processor,
            settings,
            env=plan.env,
            **place,
            on_progress=note_answers,
            most_of_ranks=partial(most_of_ranks, accelerator) if is_sharded else lambda count: count,
        )
        start_s = time.perf_counter()
        evaluation = evaluate(policy, plan, model_id)
    logger.info(f"{model_id}: scored in {time.perf_counter() - start_s:.0f} s")
    del model, wrapped, policy, policy_model
    # it holds what it prepared
    accelerator.free_memory()
    gc.collect()
    return evaluation


def table(document: dict[str, Any]) -> str:
    """The figures as a table for the terminal, a column a model, and their paired difference below."""
    baseline = document["baseline"]
    columns = [document] if baseline is None else [baseline, document]
    shown = Table("", show_edge=False, pad_edge=False)
    for column in columns:
        shown.add_column(Text(printable(column["model"])), justify="right", overflow="fold")
    shown.add_column("")
    for name, meaning, keys in _rows(columns):
        # names of outcomes and choices are the environment's: as Text, none of them is markup
        figures = (percent_at(column, *keys) for column in columns)
        shown.add_row(Text(printable(name)), *figures, Text(printable(meaning)))
    if baseline is None:
        return rendered(shown, 120)
    gain = baseline["difference"]
    low, high = gain["ci95"]
    points = f"{100 * gain['value']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    return rendered(shown, 120) + (
        f"\n{printable(document['model'])} is right {points} oftener than {printable(baseline['model'])} "
        f"on the same {gain['n']} episodes; alone right on {gain['only_model_right']} and "
        f"{gain['only_baseline_right']} (McNemar's exact p = {gain['p_value']:.2g})\n"
    )


def _rows(columns: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, meaning, keys in a document) of each figure."""
    first = columns[0]
    yield "greedy accuracy", "", ("greedy_accuracy",)
    if first["sampled_accuracy"] is not None:
        yield "sampled accuracy", f"{first['num_samples']} samples an episode", ("sampled_accuracy",)
    for k in first["pass_at_k"]:
        yield f"pass@{k}", "", ("pass_at_k", k)
    yield "chance", "" if first["chance"] else "the environment does not say", ("chance",)
    if first["choices"]:
        yield "best constant choice", f"always {first['best_constant_choice']['choice']}", ("best_constant_choice",)
    for control, meaning in CONTROL_MEANINGS.items():
        said = meaning if first["controls"][control] else NO_SUCH_CONTROL
        yield control.replace("_", " "), said, ("controls", control)
    for family in ("outcome", "parse_status"):
        for name in first[family]:
            if any(column[family][name]["value"] for column in columns):
                yield f"{family.replace('_', ' ')}: {name}", "", (family, name)
    for choice in first["accuracy_by_choice"] or ():
        yield f"right where {choice} is", "", ("accuracy_by_choice", choice)
