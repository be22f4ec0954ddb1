"""Faults on purpose, in rewards, losses and gradients: none reaches a weight, and each is counted or ends the run."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fleet.errors import RunStopped
from fleet.own_code.reward_function import checked_value
from fleet.own_code.reward_process import RewardProcess
from fleet.rl.guards import without_gradient_if_not_finite
from model_utils import make_lora_config
from tests.helpers import (
    PlainReward,
    ScriptedFleetTrainer,
    StepKeeper,
    fleet_trainer,
    rloo_config,
    spoil,
    toy_model,
    weights_of,
)

INF, NAN = math.inf, math.nan


def all_finite(model: torch.nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# --- rewards ----------------------------------------------------------------------------------------------------------

# the values of two groups of four, a step each, then the advantages that they make by hand and the share dropped
FAULTS: dict[str, tuple[list[Any], list[float], float]] = {
    "every value dropped": ([None] * 8, [0] * 8, 1),
    "inf": ([INF, 1, 0, 0, 1, 0, 0, 0], [0, 1, -1 / 2, -1 / 2, 1, -1 / 3, -1 / 3, -1 / 3], 1 / 8),
    "-inf": ([1, -INF, 0, 0, 0, 0, 0, 0], [1, 0, -1 / 2, -1 / 2, 0, 0, 0, 0], 1 / 8),
    "NaN": ([1, 0, NAN, 0, 0, 0, 0, NAN], [1, -1 / 2, 0, -1 / 2, 0, 0, 0, 0], 2 / 8),
    "None": ([1, 0, 0, None, 0, 0, 0, 0], [1, -1 / 2, -1 / 2, 0, 0, 0, 0, 0], 1 / 8),
    "1e38": ([1e38, 1, 0, 0, 0, 0, 0, -1e38], [0, 1, -1 / 2, -1 / 2, 0, 0, 0, 0], 2 / 8),
    "other types": (["1", 1 + 1j, True, False, 0, 0, 0, []], [0, 0, 1, -1, 0, 0, 0, 0], 3 / 8),
    "a whole group dropped": ([NAN] * 4 + [1, 0, 0, 0], [0, 0, 0, 0, 1, -1 / 3, -1 / 3, -1 / 3], 4 / 8),
    "one left of a group": ([5, INF, NAN, None, 0, 0, 0, 0], [0] * 8, 3 / 8),
    "the largest that count": ([1e6, -1e6, -1e6, -1e6, 0, 0, 0, 0], [2e6] + [-2e6 / 3] * 3 + [0] * 4, 0),
    "tensors": (torch.tensor([1, NAN, 0, INF, 0, 0, 0, 0]), [1, 0, -1, 0, 0, 0, 0, 0], 2 / 8),
}  # fmt: skip


class FaultyReward:
    """Gives the fault of the step, and keeps what it was called with."""

    def __call__(self, completions: list[str], trainer_state: Any, **columns: Any) -> Any:
        self.columns = columns | {"completions": completions}
        return list(FAULTS.values())[trainer_state.global_step % len(FAULTS)][0]


class AdvantageKeeper(StepKeeper):
    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer, self.advantages = trainer, list[list[float]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.advantages.append([rollout.advantage for rollout in self.trainer.latest_rollouts])


REWARD_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unpacked": {"shared_prefix": False},
    "normalized": {"normalize_advantages": True},
    "kl": {"beta": 0.05},
    "normalized kl over micro-batches": {
        "beta": 0.05,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "normalize_advantages": True,
    },
}


@pytest.mark.parametrize("name", REWARD_SETTINGS)
def test_a_bad_reward_drops_its_rollout_and_no_weight_is_lost(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dict(REWARD_SETTINGS[name])
    shared = {"shared_prefix": settings.pop("shared_prefix", True)}
    reward = FaultyReward()
    args = rloo_config(tmp_path, max_steps=len(FAULTS), **settings)
    trainer = fleet_trainer(args, ScriptedFleetTrainer, reward_function=reward, **shared)
    keeper = AdvantageKeeper(trainer)
    trainer.add_callback(keeper)
    trainer.train()

    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert [line["rewards/dropped"] for line in lines] == pytest.approx([share for _, _, share in FAULTS.values()])
    assert [line["skipped_steps"] for line in lines] == [0] * len(FAULTS)
    assert all(all(bool(weight.isfinite().all()) for weight in weights.values()) for weights in keeper.weights)
    # a step of dropped rollouts alone has no gradient, and the optimizer no moment yet
    assert all(torch.equal(weight, keeper.weights[1][name]) for name, weight in keeper.weights[0].items())
    assert (lines[0]["reward"], lines[0]["grad_norm"]) == (None, 0)
    assert lines[1]["reward"] == pytest.approx(2 / 7) and lines[1]["grad_norm"] > 0
    assert [record.message for record in caplog.records if "rewards/dropped" in record.message] == [
        "step 1: reward function FaultyReward gave None (NoneType); rollouts without a finite number within 1e+06 of 0 "
        "are dropped, and counted in rewards/dropped (said once)"
    ]
    if "beta" not in settings and "normalize_advantages" not in settings:
        for found, (_, advantages, _) in zip(keeper.advantages, FAULTS.values(), strict=True):
            assert found == pytest.approx(advantages, rel=1e-6)
    assert reward.columns.keys() == {
        "prompts", "completions", "completion_ids", "correct_index", "num_candidates", "episode", "verdict",
    }  # fmt: skip
    assert {len(column) for column in reward.columns.values()} == {8}


def test_numbers_of_torch_count() -> None:
    assert checked_value(torch.tensor(0.5)) == 0.5
    assert checked_value(torch.tensor(1.0, requires_grad=True)) == 1.0
    assert math.isnan(checked_value(torch.tensor([0.5, 0.5])))
    assert PlainReward(lambda **columns: torch.tensor([1.0, 2.0]))(["a", "b"]).values == [1.0, 2.0]
    problem = PlainReward(lambda **columns: torch.tensor(1.0))(["a"]).problem
    assert problem is not None and "returned a Tensor of shape (), but wanted a sequence of 1 numbers" in problem
    column = torch.tensor([[1.0], [2.0]])
    for values in (column, list(column), list(column.flatten()), column.numpy(), column.double().requires_grad_()):
        assert PlainReward(lambda values=values, **columns: values)(["a", "b"]).values == [1.0, 2.0]


BROKEN_FILE = """
import time

