"""Groups of one accord are replaced by further episodes': which, how often, what is counted, and what is learnt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset import RepeatableEpisodeDataset
from environment import Episode, PickImageEnv
from fleet.episode_numbers import FURTHER_STRIDE, MAX_REPLACEMENTS, REPLACEMENT_STRIDE, numbers_drawn
from fleet.rl.drawing import Drawn
from fleet.rl.judging import JudgedGroups
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from tests import length_reward
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor, weights_of
from tests.turning_env import LookAgainEnv
from utils.tool_calls import make_tool_call_str

WRONG, MIXED, RIGHT = [1, 1, 2, 3], [0, 1, 0, 2], [0, 0, 0, 0]  # the indices that the rollouts of a group pick


class SaidByNumber(FleetRLOOTrainer):
    """The real trainer, whose rollouts of an episode are set by its number."""

    picks: dict[int, list[int]]
    drawn: list[list[int]]

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        self.drawn.append(list(batch["numbers"]))
        texts = [make_tool_call_str(pick) + "<|im_end|>" for number in batch["numbers"] for pick in self.picks[number]]
        return Drawn(toy_processor().tokenizer(texts)["input_ids"])


def said_by_number(tmp_path: Path, picks: dict[int, list[int]], **settings: Any) -> SaidByNumber:
    args = rloo_config(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=16)
    trainer = fleet_trainer(args, SaidByNumber, **settings)
    assert isinstance(trainer, SaidByNumber)
    trainer.picks, trainer.drawn = picks, []
    return trainer


def test_only_groups_of_one_accord_make_way_and_only_for_groups_that_teach(tmp_path: Path) -> None:
    far = FURTHER_STRIDE
    picks = {0: RIGHT, 1: MIXED, 2: WRONG, 3: MIXED, far: MIXED, far + 2: WRONG, 2 * far + 2: MIXED}
    trainer = said_by_number(tmp_path, picks, dynamic_sampling=3)
    trainer.train()
    assert trainer.drawn == [[0, 1, 2, 3], [far, far + 2], [2 * far + 2]]
    trained = [record.episode.episode_index for record in trainer.latest_rollouts[::4]]
    assert trained == [far, 1, 2 * far + 2, 3]
    assert [record.advantage != 0 for record in trainer.latest_rollouts] == [True] * 16
    (line,) = [line for line in trainer.state.log_history if "accuracy" in line]
    # of seven groups one is all right, two are all wrong, and four are half right
    assert line["accuracy"] == (4 + 4 * 2) / 28
    assert (line["groups/all_right"], line["groups/all_wrong"], line["groups/mixed"]) == (1 / 7, 2 / 7, 4 / 7)
    assert line["dynamic_sampling/replaced"] == 2 / 4
    assert line["dynamic_sampling/groups_per_kept"] == 7 / 4
    # of what is trained on: half of it right, and 5 % of the reward for any call
    assert line["reward"] == pytest.approx(0.05 + 0.95 / 2)
    assert line["frac_reward_zero_std"] == 0


@pytest.mark.parametrize("attempts", [0, 1])
def test_after_its_attempts_a_group_stays_as_it_was(tmp_path: Path, attempts: int) -> None:
    far = FURTHER_STRIDE
    picks = {0: RIGHT, 1: MIXED, 2: MIXED, 3: MIXED, far: WRONG}
    trainer = said_by_number(tmp_path, picks, dynamic_sampling=attempts)
    trainer.train()
    assert trainer.drawn == [[0, 1, 2, 3], [far]][: 1 + attempts]
    assert [record.episode.episode_index for record in trainer.latest_rollouts[::4]] == [0, 1, 2, 3]
    (line,) = [line for line in trainer.state.log_history if "accuracy" in line]
    assert line["frac_reward_zero_std"] == 1 / 4
    assert line["accuracy"] == (4 + 3 * 2) / (16 + 4 * attempts)
    assert line.get("dynamic_sampling/replaced") == (0 if attempts else None)


def test_a_shaped_reward_does_not_keep_a_group_that_is_all_wrong(tmp_path: Path) -> None:
    def by_place(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(place % 4) for place in range(len(completions))]

    picks = {0: WRONG, 1: MIXED, 2: MIXED, 3: MIXED, FURTHER_STRIDE: MIXED}
    trainer = said_by_number(tmp_path, picks, dynamic_sampling=1, reward_function=by_place)
    trainer.train()
    assert trainer.drawn[1:] == [[FURTHER_STRIDE]]


class OfManySizes(LookAgainEnv):
    """Episodes whose pictures differ in number, and whose prompts in length."""

    def episode(self, index: int) -> Episode:
        return PickImageEnv(TOY_DATA_ROOT, 2 + index % 3, 0, seed=self.seed).episode(index)


class RightByChance(FleetRLOOTrainer):
    """The real trainer, to which a rollout is right if the sum of its ids is a multiple of four."""

    def _judge(self, *everything: Any) -> JudgedGroups:
        judged = super()._judge(*everything)
        are_right = [sum(record.token_ids) % 4 == 0 for record in judged.records]
        verdicts = [
            replace(record.verdict, is_right=is_right)
            for record, is_right in zip(judged.records, are_right, strict=True)
        ]
        records = [replace(record, verdict=verdict) for record, verdict in zip(judged.records, verdicts, strict=True)]
        return replace(judged, records=records)


class Chosen(RepeatableEpisodeDataset):
    """The episodes with these numbers, in order."""

    numbers: Sequence[int]

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(self.numbers[index])


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("max_turns", [1, 2])
def test_a_step_on_replaced_groups_is_that_of_the_groups_alone(tmp_path: Path, is_frozen: bool, max_turns: int) -> None:
    """The oracle is a trainer that gets the same episodes in one batch, and replaces nothing."""

    def trained(numbers: Sequence[int], dynamic_sampling: int) -> FleetRLOOTrainer:
        args = rloo_config(tmp_path, max_steps=1, per_device_train_batch_size=24, optim="sgd", learning_rate=0.5)
        env = OfManySizes(TOY_DATA_ROOT, 4, 0, seed=3)
        env.num_looks = max_turns - 1
        dataset = Chosen(env, TOY_IMAGE_PIXELS)
        dataset.numbers = numbers
        model = toy_model()
        model.model.visual.requires_grad_(not is_frozen)
        trainer = fleet_trainer(
            args,
            RightByChance,
            model=model,
            dataset=dataset,
            reward_function=length_reward.score,
            dynamic_sampling=dynamic_sampling,
            max_turns=max_turns,
            vision_cache_bytes=2**20 if is_frozen else 0,
        )
        trainer.train()
        return trainer

    class OwnThenFurther(Sequence[int]):
        def __len__(self) -> int:
            return FURTHER_STRIDE**2

        def __getitem__(self, index: Any) -> Any:
            return index

    replaced = trained(OwnThenFurther(), 4)
    numbers = [record.episode.episode_index or 0 for record in replaced.latest_rollouts[::4]]
    assert any(number >= FURTHER_STRIDE for number in numbers)
    wanted = trained(numbers, 0)
    said = [[record.token_ids for record in trainer.latest_rollouts] for trainer in (replaced, wanted)]
    assert said[0] == said[1]
    # the replaced ones began from the same weights, which a step of this size moves far
    for name, weight in weights_of(wanted.model).items():
        torch.testing.assert_close(weights_of(replaced.model)[name], weight, rtol=1e-4, atol=1e-6)


def test_no_two_numbers_of_a_run_meet() -> None:
    stands_in = [k * REPLACEMENT_STRIDE for k in range(1 + MAX_REPLACEMENTS)]
    drawn = [number + further for number in numbers_drawn(50, 3) for further in stands_in]
    assert len(set(drawn)) == 50 * 4 * len(stands_in)
    assert list(numbers_drawn(3)) == [0, 1, 2]
