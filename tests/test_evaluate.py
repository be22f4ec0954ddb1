"""The second command line on the toy model: what it writes, what it takes from a run, and what it refuses."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import training
from fleet.command.evaluate_options import parse_evaluate_options, resolve_evaluate_options
from fleet.command.options import parse_options
from fleet.errors import UsageError
from fleet.run_folder import read_jsonl
from fleet.toy.model import SIGHTED, toy_model_path
from tests import HANG_S
from tests.helpers import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "docs" / "evaluation.schema.json").read_text())
UNWATCHED_RUN = ["--fixed_correct_index", "none", "--per_device_batch_size", "2", "--sample_steps", "0",
                 "--train_steps", "3"]  # fmt: skip
QUICK_RUN = [*UNWATCHED_RUN, "--eval_steps", "2", "--eval_episodes", "12"]


def scored(output: Path, *flags: str) -> dict[str, Any]:
    evaluate.main([*flags, "--output", str(output)])
    document = json.loads(output.read_text())
    Draft202012Validator(SCHEMA).validate(document)
    return document


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "look"
    training.main([*QUICK_RUN, "--keep_best", "--learning_rate", "5e-4", "--output_dir", str(folder)])
    return folder


def without_times(path: Path) -> list[dict[str, Any]]:
    passing = {"step_time_s", "rollouts_per_s", "epoch", "eval/seconds"}
    return [{name: value for name, value in line.items() if name not in passing} for line in read_jsonl(path)]


def test_the_sighted_toy_is_half_sighted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--fixed_correct_index", "none", "--eval_episodes", "256", "--num_samples", "2"]
    document = scored(tmp_path / "new" / "evaluation.json", *flags)
    figures = {name: estimate["value"] for name, estimate in document["controls"].items()}
    assert 0.3 <= document["greedy_accuracy"]["value"] <= 0.6
    assert 0.2 <= figures["blank_images"] <= 0.3
    assert figures["permuted_order"] > 0.5 and figures["swapped_images"] < 0.4, "a habit of position"
    assert document["outcome"]["unparsable"]["value"] <= 0.02
    # what it answers is not deterministic, but what it is measured on is
    assert document["episodes"] == document["greedy_accuracy"]["n"] == 256 and document["seed"] == 2_000_000_000
    assert document["chance"]["value"] == 0.25


def test_the_schema_is_strict(tmp_path: Path) -> None:
    document = scored(
        tmp_path / "e.json", "--eval_episodes", "4", "--num_samples", "0", "--fixed_correct_index", "none"
    )
    validator = Draft202012Validator(SCHEMA)
    assert validator.is_valid(document) and document["schema_version"] == 2
    for name in ("greedy_accuracy", "pass_at_k", "chance", "best_constant_choice", "controls"):
        assert not validator.is_valid({key: value for key, value in document.items() if key != name})
    assert not validator.is_valid(document | {"more": 1})
    assert not validator.is_valid(document | {"greedy_accuracy": {"value": 1.5, "ci95": [0, 1], "n": 4}})


def test_a_trained_model_is_compared_with_its_base(run: Path, tmp_path: Path) -> None:
    few = ["--eval_episodes", "24", "--num_samples", "2"]
    document = scored(tmp_path / "e.json", "--model_id", str(run / "final"), "--baseline", "toy", *few)
    baseline = document["baseline"]
    difference = document["greedy_accuracy"]["value"] - baseline["greedy_accuracy"]["value"]
    assert baseline["difference"]["value"] == pytest.approx(difference)
    assert (document["model"], baseline["model"]) == (str(run / "final"), "toy")
    alone = scored(
        tmp_path / "alone.json", "--fixed_correct_index", "none", "--eval_episodes", "24", "--num_samples", "2"
    )
    # the run's own episodes are passed over for both models, so that they are asked the same
    if document["passed_over"] == 0:
        assert baseline["greedy_accuracy"] == alone["greedy_accuracy"]
        assert baseline["controls"] == alone["controls"]


def test_flags_that_are_not_given_are_the_runs_own(run: Path, tmp_path: Path) -> None:
    options = parse_evaluate_options(["--model_id", str(run / "final")])
    assert options.fixed_correct_index is None
    assert (options.image_max_pixels, options.max_completion_length) == (3136, 32)
    assert options.eval_episodes == 512, "how much is measured is the evaluation's own affair"
    other = parse_evaluate_options(
        ["--model_id", str(run / "checkpoint-3"), "--fixed_correct_index", "2", "--top_p", "0.9"]
    )
    assert (other.fixed_correct_index, other.top_p) == (2, 0.9)
    # what a checkpoint may have been chosen by is not what it is scored on
    assert options.eval_seed == 2_000_000_000 != parse_options([]).eval_seed
    (tmp_path / "own.yaml").write_text("temperature: 0.5\nfixed_correct_index: 1\n")
    by_file = parse_evaluate_options(["--model_id", str(run / "final"), "--config", str(tmp_path / "own.yaml")])
    assert (by_file.temperature, by_file.fixed_correct_index, by_file.max_completion_length) == (0.5, 1, 32)
    reasoning = parse_evaluate_options(["--model_id", str(run / "final"), "--prompt_style", "reasoning"])
    resolved, _ = resolve_evaluate_options(reasoning, has_bf16_gpu=False)
    assert (resolved.max_completion_length, resolved.image_max_pixels) == (512, 3136)


def test_training_writes_its_evaluations(run: Path) -> None:
    documents = read_jsonl(run / "evaluations.jsonl")
    assert [document["step"] for document in documents] == [0, 2, 3]
    for document in documents:
        Draft202012Validator(SCHEMA).validate(document)
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "eval/greedy_accuracy" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line, document in zip(lines, documents, strict=True):
        assert line["eval/greedy_accuracy"] == document["greedy_accuracy"]["value"]
        assert line["eval/blank_images"] == document["controls"]["blank_images"]["value"]
        assert "reward" not in line
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/control/grey")] == [0, 2, 3]
    in_tensorboard = {event.step: event.value for event in events.Scalars("eval/greedy_accuracy")}
    assert in_tensorboard == pytest.approx({line["step"]: line["eval/greedy_accuracy"] for line in lines})


def test_the_evaluation_of_the_last_step_is_that_of_final(run: Path, tmp_path: Path) -> None:
    last = read_jsonl(run / "evaluations.jsonl")[-1]
    same = ["--eval_episodes", "12", "--eval_seed", "1000000000", "--num_samples", "0"]
    again = scored(tmp_path / "e.json", "--model_id", str(run / "final"), *same)
    for name in ("greedy_accuracy", "confusion", "controls", "parse_status", "passed_over"):
        assert again[name] == last[name], name


def test_the_best_checkpoint_is_kept(run: Path) -> None:
    documents = read_jsonl(run / "evaluations.jsonl")[1:]
    best = max(documents, key=lambda document: document["greedy_accuracy"]["value"])
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_metric"] == best["greedy_accuracy"]["value"]
    assert (run / f"checkpoint-{state['best_global_step']}").is_dir()


def test_evaluating_changes_nothing_in_training(run: Path, tmp_path: Path) -> None:
    flags = ["--learning_rate", "5e-4", "--output_dir", str(tmp_path / "blind")]
    training.main([*UNWATCHED_RUN, *flags])
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (run, tmp_path / "blind"))
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    evaluated = [line for line in without_times(run / "metrics.jsonl") if "reward" in line]
    assert evaluated == without_times(tmp_path / "blind" / "metrics.jsonl")


def test_a_resumed_run_evaluates_what_is_left(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    flags = [*QUICK_RUN, "--learning_rate", "5e-4", "--keep_best", "--output_dir", str(folder), "--save_steps", "2"]
    training.main([*flags, "--train_steps", "2"])
    training.main([*flags, "--resume"])
    assert without_times(folder / "metrics.jsonl") == without_times(run / "metrics.jsonl")
    evaluations = [
        [{name: value for name, value in document.items() if name != "model"} for document in read_jsonl(path)]
        for path in (folder / "evaluations.jsonl", run / "evaluations.jsonl")
    ]
    assert evaluations[0] == evaluations[1]


def test_reasoning_prompts_are_compared_under_one_parser(tmp_path: Path) -> None:
    flags = ["--fixed_correct_index", "none", "--eval_episodes", "4", "--num_samples", "0"]
    plain = scored(tmp_path / "plain.json", *flags)
    direct = scored(tmp_path / "direct.json", *flags, "--prompt_style", "direct")
    reasoning = scored(tmp_path / "reasoning.json", *flags, "--prompt_style", "reasoning")
    assert [(d["prompt_style"], d["allow_reasoning"]) for d in (plain, direct, reasoning)] == [
        ("direct", False),
        ("direct", True),
        ("reasoning", True),
    ]


def test_an_adapter_is_scored(tmp_path: Path) -> None:
    flags = ["--use_lora", "--eval_steps", "1", "--train_steps", "1", "--report_to", "none"]
    training.main([*QUICK_RUN, *flags, "--output_dir", str(tmp_path / "run")])
    last = read_jsonl(tmp_path / "run" / "evaluations.jsonl")[-1]
    model = str(tmp_path / "run" / "final")
    same = ["--eval_episodes", "12", "--eval_seed", "1000000000", "--num_samples", "0"]
    again = scored(tmp_path / "e.json", "--model_id", model, *same)
    assert again["confusion"] == last["confusion"] and again["controls"] == last["controls"]


def test_groups_of_any_size_are_evaluated_beside(tmp_path: Path) -> None:
    flags = ["--num_rollouts", "5", "--eval_steps", "1", "--train_steps", "1", "--report_to", "none"]
    training.main([*QUICK_RUN, *flags, "--output_dir", str(tmp_path / "run")])
    assert [document["step"] for document in read_jsonl(tmp_path / "run" / "evaluations.jsonl")] == [0, 1]


def test_episodes_of_every_run_behind_a_model_are_passed_over(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    flags = ["--model_id", str(run / "final"), "--seed", "1", "--report_to", "none", "--dynamic_sampling", "2"]
    training.main([*UNWATCHED_RUN, *flags, "--output_dir", str(second)])
    options = parse_evaluate_options(["--model_id", str(second / "final")])
    found = evaluate.runs_behind(options, str(second / "final"))
    assert [(getattr(run.env, "seed", None), run.num_episodes) for run in found] == [(1, 6), (0, 6)]
    assert [run.num_attempts for run in found] == [2, 0]
    assert evaluate.runs_behind(options, "toy") == []


BAD = {
    "no episodes": ("--eval_episodes 0", "eval_episodes=0, but it must be at least 1"),
    "k beyond the samples": ("--num_samples 4 --pass_k 1,8", "pass_k=8, but with num_samples=4 k is from 1 to 4; draw"),
    "k without samples": ("--num_samples 0 --pass_k 1", "pass_k=1, but with num_samples=0"),
    "k is a word": ("--pass_k one", "pass_k='one', but wanted whole numbers with commas between"),
    "k is negative": ("--pass_k=-1", "pass_k='-1', but wanted whole numbers"),
    "unknown flag": ("--epsiodes 5", "unknown flag --epsiodes, did you mean --eval_episodes?"),
    "a flag of training": ("--train_steps 5", "unknown flag --train_steps"),
    "no such model": ("--model_id nowhere", "model_id=nowhere is no folder"),
    "no such baseline": ("--baseline nowhere", "baseline=nowhere is no folder"),
    "no such images": ("--data_root nowhere", "data folder nowhere does not exist"),
    "output is a folder": ("--output tests", "output=tests is a folder; name a file in it"),
    "output exists": ("--output README.md", "output=README.md exists; pass --overwrite to replace it"),
    "output under a file": ("--output README.md/e.json", "cannot be written under"),
    "a prompt style of its own": ("--prompt_style terse", "invalid choice: 'terse'"),
}


@pytest.mark.parametrize(("flags", "words"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_is_said_before_anything_loads(flags: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(
        "fleet.run.model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded")
    )
    with pytest.raises(UsageError) as refusal:
        evaluate.main(flags.split())
    assert words in str(refusal.value)


def test_a_models_own_training_episodes_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="eval_seed=0 is the seed that model_id=.* was trained with"):
        evaluate.main(["--model_id", str(run / "final"), "--eval_seed", "0"])
    with pytest.raises(UsageError, match="eval_seed=0 is the seed that baseline=.* was trained with"):
        evaluate.main(["--baseline", str(run / "checkpoint-3"), "--eval_seed", "0"])
    with pytest.raises(UsageError, match="would leave no place for the newest checkpoint"):
        training.main(["--eval_steps", "5", "--keep_best", "--save_total_limit", "1"])
    with pytest.raises(UsageError, match="eval_seed=7 is the run's own seed"):
        training.main(["--eval_steps", "5", "--eval_seed", "7", "--seed", "7"])


def test_a_broken_checkpoint_is_said(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "processor_config.json").unlink()
    with pytest.raises(UsageError, match="has no processor .*copy it there from the original model"):
        evaluate.main(["--model_id", str(tmp_path / "checkpoint-3")])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match="is an adapter whose base_model_name_or_path=/gone/base is no folder"):
        evaluate.main(["--model_id", str(adapter)])


def test_a_folder_too_small_to_hold_out_is_said_before_training(tmp_path: Path) -> None:
    from tests.conftest import save_picture

    for name in ("red", "blue"):
        save_picture(tmp_path / "data" / f"{name}.png", name)
    flags = ["--data_root", str(tmp_path / "data"), "--candidates_per_episode", "2", "--eval_steps", "1"]
    with pytest.raises(
        UsageError, match="eval_episodes=256: 5120 draws gave 0 different episodes that training does not draw"
    ):
        training.main([*flags, "--fixed_correct_index", "none", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_command_exits_with_2_and_one_line() -> None:
    done = subprocess.run(
        ["python", "evaluate.py", "--eval_episodes", "0"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert done.returncode == 2
    assert done.stderr == "error: eval_episodes=0, but it must be at least 1; correct --eval_episodes\n"
    assert toy_model_path(SIGHTED).is_dir()
