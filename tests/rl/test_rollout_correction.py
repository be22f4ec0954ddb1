"""Rollouts that another engine drew are weighted: the weights by hand, and a real step's gradient by brute force."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset import EpisodeBatch
from fleet.rl.algorithm import clipped_loss, rollout_weights
from fleet.rl.vllm_sampling import weight_metrics
from model_utils import media_token_ids
from tests import length_reward
from tests.helpers import fleet_trainer, rloo_config, scripted_completions, toy_model, toy_processor
from tests.rl.test_rloo_trainer import GradientKeeper

NAN, CAP, ROLLOUTS = math.nan, 2.0, 4


def test_weights_worked_by_hand() -> None:
    target = torch.tensor([[0.5, 0.6], [0.9, 0.8], [0.1, 0.5], [0.5, 0.5], [0.4, 0.9]]).log()
    sampler = torch.tensor([[0.4, 0.5], [0.3, 0.4], [0.4, 0.5], [NAN, 0.25], [0.5, 0.1]]).log()
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]])
    # 1.5; 6, which is capped; 1/4; 2 of the token that is known; and 4/5 of the token that is no padding
    assert rollout_weights(target, sampler, mask, CAP).tolist() == pytest.approx([1.5, 2.0, 0.25, 2.0, 0.8])


def test_a_token_that_one_engine_never_draws() -> None:
    target, sampler = torch.tensor([[-math.inf], [-1.0]]), torch.tensor([[-1.0], [-math.inf]])
    assert rollout_weights(target, sampler, torch.ones(2, 1, dtype=torch.int64), CAP).tolist() == [0.0, CAP]


def test_weighted_means_over_an_engines_samples_are_the_trainers() -> None:
    """Over all sequences of three tokens: without a cap, of any figure, and of 1."""
    generator = torch.Generator().manual_seed(0)
    engine, trainer = (torch.rand(3, 5, generator=generator).softmax(dim=1) for _ in range(2))
    sequences = list(itertools.product(range(5), repeat=3))
    figures = [float(sum(sequence) % 4) for sequence in sequences]

    def logps(policy: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[policy[place, token] for place, token in enumerate(row)] for row in sequences]).log()

    weights = rollout_weights(logps(trainer), logps(engine), torch.ones(125, 3, dtype=torch.int64), math.inf).tolist()
    chances = {
        name: [math.prod(float(policy[place, token]) for place, token in enumerate(row)) for row in sequences]
        for name, policy in (("engine", engine), ("trainer", trainer))
    }
    weighted = [chance * weight for chance, weight in zip(chances["engine"], weights, strict=True)]
    assert sum(weighted) == pytest.approx(1.0, abs=1e-5)
    found = sum(part * figure for part, figure in zip(weighted, figures, strict=True))
    wanted = sum(chance * figure for chance, figure in zip(chances["trainer"], figures, strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_weight_multiplies_its_rollouts_loss_and_gradient() -> None:
    logps = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    advantages, weights = torch.tensor([1.0, -0.25, -0.75]), torch.tensor([2.0, 0.5, 0.0])
    loss, _, _ = clipped_loss(logps, logps.detach(), advantages, 0.2, 0.2, weights)
    loss.backward()
    # losses of -2, 0.125 and 0
    assert loss.item() == pytest.approx(-1.875 / 3) and logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-2 / 3, 0.125 / 3, 0.0])


def test_metrics_worked_by_hand() -> None:
    found = weight_metrics(torch.tensor([2.0, 0.5, 0.5, 1.0]), CAP)
    # 4 squared, over 4 times 5.5
    wanted = {"correction_mean": 1.0, "correction_truncated": 0.25, "effective_samples": 16 / 22}
    assert found == {f"vllm/{name}": pytest.approx(value) for name, value in wanted.items()}
    assert weight_metrics(torch.zeros(2), CAP)["vllm/effective_samples"] == 0.0
    assert weight_metrics(torch.zeros(0), CAP) == {}


# --- a real step ------------------------------------------------------------------------------------------------------


class FakeSampler:
    """Stands in for VLLMSampler: says what a script says, with log-probabilities that are set."""

    def __init__(self, logps: list[list[float]]):
        self.logps = logps

    def sample(self, batch: EpisodeBatch, step: int) -> tuple[list[list[int]], list[list[float]]]:
        return completions_of(batch), self.logps

    def compare(self, *tensors: torch.Tensor, **settings: Any) -> dict[str, float]:
        return {}


def completions_of(batch: EpisodeBatch) -> list[list[int]]:
    return scripted_completions(ROLLOUTS, ROLLOUTS * len(batch["episodes"]), 1)


def first_batch(args: Any) -> EpisodeBatch:
    """The batch that the first step has."""
    trainer = fleet_trainer(args)
    rows = [trainer.train_dataset[number] for number in range(2) for _ in range(ROLLOUTS)]
    batch: EpisodeBatch = trainer.data_collator(rows)
    return batch


def plain_logits(model: Any, batch: EpisodeBatch, row: int, ids: list[int]) -> torch.Tensor:
    """What one plain row predicts for each of its completion's tokens: (t, V)."""
    episode = row // ROLLOUTS
    prompt = batch["input_ids"][episode][batch["attention_mask"][episode].bool()]
    sequence = torch.cat([prompt, torch.tensor(ids)])[None]
    places = slice(episode * 4, episode * 4 + 4)
    patches = batch["image_grid_thw"].prod(dim=1).tolist()
    first = sum(patches[: places.start])
    logits: torch.Tensor = model(
        input_ids=sequence,
        attention_mask=torch.ones_like(sequence),
        mm_token_type_ids=(sequence == toy_processor().image_token_id).long(),
        pixel_values=batch["pixel_values"][first : first + sum(patches[places])],
        image_grid_thw=batch["image_grid_thw"][places],
    ).logits[0, len(prompt) - 1 : -1]
    return logits


