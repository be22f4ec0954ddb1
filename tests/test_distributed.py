"""Real processes under `accelerate launch`: DeepSpeed ZeRO-3 on two of them, and two launchers as two machines."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evaluate
from dataset import VLMDataCollator
from fleet.cache import cache_folder
from fleet.episode_numbers import FURTHER_STRIDE
from fleet.run_folder import read_jsonl
from fleet.toy.model import SIGHTED, toy_model_path
from model_utils import generate_tool_call, load_qwen25_vl
from tests import HANG_S
from tests.distributed_generation import STOPS_AFTER
from tests.helpers import REPOSITORY, toy_dataset, toy_model, toy_path, toy_processor
from tests.processes import ZERO3, ZERO3_CONFIG, free_port, launch, run_ranks, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU collectives with g++"),
]

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--save_steps", "1"]


@pytest.mark.exhaustive  # make documented trains over ZeRO-3 and looks for final/ too
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_zero3_leaves_weights_that_open(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*QUICK, "--use_lora", "true" if kind == "lora" else "false", "--output_dir", str(run)]
    launch(ZERO3, ["training.py", *flags, "--train_steps", "2"])
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    weights = load_file(run / "final" / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors"))
    assert all(weight.numel() > 0 and weight.isfinite().all() for weight in weights.values())

    model, processor = load_qwen25_vl(str(run / "final"))
    answer = generate_tool_call(model, processor, toy_dataset().env.episode(0), max_pixels=56 * 56)
    assert answer.startswith("<tool_call>")


@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("full", "zero3"),
        ("lora", "zero3"),
        ("frozen-tower", "zero3"),
        ("frozen-language-model", "zero3"),
        ("lora-everywhere", "zero3"),
        ("frozen-tower", "ddp"),
        ("frozen-language-model", "ddp"),
        ("lora-everywhere", "ddp"),
    ],
)
def test_two_ranks_take_the_packed_step_that_one_process_takes_unpacked(
    kind: str, launcher: str, tmp_path: Path
) -> None:
    # uneven completions, other prompts and other images to encode on either rank, a KL term; LoRA with checkpointing
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(tmp_path, [str(one), "4", kind, "unpacked"], target="tests.distributed_step")
    run_ranks(tmp_path, [str(two), "2", kind, "packed"], 2, zero3=launcher == "zero3", target="tests.distributed_step")
    figures = [[float(word) for word in (run / "figures.txt").read_text().split()] for run in (one, two)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3, abs=1e-6)
    name = "adapter_model.safetensors" if "lora" in kind else "model.safetensors"
    first, second = (load_file(run / "final" / name) for run in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    if "lora" in kind:
        assert all(weight.abs().max() > 0 for name, weight in first.items()), "both factors have moved off zero"
        return
    base = load_file(Path(toy_path()) / "model.safetensors")
    assert base.keys() == first.keys() and sum(not torch.equal(second[name], base[name]) for name in base) > 25
    frozen = {
        "full": (),
        "frozen-tower": ("visual.patch_embed", "visual.blocks"),
        "frozen-language-model": ("model", "lm_head"),
    }
    kept = [name for name in base if name.startswith(frozen[kind])]
    assert (kind == "full") is (not kept) and all(torch.equal(second[name], base[name]) for name in kept)


@pytest.mark.parametrize("launcher", ["zero3", "zero3 with offload", "ddp"])
def test_two_ranks_move_each_side_at_its_own_rate(launcher: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 1e-5}
    flags = [*QUICK, "--train_steps", "2", "--lr_scheduler_type", "linear", "--freeze", "merger"]
    flags += [word for name, rate in rates.items() for word in (f"--{name}", str(rate))]
    settings: dict[str, Any] = {"zero3": launcher != "ddp"}
    if launcher == "zero3 with offload":
        # DeepSpeed puts its own Adam in the place of PyTorch's
        settings["config"] = tmp_path / "offload.yaml"
        settings["config"].write_text(
            ZERO3_CONFIG.read_text().replace("optimizer_device: none", "optimizer_device: cpu")
        )
    run_ranks(tmp_path, [*flags, "--output_dir", str(run)], 2, **settings)
    lines = read_jsonl(run / "metrics.jsonl")
    for name, rate in rates.items():
        assert [line[name] for line in lines] == pytest.approx([rate, rate / 2]), name
    steps = [load_file(Path(toy_path()) / "model.safetensors")]
    steps += [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2)]
    base, first, second = ({name: weight.double() for name, weight in step.items()} for step in steps)
    for name in base:
        rate = 0 if "visual.merger" in name else rates["vision_learning_rate" if "visual" in name else "learning_rate"]
        # AdamW's first step is as long as the rate; its second one is no longer than the rate then
        updates = [
            float((after[name] - before[name]).abs().max()) for before, after in ((base, first), (first, second))
        ]
        assert updates[0] == pytest.approx(rate, rel=0.02), name
        assert updates[1] <= 1.02 * rate / 2 and (updates[1] > rate / 4 or rate == 0), name


@pytest.mark.parametrize(("weights", "kind"), [("gather", "full"), ("shards", "full"), ("shards", "lora")])
def test_ranks_generate_behind_one_prefill_what_plain_generate_gives(weights: str, kind: str, tmp_path: Path) -> None:
    run_ranks(tmp_path, [str(tmp_path), weights, kind], 2, zero3=True, target="tests.distributed_generation")
    model, dataset, collate = toy_model(), toy_dataset(), VLMDataCollator(toy_processor(), 1)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    for rank, max_new_tokens in enumerate(STOPS_AFTER):
        batch: Any = collate([dataset[2 * rank], dataset[2 * rank + 1]])
        sequences = model.generate(
            **{name: batch[name] for name in names}, max_new_tokens=max_new_tokens, do_sample=False
        )
        end = toy_processor().tokenizer.eos_token_id
        rows = [row[: row.index(end) + 1] if end in row else row
                for row in sequences[:, batch["input_ids"].shape[1] :].tolist()]  # fmt: skip
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["completions"] == found["with_drafts"] == [row for row in rows for _ in range(4)]
        if weights == "shards":
            # greedy calls stand in the drafts; token by token, both ranks go on for as long as either
            assert found["gathers"] == [max(STOPS_AFTER), 1]


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.exhaustive)])
def test_two_ranks_talk_and_learn_as_one_process_does(kind: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(tmp_path, [str(one), "4", kind], target="tests.distributed_turns")
    run_ranks(tmp_path, [str(two), "2", kind], 2, zero3=True, target="tests.distributed_turns")
    alone, together = (json.loads((run / "said.json").read_text()) for run in (one, two))
    assert alone == together
    has_pictures = ["picture" in text for text, _, _ in alone]
    assert any(has_pictures[:8]) and not any(has_pictures[8:])
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    first, second = (load_file(run / "final" / name) for run in (one, two))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.exhaustive  # two processes without a launcher build it in test_toy_model.py
def test_two_ranks_with_an_empty_cache_build_one_whole_toy_model(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLEET_CACHE": str(cache)}
    done = subprocess.run(
        [*command, "training.py", *QUICK, "--train_steps", "1", "--output_dir", str(run)],
        cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (model_folder,) = [path for path in cache.iterdir() if path.is_dir()]
    load_qwen25_vl(str(model_folder))
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1]


def test_the_shipped_configuration_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*QUICK, "--dtype", "bfloat16", "--gradient_checkpointing", "true", "--beta", "0.05"]
    # bfloat16 and CPU offload included
    launch(["--config_file", shipped_configuration_on_two_cpus(tmp_path)],
           ["training.py", *flags, "--output_dir", str(run), "--train_steps", "2"])  # fmt: skip
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["kl"] == 0 and lines[1]["kl"] != 0, "the reference is the model before its first step"
    saved = load_file(run / "final" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("launcher", ["zero3", "shipped", "ddp"])
def test_what_is_wrong_on_one_rank_skips_a_step_or_stops_on_both(launcher: str, tmp_path: Path) -> None:
    dtype = "bfloat16" if launcher == "shipped" else "float32"
    settings: dict[str, Any] = {"target": "tests.distributed_faults", "zero3": launcher != "ddp"}
    if launcher == "shipped":
        settings["config"] = Path(shipped_configuration_on_two_cpus(tmp_path))
    run_ranks(tmp_path, [str(tmp_path), dtype], 2, **settings)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for seen in ranks:
        # step 1: rank 0 has no scored rollout; 2: a gradient of rank 1's, 3: an activation of rank 0's is not finite
        assert seen["dropped"] == [0.5, 0, 0, 0]
        assert seen["num_skipped"] == [0, 1, 2, 2]
        assert seen["steps_that_changed_weights"] == seen["steps_that_changed_moments"] == [1, 4]
        assert seen["learning_rates"] == pytest.approx([1e-4 * left / 9 for left in (9, 8, 8, 8, 7)])
        assert seen["is_finite"]
        # step 5: the reward function of rank 1 raises
        assert seen["reason"].startswith("process 1: reward function reward raised ConnectionError: no judge (")


@pytest.mark.parametrize("dynamic_sampling", ["0", "2"])
def test_what_is_sampled_does_not_depend_on_the_number_of_processes(tmp_path: Path, dynamic_sampling: str) -> None:
    said, replaced = [], []
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        flags = ["--per_device_batch_size", str(8 // num_processes), "--train_steps", "1", "--temperature", "1.5"]
        flags += ["--dynamic_sampling", dynamic_sampling]
        done = subprocess.run(
            ["torchrun", "--nproc_per_node", str(num_processes), "--master_port", free_port(), "training.py",
             "--report_to", "none", "--output_dir", str(run), *flags],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=HANG_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        groups = read_jsonl(run / "rollouts.jsonl")
        said.append({line["episode_index"]: [rollout["token_ids"] for rollout in line["rollouts"]] for line in groups})
        (figures,) = read_jsonl(run / "metrics.jsonl")
        replaced.append(figures.get("dynamic_sampling/replaced", 0))
    assert {number % FURTHER_STRIDE for number in said[0]} == set(range(8))
    # which of the processes needs how many differs, so that each draws for the other
    assert replaced[0] == replaced[1] == sum(number >= FURTHER_STRIDE for number in said[0]) / 8
    assert (replaced[0] > 0) == (dynamic_sampling != "0")
    equal = [said[0][episode] == said[1].get(episode) for episode in said[0]]
    # a uniform may fall on an edge that rounding moves, in one rollout of a thousand
    assert said[0].keys() == said[1].keys() and equal.count(True) >= 7, (said, equal)
    assert len({str(group) for group in said[0].values()}) == 8


@pytest.mark.parametrize("launcher", ["zero3", "ddp"])
def test_passes_that_teach_no_rank_are_left_out_on_all_and_weights_move_as_they_would(
    launcher: str, tmp_path: Path
) -> None:
    found = {}
    for kind in ("spared", "full"):
        folder = tmp_path / kind
        run_ranks(tmp_path, [str(folder), kind], 2, zero3=launcher == "zero3", target="tests.distributed_skips")
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        found[kind] = ranks[0], load_file(folder / "final" / "model.safetensors")
    (spared, weights), (full, all_weights) = found["spared"], found["full"]
    assert full["passes"] == [0, 0, 1, 1, 2, 2]
    # a step's last pass is made where another was; DeepSpeed steps inside it, so there it is always made
    assert spared["passes"] == ([0, 1, 1, 2] if launcher == "zero3" else [0, 1, 1])
    assert spared["learning_rates"] == full["learning_rates"]
    for name, weight in all_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7, msg=name)


def test_an_environment_that_breaks_on_one_process_stops_both(tmp_path: Path) -> None:
    run_ranks(tmp_path, [str(tmp_path)], 2, target="tests.distributed_environment")
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen["step"] == 1
        assert seen["reason"].startswith(
            "process 1: the environment is broken: the verdict on the call 2 failed with FileNotFoundError: no "
            "answers.json (in respond()); correct it; every checkpoint is whole"
        )


def shipped_configuration_on_two_cpus(folder: Path) -> str:
    """Writes accelerate_config.yaml with what this machine lacks changed: GPUs, and eight of them."""
    config = yaml.safe_load((REPOSITORY / "accelerate_config.yaml").read_text())
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2}))
    return str(path)


@pytest.mark.exhaustive  # make documented starts two launchers too
def test_two_launchers_train_as_two_machines(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    launchers = [
        start([*ZERO3, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
               "--main_process_port", port], ["training.py", *QUICK, "--output_dir", str(run), "--train_steps", "2"])
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S)[0] for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2]


def test_a_machine_whose_folder_is_missing_stops_the_other_too(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    launchers = [
        start([*ZERO3, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
               "--main_process_port", port],
              ["training.py", *QUICK, "--output_dir", str(run), "--data_root", data_root])
        for rank, data_root in ((0, "./toy_images"), (1, str(tmp_path / "nowhere")))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S)[0] for process in launchers]
    assert all(process.returncode != 0 for process in launchers)
    assert all("process 1: data folder" in output for output in outputs)
    assert not run.exists()


def test_machines_started_with_other_flags_stop_and_say_which(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    launchers = [
        start([*ZERO3, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
               "--main_process_port", port],
              ["training.py", *QUICK, "--output_dir", str(run), "--train_steps", "2", "--seed", str(rank)])
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S)[0] for process in launchers]
    assert all(process.returncode != 0 for process in launchers)
    assert all("processes were started with different flags: seed=['0', '1']" in output for output in outputs)
    assert not run.exists()


def test_two_shards_are_predicted_by_one_process_that_waits_for_none(tmp_path: Path) -> None:
    # without counts in the cache one process makes them, and a model that it makes must not be sharded
    shutil.rmtree(cache_folder() / "counts", ignore_errors=True)
    flags = [*QUICK, "--train_steps", "1", "--gradient_checkpointing", "auto", "--output_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, flags, 2, zero3=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["gradient_checkpointing"] is False and config["measured"]["memory_gib"] > 0
    # each holds half of the weights, and all of them gathered
    assert config["prediction"]["memory_gpu_gib"]["weights"] == pytest.approx(1.5 * 631_680 * 4 / 2**30, abs=1e-3)


def test_a_dry_run_of_two_processes_answers_once(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, ["--dry_run", "--json"], 2)
    answers = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("{")]
    assert len(answers) == 1 and json.loads(answers[0])["fits"] is True


def test_a_misspelt_flag_on_one_machine_ends_both(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    launchers = [
        start([*ZERO3, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
               "--main_process_port", port],
              ["training.py", *QUICK, "--output_dir", str(run), flag, "2"])
        for rank, flag in ((0, "--train_steps"), (1, "--train_stepz"))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S)[0] for process in launchers]
    assert all(process.returncode != 0 for process in launchers)
    assert all("unknown flag --train_stepz, did you mean --train_steps" in output for output in outputs)
    assert "process 1: unknown flag" in outputs[0]
    assert not run.exists()


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_two_machines_train_as_one_machine_with_all_their_processes(num_processes: int, tmp_path: Path) -> None:
    flags = ["training.py", *QUICK, "--train_steps", "2", "--seed", "3"]
    both = ["--num_processes", str(num_processes), "--main_process_ip", "127.0.0.1"]
    one = start([*ZERO3, *both, "--main_process_port", free_port()], [*flags, "--output_dir", str(tmp_path / "one")])
    output = one.communicate(timeout=HANG_S)[0]
    assert one.returncode == 0, output[-3000:]
    port = free_port()
    launchers = [
        start([*ZERO3, *both, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_port", port],
              [*flags, "--output_dir", str(tmp_path / "two")])
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S)[0] for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    first, second = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in first] == [1, 2]
    assert [(line["reward"], line["accuracy"]) for line in first] == [
        (line["reward"], line["accuracy"]) for line in second
    ]
    weights = load_file(tmp_path / "one" / "final" / "model.safetensors")
    base = load_file(Path(toy_path()) / "model.safetensors")
    assert any(not torch.equal(base[name], weight) for name, weight in weights.items()), "the run has trained"
    for name, weight in load_file(tmp_path / "two" / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-7, msg=name)


def test_zero3_evaluates_as_one_process_does(tmp_path: Path) -> None:
    toy_model_path(SIGHTED)
    run = tmp_path / "run"
    task = ["--fixed_correct_index", "none", "--eval_episodes", "13"]
    training_flags = [*QUICK, *task, "--eval_steps", "1", "--train_steps", "1", "--output_dir", str(run)]
    run_ranks(tmp_path, training_flags, 2, zero3=True)
    while_training = read_jsonl(run / "evaluations.jsonl")
    assert [document["step"] for document in while_training] == [0, 1]
    # one episode at a time, so that the two go on for unequally long
    flags = ["--model_id", str(run / "final"), "--eval_episodes", "13", "--eval_seed", "1000000000", "--num_samples",
             "2", "--temperature", "1.4", "--per_device_batch_size", "1"]  # fmt: skip
    two = [*flags, "--baseline", "toy", "--output", str(tmp_path / "two.json")]
    run_ranks(tmp_path, two, 2, zero3=True, target="tests.distributed_evaluation")
    evaluate.main([*flags, "--output", str(tmp_path / "one.json")])
    alone, together = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for name in ("confusion", "controls", "greedy_accuracy", "passed_over"):
        assert alone[name] == together[name], name
        assert alone[name] == while_training[-1][name], name
