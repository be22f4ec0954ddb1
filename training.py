"""The command line: parse, check, build, train, save, report.

    accelerate launch training.py --fixed_correct_index 0

`main()` tells the story in functions that can be imported. Importing this file starts nothing. torch is imported after
all checks that need none.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from fleet.command import command_line
from fleet.command.options import parse_options
from fleet.command.preflight import check_before_loading
from fleet.command.resume_check import resumes
from fleet.processes import result_or_problem

logger = logging.getLogger("fleet")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training from start to end. Raises UsageError, before any weight loads, for a run that is refused."""
    command_line.set_up_logging()
    options = parse_options(sys.argv[1:] if argv is None else argv)
    options = replace(options, resume=resumes(options))
    findings, problem = result_or_problem(lambda: check_before_loading(options))
    command_line.keep_libraries_quiet()
    from fleet.run import results, watchdog
    from fleet.run.build import training

    with watchdog.watched(options.step_timeout_s) as watch:
        run = training.prepare(options, findings, problem, watch)
        if options.dry_run:
            logger.info("dry run: everything checked is sound; no weight was loaded")
            return
        with training.built(run, watch) as (trainer, checkpoint):
            training.train(trainer, checkpoint)
            results.save_results(trainer, options, merge_lora=options.merge_lora)
    logger.info(results.describe_results(trainer, options, run.data.env))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
