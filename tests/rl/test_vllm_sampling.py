"""What vLLM is given and what is compared, with a stand-in for vLLM; tests/test_vllm.py asks a real one."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dataset import repeat_episodes
from fleet.command.options import parse_options
from fleet.command.preflight import require_vllm_version
from fleet.episode_numbers import FURTHER_STRIDE
from fleet.errors import RunRefused, RunStopped, UsageError
from fleet.rl import drawing
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.rl.vllm_sampling import (
    VLLMSampler,
    collapse_runs,
    logprob_gaps,
    require_small_gap,
    run_lengths,
    sampling_kwargs,
    where_prompts_part,
)
from fleet.run.build import training
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor, weights_of
from utils.tool_calls import make_tool_call_str

PAD = toy_processor().image_token_id


def expand(ids: list[int], num_tokens: int = 4) -> list[int]:
    """What vLLM does to ids: each placeholder becomes an image's tokens."""
    return [token for value in ids for token in [value] * (num_tokens if value == PAD else 1)]


class StandIn:
    """Answers as TRL's VLLMGeneration does, from the trainer's own model, with a fault if it is given one."""

    def __init__(self, trainer: Any, mode: str, fault: str = ""):
        self.trainer, self.mode, self.fault, self.top_p = trainer, mode, fault, 1.0
        self.max_model_length: int | None = None
        self.max_completion_length = 32
        self.accelerator = trainer.accelerator
        self.calls: list[str] = []
        self.sent: list[list[int]] = []
        engine = SimpleNamespace(reset_encoder_cache=lambda: self.calls.append("encoder cache reset"))
        self.llm = SimpleNamespace(llm_engine=engine)
        session = SimpleNamespace(post=self._post)
        self.vllm_client = SimpleNamespace(base_url="http://server:8000", session=session)

    def _post(self, url: str) -> Any:
        self.calls.append(url)
        return SimpleNamespace(status_code=404 if self.fault == "no route" else 200)

    def sync_weights(self) -> None:
        self.calls.append("weights sent")

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int) -> Any:
        self.calls.append("generated")
        self.sent = prompts
        used = [expand(ids) if self.mode == "colocate" else ids for ids in prompts]
        if self.fault == "prompt":
            used = [[*ids[:-1], ids[-1] + 1] for ids in used]
        completions = toy_processor().tokenizer(self.texts(num_generations))["input_ids"]
        return used, completions, [[[value] for value in row] for row in self._logps(completions)], None

    def texts(self, group_size: int) -> list[str]:
        return ['<tool_call>\n{"name"<|im_end|>'] * group_size * len(self.trainer.latest_batch["episodes"])

    def _logps(self, completions: list[list[int]]) -> list[list[float]]:
        rows = repeat_episodes(self.trainer.latest_batch, 0, len(self.trainer.latest_batch["episodes"]))
        ids_BT = pad_sequence([torch.tensor(ids) for ids in completions], batch_first=True)
        sequence = torch.cat([rows["prompt_ids"], ids_BT], dim=1)
        with torch.no_grad():
            logits = self.trainer.model(
                input_ids=sequence,
                attention_mask=torch.cat([rows["prompt_mask"], torch.ones_like(ids_BT)], dim=1),
                mm_token_type_ids=(sequence == PAD).long(),
                pixel_values=rows["pixel_values"],
                image_grid_thw=rows["image_grid_thw"],
            ).logits[:, -ids_BT.shape[1] - 1 : -1]
        values = logits.log_softmax(dim=-1).gather(2, ids_BT[:, :, None]).squeeze(2)
        values -= 0.5 if self.fault == "weights" else 0.0
        return [row[: len(ids)] for row, ids in zip(values.tolist(), completions, strict=True)]


class TrainerWithStandIn(FleetRLOOTrainer):
    """The real trainer, whose vLLM is a stand-in."""

    mode, fault, kind = "colocate", "", StandIn

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stand_in: Any = self.kind(self, self.mode, self.fault)
        self.vllm = VLLMSampler(self.stand_in, self.processing_class, max_gap=0.1)
        self.draws_on_trees = False

    def _draw(self, batch: Any, *everything: Any) -> Any:
        self.latest_batch = batch
        return super()._draw(batch, *everything)


