"""The second command line: score a model, a checkpoint or an adapter on held-out episodes.

    python evaluate.py --model_id runs/look/final --baseline toy --output evaluation.json
    python evaluate.py --replay runs/look --step 51 --group 3

Alone or under accelerate launch, DeepSpeed ZeRO-3 included. docs/evaluation.schema.json describes the output, and
fleet/evaluation draws the episodes and the figures. Importing this file starts nothing.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.command import command_line
from fleet.command.evaluate_options import parse_evaluate_options
from fleet.command.preflight import check_evaluation as check_before_loading
from fleet.evaluation.held_out import TASK, runs_behind
from fleet.processes import result_or_problem
from fleet.run_folder import write_atomically

__all__ = ["TASK", "check_before_loading", "main", "runs_behind", "write_document"]

logger = logging.getLogger("fleet")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one evaluation from start to end. Raises UsageError, before any weight loads, for one that is refused."""
    command_line.set_up_logging()
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--replay" for word in argv):
        command_line.keep_libraries_quiet()
        from fleet.run.build import replay

        replay.main(argv)
        return
    options = parse_evaluate_options(argv)
    findings, problem = result_or_problem(lambda: check_before_loading(options))
    command_line.keep_libraries_quiet()
    from fleet.run.build import evaluation

    run = evaluation.prepare(options, findings, problem)
    scored = evaluation.score_all(run)
    if run.accelerator.is_main_process:
        logger.info(evaluation.table(scored.document), extra=command_line.COLOURED)
        write_document(scored.document, options.output)


def __getattr__(name: str) -> Any:
    """`plan_evaluation`, which lies behind the import of torch."""
    if name != "plan_evaluation":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from fleet.run.build.evaluation import plan_evaluation

    return plan_evaluation


def write_document(document: dict[str, Any], output: str | None) -> None:
    """Writes the figures as JSON, whole or not at all."""
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document, indent=2) + "\n")
        logger.info(f"figures in {path}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