def wrong_length(**columns):
    return [1.0] * 7

def hangs(**columns):
    time.sleep(60)

def raises(**columns):
    raise ConnectionError("no judge")
"""


@pytest.mark.parametrize(
    ("name", "timeout_s", "words"),
    [
        ("wrong_length", 60, "reward function wrong_length returned 7 values, but wanted a sequence of 8 numbers"),
        ("hangs", 0.2, "reward function hangs did not return within 0.2 s; mend it, or raise --reward_timeout_s"),
        (
            "raises",
            60,
            r"reward function raises raised ConnectionError: no judge \(\S+broken.py, line \d+\); correct it",
        ),
    ],
)
def test_a_broken_reward_function_stops_the_run(name: str, timeout_s: float, words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN_FILE)
    with contextlib.closing(RewardProcess(f"{tmp_path / 'broken.py'}:{name}", timeout_s)) as reward:
        trainer = fleet_trainer(rloo_config(tmp_path), ScriptedFleetTrainer, reward_function=reward)
        before = weights_of(trainer.model)
        with pytest.raises(RunStopped, match=f"^{words}"):
            trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer.model).items())


def scores_until(step: int) -> Any:
    """A reward whose values all count before that step, and none from it on."""

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        is_sound = trainer_state.global_step + 1 < step
        return [float(len(text) % 3) if is_sound else NAN for text in completions]

    return reward


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.05, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}]
)
def test_steps_in_a_row_without_any_reward_save_and_stop(settings: dict[str, Any], tmp_path: Path) -> None:
    def trainer_of(step: int) -> Any:
        args = rloo_config(tmp_path, max_steps=6, **settings)
        reward = scores_until(step)
        return fleet_trainer(args, ScriptedFleetTrainer, model=toy_model(), reward_function=reward, max_skipped_steps=2)

    trainer = trainer_of(3)
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert str(stop.value) == (
        "2 optimizer steps in a row taught nothing, as no group has two rollouts that count: reward function reward "
        f"gave nan (float), but wanted a finite number within 1e+06 of 0; the last checkpoint in {tmp_path} is sound; "
        "correct that, then pass --resume"
    )
    assert trainer.state.global_step == 4
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    resumed = trainer_of(99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("reward", "2 optimizer steps in a row taught nothing, as no group has two rollouts that count: "),
        ("gradient", "2 optimizer steps in a row were skipped, as the gradient's norm was last nan; "),
    ],
)
def test_a_run_that_is_shorter_than_the_limit_and_learns_nothing_stops(fault: str, words: str, tmp_path: Path) -> None:
    settings = {"reward_function": scores_until(1)} if fault == "reward" else {}
    trainer = fleet_trainer(rloo_config(tmp_path), ScriptedFleetTrainer, **settings)
    if fault == "gradient":
        spoil(trainer, {1: ("gradient", NAN), 2: ("gradient", NAN)})
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert str(stop.value).startswith(words) and str(stop.value).endswith(", then begin another run")


def test_a_run_of_which_two_siblings_count_at_times_goes_on(tmp_path: Path) -> None:
    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        counts = trainer_state.global_step == 1
        # one alone, as at every other step, teaches nothing
        return [1.0, 0.0 if counts else NAN, *[NAN] * 6]

    trainer = fleet_trainer(
        rloo_config(tmp_path, max_steps=3), ScriptedFleetTrainer, reward_function=reward, max_skipped_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 3


# --- losses and gradients ---------------------------------------------------------------------------------------------


def test_a_finite_loss_keeps_its_gradient_to_the_bit() -> None:
    weight = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    loss = (weight * weight).sum()
    guarded = without_gradient_if_not_finite(loss)
    guarded.backward()
    assert torch.equal(guarded, loss)
    assert torch.equal(weight.grad, 2 * weight)


@pytest.mark.parametrize("constant", [INF, -INF, NAN])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(constant: float) -> None:
    weight, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = weight.sum() + 0 * unused.sum() + constant
    without_gradient_if_not_finite(loss).backward()
    assert weight.grad.isnan().all() and unused.grad.isnan().all()


# by step: the gradient, the forward pass, and finite gradients whose norm is not; steps 1, 4 and 7 are sound
SPOILT = {2: ("gradient", NAN), 3: ("gradient", INF), 5: ("forward", NAN), 6: ("gradient", 1e36)}

STEP_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "two iterations": {"num_iterations": 2},
    "lora with kl": {"beta": 0.05, "lora": True},
}


@pytest.mark.parametrize("name", STEP_SETTINGS)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dict(STEP_SETTINGS[name])
    lora = make_lora_config(rank=4) if settings.pop("lora", False) else None
    args = rloo_config(tmp_path, max_steps=7, weight_decay=0.1, lr_scheduler_type="linear", **settings)
    trainer = fleet_trainer(args, ScriptedFleetTrainer, lora)
    spoil(trainer, SPOILT)
    keeper = StepKeeper()
    trainer.add_callback(keeper)
    trainer.train()

    for step in range(1, 8):
        before, after = keeper.weights[step - 1], keeper.weights[step]
        assert all(bool(weight.isfinite().all()) for weight in after.values()), step
        is_same = all(torch.equal(weight, before[name]) for name, weight in after.items())
        assert is_same is (step in SPOILT), step
        moments_before, moments = keeper.moments[step - 1], keeper.moments[step]
        if step in SPOILT:
            assert len(moments) == len(moments_before) > 100
            assert all(map(torch.equal, moments, moments_before)), step
    # the schedule of seven steps falls by a seventh of 1e-4 for each step that is taken
    rates = [1 - taken / 7 for taken in (0, 1, 1, 1, 2, 2, 2, 3)]
    assert keeper.learning_rates == pytest.approx([1e-4 * rate for rate in rates])
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert [math.isfinite(line["grad_norm"]) for line in lines] == [step not in SPOILT for step in range(1, 8)]
    said = [record.message for record in caplog.records if " skipped: " in record.message]
    assert [message.split()[1] for message in said] == ["2", "3", "5", "6"]


def test_too_many_skipped_steps_in_a_row_save_and_stop_and_a_resumed_run_counts_on(tmp_path: Path) -> None:
    def trainer_of(num_steps: int, faults: dict[int, tuple[str, float]]) -> Any:
        args = rloo_config(tmp_path, max_steps=num_steps)
        trainer = fleet_trainer(args, ScriptedFleetTrainer, model=toy_model(), max_skipped_steps=2)
        spoil(trainer, faults)
        return trainer

    # two in all are not two in a row
    trainer = trainer_of(9, {1: ("gradient", NAN), 3: ("forward", NAN), 4: ("gradient", INF), 5: ("gradient", NAN)})
    keeper = StepKeeper()
    trainer.add_callback(keeper)
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert trainer.state.global_step == 4
    assert str(stop.value).startswith(
        "2 optimizer steps in a row were skipped, as the gradient's norm was last nan; the weights are those of "
        f"step 2, and the last checkpoint in {tmp_path} is sound; "
    )
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    of_step_2 = [weight for name, weight in keeper.weights[2].items() if name.endswith("visual.merger.ln_q.weight")]
    assert torch.equal(saved["visual.merger.ln_q.weight"], of_step_2[0])
    assert all(weight.isfinite().all() for weight in saved.values())

    resumed = trainer_of(6, {5: ("gradient", NAN)})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    counts = [line["skipped_steps"] for line in resumed.state.log_history if "skipped_steps" in line]
    assert counts == [1, 1, 2, 3, 4, 4]
    assert all_finite(resumed.model)
