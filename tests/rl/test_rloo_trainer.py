"""FleetRLOOTrainer against stock TRL, brute force and hand-worked values, on a real tiny Qwen2.5-VL."""

import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import RLOOTrainer

from environment import Outcome
from fleet.rl.algorithm import clipped_loss, leave_one_out_advantages, needs_old_logps, shaped_rewards, token_kl
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer, num_episodes_of_run
from fleet.verdicts import Verdict, verdict_on
from model_utils import make_lora_config
from tests.helpers import (
    ScriptedFleetTrainer,
    fleet_trainer,
    rloo_config,
    stock_trainer,
    toy_dataset,
    toy_model,
    toy_processor,
    weights_of,
)
from utils.tool_calls import ParseStatus, make_tool_call_str

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([[1.0, 0.0, 0.0, 0.0]], [[1.0, -1 / 3, -1 / 3, -1 / 3]]),
        ([[1.0, 0.0]], [[1.0, -1.0]]),
        ([[0.5, 0.5, 0.5]], [[0.0, 0.0, 0.0]]),
        ([[3.0, 0.0, 0.0], [0.0, 6.0, 0.0]], [[3.0, -1.5, -1.5], [-3.0, 6.0, -3.0]]),
        ([[1.0, NAN, 0.0]], [[1.0, 0.0, -1.0]]),
        ([[1.0, NAN, NAN]], [[0.0, 0.0, 0.0]]),
        ([[NAN, NAN]], [[0.0, 0.0]]),
    ],
)
def test_advantages_worked_by_hand(rewards: list[list[float]], advantages: list[list[float]]) -> None:
    torch.testing.assert_close(leave_one_out_advantages(torch.tensor(rewards)), torch.tensor(advantages))


def test_normalized_advantages_worked_by_hand() -> None:
    # advantages 1/2, -1 and 1/2 of the scored three: mean 0, deviation sqrt(3/4); nobody scored the fourth
    found = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 1.0, NAN]]), normalize=True)
    scale = math.sqrt(3 / 4) + 1e-4
    torch.testing.assert_close(found, torch.tensor([[0.5 / scale, -1 / scale, 0.5 / scale, 0.0]]))


def test_a_run_draws_the_episodes_of_its_last_generation_whole(tmp_path: Path) -> None:
    # two micro-batches of 8 episodes a generation, each taken twice: three steps need one generation, five need two
    generation = {"per_device_train_batch_size": 32, "steps_per_generation": 2, "num_iterations": 2}
    numbers = [num_episodes_of_run(rloo_config(tmp_path, max_steps=steps, **generation)) for steps in (3, 5)]
    assert numbers == [16, 32]


def test_advantages_equal_brute_force() -> None:
    rewards = torch.rand(20, 7, generator=torch.Generator().manual_seed(0))
    brute = [[float(row[i]) - sum(float(row[j]) for j in range(7) if j != i) / 6 for i in range(7)] for row in rewards]
    torch.testing.assert_close(leave_one_out_advantages(rewards), torch.tensor(brute))


def test_one_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="infinite"):
        leave_one_out_advantages(torch.tensor([[bad, 1.0]]))


def test_a_reward_loses_beta_times_its_sequences_kl() -> None:
    old = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -2.5, -1.0], [-1.0, -0.5, 0.0], [-1.0, -math.inf, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    kl = token_kl(old, reference, mask)
    # log-ratios 1 and 0.5, the third token padding; 0.5, 0 and -0.5; and one token that the reference never gives
    torch.testing.assert_close(kl, torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, -0.5], [0.0, math.inf, 0.0]]))
    found = shaped_rewards(torch.tensor([3.0, 1.0, 1.0]), kl, beta=0.1, clip_range=(0.0, 2.0))
    torch.testing.assert_close(found, torch.tensor([2.0 - 0.15, 1.0, NAN]), equal_nan=True)


