"""Run as ranks by tests/test_distributed.py: an environment that breaks on one process alone, and what each heard.

Arguments: OUTPUT
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset import RepeatableEpisodeDataset
from environment import Episode, PickImageEnv, ToolCall
from fleet.errors import RunStopped
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from tests.helpers import ScriptedFleetTrainer, fleet_trainer, rloo_config


class Breaking(PickImageEnv):
    """An environment whose verdict needs something that one process does not have."""

    rank = 0
    num_verdicts = 0

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        self.num_verdicts += 1
        # by the script, six of the eight completions of the first step are calls
        if self.rank == 1 and self.num_verdicts > 6:
            raise FileNotFoundError("no answers.json")
        return super().respond(episode, turns)


def main(argv: Sequence[str]) -> None:
    output = Path(argv[0])
    args = rloo_config(output, max_steps=3)
    env = Breaking(TOY_DATA_ROOT)
    env.rank = args.process_index
    trainer = fleet_trainer(args, ScriptedFleetTrainer, dataset=RepeatableEpisodeDataset(env, TOY_IMAGE_PIXELS))
    reason = None
    try:
        trainer.train()
    except RunStopped as stop:
        reason = str(stop)
    seen = {"reason": reason, "step": trainer.state.global_step}
    (output / f"rank{args.process_index}.json").write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
