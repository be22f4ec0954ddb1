"""Started by tests/test_distributed.py: two steps on fixed completions, and the weights that came of them.

accelerate launch --config_file CONFIG tests/distributed_step.py OUTPUT EPISODES_PER_DEVICE
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rloo_trainer import FleetRLOOTrainer
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor
from utils.tool_calls import make_tool_call_str

ANSWERS = [make_tool_call_str(0), "no call", make_tool_call_str(2), make_tool_call_str(1)]


class FixedFleetTrainer(FleetRLOOTrainer):
    """Answers by the pictures shown, so that an episode gets the same completions on whatever device it is."""

    def _sample_completions(self, batch: Any, features: Any) -> list[list[int]]:
        tokenizer = toy_processor().tokenizer
        numbers = [sum(map(len, episode.labels)) for episode in batch["episodes"]]
        return [
            tokenizer(ANSWERS[(number + rollout * (1 + number % 2)) % 4] + "<|im_end|>")["input_ids"]
            for number in numbers
            for rollout in range(batch["group_size"])
        ]


def main() -> None:
    output, episodes = Path(sys.argv[1]), int(sys.argv[2])
    # the arguments come first: they start ZeRO-3, under which the model must load
    args = rloo_config(output, per_device_train_batch_size=4 * episodes, optim="sgd", learning_rate=0.01)
    trainer = fleet_trainer(args, FixedFleetTrainer, model=toy_model())
    trainer.train()
    trainer.save_model(str(output / "final"))
    if trainer.is_world_process_zero():
        norms = [str(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
        rewards = [str(line["reward"]) for line in trainer.state.log_history if "reward" in line]
        (output / "figures.txt").write_text(" ".join(norms + rewards), encoding="utf-8")


if __name__ == "__main__":
    main()
