"""What Fleet does on one GPU, in minutes: parity in half precision, whole steps, a kill and a resume.

    python benchmarks/gpu_check.py --json check.json
    python benchmarks/gpu_check.py --sections steps_8 steps_64

Writes a table and a JSON. Needs no network and no weights: models have real dimensions and random weights. Each section
is a process of its own, so that the next has the whole GPU. Without a GPU it runs on small sizes (--model_size 2m
--image_side_px 56).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import step_time  # noqa: E402
from benchmarks.comparison import device_name  # noqa: E402
from dataset import VLMDataCollator  # noqa: E402
from fleet.qwen.flops import TextWork, text_flops, vision_flops  # noqa: E402
from fleet.qwen.group_passes import image_inputs, score_tree, tree_prompts  # noqa: E402
from fleet.qwen.token_tree import by_rollout, tree_of_rollouts  # noqa: E402
from fleet.run.config import installed_versions  # noqa: E402
from fleet.run_folder import read_jsonl  # noqa: E402
from model_utils import load_qwen25_vl  # noqa: E402
from utils.tool_calls import make_tool_call_str  # noqa: E402

# dense bfloat16 operations a second, by the vendor's data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
DEFAULT_SECTIONS = ("parity", "steps_8", "steps_64", "toy", "zero3")


def main() -> None:
    arguments, model = parse_arguments()
    if arguments.one is not None:
        print(json.dumps(SECTIONS[arguments.one](model)))
        return
    step_time.refuse_no_file(argparse.ArgumentParser(), "--json", arguments.json)
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu_check.py", *sys.argv[1:]]),
        "device": device_name(),
        "versions": installed_versions(),
    }
    for name in arguments.sections:
        start_s = time.perf_counter()
        command = [sys.executable, __file__, "--one", name, *model]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        failed = {"failed": f"exit status {done.returncode}; what it printed stands above"}
        results[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
        results[name]["seconds"] = round(time.perf_counter() - start_s, 1)
        print(as_lines(name, results[name]), flush=True)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any("failed" in results[name] for name in arguments.sections):
        sys.exit(1)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of step_time.py that say which model and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=list(SECTIONS),
        default=list(DEFAULT_SECTIONS),
        help="(default: the first five)",
    )
    parser.add_argument("--json", type=Path, help="file for the results (default: none)")
    parser.add_argument("--one", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--model_size", default="3b", help="of random weights, as in step_time.py (default: 3b)")
    parser.add_argument("--image_side_px", default="448", help="a multiple of 28 (default: 448)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(default: bfloat16)")
    arguments = parser.parse_args()
    names = ("model_size", "image_side_px", "dtype")
    return arguments, [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]


def settings_of(model: list[str], *more: str) -> argparse.Namespace:
    """step_time.py's arguments for a model, and these."""
    argv, sys.argv = sys.argv, ["step_time.py", *model, "--num_pictures", "24", "--measure_memory", "false", *more]
    try:
        return step_time.parse_arguments()
    finally:
        sys.argv = argv


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(model: list[str]) -> dict[str, Any]:
    """How far a tree's log-probabilities and gradients are from those of rows, beside rows in another layout.

    Rows of one batch and rows one by one differ by rounding alone: that is the noise floor.
    """
    arguments = settings_of(model)
    with step_time.prepared_folder(arguments) as folder:
        policy, processor = load_qwen25_vl(str(folder / "model"), dtype=getattr(torch, arguments.dtype))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = policy.to(device)
        rows = [make_row(folder, arguments, number) for number in range(2)]
    group_size = 4
    batch: Any = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in VLMDataCollator(processor, 1)(rows).items()
    }
    end = processor.tokenizer.eos_token_id
    calls = [[*processor.tokenizer(make_tool_call_str(index % 3))["input_ids"], end] for index in range(group_size)]
    layouts: dict[str, Callable[[], Tensor]] = {
        "tree": lambda: tree_logps(policy, batch, [calls] * 2, end),
        "rows": lambda: torch.cat([row_logps(policy, batch, place, calls) for place in range(2)]),
        "rows one by one": lambda: torch.cat(
            [row_logps(policy, batch, place, [call]) for place in range(2) for call in calls]
        ),
    }
    logps, gradients = {}, {}
    for name, compute in layouts.items():
        policy.zero_grad()
        found = compute()
        weights = torch.linspace(-1, 1, found.numel(), device=device).view(found.shape)
        (found * weights).sum().backward()
        logps[name] = found.detach().float()
        gradients[name] = {key: value.grad.float().cpu() for key, value in policy.named_parameters()}
    floor = 1e-5 * max(gradient.norm() for gradient in gradients["rows"].values())

    def apart(name: str) -> dict[str, float]:
        differences = (logps[name] - logps["rows"]).abs()
        relative = [
            float((gradients[name][key] - gradient).norm() / max(gradient.norm(), floor))
            for key, gradient in gradients["rows"].items()
        ]
        return {
            "logprob_max": differences.max().item(),
            "logprob_mean": differences.mean().item(),
            "gradient_max": max(relative),
            "gradient_median": statistics.median(relative),
        }

    return {"tree": apart("tree"), "noise_floor": apart("rows one by one"), "num_logprobs": logps["rows"].numel()}


