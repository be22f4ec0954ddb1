"""Parts of the model that train, by --freeze and --lora_targets, and a learning rate of the vision side's own."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from fleet.rl.trainer import FleetRLOOTrainer
from model_utils import make_lora_config
from tests.helpers import ScriptedFleetTrainer, fleet_trainer, rloo_config, stock_trainer, toy_model

# the beginnings of the names of each part's weights, in the toy itself and behind adapters
BEGINNINGS = {
    "tower": ("model.visual.patch_embed.", "model.visual.blocks."),
    "merger": ("model.visual.merger.",),
    "language_model": ("model.language_model.", "lm_head."),
}
PART_OF_TARGET = {"language": "language_model", "vision": "tower", "merger": "merger"}

FROZEN = [frozen for size in (0, 1, 2) for frozen in combinations(BEGINNINGS, size)]
TARGETS = [targets for size in (1, 2, 3) for targets in combinations(PART_OF_TARGET, size)]
KINDS: dict[str, dict[str, Any]] = {
    **{f"freeze {','.join(frozen) or 'none'}": {"freeze": frozen} for frozen in FROZEN},
    **{f"lora {','.join(targets)}": {"targets": targets} for targets in TARGETS},
}

OFTEN = ("freeze tower", "freeze language_model", "lora language,vision,merger")
FURTHER = [pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for kind in KINDS if kind not in OFTEN]


def trainer_of(
    folder: Path,
    freeze: Any = (),
    targets: Any = (),
    make: Any = fleet_trainer,
    four_bit: bool = False,
    **settings: Any,
) -> Any:
    """A trainer on scripted completions. settings: of rloo_config, and vision_learning_rate."""
    torch.manual_seed(0)
    lora = None
    if targets:
        lora = make_lora_config(rank=4, targets=targets)
        # at zero, an adapter's second factor would keep the first one's gradient at zero
        lora.init_lora_weights = False
    own: dict[str, Any] = {"trainer_class": ScriptedFleetTrainer} if make is fleet_trainer else {}
    if "vision_learning_rate" in settings:
        own["vision_learning_rate"] = settings.pop("vision_learning_rate")
    args = rloo_config(folder, **({"max_steps": 1} | settings))
    return make(args, peft_config=lora, model=toy_model(freeze=freeze, load_in_4bit=four_bit), **own)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def trains(name: str, freeze: Any = (), targets: Any = ()) -> bool:
    """True if a weight is one that training moves, by its name."""
    parts = [PART_OF_TARGET[target] for target in targets] or [part for part in BEGINNINGS if part not in freeze]
    beginnings = tuple(beginning for part in parts for beginning in BEGINNINGS[part])
    is_adapter = ".lora_" in name
    return name.removeprefix("base_model.model.").startswith(beginnings) and is_adapter == bool(targets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_all_of_the_parts_that_train_and_nothing_else(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **KINDS[kind])
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if trains(name, **KINDS[kind])
    }


class GradientKeeper(TrainerCallback):
    """Keeps every gradient of the first step as the optimizer finds it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = model.named_parameters()
        self.gradients = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    keeper = GradientKeeper()
    trainer.add_callback(keeper)
    trainer.train()
    return keeper.gradients


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("kind", [*OFTEN, *FURTHER])
def test_the_gradients_are_stock_trls_with_checkpointing_of_either_kind_too(kind: str, tmp_path: Path) -> None:
    # without clipping; stock TRL computes every row by itself
    settings: dict[str, Any] = {"max_grad_norm": 0.0, **KINDS[kind]}
    wanted = gradients_of(trainer_of(tmp_path, make=stock_trainer, **settings))
    assert all(trains(name, **KINDS[kind]) for name in wanted)
    largest = max(gradient.norm() for gradient in wanted.values())
    for checkpointing in CHECKPOINTED.values():
        found = gradients_of(trainer_of(tmp_path, **settings, **checkpointing))
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-5 * largest), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_every_part_train_over_4_bit_weights(checkpointing: bool, tmp_path: Path) -> None:
    targets = tuple(PART_OF_TARGET)
    trainer = trainer_of(
        tmp_path, targets=targets, four_bit=True, gradient_checkpointing=checkpointing, learning_rate=0.1
    )
    before = weights_of(trainer)
    assert any("visual.blocks" in name and weight.dtype == torch.uint8 for name, weight in before.items())
    trainer.train()
    after = weights_of(trainer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if trains(name, targets=targets)
    }
    assert all(after[name].isfinite().all() for name in after if ".lora_" in name)


