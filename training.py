"""The command line: parse, check, build, train, save, report.

    accelerate launch training.py --fixed_correct_index 0

`main()` tells the story in functions that can be imported. Importing this file starts nothing. torch is imported after
all checks that need none.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from fleet.command import command_line, dry_run
from fleet.command.options import Options, parse_options
from fleet.command.preflight import check_before_loading
from fleet.command.resume_check import resumes
from fleet.processes import known_to_all, result_or_problem

logger = logging.getLogger("fleet")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training from start to end. Raises UsageError, before any weight loads, for a run that is refused."""
    command_line.set_up_logging()
    options = known_to_all(lambda: parse_options(sys.argv[1:] if argv is None else argv))
    with dry_run.answered(is_wanted=options.json):
        run(replace(options, resume=resumes(options)))


def run(options: Options) -> None:
    """The training that these options ask for. Raises as `main`."""
    findings, problem = result_or_problem(lambda: check_before_loading(options))
    command_line.keep_libraries_quiet()
    from fleet.run import results, watchdog
    from fleet.run.build import prediction, training

    with watchdog.watched(options.step_timeout_s) as watch:
        prepared = training.prepare(options, findings, problem, watch)
        if options.dry_run:
            prediction.answer_dry_run(prepared.prediction, as_json=options.json)
            return
        prediction.say(prepared.prediction)
        with training.built(prepared, watch) as (trainer, checkpoint):
            training.train(trainer, checkpoint)
            results.save_results(trainer, options, merge_lora=options.merge_lora)
    logger.info(results.describe_results(trainer, options, prepared.data.env))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