def test_rewards_without_a_reference_are_clipped_alone() -> None:
    rewards = torch.tensor([-3.0, 0.5, NAN, 7.0])
    assert torch.equal(shaped_rewards(rewards[[0, 1, 3]], None, 0.1, None), rewards[[0, 1, 3]])
    found = shaped_rewards(rewards, None, 0.1, (-1.0, 1.0))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.5, NAN, 1.0]), equal_nan=True)


def test_the_loss_and_what_it_clips_worked_by_hand() -> None:
    # ratios 2, 2, 1/2, 1/2 and 1 in the range [0.9, 1.3]
    logps = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.0]).log() - 7.0
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 4.0])
    loss, is_below, is_above = clipped_loss(logps, torch.full((5,), -7.0), advantages, 0.1, 0.3)
    # a sum of 1.3 - 2 + 0.5 - 0.9 + 4
    assert loss.item() == pytest.approx(-2.9 / 5)
    assert (is_below.tolist(), is_above.tolist()) == ([False, False, False, True, False], [True] + [False] * 4)


def test_the_loss_and_its_gradient_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    logps, old, advantages = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    logps.requires_grad_()
    loss, _, _ = clipped_loss(logps, old, advantages, 0.2, 0.4)
    loss.backward()
    losses, gradients = [], []
    for logp, old_logp, advantage in zip(logps.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(logp) / math.exp(old_logp)
        is_clipped = ratio > 1.4 if advantage > 0 else ratio < 0.8
        bound = 1.4 if advantage > 0 else 0.8
        losses.append(-(bound if is_clipped else ratio) * advantage)
        gradients.append(0.0 if is_clipped else -ratio * advantage / 200)
    assert 20 < gradients.count(0.0) < 180
    assert loss.item() == pytest.approx(sum(losses) / 200)
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx(gradients)


def test_on_policy_the_gradient_is_reinforces() -> None:
    logps = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    advantages = torch.tensor([1.0, -0.25, -0.75])
    clipped_loss(logps, logps.detach(), advantages, 0.2, 0.2)[0].backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, -advantages / 3)