def trainer_with(
    tmp_path: Path, mode: str = "colocate", fault: str = "", kind: type[StandIn] = StandIn, settings: Any = None,
    **changes: Any,
) -> Any:  # fmt: skip
    """settings: TrainerSettings' fields. changes: of TRL's arguments."""
    trainer_class = type("Kind", (TrainerWithStandIn,), {"mode": mode, "fault": fault, "kind": kind})
    args = rloo_config(tmp_path, **{"per_device_train_batch_size": 4, "learning_rate": 1e-3, **changes})
    return fleet_trainer(args, trainer_class, **(settings or {}))


def lengths_sent(trainer: Any) -> list[int]:
    return run_lengths(trainer.stand_in.sent[0], PAD)


@pytest.mark.parametrize(
    ("mode", "runs", "reset"),
    [("colocate", [1, 1, 1, 1], "encoder cache reset"),
     ("server", [4, 4, 4, 4], "http://server:8000/reset_encoder_cache")],
)  # fmt: skip
def test_prompts_and_caches_of_each_mode(mode: str, runs: list[int], reset: str, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, mode)
    trainer.train()
    assert lengths_sent(trainer) == runs
    assert trainer.stand_in.calls == ["weights sent", reset, "generated"] * 2
    gaps = [line["vllm/logprob_gap"] for line in trainer.state.log_history if "reward" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_weights_are_sent_once_for_generations_of_one_step(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]] * 4)
    trainer.latest_batch = batch
    for step in (0, 0, 1):
        trainer.vllm.sample(batch, step)
    assert trainer.stand_in.calls.count("weights sent") == 2


@pytest.mark.parametrize(
    ("mode", "fault", "words"),
    [
        ("colocate", "prompt", "vLLM used another prompt than Fleet scores: 1.. tokens for 1"),
        ("colocate", "weights", "their log-probabilities are 0.500 apart on average and 0.500 at most, wanted 0.1 at"),
        ("server", "weights", "their log-probabilities are 0.500 apart on average"),
        ("server", "no route", "http://server:8000 answered 404 to /reset_encoder_cache"),
    ],
)
def test_what_differs_stops_the_run_before_anything_is_trained(
    mode: str, fault: str, words: str, tmp_path: Path
) -> None:
    require_stop(trainer_with(tmp_path, mode, fault), words)


@pytest.mark.parametrize("changes", [{"num_iterations": 2}, {"gradient_accumulation_steps": 2, "beta": 0.1}])
def test_it_stops_before_the_first_step_wherever_scores_come_from(changes: dict[str, Any], tmp_path: Path) -> None:
    require_stop(trainer_with(tmp_path, fault="weights", **changes), "0.500 apart on average and 0.500 at most")


def require_stop(trainer: Any, words: str) -> None:
    before = weights_of(trainer.model)
    with pytest.raises(RunRefused, match=words):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_a_prompt_that_differs_later_stops_the_run_with_what_it_has(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)

    def spoil_second(*args: Any, **kwargs: Any) -> Any:
        trainer.stand_in.fault = "prompt" if trainer.state.global_step else ""
        return sample(*args, **kwargs)

    sample, trainer.vllm.sample = trainer.vllm.sample, spoil_second
    with pytest.raises(RunStopped, match="vLLM used another prompt"):
        trainer.train()


class RightIfFurther(StandIn):
    """All wrong, but of an episode that stands in for another half is right."""

    def texts(self, group_size: int) -> list[str]:
        numbers = self.trainer.latest_batch["numbers"]
        picks = [(place % 2 if number >= FURTHER_STRIDE else 1) for number in numbers for place in range(group_size)]
        return [make_tool_call_str(pick) + "<|im_end|>" for pick in picks]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_groups_of_one_accord_are_replaced_with_the_figures_of_their_own_draws(mode: str, tmp_path: Path) -> None:
    settings = {"dynamic_sampling": 2, "correction_cap": 2.0}
    trainer = trainer_with(
        tmp_path, mode, kind=RightIfFurther, settings=settings, max_steps=1, per_device_train_batch_size=8
    )
    trainer.train()
    # weights are sent once for both draws
    assert [call for call in trainer.stand_in.calls if "reset" not in call] == ["weights sent"] + ["generated"] * 2
    numbers = [record.episode.episode_index for record in trainer.latest_rollouts[::4]]
    assert numbers == [FURTHER_STRIDE, FURTHER_STRIDE + 1]
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    assert line["dynamic_sampling/replaced"] == 1.0
    assert line["vllm/logprob_gap_max"] < 1e-4
    assert line["vllm/correction_mean"] == pytest.approx(1.0, abs=1e-3)
    assert line["vllm/effective_samples"] == pytest.approx(1.0, abs=1e-3)


