"""The second command line: score a model, a checkpoint or an adapter on held-out episodes, honestly.

    python evaluate.py --model_id runs/look/final --baseline toy --output evaluation.json

Alone or under accelerate launch, DeepSpeed ZeRO-3 included. docs/evaluation.schema.json describes what it writes.
How answers become figures is in fleet/evaluation/figures.py, what is held out in held_out.py there. Importing this file
starts nothing.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import EpisodeSource
from fleet.command import command_line
from fleet.command.evaluate_options import (
    EvaluateOptions,
    parse_evaluate_options,
    require_output,
    resolve_evaluate_options,
    run_config,
    run_options,
)
from fleet.command.image_check import Findings, RunData, find_bad_images, images_of
from fleet.command.preflight import (
    make_environment,
    require_consistent_launch,
    require_model,
    require_packages,
    try_own_environment,
)
from fleet.errors import UsageError
from fleet.evaluation.figures import EvaluationPlan, with_baseline
from fleet.evaluation.held_out import make_plan

logger = logging.getLogger("fleet")

TASK = ("data_root", "env", "candidates_per_episode", "fixed_correct_index")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one evaluation from start to end. Raises UsageError, before any weight loads, for one that cannot be."""
    command_line.set_up_logging()
    options = parse_evaluate_options(sys.argv[1:] if argv is None else argv)
    findings, problem = command_line.result_or_problem(lambda: check_before_loading(options))
    command_line.keep_libraries_quiet()
    from fleet.run import model_setup, scoring

    options, filled = resolve_evaluate_options(options, has_bf16_gpu=model_setup.has_bfloat16())
    models = [model for model in (options.model_id, options.baseline) if model is not None]
    problem = problem or model_setup.problem_of_models(*models, revision=options.revision)
    problem = problem or model_setup.problem_of_prompts(options, findings)
    accelerator = scoring.start(options, problem)
    assert findings is not None, "a process that has found nothing has a problem, which start() raises"
    data = model_setup.agree_on_data(options, findings)
    plan, problem = command_line.result_or_problem(lambda: plan_evaluation(options, data))
    model_setup.require_agreement(options, problem)
    assert plan is not None, "a process without a plan has a problem, which require_agreement() raises"
    logger.info(scoring.describe(options, plan, filled), extra=command_line.COLOURED)
    model_setup.say_what_the_toy_has_not_seen(options, [image.path for image in images_of(data.env) or ()])
    evaluation = scoring.score(options, plan, options.model_id, accelerator)
    if options.baseline is not None:
        evaluation = with_baseline(evaluation, scoring.score(options, plan, options.baseline, accelerator))
    if accelerator.is_main_process:
        logger.info(scoring.table(evaluation.document), extra=command_line.COLOURED)
        write_document(evaluation.document, options.output)


def check_before_loading(options: EvaluateOptions) -> Findings:
    """The environment and this process's share of its images, once all else that needs no weight is sound.

    Raises UsageError; for bad images only where one process evaluates.
    """
    require_packages(options)
    require_consistent_launch(os.environ)
    require_model(options.model_id)
    if options.baseline is not None:
        require_model(options.baseline, "baseline")
    require_output(options)
    findings = find_bad_images(make_environment(options, seed=options.eval_seed), options, os.environ)
    return replace(findings, episode_digests=try_own_environment(options, findings.env, options.eval_seed))


def plan_evaluation(options: EvaluateOptions, data: RunData) -> EvaluationPlan:
    """What is to be measured, on episodes that no run behind the models has drawn. Raises UsageError."""
    models = [model for model in (options.model_id, options.baseline) if model is not None]
    return make_plan(
        options,
        [run for model in models for run in runs_behind(options, model)],
        skipped_images=data.skipped_images,
        num_samples=options.num_samples,
        ks=options.ks,
        prompt_style=options.prompt_style,
    )


def runs_behind(options: EvaluateOptions, model_id: str) -> list[tuple[EpisodeSource, int]]:
    """The environment of the run that left this model, and how many episodes it drew; of those before it likewise."""
    runs, folders = [], set()
    while (config := run_config(model_id)) and Path(model_id).resolve() not in folders:
        folders.add(Path(model_id).resolve())
        run = run_options(model_id)
        try:
            num_episodes = int(config["num_episodes"])
            env = make_environment(
                replace(options, **{name: run[name] for name in TASK}),
                seed=run["seed"],
                skipped_images=config.get("skipped_images", ()),
            )
        except (KeyError, UsageError) as error:
            logger.info(f"what the run of {model_id} trained on is not known, and not passed over: {error}")
        else:
            runs.append((env, num_episodes))
        model_id = str(run.get("model_id"))
    return runs


def write_document(document: dict[str, Any], output: str | None) -> None:
    """Writes the figures as JSON, whole or not at all."""
    if output is None:
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    logger.info(f"figures in {path}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
