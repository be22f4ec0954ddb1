"""Run as ranks by tests/test_distributed.py: three steps, in some of whose micro-batches no rank has an advantage.

Arguments: OUTPUT spared|full
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor
from utils.tool_calls import make_tool_call_str

MIXED, TIED = [0, 1, 0, 2], [0, 0, 0, 0]
# by step and rank, the answers to the episode of each of two micro-batches
SCRIPT = [
    {0: (TIED, MIXED), 1: (TIED, TIED)},
    {0: (TIED, TIED), 1: (MIXED, TIED)},
    {0: (TIED, TIED), 1: (TIED, TIED)},
]


class Scripted(FleetRLOOTrainer):
    is_sparing = True

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        answers = SCRIPT[self.state.global_step][self.accelerator.process_index]
        texts = [make_tool_call_str(index) + "<|im_end|>" for group in answers for index in group]
        return Drawn([toy_processor().tokenizer(text)["input_ids"] for text in texts])

    def _teaches_nothing(self, *args: Any) -> bool:
        return self.is_sparing and super()._teaches_nothing(*args)


def main(argv: Sequence[str]) -> None:
    output, kind = Path(argv[0]), argv[1]
    args = rloo_config(
        output,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    torch.manual_seed(0)
    trainer = fleet_trainer(args, Scripted, model=toy_model())
    trainer.is_sparing = kind == "spared"
    passes: list[int] = []
    trainer.accelerator.unwrap_model(trainer.model).model.language_model.register_forward_pre_hook(
        lambda module, args: passes.append(trainer.state.global_step) if torch.is_grad_enabled() else None
    )
    trainer.train()
    trainer.save_model(str(output / "final"))
    seen = {"passes": passes, "learning_rates": [line.get("learning_rate") for line in trainer.state.log_history]}
    (output / f"rank{args.process_index}.json").write_text(json.dumps(seen), encoding="utf-8")
