"""Sampling's first pass as the one that is trained on: equal to two passes, and taken in exactly one case."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fleet.qwen.drafts import DraftMemory
from fleet.qwen.vision_windows import NAME
from fleet.rl.drawing import MEMORY_NAME
from fleet.rl.trainer import FleetRLOOTrainer
from model_utils import make_lora_config
from tests.helpers import fleet_trainer, rloo_config, toy_dataset, toy_model, weights_of
from tests.rl.test_rloo_trainer import forward_tokens


class TwoPasses(FleetRLOOTrainer):
    """Samples in one pass and trains in another, always."""

    def _tries_one_pass(self) -> bool:
        return False


class Hopeful(FleetRLOOTrainer):
    """Runs round 1 with gradients even if rollouts have gone on before."""

    def _tries_one_pass(self) -> bool:
        return self._why_not_one_pass() is None


def lines_of(trainer: FleetRLOOTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "reward" in line]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.05},
    "hot": {"temperature": 0.7},
    "masked": {"mask_truncated_completions": True, "max_completion_length": 20},
    "lora": {"lora": True, "is_cached": True},
    "frozen vision": {"freeze": ("tower", "merger"), "is_cached": True},
    "frozen tower": {"freeze": ("tower",)},
    "frozen language model": {"freeze": ("language_model",), "learning_rate": 0.1},
    "lora on every part": {"lora": True, "targets": ("language", "vision", "merger")},
    "eager": {"attention": "eager"},
    "4-bit base": {"lora": True, "load_in_4bit": True, "is_cached": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_pass_takes_the_steps_that_two_take(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.01} | SETTINGS[name]
    targets, is_cached = settings.pop("targets", ("language",)), settings.pop("is_cached", False)
    lora = make_lora_config(rank=4, targets=targets) if settings.pop("lora", False) else None
    frozen, attention = settings.pop("freeze", ()), settings.pop("attention", "sdpa")
    load_in_4bit = settings.pop("load_in_4bit", False)
    runs = []
    for kind in (Hopeful, TwoPasses):
        torch.manual_seed(0)
        trainer = fleet_trainer(
            rloo_config(tmp_path / kind.__name__, **settings),
            kind,
            lora,
            model=toy_model(
                freeze=frozen, attn_implementation=attention, load_in_4bit=load_in_4bit, dtype=torch.float32
            ),
            vision_cache_bytes=2**20 if is_cached else 0,
        )
        trainer.train()
        runs.append(trainer)
    one, two = runs
    taken = [line["sampling/one_pass"] for line in lines_of(one)]
    assert sum(taken) > 0 and {line["sampling/one_pass"] for line in lines_of(two)} == {0.0}
    for ours, theirs in zip(one.state.log_history, two.state.log_history, strict=True):
        for figure in ("grad_norm", "reward", "entropy", "kl", "completions/mean_length"):
            if figure in theirs:
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4, abs=1e-6), figure
    for weight_name, weight in weights_of(two.model).items():
        rtol = 1e-4 if weight.dtype == torch.float32 else 1e-2  # over 4-bit weights, an adapter is in bfloat16
        torch.testing.assert_close(weights_of(one.model)[weight_name], weight, rtol=rtol, atol=1e-6, msg=weight_name)


def test_a_step_in_one_pass_is_one_pass(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=6), Hopeful)
    passes = forward_tokens(trainer.model)
    marks = [0]

    class Marker(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append(len(passes))

    trainer.add_callback(Marker())
    trainer.train()
    by_step = [passes[start:end] for start, end in itertools.pairwise(marks)]
    taken = [line["sampling/one_pass"] for line in lines_of(trainer)]
    assert 0 < sum(taken) < 6, "steps of both kinds"
    for is_taken, of_step in zip(taken, by_step, strict=True):
        # tokens that are drawn behind the drafts are few
        gradients = [has_gradient for has_gradient, num_tokens in of_step if num_tokens > 150]
        assert gradients == ([True] if is_taken else [True, True])


def test_it_is_tried_where_one_rollout_at_most_went_on_before(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path))
    tried = []
    for share in (0.0, 6 / 8, 7 / 8, 1.0):
        memory = DraftMemory()
        memory.add([], 8, share)
        trainer.state.stateful_callbacks[MEMORY_NAME] = memory.as_json()
        tried.append(trainer._tries_one_pass())
    assert tried == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"beta": 0.05}, None),
        ({"gradient_accumulation_steps": 2}, "an optimizer step has 2 micro-batches"),
        ({"num_iterations": 2}, "a generation serves 2 optimizer steps"),
        ({"steps_per_generation": 2}, "a generation serves 2 optimizer steps"),
        ({"gradient_checkpointing": True}, "checkpointing"),
        ({"dropout": 0.1}, "dropout draws anew"),
    ],
)
def test_where_it_is_not_taken_the_reason_is_said_once(
    changes: dict[str, Any], words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = dict(changes)
    lora = make_lora_config(rank=4, dropout=dropout) if (dropout := changes.pop("dropout", 0.0)) else None
    trainer = fleet_trainer(rloo_config(tmp_path, **changes), peft_config=lora)
    with caplog.at_level("INFO", logger="fleet"):
        trainer._tries_one_pass()
        trainer._tries_one_pass()
    told = [record.getMessage() for record in caplog.records if "one pass" in record.getMessage()]
    assert told == [] if words is None else len(told) == 1 and words in told[0]


def test_the_memory_of_drafts_is_what_was_said_often_of_late() -> None:
    memory = DraftMemory()
    memory.add([[1, 2], [1, 2], [3], [4] * 600, [4] * 600], 10, 0.5)
    # twice of ten; once is no habit, and a page is no draft
    assert memory.drafts() == [[1, 2]] and memory.share_ended_in_first == 0.5
    again = DraftMemory.from_json(memory.as_json())
    for known in (memory, again):
        known.add([[3]] * 6 + [[1, 2]], 10, 1.0)
        assert known.drafts() == [[3], [1, 2]]
    assert again.as_json() == memory.as_json()
    for _ in range(12):
        memory.add([[3]] * 10, 10, 1.0)
    assert memory.drafts() == [[3]], "what is no longer said is forgotten"


def test_completions_do_not_depend_on_the_batch_they_are_drawn_in(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path))
    rows = [toy_dataset()[number] for number in (3, 5) for _ in range(4)]
    both = trainer._draw(trainer.data_collator(rows), None).completion_ids
    alone = [trainer._draw(trainer.data_collator(rows[first : first + 4]), None).completion_ids for first in (0, 4)]
    assert both == alone[0] + alone[1] and both[:4] != both[4:]


def test_what_was_said_is_drafted_next_and_is_part_of_the_state_that_is_saved(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=3))
    trainer.train()
    saved = DraftMemory.from_json(trainer.state.stateful_callbacks[MEMORY_NAME])
    assert saved.drafts() and saved.share_ended_in_first > 0
    batch = trainer.data_collator([toy_dataset()[0]] * 4)
    assert trainer._drafts(batch, [[]]) == [saved.drafts()]


def test_drafts_take_no_more_room_than_rollouts_of_their_own_would(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, num_generations=2, max_completion_length=10))
    batch = trainer.data_collator([toy_dataset()[0]] * 2)
    memory = DraftMemory()
    said = [[40 + number] * 7 for number in range(4)]
    memory.add([ids for ids in said for _ in range(2)], 8, 1.0)
    trainer.state.stateful_callbacks[MEMORY_NAME] = memory.as_json()
    # two rollouts of ten tokens, whose last is predicted alone, have 18 slots
    assert trainer._drafts(batch, [[]]) == [said[:2]]


@pytest.mark.parametrize("is_half", [False, True])
def test_generations_and_held_out_answers_are_in_the_precision_of_training(is_half: bool, tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, bf16=is_half))
    with trainer._policy_that_samples():
        assert torch.is_autocast_enabled("cpu") is is_half


def test_the_reference_attends_its_windows_as_the_policy_does(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, beta=0.05))
    assert trainer.ref_model.config.vision_config._attn_implementation == NAME