def make_row(folder: Path, arguments: argparse.Namespace, number: int) -> Any:
    """An episode of random pictures as a row of the data set."""
    env = step_time.PickImageEnv(folder / "pictures", arguments.num_images, seed=0)
    return step_time.RepeatableEpisodeDataset(env, arguments.image_side_px**2)[number]


def tree_logps(policy: Any, batch: Any, completions: list[list[list[int]]], padding_id: int) -> Tensor:
    """Log-probabilities (P * G, T) of completions as Fleet scores them."""
    tree = tree_of_rollouts(tree_prompts(policy, batch), completions, padding_id)
    images = image_inputs(batch, slice(0, len(completions)), None)
    return by_rollout(score_tree(policy, tree, images, "sdpa", 1.0)[0], tree).flatten(0, 1)


def row_logps(policy: Any, batch: Any, place: int, completions: list[list[int]]) -> Tensor:
    """Log-probabilities (G, T) of an episode's completions of one length, each in a row with its own prompt."""
    ids, mask = batch["input_ids"][place], batch["attention_mask"][place].bool()
    images = image_inputs(batch, slice(place, place + 1), None)
    said = torch.tensor(completions, device=ids.device)
    count = len(completions)
    kinds = batch["mm_token_type_ids"][place][mask].expand(count, -1)
    logits = policy(
        input_ids=torch.cat([ids[mask].expand(count, -1), said], dim=1),
        mm_token_type_ids=torch.cat([kinds, torch.zeros_like(said)], dim=1),
        pixel_values=images["pixel_values"].repeat(count, 1),
        image_grid_thw=images["image_grid_thw"].repeat(count, 1),
        logits_to_keep=said.shape[1] + 1,
    ).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(2, said[..., None])[..., 0]


# --- whole steps ------------------------------------------------------------------------------------------------------


def steps_8(model: list[str]) -> dict[str, Any]:
    """Whole steps at 8 rollouts: Fleet's, beside stock TRL as it is, and beside stock with Fleet's vision attention."""
    found: dict[str, Any] = {"without checkpointing": fleet_steps(settings_of(model, "--num_steps", "5"))}
    for name, more in (("stock", []), ("stock with our vision", ["--stock_vision_windows"])):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.json"
            flags = [
                "--num_pictures",
                "24",
                "--gradient_checkpointing",
                "--num_steps",
                "2",
                "--measure_memory",
                "false",
            ]
            command = [sys.executable, "benchmarks/step_time.py", *model, *flags, *more, "--json", str(path)]
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
            result = json.loads(path.read_text())
        kept = ("step", "generate", "train", "passes", "parity", "rollouts_per_s")
        found[f"beside {name}"] = {key: result[key] for key in kept}
    return found


def steps_64(model: list[str]) -> dict[str, Any]:
    """Fleet's steps at 64 rollouts, beside one of stock's at 8 that is scaled: 64 rollouts are 8 times its rows."""
    fleet = fleet_steps(settings_of(model, "--num_rollouts", "64", "--num_steps", "3"))
    arguments = settings_of(model, "--num_steps", "1", "--gradient_checkpointing")
    with step_time.prepared_folder(arguments) as folder:
        trainer = step_time.make_trainer("stock", arguments, folder)
        step_time.run_in_turns({"stock": trainer})
    (seconds,) = step_time.step_seconds(trainer)
    return {"fleet": fleet, "stock, scaled from 8 rollouts and not measured": {"step_s": 8 * seconds}}


def lora_7b(model: list[str]) -> dict[str, Any]:
    """LoRA at 7B's dimensions; at the model's own size without a GPU."""
    if torch.cuda.is_available():
        model = ["--model_size", "7b", *model[2:]]
    return fleet_steps(settings_of(model, "--use_lora", "--num_episodes", "1", "--num_steps", "3"))


