"""training.py that says which phase it is in, and can be told to misbehave in one: for tests of signals and stalls."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import training
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.run.build import training as run_build


def main(argv: Sequence[str]) -> None:
    """Training with `argv`, whose last argument may be `<rank>:<phase>:<what>`, done at that phase's second time.

    what: raise, exit, hang or kill.
    """
    fault = argv[-1].split(":") if argv[-1].count(":") == 2 else None

    class SpeakingTrainer(FleetRLOOTrainer):
        """Says each activity on stderr."""

        times: dict[str, int] = {}

        @property
        def on_activity(self) -> Any:
            return self.act

        @on_activity.setter
        def on_activity(self, listener: Any) -> None:
            self.listener = listener

        def act(self, activity: str) -> None:
            self.listener(activity)
            print(f"[{activity}]", file=sys.stderr, flush=True)
            self.times[activity] = self.times.get(activity, 0) + 1
            if fault and self.times[activity] == 2 and [str(self.args.process_index), activity] == fault[:2]:
                misbehave(fault[2])

    run_build.FleetRLOOTrainer = SpeakingTrainer  # type: ignore[misc]
    training.main(list(argv[:-1] if fault else argv))


def misbehave(what: str) -> None:
    """Ends or stalls this process, in the way that is named."""
    print("[fault]", file=sys.stderr, flush=True)
    if what == "raise":
        raise ValueError("a fault of the test's")
    if what == "exit":
        os._exit(9)
    if what == "kill":
        os.kill(os.getpid(), 9)
    time.sleep(10_000)


if __name__ == "__main__":
    from fleet.command import command_line

    sys.exit(command_line.run(lambda: main(sys.argv[1:])))
