"""Completions that no healthy model writes: the run goes on, its figures are right, and what it leaves can be read."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file

import training
from environment import Outcome
from fleet.errors import RunStopped
from fleet.evaluation import answering
from fleet.qwen.tree_sampling import Samples
from fleet.rl import drawing
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from report import write_report
from tests.conftest import call_text
from tests.helpers import StepKeeper, fleet_trainer, rloo_config, toy_processor


def ids_of(text: str) -> list[int]:
    return toy_processor().tokenizer(text)["input_ids"]


def ids_of_bytes(content: bytes) -> list[int]:
    """One token a byte, as a byte-level tokenizer spells them: a printable byte as itself, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in content]
    return toy_processor().tokenizer.convert_tokens_to_ids(letters)


END = ids_of("<|im_end|>")
CALL = ids_of("<tool_call>")
IMAGE, VIDEO = ids_of("<|image_pad|>"), ids_of("<|video_pad|>")
RIGHT = ids_of(call_text(0)) + END

# two groups of four, and what the judge reads of them
BATCHES: dict[str, tuple[list[list[int]], list[str]]] = {
    "only the end": ([END] * 8, [""] * 8),
    "nothing": ([[]] * 8, [""] * 8),
    "no end": (
        [CALL * 32, ids_of("no call"), RIGHT[:-1], CALL * 9] * 2,
        ["<tool_call>" * 32, "no call", call_text(0), "<tool_call>" * 9] * 2,
    ),
    "media tokens": (
        [IMAGE + END, CALL + IMAGE + CALL + END, VIDEO, CALL + VIDEO, IMAGE * 8, RIGHT[:-1] + IMAGE, VIDEO * 2, RIGHT],
        ["", "<tool_call>", "", "<tool_call>", "", call_text(0), "", call_text(0)],
    ),
    "only special tokens": (
        [ids_of("<|im_start|><|vision_start|>") + END, ids_of("<|vision_pad|>") * 3, ids_of("<|endoftext|>"), END] * 2,
        ["<|im_start|><|vision_start|>", "<|vision_pad|>" * 3, "<|endoftext|>", ""] * 2,
    ),
    "bytes that are no UTF-8": (
        list(map(ids_of_bytes, (b"\xc3", b"\xff\xfe", b"\xed\xa0\x80", b"\x00\x1b[2J\r"))) * 2,
        ["\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd", "\x00\x1b[2J\r"] * 2,
    ),
    "one token": ([ids_of("a")] * 4 + [CALL, END, ids_of("0"), ids_of("{")], ["a"] * 4 + ["<tool_call>", "", "0", "{"]),
    "all alike and right": ([RIGHT] * 8, [call_text(0)] * 8),
    "very uneven": ([END, ids_of("a b c ") * 100, RIGHT, []] * 2, ["", "a b c " * 100, call_text(0), ""] * 2),
}  # fmt: skip


class OddFleetTrainer(FleetRLOOTrainer):
    """Samples a batch of BATCHES a generation, in turn, in place of either way to generate."""

    num_generations_done = 0

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        self.num_generations_done += 1
        rows, _ = list(BATCHES.values())[self.num_generations_done - 1]
        return Drawn([list(row) for row in rows])


