"""Micro-batches without an advantage cost no pass, and change nothing else: weights, moments, schedule, randomness."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from tests.helpers import StepKeeper, fleet_trainer, rloo_config, toy_processor
from utils.tool_calls import make_tool_call_str

MIXED, TIED = [0, 1, 0, 2], [0, 0, 0, 0]
# what the two episodes of each micro-batch are answered with, step by step, two micro-batches a step
SCRIPT = [
    [(MIXED, MIXED), (TIED, TIED)],
    [(TIED, TIED), (MIXED, TIED)],
    [(TIED, TIED), (TIED, TIED)],
    [(TIED, MIXED), (MIXED, TIED)],
]


class Scripted(FleetRLOOTrainer):
    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        answers = [group for micro_batch in SCRIPT[self.state.global_step] for group in micro_batch]
        ids_of = toy_processor().tokenizer
        return Drawn(
            [ids_of(make_tool_call_str(index) + "<|im_end|>")["input_ids"] for group in answers for index in group]
        )


class Unsparing(Scripted):
    """Makes every pass."""

    def _teaches_nothing(self, *args: Any) -> bool:
        return False


def run(kind: type[FleetRLOOTrainer], folder: Path, **changes: Any) -> tuple[Any, StepKeeper, list[int]]:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
    }
    trainer = fleet_trainer(rloo_config(folder, **settings | changes), kind)
    keeper, passes = StepKeeper(), list[int]()
    trainer.add_callback(keeper)
    trainer.model.model.language_model.register_forward_pre_hook(
        lambda module, args: passes.append(trainer.state.global_step) if torch.is_grad_enabled() else None
    )
    trainer.train()
    return trainer, keeper, passes


def test_what_teaches_nothing_is_left_out_and_all_else_moves_as_it_would(tmp_path: Path) -> None:
    spared, of_spared, passes = run(Scripted, tmp_path / "spared")
    full, of_full, all_passes = run(Unsparing, tmp_path / "full")
    # the last pass of a step is made where another was before it
    assert (passes, all_passes) == ([0, 0, 1, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3])
    skipped = [line["groups/skipped"] for line in spared.state.log_history if "reward" in line]
    assert skipped == [0.0, 0.5, 1.0, 0.0]
    assert of_spared.learning_rates == of_full.learning_rates and len(set(of_full.learning_rates)) > 3
    for ours, theirs in zip(of_spared.weights, of_full.weights, strict=True):
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    for our_moments, their_moments in zip(of_spared.moments, of_full.moments, strict=True):
        for ours_, theirs_ in zip(our_moments, their_moments, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-9)
    # decay and momentum move weights in the step without any pass too
    before, after = of_spared.weights[2], of_spared.weights[3]
    assert all(not torch.equal(before[name], after[name]) for name in before if before[name].abs().sum() > 0)


def test_figures_of_a_pass_that_was_not_made_are_absent(tmp_path: Path) -> None:
    trainer, _, _ = run(Scripted, tmp_path)
    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert ["entropy" in line for line in lines] == [True, True, False, True]
    assert [line["grad_norm"] > 0 for line in lines] == [True, True, False, True]


@pytest.mark.parametrize("changes", [{"beta": 0.05}, {"beta": 0.05, "num_iterations": 2, "max_steps": 2}])
def test_with_a_kl_term_every_pass_is_made(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, _, passes = run(Scripted, tmp_path, **changes)
    assert len(passes) == 2 * trainer.state.global_step
    assert not any("groups/skipped" in line for line in trainer.state.log_history)