def fleet_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fleet's own steps: seconds by phase, rollouts a second, share of the chip's peak, memory, waiting for images."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with step_time.prepared_folder(arguments) as folder:
        trainer = step_time.make_trainer("fleet", arguments, folder)
        step_time.run_in_turns({"fleet": trainer})
    steps = [seconds for seconds, _ in trainer.stopwatch.steps[1:]]
    medians = {
        phase: statistics.median(step[phase] for step in steps)
        for phase in ("step", "generate", "train", "optimizer", "waiting")
    }
    last = [line for line in trainer.state.log_history if "reward" in line][-1]
    flops = flops_of_step(trainer, arguments, bool(last.get("sampling/one_pass")))
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name()), None)
    return {
        **{f"{phase}_s": seconds for phase, seconds in medians.items()},
        "rollouts_per_s": arguments.num_rollouts * arguments.num_episodes / medians["step"],
        "waiting_share": medians["waiting"] / medians["step"],
        "one_pass": last.get("sampling/one_pass"),
        "passes": last["sampling/passes"],
        "tflop": flops / 1e12,
        "share_of_peak": None if peak is None else flops / medians["step"] / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def flops_of_step(trainer: Any, arguments: argparse.Namespace, is_one_pass: bool) -> float:
    """Operations of a step's forward and backward passes, by the tokens that went through the model; no recomputing."""
    amounts = trainer.stopwatch.steps[-1][1]
    config, passes = trainer.model.config, 1 if is_one_pass else 2
    tokens = amounts["tokens"] / passes
    row = tokens / arguments.num_episodes
    scored = min(tokens, arguments.num_rollouts * arguments.num_episodes * 8)
    work = TextWork(int(tokens), int(arguments.num_episodes * row**2), int(scored))
    side = arguments.image_side_px // config.vision_config.patch_size
    vision = vision_flops(config, [(1, side, side)] * arguments.num_images) * arguments.num_episodes
    sampled = 0 if is_one_pass else 1
    text_passes, vision_passes = (2, 0) if arguments.use_lora else (3, 3)
    return (text_passes + sampled) * text_flops(config, work) + (vision_passes + sampled) * vision


# --- whole commands ---------------------------------------------------------------------------------------------------


def toy(model: list[str]) -> dict[str, Any]:
    """The first demo."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", "--train_steps", "60")
        lines = reward_lines(Path(folder) / "run")
    return {
        "reward_first": lines[0]["reward"],
        "reward_last_10": statistics.mean(line["reward"] for line in lines[-10:]),
        "one_pass_share": statistics.mean(line.get("sampling/one_pass", 0.0) for line in lines),
        "step_s": statistics.median(line["step_time_s"] for line in lines),
    }


def zero3(model: list[str]) -> dict[str, Any]:
    """The shipped configuration, ZeRO-3 with offloading, on one GPU."""
    launch = ["--config_file", "accelerate_config.yaml", "--num_processes", "1"]
    if not torch.cuda.is_available():
        launch += ["--cpu", "--mixed_precision", "no"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        dtype = [] if torch.cuda.is_available() else ["--dtype", "float32"]
        train(run, "--train_steps", "3", *dtype, launch=launch)
        lines = reward_lines(run)
        has_weights = (run / "final" / "model.safetensors").is_file()
    return {"steps": len(lines), "has_weights": has_weights, "step_s": lines[-1]["step_time_s"]}


def resume(model: list[str]) -> dict[str, Any]:
    """A run that is killed behind its second checkpoint and resumed, beside one that is not: their weights' bits."""
    flags = ["--train_steps", "12", "--save_steps", "3", "--save_total_limit", "9"]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        train(whole, *flags)
        started = subprocess.Popen(
            train_command(killed, *flags), cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True
        )
        while not (killed / "checkpoint-6" / "manifest.json").exists():
            if started.poll() is not None:
                raise SystemExit(f"the run ended with {started.returncode} before it could be killed")
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        train(killed, *flags, "--resume")
        weights = [(run / "final" / "model.safetensors").read_bytes() for run in (whole, killed)]
    return {"is_equal_bit_for_bit": weights[0] == weights[1], "num_bytes": len(weights[0])}


def train_command(run: Path, *flags: str, launch: list[str] | None = None) -> list[str]:
    one_process = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    started = ["accelerate", "launch", *(one_process if launch is None else launch)]
    return [*started, "training.py", "--report_to", "none", "--output_dir", str(run), *flags]


def train(run: Path, *flags: str, launch: list[str] | None = None) -> None:
    subprocess.run(train_command(run, *flags, launch=launch), cwd=REPOSITORY, check=True, stdout=sys.stderr)


def reward_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "metrics.jsonl") if "reward" in line]


SECTIONS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "parity": parity, "steps_8": steps_8, "steps_64": steps_64, "toy": toy, "zero3": zero3, "lora_7b": lora_7b,
    "resume": resume,
}  # fmt: skip


def as_lines(name: str, found: dict[str, Any], indent: int = 0) -> str:
    """A section for the terminal: a line a figure."""
    lines = [f"{'  ' * indent}{name}"]
    for key, value in found.items():
        if isinstance(value, dict):
            lines.append(as_lines(key, value, indent + 1))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{'  ' * (indent + 1)}{key:<28} {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