class OddStepKeeper(StepKeeper):
    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer, self.texts, self.outcomes = trainer, list[list[str]](), list[list[Outcome]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.texts.append([rollout.completion for rollout in self.trainer.latest_rollouts])
        self.outcomes.append([rollout.verdict.outcome for rollout in self.trainer.latest_rollouts])


def place_reward(completions: list[str], **columns: Any) -> list[float]:
    """Other advantages for every rollout, so that odd completions are trained on, alike or not."""
    return [float(place % 4) for place, _ in enumerate(completions)]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated ones masked": {"mask_truncated_completions": True},
    "kl, normalized, two iterations": {"beta": 0.05, "num_iterations": 2, "normalize_advantages": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_run_goes_on_and_packed_rows_learn_what_trls_own_passes_learn(name: str, tmp_path: Path) -> None:
    settings, runs = SETTINGS[name], []
    for shared_prefix in (True, False):
        num_steps = len(BATCHES) * settings.get("num_iterations", 1)
        # plain descent, because Adam would turn a rounding difference near zero into a whole step
        args = rloo_config(tmp_path, max_steps=num_steps, optim="sgd", learning_rate=1e-4, **settings)
        trainer = fleet_trainer(args, OddFleetTrainer, reward_function=place_reward, shared_prefix=shared_prefix)
        keeper = OddStepKeeper(trainer)
        trainer.add_callback(keeper)
        trainer.train()
        assert trainer.state.global_step == num_steps
        assert all(all(bool(weight.isfinite().all()) for weight in weights.values()) for weights in keeper.weights)
        generations = slice(settings.get("num_iterations", 1) - 1, None, settings.get("num_iterations", 1))
        assert keeper.texts[generations] == [texts for _, texts in BATCHES.values()]
        rights = [[text == call_text(0) for text in texts] for texts in keeper.texts]
        assert [[outcome == "correct" for outcome in outcomes] for outcomes in keeper.outcomes] == rights
        lines = [line for line in trainer.state.log_history if "grad_norm" in line]
        assert [line["skipped_steps"] for line in lines] == [0] * num_steps
        for line, figure in itertools.product(lines, ("loss", "grad_norm", "reward", "accuracy", "entropy", "kl")):
            assert line.get(figure) is None or math.isfinite(line[figure]), (line, figure)
        runs.append(lines)
    packed, unpacked = runs
    for number, (ours, trls) in enumerate(zip(packed, unpacked, strict=True)):
        figures = {"grad_norm", "reward", "entropy", "kl", "accuracy", "completions/clipped_ratio"} & ours.keys()
        for figure in figures:
            assert ours[figure] == pytest.approx(trls[figure], rel=1e-3, abs=1e-4), (number, figure)
    # two batches have no end at all: masked, they leave nothing to train on
    norms_of_truncated = [line["grad_norm"] for line in packed if line.get("completions/clipped_ratio") == 1]
    is_masked = "mask_truncated_completions" in settings
    assert [norm == 0 for norm in norms_of_truncated] == [is_masked] * 2
    assert max(line["grad_norm"] for line in packed) > 1


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def test_a_whole_command_goes_through_and_leaves_files_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for completions, _ in BATCHES.values() for row in completions]
    in_training, in_evaluation = itertools.cycle(rows), itertools.cycle(rows)

    def forced(source: "itertools.cycle[list[int]]") -> Any:
        def sample_batch(model: Any, batch: Any, *_: Any, **__: Any) -> list[Samples]:
            chosen = list(itertools.islice(source, len(batch["episodes"]) * batch["group_size"]))
            chosen = [row if row[-1:] == END else row + END for row in chosen]
            lengths, logps = [[len(row)] for row in chosen], [[0.0] * len(row) for row in chosen]
            return [Samples(chosen, lengths, logps, [], [], [list(row) for row in chosen], 1, 0, None)]

        return sample_batch

    monkeypatch.setattr(drawing, "sample_batch", forced(in_training))
    monkeypatch.setattr(answering, "sample_batch", forced(in_evaluation))
    run = tmp_path / "run"
    num_steps = len(BATCHES)
    training.main([
        "--per_device_batch_size", "2", "--train_steps", str(num_steps), "--sample_steps", "1",
        "--output_dir", str(run), "--eval_steps", str(num_steps), "--eval_episodes", "4", "--save_steps", "100",
    ])  # fmt: skip
    files = {}
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        content = (run / name).read_bytes().decode("utf-8")
        files[name] = [json.loads(line, parse_constant=refuse_constant) for line in content.splitlines()]
    steps = [line for line in files["metrics.jsonl"] if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, num_steps + 1))
    assert [line["skipped_steps"] for line in steps] == [0] * num_steps
    completions = [rollout["completion"] for group in files["rollouts.jsonl"] for rollout in group["rollouts"]]
    assert completions == [text for _, texts in BATCHES.values() for text in texts]
    assert [document["step"] for document in files["evaluations.jsonl"]] == [0, num_steps]
    assert (run / "report.html").stat().st_size > 10_000
    weights = load_file(run / "final" / "model.safetensors").values()
    assert all(weight.isfinite().all() for weight in weights)


def test_a_reward_that_is_never_a_number_teaches_nothing_which_the_run_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "never.py").write_text("def score(completions, **columns):\n    return [None for _ in completions]\n")
    run = tmp_path / "run"
    with pytest.raises(
        RunStopped, match="3 optimizer steps in a row taught nothing, as no group has two rollouts that count"
    ):
        training.main([
            "--per_device_batch_size", "2", "--train_steps", "3", "--sample_steps", "1", "--report_to", "none",
            "--reward", f"{tmp_path}/never.py:score", "--output_dir", str(run),
        ])  # fmt: skip
    lines = [json.loads(line, parse_constant=refuse_constant) for line in (run / "metrics.jsonl").open()]
    assert [("reward" in line, line["rewards/dropped"], line["grad_norm"]) for line in lines] == [(False, 1, 0)] * 3
    groups = [json.loads(line, parse_constant=refuse_constant) for line in (run / "rollouts.jsonl").open()]
    kept = [(rollout["reward"], rollout["advantage"]) for group in groups for rollout in group["rollouts"]]
    assert kept == [(None, 0.0)] * 24
    assert write_report(run).exists()