def test_gaps_count_what_top_p_cannot_explain() -> None:
    own = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    sampler = torch.tensor([-1.0, -0.9, -1.3, -0.2])
    assert logprob_gaps(own, sampler, 1.0).tolist() == pytest.approx([0.0, 0.1, 0.3, 0.8])
    # a nucleus of 0.9 raises by -log(0.9) = 0.10536 at most
    assert logprob_gaps(own, sampler, 0.9).tolist() == pytest.approx([0.0, 0.0, 0.3, 0.69464], abs=1e-5)


@pytest.mark.parametrize("mean", [0.11, math.nan, math.inf])
def test_a_gap_above_the_limit_is_refused(mean: float) -> None:
    require_small_gap(0.1, 3.0, 0.1)
    with pytest.raises(RunRefused, match="--vllm_max_logprob_gap"):
        require_small_gap(mean, 3.0, 0.1)


def test_prompts_that_part_are_shown_where_they_do() -> None:
    ids = toy_processor().tokenizer("Pick the red circle.")["input_ids"]
    text = where_prompts_part([*ids, PAD, PAD], [*ids, PAD], toy_processor())
    assert f"{len(ids) + 1} tokens for {len(ids) + 2}, with [1] tokens an image for [2]" in text
    assert f"part at token {len(ids) + 1}" in text


@pytest.mark.parametrize(
    ("ids", "collapsed", "runs"),
    [([], [], []), ([7], [7], [1]), ([7, 7], [7], [2]), ([1, 7, 7, 2, 7], [1, 7, 2, 7], [2, 1]), ([1, 1], [1, 1], [])],
)
def test_runs_of_placeholders(ids: list[int], collapsed: list[int], runs: list[int]) -> None:
    assert collapse_runs(ids, 7) == collapsed and run_lengths(ids, 7) == runs


def test_media_tokens_are_banned_and_fleets_ends_end() -> None:
    assert sampling_kwargs([5, 6], [2, 0]) == {"logit_bias": {5: -100.0, 6: -100.0}, "stop_token_ids": [2, 0]}


@pytest.mark.parametrize(
    ("version", "is_fine"),
    [("0.21.3", False), ("0.22.0", True), ("0.31.0", True), ("0.31.1+cu129", True), ("0.32.0", False), ("1.0", False),
     ("0.31.0rc1", True)],
)  # fmt: skip
def test_versions_that_trl_does_not_talk_to_are_refused(version: str, is_fine: bool) -> None:
    if is_fine:
        require_vllm_version(version)
        return
    with pytest.raises(UsageError, match=rf"vLLM {version} is installed, but TRL 1.16 works with 0.22 to 0.31"):
        require_vllm_version(version)


@pytest.mark.parametrize("error", [ConnectionError("can't be reached"), RuntimeError("no weight-transfer engine")])
def test_a_server_that_cannot_be_used_is_said_in_a_line(error: Exception) -> None:
    def attempt(*flags: str) -> None:
        with training.server_problems_said(parse_options(["--use_vllm", *flags])):
            raise error

    server = ["--vllm_mode", "server", "--vllm_server_port", "8001"]
    with pytest.raises(UsageError, match=f"no vLLM server can be used at 127.0.0.1:8001 .{error}.; start one as docs"):
        attempt(*server)
    # a fault beside a colocated vLLM is no server's
    with pytest.raises(type(error)):
        attempt()


def test_the_trainer_gives_trl_the_ban(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Stop(Exception):
        pass

    def stop(self: Any, **kwargs: Any) -> None:
        given.append(kwargs["args"])
        raise Stop

    monkeypatch.setattr(drawing.VisionRate, "__init__", stop)
    args = rloo_config(tmp_path, use_vllm=True)
    with pytest.raises(Stop):
        fleet_trainer(args, model=toy_model())
    tokenizer = toy_processor().tokenizer
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    kwargs = given[0].generation_kwargs
    assert kwargs["logit_bias"] == {image: -100.0, video: -100.0}
    assert tokenizer.eos_token_id in kwargs["stop_token_ids"]