SETTINGS: dict[str, dict[str, Any]] = {
    "on-policy": {},
    "kl": {"beta": 0.05},
    "temperature": {"temperature": 0.7, "beta": 0.05},
    # which tokens may be drawn is no part of the distribution that is trained
    "temperature and top-p": {"temperature": 0.7, "top_p": 0.9, "num_iterations": 2},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two iterations that clip": {"num_iterations": 2, "max_steps": 4, "epsilon": 0.01, "epsilon_high": 0.02},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "normalized": {"normalize_advantages": True},
    "masked": {"mask_truncated_completions": True},
    "clipped rewards": {"reward_clip_range": (0.0, 0.5)},
    "lora": {"lora": True},
    "lora with kl": {"lora": True, "beta": 0.05},
    "kl over micro-batches": {"beta": 0.05, "gradient_accumulation_steps": 2},
    "normalized kl over micro-batches": {
        "beta": 0.05,
        "gradient_accumulation_steps": 2,
        "normalize_advantages": True,
    },
    "frozen vision": {"freeze": ("tower", "merger")},
    "frozen vision with kl": {"freeze": ("tower", "merger"), "beta": 0.05},
    "without shared prefix": {"shared_prefix": False},
    "without shared prefix, with kl": {"shared_prefix": False, "beta": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_completions_give_the_same_steps_as_stock_trl(name: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[name])
    lora = make_lora_config(rank=4) if settings.pop("lora", False) else None
    frozen, is_shared = settings.pop("freeze", ()), settings.pop("shared_prefix", True)
    # plain descent, because Adam would turn a rounding difference near zero into a whole step
    settings |= {"optim": "sgd", "learning_rate": 0.01}
    models = [toy_model(freeze=frozen) for _ in range(2)]
    stock = stock_trainer(rloo_config(tmp_path / "stock", **settings), lora, model=models[0])
    ours = fleet_trainer(
        rloo_config(tmp_path / "ours", **settings),
        ScriptedFleetTrainer,
        lora,
        model=models[1],
        shared_prefix=is_shared,
        vision_cache_bytes=2**20 if frozen or lora else 0,
    )
    stock.train()
    ours.train()
    assert ours._rollouts is not None and ours._rollouts.sampled.is_packed is is_shared
    assert (ours.vision_cache is not None) is bool(frozen or lora is not None)
    not_compared = {"step_time", "loss"}
    if "gradient_accumulation_steps" in settings:
        # a mean of micro-batches' means, and TRL deals rollouts to micro-batches at random where we keep groups whole
        not_compared.add("entropy")
    stock_lines = [line for line in stock.state.log_history if "reward" in line or "grad_norm" in line]
    our_lines = [line for line in ours.state.log_history if "reward" in line or "grad_norm" in line]
    assert len(our_lines) == len(stock_lines) == settings.get("max_steps", 2)
    for stock_line, our_line in zip(stock_lines, our_lines, strict=True):
        for figure in stock_line.keys() - not_compared:
            if not figure.startswith("epoch"):
                assert our_line[figure] == pytest.approx(stock_line[figure], rel=1e-4, abs=1e-6), figure
    if "epsilon" in settings:
        assert any(line["clip_ratio/low_mean"] > 0 for line in our_lines if "clip_ratio/low_mean" in line)
        assert any(line["clip_ratio/high_mean"] > 0 for line in our_lines if "clip_ratio/high_mean" in line)
    our_weights, moved = weights_of(ours.model), 0
    base = weights_of(toy_model())
    for weight_name, stock_weight in weights_of(stock.model).items():
        torch.testing.assert_close(our_weights[weight_name], stock_weight, rtol=1e-4, atol=1e-6, msg=weight_name)
        moved += weight_name in base and not torch.equal(stock_weight, base[weight_name])
    assert lora is not None or moved > (35 if frozen else 50)


class GradientKeeper(TrainerCallback):
    """Keeps every gradient of the first step as the optimizer finds it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.gradients = {
                name: parameter.grad.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["full", "lora", "frozen vision"])
def test_every_gradient_equals_stock_trls(kind: str, beta: float, checkpointing: bool, tmp_path: Path) -> None:
    lora = None
    if kind == "lora":
        lora = make_lora_config(rank=4)
        lora.init_lora_weights = False  # at zero, half of an adapter has no gradient
    keepers = []
    makers: tuple[Any, ...] = (stock_trainer, fleet_trainer)
    for make in makers:
        args = rloo_config(
            tmp_path, beta=beta, gradient_checkpointing=checkpointing, max_steps=1, max_grad_norm=0.0, num_iterations=1
        )
        torch.manual_seed(0)
        model, settings = toy_model(freeze=("tower", "merger") if kind == "frozen vision" else ()), dict[str, Any]()
        if make is fleet_trainer:
            settings = {"trainer_class": ScriptedFleetTrainer, "vision_cache_bytes": 0 if kind == "full" else 2**20}
        trainer = make(args, peft_config=lora, model=model, **settings)
        keepers.append(GradientKeeper())
        trainer.add_callback(keepers[-1])
        trainer.train()
    stocks, ours = (keeper.gradients for keeper in keepers)
    assert stocks.keys() == ours.keys() and len(ours) == {"full": 69, "lora": 42, "frozen vision": 39}[kind]
    largest = max(gradient.norm() for gradient in stocks.values())
    for name, gradient in stocks.items():
        scale = max(gradient.norm(), 1e-5 * largest)
        assert (ours[name] - gradient).norm() <= 1e-4 * scale, name


class LongFleetTrainer(FleetRLOOTrainer):
    """Answers at a length that makes packed rows more work than rows of their own."""

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        # the second step's are longer still, so that their reason is another
        length = 600 + 100 * self.state.global_step
        return Drawn([[40 + row % 7] * length for row in range(len(batch["episodes"]) * self.num_generations)])


class LongStockTrainer(RLOOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        return [[40 + row % 7] * (600 + 100 * self.state.global_step) for row in range(len(prompt_ids))]


def test_long_completions_are_trained_on_as_trl_does_and_said_once(tmp_path: Path, caplog: Any) -> None:
    settings = {"beta": 0.05, "max_steps": 2, "optim": "sgd", "learning_rate": 0.01, "max_completion_length": 600}
    ours = fleet_trainer(rloo_config(tmp_path / "ours", **settings), LongFleetTrainer)
    stock = stock_trainer(rloo_config(tmp_path / "stock", **settings), trainer_class=LongStockTrainer)
    with caplog.at_level("INFO", logger="fleet"):
        ours.train()
    stock.train()
    assert ours._rollouts is not None and not ours._rollouts.sampled.is_packed
    assert [line["token_ratio"] for line in ours.state.log_history if "token_ratio" in line] == [1.0, 1.0]
    told = [record.message for record in caplog.records if "times the work" in record.message]
    assert len(told) == 1
    for name, weight in weights_of(stock.model).items():
        torch.testing.assert_close(weights_of(ours.model)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, False),
        ({"beta": 0.05}, False),
        ({"gradient_accumulation_steps": 4}, False),
        ({"gradient_accumulation_steps": 4, "beta": 0.05}, False),
        ({"normalize_advantages": True, "beta": 0.05}, False),
        ({"gradient_accumulation_steps": 4, "beta": 0.05, "normalize_advantages": True}, True),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 2}, True),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, True),
    ],
)
def test_old_log_probabilities_have_a_pass_only_where_they_need_one(
    changes: dict[str, Any], needs: bool, tmp_path: Path
) -> None:
    assert needs_old_logps(rloo_config(tmp_path, **changes)) is needs


def forward_tokens(model: Any) -> list[tuple[bool, int]]:
    """(whether gradients are on, rows x tokens) of every pass through the language model, decoding left out."""
    passes: list[tuple[bool, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows, tokens = kwargs["inputs_embeds"].shape[:2]
        if tokens > 1:
            passes.append((torch.is_grad_enabled(), rows * tokens))

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


def test_a_step_passes_each_prompt_once_to_generate_and_once_to_train(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=1))
    passes = forward_tokens(trainer.model)
    trainer.train()
    (prefill_has_gradient, prefill), (training_has_gradient, packed) = passes
    assert (prefill_has_gradient, training_has_gradient) == (False, True)
    lengths = trainer.data_collator([toy_dataset()[0]] * 4)["attention_mask"].sum(dim=1)
    drafts = {tuple(toy_processor().tokenizer(make_tool_call_str(index))["input_ids"]) for index in range(4)}
    num_drafted = len({ids[:end] for ids in drafts for end in range(1, len(ids) + 1)})
    assert prefill == 2 * (int(lengths[0]) + num_drafted), "the prompts, and behind each the four calls as one tree"
    ended = [len(toy_processor().tokenizer(rollout.completion)["input_ids"]) + 1 for rollout in trainer.latest_rollouts]
    assert packed <= 2 * (int(lengths[0]) - 1 + max(sum(ended[:4]), sum(ended[4:])) + 8)
    line = trainer.state.log_history[0]
    assert line["token_ratio"] > 2


def test_kl_takes_one_pass_of_the_reference_and_none_more_of_the_policy(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=1, beta=0.05))
    passes, of_reference = forward_tokens(trainer.model), forward_tokens(trainer.ref_model)
    trainer.train()
    assert [has_gradient for has_gradient, _ in passes] == [False, True]
    assert of_reference == [(False, passes[1][1])], "the reference passes the same packed rows, once"


def test_an_image_is_encoded_once_a_run_where_vision_is_frozen(tmp_path: Path) -> None:
    args = rloo_config(tmp_path, max_steps=6, beta=0.05)
    model = toy_model(freeze=("tower", "merger"))
    trainer = fleet_trainer(args, ScriptedFleetTrainer, model=model, vision_cache_bytes=2**20)
    patches: list[int] = []
    trainer.model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(args[0].shape[0]), with_kwargs=True
    )
    trainer.train()
    # the toy's twelve pictures of 16 patches, each once and alone, for generation, reference and training of six steps
    assert patches == [16] * 12
    rates = [line["vision_cache/hit_rate"] for line in trainer.state.log_history if "reward" in line]
    assert sum(1 - rate for rate in rates) == pytest.approx(12 / 8), "each step shows 8 pictures"
    assert max(rates) == 1


def test_a_cache_of_a_tower_that_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass --freeze tower,merger or --vision_cache_mib 0"):
        fleet_trainer(rloo_config(tmp_path), vision_cache_bytes=2**20)


def test_our_advantages_equal_stock_trls(tmp_path: Path) -> None:
    stock = stock_trainer(rloo_config(tmp_path / "stock"))
    ours = fleet_trainer(rloo_config(tmp_path / "ours"), ScriptedFleetTrainer)
    rows = [toy_dataset()[index] for index in (0, 1) for _ in range(4)]
    stock.model.train()
    ours.model.train()
    stock_advantages = stock._generate_and_score_completions(rows)["advantages"]
    our_advantages = ours._prepare_inputs(ours.data_collator(rows))["rollouts"].advantages_B
    assert our_advantages.abs().sum() > 0
    torch.testing.assert_close(our_advantages, stock_advantages)


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[list[float], list[str]]:
        trainer = fleet_trainer(rloo_config(tmp_path, seed=seed, max_steps=3), dataset=toy_dataset(seed=seed))
        trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        return norms, [rollout.completion for rollout in trainer.latest_rollouts]

    first, again, other = run(5), run(5), run(6)
    assert first == again
    assert first != other


def test_metrics_of_a_step(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=1), ScriptedFleetTrainer)
    trainer.train()
    line = trainer.state.log_history[0]
    # by the script: the 8 rollouts are calls 1, 7, 0, none and none, 2, 1, 7 of 0..3, with 0 right
    assert sorted(str(rollout.verdict.call) for rollout in trainer.latest_rollouts) == sorted(
        ["1", "7", "0", "None", "None", "2", "1", "7"]
    )
    assert line["accuracy"] == pytest.approx(1 / 8)
    assert line["reward"] == pytest.approx((1 + 3 * 0.05) / 8)
    assert line["parse/no_call"] == pytest.approx(2 / 8)
    assert line["outcome/index_out_of_range"] == pytest.approx(2 / 8)
    assert (line["groups/mixed"], line["groups/all_wrong"], line["groups/all_right"]) == (0.5, 0.5, 0.0)
    assert line["chosen/1"] == pytest.approx(2 / 8)
    assert {f"parse/{status}" for status in ParseStatus} | {f"outcome/{outcome}" for outcome in Outcome} <= line.keys()
    assert line["step_time_s"] > 0 and line["rollouts_per_s"] > 0
    assert {rollout.advantage for rollout in trainer.latest_rollouts} != {0.0}


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_completion_is_judged_once(beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def counting(env: Any, episode: Any, completion: str, **kwargs: Any) -> Verdict:
        judged.append(completion)
        return verdict_on(env, episode, completion, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith(("fleet.", "reward")) and getattr(module, "verdict_on", None) is verdict_on:
            monkeypatch.setattr(module, "verdict_on", counting)
    trainer = fleet_trainer(rloo_config(tmp_path, max_steps=2, beta=beta), ScriptedFleetTrainer)
    trainer.train()
    assert len(judged) == 16, "two steps of 8 rollouts"
    assert judged[8:] == [rollout.completion for rollout in trainer.latest_rollouts]


@pytest.mark.parametrize("media_token", ["<|image_pad|>", "<|video_pad|>"])
def test_media_tokens_are_never_sampled(media_token: str, tmp_path: Path) -> None:
    model, tokenizer = toy_model(), toy_processor().tokenizer
    media_id, call_id = tokenizer.convert_tokens_to_ids(media_token), tokenizer.convert_tokens_to_ids("<tool_call>")
    with torch.no_grad():
        # wherever the model wants to open a call, it now wants the media token far more
        model.lm_head.weight[media_id] = 20 * model.lm_head.weight[call_id]
    trainer = fleet_trainer(rloo_config(tmp_path), model=model)
    batch: Any = dict(trainer.data_collator([toy_dataset()[index] for index in (0, 1) for _ in range(4)]))
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    unguarded = model.generate(**{name: batch[name] for name in names}, max_new_tokens=4, do_sample=False)
    assert media_id in unguarded[:, batch["input_ids"].shape[1] :], "the trap must be one"
    sampled = trainer._draw(batch, None).completion_ids
    assert all(media_id not in ids for ids in sampled)


@pytest.mark.parametrize(
    ("steps", "accumulation", "per_generation", "iterations", "episodes"),
    [(3, 1, 1, 1, 6), (3, 2, 2, 1, 12), (4, 1, 1, 2, 4), (5, 1, 4, 1, 16), (3, 1, 1, 2, 4)],
)
def test_a_run_draws_each_episode_once(
    steps: int, accumulation: int, per_generation: int, iterations: int, episodes: int, tmp_path: Path
) -> None:
    args = rloo_config(
        tmp_path,
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
    )
    trainer = fleet_trainer(args, ScriptedFleetTrainer)
    assert len(trainer.train_dataset) == episodes
    seen: list[int] = []
    for batch in trainer.get_train_dataloader():
        seen += [episode for episode in batch["episodes"] if episode not in seen]
    assert seen == [toy_dataset().env.episode(index) for index in range(episodes)]


def test_a_split_group_is_refused(tmp_path: Path) -> None:
    args = rloo_config(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="per_device_train_batch_size=6 is not a multiple of num_generations=4"):
        fleet_trainer(args)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("_generate_single_turn", ["self", "prompt_ids", "images", "multimodal_fields"]),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_trl_still_has_the_internals_we_lean_on(method: str, parameters: list[str]) -> None:
    found = list(inspect.signature(getattr(RLOOTrainer, method)).parameters)
    assert found == parameters, (
        f"TRL changed RLOOTrainer.{method}: trainer.py and policy_passes.py must follow before trl's pin moves"
    )


def test_trl_still_has_the_attributes_we_read(tmp_path: Path) -> None:
    read = {"_current_train_step_time", "_metrics", "_step", "_tokenizer", "beta", "eos_token_ids", "epsilon_high",
            "epsilon_low", "generation_config", "mask_truncated_completions", "normalize_advantages",
            "num_generations", "num_iterations", "ref_model", "reward_clip_range", "reward_func_names",
            "reward_weights"}  # fmt: skip
    lost = read - vars(stock_trainer(rloo_config(tmp_path))).keys()
    assert not lost, f"TRL's trainer has no {sorted(lost)}: trainer.py and policy_passes.py must follow"


def test_trl_still_scores_with_the_arguments_we_pass() -> None:
    found = inspect.signature(RLOOTrainer._get_per_token_logps_and_entropies).parameters
    ours = {"model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "pixel_values", "image_grid_thw",
            "num_images", "mm_token_type_ids", "compute_entropy"}  # fmt: skip
    assert ours <= found.keys(), f"TRL changed _get_per_token_logps_and_entropies: {sorted(ours - found.keys())} gone"
