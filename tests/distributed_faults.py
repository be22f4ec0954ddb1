"""Run as ranks by tests/test_distributed.py: processes that meet different faults, and what each saw, as JSON.

Arguments: OUTPUT float32|bfloat16
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fleet.errors import RunStopped
from tests.helpers import ScriptedFleetTrainer, StepKeeper, fleet_trainer, rloo_config, spoil, toy_model

# by process, then by step from 1; the fifth step's reward is broken on process 1
FAULTS = ({3: ("forward", math.inf)}, {2: ("gradient", math.nan)})
BROKEN_STEP = 5


def main(argv: Sequence[str]) -> None:
    output, dtype = Path(argv[0]), argv[1]
    # the arguments come first: they start the processes' group, under which the model must load
    args = rloo_config(output, max_steps=9, lr_scheduler_type="linear", bf16=dtype == "bfloat16")
    rank = args.process_index

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float | None]:
        step = trainer_state.global_step + 1
        if step == BROKEN_STEP and rank == 1:
            raise ConnectionError("no judge")
        # process 0 has no scored rollout at the first step
        return [None if step == 1 and rank == 0 else float(len(text) % 3) for text in completions]

    model = toy_model(dtype=torch.bfloat16 if dtype == "bfloat16" and args.deepspeed_plugin else torch.float32)
    trainer = fleet_trainer(args, ScriptedFleetTrainer, model=model, reward_function=reward)
    spoil(trainer, FAULTS[rank])
    keeper = StepKeeper()
    trainer.add_callback(keeper)
    reason = None
    try:
        trainer.train()
    except RunStopped as stop:
        reason = str(stop)
    pairs = list(zip(keeper.weights[1:], keeper.weights[:-1], strict=True))
    moments = list(zip(keeper.moments[1:], keeper.moments[:-1], strict=True))
    lines = [line for line in trainer.state.log_history if "reward" in line]
    seen = {
        "steps_that_changed_weights": [
            step
            for step, (now, old) in enumerate(pairs, 1)
            if any(not torch.equal(now[name], old[name]) for name in now)
        ],
        "steps_that_changed_moments": [
            step
            for step, (now, old) in enumerate(moments, 1)
            if len(now) != len(old) or not all(map(torch.equal, now, old))
        ],
        "learning_rates": keeper.learning_rates,
        "is_finite": all(bool(weight.isfinite().all()) for weights in keeper.weights for weight in weights.values()),
        "num_skipped": [line["skipped_steps"] for line in lines],
        "dropped": [line["rewards/dropped"] for line in lines],
        "reason": reason,
    }
    (output / f"rank{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
