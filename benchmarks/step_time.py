"""Whole optimizer steps of Fleet's trainer beside stock TRL's, taken in turns in one process.

    python benchmarks/step_time.py --num_rollouts 8

Both trainers run their own training loop on the same random-weight model, prompts and completion length; a turnstile
lets one step of either through at a time. A phase is timed where both trainers have a method for it: `prepare`
(images, tokens, rewards, records), `generate`, `score` (log-probabilities without gradient), `train` (forward and
backward), `optimizer`. The first step of each is a warm-up, in which both see the same completions: it gives the
parity of log-probabilities and gradients. Memory is measured in processes of their own.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402
from trl import RLOOConfig  # noqa: E402

from benchmarks import ideal, random_model  # noqa: E402
from benchmarks.peak_memory import peak_memory  # noqa: E402
from benchmarks.timed_trainers import StepClock, Stopwatch, TimedFleet, TimedStock, Turnstile  # noqa: E402
from dataset import RepeatableEpisodeDataset  # noqa: E402
from environment import PickImageEnv  # noqa: E402
from model_utils import load_qwen25_vl, make_lora_config, media_token_ids  # noqa: E402
from reward import make_trl_reward_function  # noqa: E402
from run_records import installed_versions  # noqa: E402

PHASES = ("prepare", "generate", "score", "train", "optimizer")
MODEL_PHASES = ("generate", "score", "train")


def main() -> None:
    arguments = parse_arguments()
    keep_libraries_quiet()
    if arguments.memory_of is not None:
        with prepared_folder(arguments) as folder:
            print(json.dumps(memory_of_training_pass(arguments, folder)))
        return
    with prepared_folder(arguments) as folder:
        fleet, stock = run_in_turns(arguments, folder)
        result = summarize(arguments, fleet, stock)
    if arguments.measure_memory:
        result["memory"] = compare_memory()
    print(as_table(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def keep_libraries_quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def device_name() -> str:
    """What the measured work runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def parse_arguments() -> argparse.Namespace:
    def switch(text: str) -> bool:
        if text not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted true or false")
        return text == "true"

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_size", default="30m", choices=list(random_model.SIZES), help="random-weight model (default: 30m)")
    add("--num_rollouts", type=int, default=8, help="G, rollouts per episode (default: 8)")
    add("--num_episodes", type=int, default=2, help="episodes per step (default: 2)")
    add("--num_images", type=int, default=4, help="candidates per episode (default: 4)")
    add("--image_side_px", type=int, default=224, help="a multiple of 28 (default: 224)")
    add("--num_pictures", type=int, default=240, help="different images in all, drawn from at random (default: 240)")
    add("--completion_tokens", type=int, default=30, help="every completion's length (default: 30)")
    add("--beta", type=float, default=0.0, help="KL weight (default: 0)")
    for name in ("freeze_vision", "use_lora", "gradient_checkpointing"):
        add(f"--{name}", type=switch, nargs="?", const=True, default=False, help="true or false (default: false)")
    add("--measure_memory", type=switch, nargs="?", const=True, default=True, help="true or false (default: true)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights (default: float32)")
    add("--attn_implementation", default="sdpa", help="of Fleet's language model (default: sdpa)")
    add("--stock_attn_implementation", default="sdpa", help="of stock TRL's language model (default: sdpa)")
    add("--num_steps", type=int, default=3, help="pairs of steps that are timed (default: 3)")
    add("--json", type=Path, help="file for the result (default: none)")
    add("--memory_of", choices=["fleet", "stock"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.image_side_px % 28 or arguments.image_side_px < 56:
        parser.error(f"--image_side_px {arguments.image_side_px} is not a multiple of 28 from 56 up")
    if arguments.num_rollouts < 2 or not 2 <= arguments.num_images <= arguments.num_pictures:
        parser.error("wanted at least 2 rollouts, and from 2 images up to --num_pictures of them")
    if min(arguments.num_steps, arguments.num_episodes, arguments.completion_tokens) < 1:
        parser.error("wanted --num_steps, --num_episodes and --completion_tokens of at least 1")
    return arguments


@contextlib.contextmanager
def prepared_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder with the model and the pictures, gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model.build(
            folder / "model", arguments.model_size, arguments.image_side_px, getattr(torch, arguments.dtype)
        )
        random_model.draw_noise(folder / "pictures", arguments.num_pictures, arguments.image_side_px)
        yield folder


def make_trainer(kind: str, arguments: argparse.Namespace, folder: Path) -> TimedStock | TimedFleet:
    """Stock TRL's trainer or Fleet's, with a stopwatch, on the folder's model and pictures."""
    is_fleet = kind == "fleet"
    model, processor = load_qwen25_vl(
        str(folder / "model"),
        freeze_vision=arguments.freeze_vision,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation if is_fleet else arguments.stock_attn_implementation,
    )
    env = PickImageEnv(folder / "pictures", arguments.num_images, seed=0)
    dataset = RepeatableEpisodeDataset(env, arguments.image_side_px**2)
    args = make_config(arguments, folder / kind, media_token_ids(model.config))
    lora = make_lora_config() if arguments.use_lora else None
    trainer: TimedStock | TimedFleet
    if is_fleet:
        cache_bytes = 2**31 if arguments.freeze_vision or arguments.use_lora else 0
        trainer = TimedFleet(model, args, dataset, processor, peft_config=lora, vision_cache_bytes=cache_bytes)
    else:
        trainer = TimedStock(
            model=model,
            reward_funcs=make_trl_reward_function(),
            args=args,
            train_dataset=dataset.as_hf_dataset(arguments.num_episodes * (1 + arguments.num_steps)),
            processing_class=processor,
            peft_config=lora,
        )
    trainer.stopwatch = Stopwatch()
    for passed in (trainer.model, trainer.ref_model):
        if passed is not None:
            trainer.stopwatch.count_amounts(passed)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def make_config(arguments: argparse.Namespace, output_dir: Path, never_sampled: list[int]) -> RLOOConfig:
    """What both trainers are told."""
    return RLOOConfig(
        output_dir=str(output_dir),
        max_steps=1 + arguments.num_steps,
        num_generations=arguments.num_rollouts,
        per_device_train_batch_size=arguments.num_rollouts * arguments.num_episodes,
        gradient_accumulation_steps=1,
        gradient_checkpointing=arguments.gradient_checkpointing,
        max_completion_length=arguments.completion_tokens,
        generation_kwargs={"min_new_tokens": arguments.completion_tokens, "suppress_tokens": never_sampled},
        beta=arguments.beta,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=False,  # weights are already in the dtype that is asked for
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        shuffle_dataset=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def run_in_turns(arguments: argparse.Namespace, folder: Path) -> tuple[TimedFleet, TimedStock]:
    """Both trainers after all their steps, taken in turns: Fleet's, stock's, Fleet's, ..."""
    trainers = {kind: make_trainer(kind, arguments, folder) for kind in ("fleet", "stock")}
    turnstile = Turnstile(list(trainers))
    failures: list[BaseException] = []

    def run(kind: str) -> None:
        trainer = trainers[kind]
        try:
            clock = StepClock(kind, turnstile, trainer.stopwatch)
            trainer.add_callback(clock)
            if kind == "stock":
                # its turn comes once Fleet has sampled
                trainer.first_completions = trainers["fleet"].first_completions
            trainer.train()
            trainer.first_gradients = clock.first_gradients
        except BaseException as error:
            failures.append(error)
        finally:
            turnstile.open()

    threads = [threading.Thread(target=run, args=(kind,)) for kind in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return trainers["fleet"], trainers["stock"]


def summarize(arguments: argparse.Namespace, fleet: Any, stock: Any) -> dict[str, Any]:
    """The JSON result of a run, without its memory."""
    timed = {"fleet": fleet.stopwatch.steps[1:], "stock": stock.stopwatch.steps[1:]}
    for steps in timed.values():
        for seconds, _ in steps:
            outside = seconds["step"] - sum(seconds[phase] for phase in ("generate", "score", "train", "optimizer"))
            seconds["prepare"] = outside
    names = ("step", *PHASES)
    phases = {name: compare([step[0][name] for step in timed["fleet"]], [step[0][name] for step in timed["stock"]])
              for name in names}  # fmt: skip
    hit_rates = [line["vision_cache/hit_rate"] for line in fleet.state.log_history if "vision_cache/hit_rate" in line]
    work = ideal.Work(arguments, fleet, encoded_share=1 - statistics.mean(hit_rates[1:]) if hit_rates else None)
    for name, ratio in (("step", work.step_ratio()), ("train", work.train_ratio())):
        phases[name] |= {"ideal_ratio": ratio, "share_of_ideal": phases[name]["ratio_median"] / ratio}
    overhead = [1 - sum(step[0][phase] for phase in MODEL_PHASES) / step[0]["step"] for step in timed["fleet"]]
    rollouts = arguments.num_rollouts * arguments.num_episodes
    return {
        "command": " ".join(["python benchmarks/step_time.py", *without_json(sys.argv[1:])]),
        "device": device_name(),
        "platform": platform.machine(),
        "versions": installed_versions(),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")},
        "num_parameters": sum(parameter.numel() for parameter in fleet.model.parameters()),
        "prompt_tokens": work.prompt,
        "vision_cache_hit_rate": statistics.mean(hit_rates[1:]) if hit_rates else None,
        **phases,
        "overhead": {"fleet_share_median": statistics.median(overhead)},
        "rollouts_per_s": {kind: rollouts / phases["step"][f"{kind}_s_median"] for kind in timed},
        "amounts": {kind: dict(steps[-1][1]) for kind, steps in timed.items()},
        "parity": parity(fleet, stock),
        "ideal": {"ratio": work.step_ratio(), "train_ratio": work.train_ratio()},
    }


def without_json(argv: list[str]) -> list[str]:
    """The command line without the file that it writes, whose place is no part of a result."""
    place = argv.index("--json") if "--json" in argv else len(argv)
    return argv[:place] + argv[place + 2 :]


def compare(fleet_s: list[float], stock_s: list[float]) -> dict[str, Any]:
    """Medians in seconds, and the ratio stock / fleet of each pair: its median, least and greatest."""
    result: dict[str, Any] = {
        "fleet_s_median": statistics.median(fleet_s),
        "stock_s_median": statistics.median(stock_s),
    }
    if min(fleet_s) > 0:
        ratios = [stock / fleet for fleet, stock in zip(fleet_s, stock_s, strict=True)]
        result |= {"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


def parity(fleet: Any, stock: Any) -> dict[str, float]:
    """How far the first step's log-probabilities and gradients are apart; a gradient relative to its own norm."""
    by_name = fleet.first_gradients, stock.first_gradients
    if by_name[0].keys() != by_name[1].keys():
        raise AssertionError(f"gradients of different parameters: {sorted(by_name[0].keys() ^ by_name[1].keys())[:5]}")
    norms = {name: gradient.norm().item() for name, gradient in by_name[1].items()}
    # a gradient that is zero but for rounding has no direction to compare
    floor = 1e-6 * max(norms.values())
    apart = {name: (by_name[0][name] - by_name[1][name]).norm().item() / max(norms[name], floor) for name in norms}
    if fleet.first_logps.keys() != stock.first_logps.keys():
        raise AssertionError("the first steps did not see the same completions")
    differences = [(logps - stock.first_logps[ids]).abs().max().item() for ids, logps in fleet.first_logps.items()]
    return {
        "max_logprob_abs": max(differences),
        "max_grad_rel": max(apart.values()),
        "num_gradients": len(apart),
        "num_gradients_below_floor": sum(norm < floor for norm in norms.values()),
    }


def memory_of_training_pass(arguments: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The peak of the second step's training pass: `growth_bytes` over what is held before it, and `total_bytes`."""
    trainer = make_trainer(arguments.memory_of, arguments, folder)
    trainer.create_optimizer_and_scheduler(2)
    loader = iter(trainer.get_train_dataloader())
    trainer.model.train()
    found: dict[str, int] = {}
    for _ in range(2):
        inputs = trainer._prepare_inputs(next(loader))

        def train(inputs: Any = inputs) -> None:
            trainer.accelerator.backward(trainer.compute_loss(trainer.model, inputs))

        # gradients exist from the first pass on, so that the second shows activations alone
        found = peak_memory(train)
        trainer._step += 1
    return found


def compare_memory() -> dict[str, float]:
    """The peak of either trainer's training pass, each in a process of its own.

    `*_bytes` and `ratio` are the growth over weights, gradients and what else is held before the pass: activations.
    """
    found = {}
    for kind in ("fleet", "stock"):
        # every tensor in pages of its own, returned when it dies, so that resident memory is what is held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", kind]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    return {
        "fleet_bytes": found["fleet"]["growth_bytes"],
        "stock_bytes": found["stock"]["growth_bytes"],
        "ratio": found["stock"]["growth_bytes"] / found["fleet"]["growth_bytes"],
        "fleet_total_bytes": found["fleet"]["total_bytes"],
        "stock_total_bytes": found["stock"]["total_bytes"],
    }


def as_table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = [f"{'phase':<12}{'fleet':>10}{'stock':>10}{'ratio':>8}   spread of the ratio"]
    for name in ("step", *PHASES):
        row = result[name]
        ratios = (
            f"{row['ratio_median']:7.2f}x   {row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
            if "ratio_median" in row
            else "      -"
        )
        lines.append(f"{name:<12}{row['fleet_s_median']:>9.3f}s{row['stock_s_median']:>9.3f}s {ratios}")
    amounts = result["amounts"]
    for unit in ("tokens", "patches"):
        counts = [amounts[kind].get(unit, 0) for kind in ("fleet", "stock")]
        lines.append(f"{unit + ' a step':<16}{counts[0]:>6,.0f}{counts[1]:>10,.0f}")
    for name in ("step", "train"):
        row = result[name]
        lines.append(
            f"ideal by FLOPs, {name}: {row['ideal_ratio']:.2f}x, of which {row['share_of_ideal']:.0%} is reached"
        )
    lines.append(f"Fleet's time outside the model: {result['overhead']['fleet_share_median']:.1%} of its step")
    found = result["parity"]
    lines.append(
        f"parity: log-probabilities within {found['max_logprob_abs']:.1e}, {found['num_gradients']} gradients within "
        f"{found['max_grad_rel']:.1e} of their norm"
    )
    if "memory" in result:
        mib = {kind: result["memory"][f"{kind}_bytes"] / 2**20 for kind in ("fleet", "stock")}
        lines.append(
            f"memory that the training pass adds at its peak: {mib['fleet']:.0f} MiB against {mib['stock']:.0f} MiB, "
            f"{result['memory']['ratio']:.1f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
