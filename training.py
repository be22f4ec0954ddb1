"""The command line: parse, check, build, train, save.

    accelerate launch training.py --fixed_correct_index 0

`main()` tells the story; each line of it is a function that can be imported. Importing this file starts nothing, and
torch is imported only once everything that can be checked without it is sound.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from flags import UsageError
from options import Options, parse_options, resolve_options
from preflight import check_before_loading, require_same_flags_on_resume

logger = logging.getLogger("fleet")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training from start to end. Raises UsageError, before any weight loads, for a run that cannot be."""
    set_up_logging()
    options = parse_options(sys.argv[1:] if argv is None else argv)
    env, problem = check_or_explain(options)
    keep_libraries_quiet()
    import run_setup

    run_setup.require_one_gpu_or_a_launcher()
    options, filled = resolve_options(options, has_bf16_gpu=run_setup.has_bfloat16())
    run_setup.require_launchers_dtype(options)
    require_same_flags_on_resume(options)
    logger.info(run_setup.describe_run(options, filled))
    if options.dry_run and problem is None:
        logger.info("dry run: everything checked is sound; no weight was loaded")
        return
    model_path = run_setup.local_model_path(options)
    options, args = run_setup.start_distributed(options, problem)
    trainer = run_setup.build_trainer(options, args, env, model_path)
    run_setup.take_output_dir(options, args)
    trainer.train(resume_from_checkpoint=options.resume or None)
    run_setup.save_results(options, trainer)
    logger.info(run_setup.describe_results(options, trainer))


def check_or_explain(options: Options) -> tuple[Any, str | None]:
    """(environment, None), or (None, what is wrong): with several processes the others must hear of it first."""
    try:
        return check_before_loading(options), None
    except UsageError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return None, str(error)


def set_up_logging() -> None:
    """Sends the logger's words to the terminal, from the main process only."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_main else logging.ERROR, force=True)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)


def keep_libraries_quiet() -> None:
    """Turns off telemetry and the libraries' chatter; must run before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("accelerate", "datasets", "httpx", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def run_command_line() -> int:
    """Runs main; returns the exit code: 0, or 2 with the reason in one line for a run that cannot be."""
    try:
        main()
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command_line())