def target_logp(scaled: torch.Tensor, token: int, top_p: float, media: list[int]) -> float:
    """The token's log-probability under a sampler's rules, one token of the vocabulary after the other."""
    chances = scaled.double().softmax(dim=0).tolist()
    allowed = sorted((index for index in range(len(chances)) if index not in media), key=lambda i: -chances[i])
    total, kept, mass = sum(chances[index] for index in allowed), set(), 0.0
    for index in allowed:
        kept.add(index)
        mass += chances[index] / total
        if mass >= top_p:
            break
    return math.log(chances[token] / sum(chances[index] for index in kept | {token}))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature and top_p": {"temperature": 0.7, "top_p": 0.9},
    "in TRL's rows": {"temperature": 0.7, "shared_prefix": False},
    "in TRL's rows, with top_p": {"temperature": 0.7, "top_p": 0.9, "shared_prefix": False},
    "with old log-probabilities": {"temperature": 0.7, "top_p": 0.9, "num_iterations": 2},
    "masked": {"top_p": 0.9, "mask_truncated_completions": True},
    "off": {"temperature": 0.7, "top_p": 0.9, "correction_cap": None},
}


@pytest.mark.parametrize("name", CASES)
def test_a_steps_gradient_is_that_of_the_weighted_loss(name: str, tmp_path: Path) -> None:
    case = dict(CASES[name])
    settings = {"correction_cap": case.pop("correction_cap", CAP), "shared_prefix": case.pop("shared_prefix", True)}
    args = rloo_config(tmp_path, max_steps=1, max_grad_norm=0.0, **case)
    batch, model = first_batch(args), toy_model()
    completions = completions_of(batch)
    # TRL's rows with top_p 1 leave the ban out
    media = media_token_ids(model.config) if args.top_p < 1 or settings["shared_prefix"] else []
    noise = torch.randn(len(completions), generator=torch.Generator().manual_seed(0)).tolist()
    sampler_logps, weights, losses = list[list[float]](), list[float](), list[torch.Tensor]()
    rewards = length_reward.score([toy_processor().tokenizer.decode(ids).split("<|im_end|>")[0] for ids in completions])
    for row, ids in enumerate(completions):
        scaled = plain_logits(model, batch, row, ids) / args.temperature
        targets = [target_logp(at, token, args.top_p, media) for at, token in zip(scaled.detach(), ids, strict=True)]
        sampler_logps.append([target - noise[row] / len(ids) for target in targets])
        is_masked = args.mask_truncated_completions and ids[-1] != toy_processor().tokenizer.eos_token_id
        group = [rewards[place] for place in range(len(rewards)) if place // ROLLOUTS == row // ROLLOUTS]
        advantage = rewards[row] - (sum(group) - rewards[row]) / (ROLLOUTS - 1)
        weights.append(1.0 if settings["correction_cap"] is None else min(CAP, math.exp(noise[row])))
        logp = scaled.log_softmax(dim=1).gather(1, torch.tensor(ids)[:, None]).sum()
        losses.append(-weights[-1] * advantage * logp * (0.0 if is_masked else 1.0))
    (sum(losses, torch.zeros(())) / len(losses)).backward()
    assert settings["correction_cap"] is None or (CAP in weights and min(weights) < 0.6)

    trainer: Any = fleet_trainer(args, reward_function=length_reward.score, **settings)
    trainer.vllm, trainer.draws_on_trees = FakeSampler(sampler_logps), False
    keeper = GradientKeeper()
    trainer.add_callback(keeper)
    trainer.train()
    assert trainer._rollouts.sampled.is_packed is settings["shared_prefix"]
    moved = 0
    for weight_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                keeper.gradients[weight_name], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=weight_name
            )
            moved += scale > 1e-6
    assert moved > 50
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    if settings["correction_cap"] is None:
        assert not [figure for figure in line if figure.startswith("vllm/correction")]
    elif not args.mask_truncated_completions:
        assert line["vllm/correction_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-3)
        assert line["vllm/correction_truncated"] == weights.count(CAP) / len(weights)