# --- a learning rate of the vision side -------------------------------------------------------------------------------


RATED: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen merger": {"freeze": ("merger",)},
    "frozen tower": {"freeze": ("tower",)},
    "lora": {"targets": ("language", "vision", "merger")},
}


@pytest.mark.parametrize("kind", RATED)
@pytest.mark.parametrize(("rate", "vision_rate"), [(1e-4, 1e-3), (1e-3, 1e-5)])
def test_adamws_first_step_is_as_long_as_each_sides_rate(
    kind: str, rate: float, vision_rate: float, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, **RATED[kind], learning_rate=rate, vision_learning_rate=vision_rate)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    for name in before:
        if trains(name, **RATED[kind]):
            # m / (sqrt(v) + 1e-8) of one gradient is its sign, except where that is as small as 1e-8
            largest_update = float((after[name].double() - before[name].double()).abs().max())
            assert largest_update == pytest.approx(vision_rate if "visual" in name else rate, rel=0.02), name
        else:
            assert torch.equal(before[name], after[name]), name
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    assert (line["learning_rate"], line["vision_learning_rate"]) == (rate, vision_rate)


def test_the_rate_of_the_rest_gives_the_bits_of_no_rate(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "learning_rate": 1e-4,
        "max_steps": 3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
    }
    plain, rated = trainer_of(tmp_path, **settings), trainer_of(tmp_path, vision_learning_rate=1e-4, **settings)
    for trainer in (plain, rated):
        trainer.train()
    assert len(plain.optimizer.param_groups) == 2 and len(rated.optimizer.param_groups) == 4
    ours = weights_of(rated)
    assert [name for name, weight in weights_of(plain).items() if not torch.equal(weight, ours[name])] == []
    assert not any("vision_learning_rate" in line for line in plain.state.log_history)


def test_weight_decay_stays_as_trainer_has_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"weight_decay": 0.1, "learning_rate": 1e-4}
    trainer = trainer_of(tmp_path, vision_learning_rate=1e-5, **settings)
    stock = trainer_of(tmp_path, make=stock_trainer, **settings)
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    stock_names = {weight: name for name, weight in stock.model.named_parameters()}
    decay = {
        names[weight]: group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for weight in group["params"]
    }
    assert decay == {
        stock_names[weight]: group["weight_decay"]
        for group in Trainer.create_optimizer(stock).param_groups
        for weight in group["params"]
    }
    assert {decay["model.visual.merger.mlp.0.bias"], decay["model.visual.merger.mlp.0.weight"]} == {0.0, 0.1}
    # asked again, the groups are the same
    groups = [group["params"] for group in trainer.optimizer.param_groups]
    assert [group["params"] for group in trainer.create_optimizer().param_groups] == groups


def test_the_schedule_scales_both_rates(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 2}
    trainer = trainer_of(tmp_path, learning_rate=1e-4, vision_learning_rate=2e-6, **settings)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    scales = [0, 1 / 2, 1, 1 / 2]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-4 * scale for scale in scales])
    assert [line["vision_learning_rate"] for line in lines] == pytest.approx([2e-6 * scale for scale in scales])


def test_features_are_not_kept_while_a_part_of_the_vision_side_trains(tmp_path: Path) -> None:
    for kind in ({"freeze": ("tower",)}, {"freeze": ("merger",)}, {"targets": ("merger",)}, {"targets": ("vision",)}):
        lora = make_lora_config(targets=kind["targets"]) if "targets" in kind else None
        with pytest.raises(ValueError, match="image features cannot be kept while the vision tower, its merger or an"):
            fleet_trainer(
                rloo_config(tmp_path),
                FleetRLOOTrainer,
                lora,
                model=toy_model(freeze=kind.get("freeze", ())),
                vision_cache_bytes=2**20,
            )
