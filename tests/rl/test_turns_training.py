"""Training on rollouts of several turns: its gradients are those of the conversations as rows of their own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.turns_parity import row_logps
from dataset import RepeatableEpisodeDataset
from environment import Episode, ToolCall, Verdict
from fleet.qwen.token_tree import PathToken
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from fleet.verdicts import BAD_OBSERVATION, OUT_OF_CONTEXT, OUT_OF_TURNS, Observation
from model_utils import make_lora_config
from tests.conftest import call_text
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor, weights_of
from tests.turning_env import LookAgainEnv

# the picks of each rollout of a group, turn by turn; None is no call
PICKS: list[list[int | None]] = [[2, 0], [2, 1], [1, 0], [9]]


class TalkingTrainer(FleetRLOOTrainer):
    """Says PICKS in place of what the policy would, and hears what the tools answer."""

    picks: list[list[int | None]] = PICKS
    answers: Any = None
    drawn: list[tuple[Any, Drawn]] = []

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        tokenizer, self.answers = toy_processor().tokenizer, answers
        paths, lengths, ids = list[list[PathToken]](), list[list[int]](), list[list[int]]()
        for group in range(len(batch["episodes"])):
            for picks in self.picks:
                said = [tokenizer(call_text(pick) if pick is not None else "no")["input_ids"] for pick in picks]
                turns, path = list[list[int]](), list[PathToken]()
                for turn in said:
                    turns.append([*turn, tokenizer.eos_token_id])
                    path += turns[-1]
                    given = answers(group, turns)
                    path += given
                    if not given:
                        break
                paths.append(path)
                lengths.append(list(map(len, turns)))
                ids.append([token for turn in turns for token in turn])
        if self.vision_cache is not None:
            answers.shown(self.model, list(answers.pictures), lambda count: count)
        self.drawn = [*self.drawn, (batch, Drawn(ids, None, None, lengths, paths))]
        return self.drawn[-1][1]


def talking_trainer(folder: Path, env: Any, **settings: Any) -> TalkingTrainer:
    lora = make_lora_config(rank=4) if settings.pop("lora", False) else None
    model = toy_model(freeze=settings.pop("freeze", ()))
    of_fleet = {name: settings.pop(name) for name in ("max_turns", "max_context") if name in settings}
    args = rloo_config(folder, optim="sgd", max_grad_norm=1e9, learning_rate=0.01, max_steps=1, **settings)
    dataset = RepeatableEpisodeDataset(env, TOY_IMAGE_PIXELS)
    frozen = lora is not None or not model.model.visual.patch_embed.proj.weight.requires_grad
    return fleet_trainer(
        args,
        TalkingTrainer,
        lora,
        model=model,
        dataset=dataset,
        vision_cache_bytes=2**20 if frozen else 0,
        **{"max_turns": 2, **of_fleet},
    )


@pytest.mark.parametrize("kind", ["full", "lora", "frozen vision"])
def test_a_step_is_that_of_the_conversations_as_rows_of_their_own(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"lora": {"lora": True}, "frozen vision": {"freeze": ("tower", "merger")}}
    trainer = talking_trainer(tmp_path, LookAgainEnv(TOY_DATA_ROOT, 4, 0), **settings.get(kind, {}))
    before = {name: weight.clone() for name, weight in weights_of(trainer.model).items()}
    trainer.train()
    ((batch, said),) = trainer.drawn
    records = trainer.latest_rollouts
    assert [record.verdict.outcome for record in records[:4]] == [
        "correct", "wrong_index", "correct", "index_out_of_range",
    ]  # fmt: skip
    assert [len(record.turns) for record in records] == [2, 2, 2, 1] * 2
    assert [record.turns[0].observation for record in records[:4]] == [
        "Image 2, once more.", "Image 2, once more.", "Image 1, once more.", None,
    ]  # fmt: skip
    assert [len(record.turns[0].images) for record in records[:4]] == [1, 1, 0, 0]
    # the oracle: minus the mean of advantage times log-probability, through the plain model
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = {name: weight.clone() for name, weight in weights_of(model).items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name])
    model.zero_grad()
    advantages = [record.advantage for record in records]
    rows = [
        row_logps(model, batch, row // 4, path, trainer.answers).sum() * advantages[row]
        for row, path in enumerate(said.paths or [])
    ]
    (-torch.stack(rows).mean()).backward()
    trained = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in after:
            step = before[name] - after[name]
            torch.testing.assert_close(step, 0.01 * parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
            trained += bool(step.any())
    assert trained > 20


class Difficult(LookAgainEnv):
    """Its answers are, by the picked place: one that never ends, one with a literal of the model's, a broken image."""

    num_looks = 99

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        index = turns[-1].arguments["index"]
        if index == 0:
            return Observation("go on")
        if index == 1:
            return Observation("see <|image_pad|>")
        if index == 2:
            return Observation("look", (Path("gone.png"),))
        return self.judged(episode, turns)


def test_a_rollout_that_ends_without_a_verdict_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = talking_trainer(tmp_path, Difficult(TOY_DATA_ROOT, 4, 3), beta=0.0)
    trainer.picks = [[0, 0], [1, 0], [2, 0], [0, 3]]
    caplog.set_level("INFO")
    trainer.train()
    outcomes = [record.verdict.outcome for record in trainer.latest_rollouts[:4]]
    assert outcomes == [OUT_OF_TURNS, BAD_OBSERVATION, BAD_OBSERVATION, "correct"]
    assert (
        "a tool's answer cannot be shown, which ends a rollout: an observation's text holds <|image_pad|>"
        in caplog.text
    )
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    assert (line[f"outcome/{BAD_OBSERVATION}"], line[f"outcome/{OUT_OF_TURNS}"]) == (0.5, 0.25)
    # only the last, of two turns, chose something
    assert [line[f"chosen/{choice}"] for choice in range(4)] == [0, 0, 0, 0.25] and line["valid_call"] == 0.25
    assert [record.reward for record in trainer.latest_rollouts[:4]] == [0, 0, 0, 1]
    assert line["turns/mean"] == pytest.approx(6 / 4)
    assert math.isfinite(line["grad_norm"])


def test_a_conversation_keeps_within_its_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = talking_trainer(tmp_path, LookAgainEnv(TOY_DATA_ROOT, 4, 0), max_context=150)
    caplog.set_level("INFO")
    trainer.train()
    assert "wanted at most 150 (--max_context_length) (said once)" in caplog.text
    assert {record.verdict.outcome for record in trainer.latest_rollouts} == {OUT_OF_CONTEXT, "index_out_of_range"}
    assert all(len(record.turns) == 1 for record in trainer.latest_rollouts)


def test_turns_need_fleets_own_sampling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_turns=2 needs sampling behind a shared prompt"):
        fleet_trainer(rloo_config(tmp_path), shared_prefix=False, max_turns=2)
