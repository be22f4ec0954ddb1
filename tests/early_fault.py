"""training.py of which one process misbehaves before it loads the model: for tests of what the others do.

Arguments: training.py's, then `<rank>:<what>`, done as the model is about to be loaded: kill, stop, or hang.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import training
from fleet.run.build import training as run_build


def main(argv: Sequence[str]) -> None:
    """Training with `argv`, whose last argument is the fault."""
    rank, what = argv[-1].split(":")
    build = run_build.build_trainer

    def build_or_fail(run: Any, *rest: Any) -> Any:
        print("[loading]", file=sys.stderr, flush=True)
        if run.args.process_index == int(rank):
            if what == "hang":
                time.sleep(10_000)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
        return build(run, *rest)

    run_build.build_trainer = build_or_fail  # type: ignore[assignment]
    training.main(list(argv[:-1]))
