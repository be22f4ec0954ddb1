"""What every command of Fleet does around its work: one logger, quiet libraries, errors in a line, exit codes."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from flags import RunStopped, UsageError

Result = TypeVar("Result")


def run(main: Callable[[], None]) -> int:
    """Runs a command; returns the exit code: 0, or with the reason in one line 2 for what cannot be, 1 for a run that
    had to stop."""
    try:
        main()
    except (UsageError, RunStopped) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def result_or_problem(check: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(what the check found, None), or (None, what is wrong).

    Started alone, a process raises UsageError itself; one of several must let the others hear of it first.
    """
    try:
        return check(), None
    except UsageError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return None, str(error)


def set_up_logging() -> None:
    """Sends the logger's words to the terminal, from the main process only."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_main else logging.ERROR, force=True)
    logging.getLogger("fleet").setLevel(logging.INFO if is_main else logging.ERROR)


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
