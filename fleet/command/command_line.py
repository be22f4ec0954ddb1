"""The frame of every command: one logger, quiet libraries, errors in a line, exit codes."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from fleet.errors import AgreedUsageError, RunEnded, UsageError, one_line
from fleet.processes import is_alone
from utils.plain_text import printable, printable_lines

COLOURED = {"is_coloured": True}


def run(main: Callable[[], None]) -> int:
    """Runs a command; returns the exit code, and says the reason in one line where it is not 0.

    2: refused. 1: failed. 75: told to stop, and saved. Of several processes a failed one ends at once: the
    interpreter's own end would wait for the others.
    """
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except UsageError as error:
        # before the processes know of each other, all raise the same, or hear of it as they agree
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {printable(error)}", file=sys.stderr)
        elif not isinstance(error, AgreedUsageError) and _knows_other_processes():
            print(f"error: process {rank}: {printable(error)}", file=sys.stderr)
        code = 2
    except RunEnded as error:
        if rank == "0" or not error.is_of_all:
            # below the progress bar
            notes = getattr(error, "__notes__", ())
            print("\n".join(["", f"{error.label}: {printable(error)}", *map(printable, notes)]), file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)
        who = "" if is_alone() else f"process {rank}: "
        print(f"error: {who}{type(error).__name__}: {printable(one_line(error))}", file=sys.stderr)
        code = 1
    else:
        return 0
    if not is_alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _knows_other_processes() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


class PlainFormatter(logging.Formatter):
    """Spells out all that could act on a terminal, except in Fleet's own coloured text, logged with COLOURED."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, its lines kept."""
        text = super().format(record)
        return text if getattr(record, "is_coloured", False) else printable_lines(text)


def set_up_logging() -> None:
    """Sends the logger's words to the terminal, from the main process only."""
    is_main = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING if is_main else logging.ERROR, force=True)
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
