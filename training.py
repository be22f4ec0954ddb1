"""The command line: parse, check, build, train, save, report.

    accelerate launch training.py --fixed_correct_index 0

`main()` tells the story; each line of it is a function that can be imported. Importing this file starts nothing, and
torch is imported only once everything that can be checked without it is sound.
"""

import logging
import sys
from collections.abc import Sequence

from fleet.command import command_line
from fleet.command.image_check import images_of
from fleet.command.options import parse_options, resolve_options
from fleet.command.preflight import check_before_loading
from fleet.command.resume_check import require_same_run_on_resume, settle_resume

logger = logging.getLogger("fleet")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training from start to end. Raises UsageError, before any weight loads, for a run that cannot be."""
    command_line.set_up_logging()
    options = settle_resume(parse_options(sys.argv[1:] if argv is None else argv))
    findings, problem = command_line.result_or_problem(lambda: check_before_loading(options))
    command_line.keep_libraries_quiet()
    from fleet.run import build, launch_checks, model_setup, results

    model_setup.use_every_core()
    launch_checks.require_one_gpu_or_a_launcher()
    options, filled = resolve_options(options, has_bf16_gpu=model_setup.has_bfloat16())
    launch_checks.require_launchers_dtype(options)
    problem = problem or command_line.result_or_problem(lambda: require_same_run_on_resume(options))[1]
    logger.info(build.describe_run(options, filled), extra=command_line.COLOURED)
    problem = problem or model_setup.problem_of_models(options.model_id, revision=options.revision)
    problem = problem or model_setup.problem_of_prompts(options, findings)
    with build.watched(options) as watchdog:
        args = build.start_distributed(options, watchdog, problem)
        assert findings is not None, "a process that has found nothing has a problem, which start_distributed raises"
        watchdog.start_with("the comparison of images and the plan of evaluation")
        data = model_setup.agree_on_data(options, findings)
        model_setup.say_what_the_toy_has_not_seen(options, [image.path for image in images_of(data.env) or ()])
        build.require_last_episode(options, data)
        plan = build.plan_evaluation(options, data)
        if options.dry_run:
            logger.info("dry run: everything checked is sound; no weight was loaded")
            return
        watchdog.start_with("the making of the toy model, or the reading of a checkpoint")
        model_path = model_setup.local_model_path(options)
        options = build.name_output_dir(options, args)
        with build.held_output_dir(options, args) as lock:
            checkpoint = build.find_checkpoint(options, args, data)
            watchdog.start_with("the loading of the model")
            trainer = build.build_trainer(options, args, data.env, plan, model_path)
            build.take_output_dir(options, trainer, data, lock)
            watchdog.start_with("the preparation of training")
            trainer.on_activity = watchdog.beat
            with build.telling_how_to_go_on(options):
                build.train(options, trainer, checkpoint)
                results.save_results(options, trainer)
    logger.info(results.describe_results(options, trainer, data.env))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
