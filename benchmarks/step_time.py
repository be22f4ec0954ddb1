"""Whole optimizer steps of Fleet's trainer beside stock TRL's, taken in turns in one process.

    python benchmarks/step_time.py --num_rollouts 8

Both trainers run their own training loop on the same random-weight model, prompts and completion length; a turnstile
lets one step of either through at a time. A phase is timed where both trainers have a method for it: `prepare`
(images, tokens, rewards, records), `generate`, `score` (log-probabilities without gradient), `train` (forward and
backward), `optimizer`. Where Fleet trains on the pass that it samples in, `train` is backward alone. Completions are
canonical calls of a random index, as a policy says them, or random tokens, where no draft is right and nothing is
shared. The first step of each is a warm-up, in which both see the same completions: it gives the
parity of log-probabilities and gradients. Memory is measured in processes of their own.
"""

import argparse
import contextlib
import json
import os
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

from benchmarks import random_model  # noqa: E402
from benchmarks.comparison import as_table, compare, summarize  # noqa: E402
from benchmarks.peak_memory import peak_memory  # noqa: E402
from benchmarks.timed_trainers import (  # noqa: E402
    StepClock,
    Stopwatch,
    TimedFleet,
    TimedStock,
    Turnstile,
    reward_of_tokens,
)
from dataset import RepeatableEpisodeDataset  # noqa: E402
from environment import PickImageEnv  # noqa: E402
from fleet.rl.settings import TrainerSettings  # noqa: E402
from model_utils import load_qwen25_vl, make_lora_config, media_token_ids  # noqa: E402
from tests.helpers import PlainReward  # noqa: E402
from utils.tool_calls import make_tool_call_str  # noqa: E402

CALL_BONUS = 1000.0


def main() -> None:
    arguments = parse_arguments()
    keep_libraries_quiet()
    if arguments.memory_of is not None:
        with prepared_folder(arguments) as folder:
            print(json.dumps(memory_of_training_pass(arguments, folder)))
        return
    with prepared_folder(arguments) as folder:
        kinds = ("fleet", *(["two_passes"] if arguments.two_passes else []), "stock")
        trainers = {kind: make_trainer(kind, arguments, folder) for kind in kinds}
        run_in_turns(trainers)
        result = summarize(arguments, trainers["fleet"], trainers["stock"])
        if arguments.two_passes:
            result["two_passes"] = compare(*(step_seconds(trainers[kind]) for kind in ("two_passes", "stock")))
        if arguments.flatness is not None:
            result["flatness"] = measure_flatness(arguments, folder)
    if arguments.measure_memory:
        result["memory"] = compare_memory()
    print(as_table(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def keep_libraries_quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse_arguments() -> argparse.Namespace:
    def switch(text: str) -> bool:
        if text not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted true or false")
        return text == "true"

    def counts(text: str) -> tuple[int, int]:
        few, _, many = text.partition(",")
        if not (few.isdecimal() and many.isdecimal() and 2 <= int(few) < int(many)):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted two numbers from 2 up, as 4,64")
        return int(few), int(many)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_size", default="30m", choices=list(random_model.SIZES), help="random-weight model (default: 30m)")
    add("--num_rollouts", type=int, default=8, help="G, rollouts per episode (default: 8)")
    add("--num_episodes", type=int, default=2, help="episodes per step (default: 2)")
    add("--num_images", type=int, default=4, help="candidates per episode (default: 4)")
    add("--image_side_px", type=int, default=224, help="a multiple of 28 (default: 224)")
    add("--num_pictures", type=int, default=240, help="different images in all, drawn from at random (default: 240)")
    add("--completion_tokens", type=int, default=30, help="every completion's length (default: 30)")
    add("--completions", default="calls", choices=["calls", "random"],
        help="canonical calls, or random tokens of --completion_tokens (default: calls)")  # fmt: skip
    add("--beta", type=float, default=0.0, help="KL weight (default: 0)")
    add("--flatness", type=counts, help="two numbers of rollouts, as 4,64: also times Fleet's step at both")
    add("--freeze", choices=["tower,merger"], help="parts that are kept as they are (default: none)")
    for name in ("use_lora", "gradient_checkpointing"):
        add(f"--{name}", type=switch, nargs="?", const=True, default=False, help="true or false (default: false)")
    add("--measure_memory", type=switch, nargs="?", const=True, default=True, help="true or false (default: true)")
    add("--stock_vision_windows", action="store_true", help="stock TRL attends vision's windows as Fleet does")
    add("--two_passes", action="store_true", help="also time Fleet where it never trains on the pass it samples in")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights (default: float32)")
    add("--attn_implementation", default="sdpa", help="of Fleet's language model (default: sdpa)")
    add("--stock_attn_implementation", default="sdpa", help="of stock TRL's language model (default: sdpa)")
    add("--num_steps", type=int, default=3, help="pairs of steps that are timed (default: 3)")
    add("--json", type=Path, help="file for the result (default: none)")
    add("--memory_of", choices=["fleet", "stock"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    refuse_no_file(parser, "--json", arguments.json)
    if arguments.image_side_px % 28 or arguments.image_side_px < 56:
        parser.error(f"--image_side_px {arguments.image_side_px} is not a multiple of 28 from 56 up")
    if arguments.num_rollouts < 2 or not 2 <= arguments.num_images <= arguments.num_pictures:
        parser.error("wanted at least 2 rollouts, and from 2 images up to --num_pictures of them")
    if min(arguments.num_steps, arguments.num_episodes, arguments.completion_tokens) < 1:
        parser.error("wanted --num_steps, --num_episodes and --completion_tokens of at least 1")
    return arguments


def refuse_no_file(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """Exits with the reason if a result cannot be written to this path: known before minutes of measuring."""
    if path is None:
        return
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if path.is_dir():
        parser.error(f"{flag} {path} is a folder; name a file in it")
    if existing != path.absolute() and not existing.is_dir():
        parser.error(f"{flag} {path}: {existing} is a file, not a folder; name another place")
    if not os.access(existing, os.W_OK):
        parser.error(f"{flag} {path}: {existing} cannot be written to; name another place")


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
    """Stock TRL's trainer or Fleet's, with a stopwatch, on the folder's model and pictures.

    kind: stock, fleet, or two_passes, Fleet's without its one pass.
    """
    is_fleet = kind != "stock"
    model, processor = load_qwen25_vl(
        str(folder / "model"),
        freeze=arguments.freeze.split(",") if arguments.freeze else (),
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation if is_fleet else arguments.stock_attn_implementation,
        vision_attn_implementation=(
            None if is_fleet or arguments.stock_vision_windows else arguments.stock_attn_implementation
        ),
    )
    env = PickImageEnv(folder / "pictures", arguments.num_images, seed=0)
    dataset = RepeatableEpisodeDataset(env, arguments.image_side_px**2)
    asked = generation_kwargs(arguments, processor, env)
    args = make_config(arguments, folder / kind, {"suppress_tokens": media_token_ids(model.config), **asked})
    lora = make_lora_config() if arguments.use_lora else None
    trainer: TimedStock | TimedFleet
    if is_fleet:
        cache_bytes = 2**31 if arguments.freeze or arguments.use_lora else 0
        reward: Any = PlainReward(reward_of_tokens)
        trainer = TimedFleet(
            model,
            args,
            dataset,
            processor,
            TrainerSettings(vision_cache_bytes=cache_bytes),
            reward_function=reward,
            peft_config=lora,
        )
        trainer.takes_one_pass = kind == "fleet"
    else:
        trainer = TimedStock(
            model=model,
            reward_funcs=reward_of_tokens,
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


def generation_kwargs(arguments: argparse.Namespace, processor: Any, env: PickImageEnv) -> dict[str, Any]:
    """What makes a model of random weights answer as is asked: tokens without end, or calls of a random index.

    Of a call, every beginning gives its next token a bonus, and the indices the same one. It counts behind the last
    tokens of the prompt alone.
    """
    if arguments.completions == "random":
        return {"min_new_tokens": arguments.completion_tokens}
    ids_of = processor.tokenizer
    messages = env.prompt_messages(env.episode(0))
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opening = ids_of(prompt)["input_ids"][-3:]
    end = processor.tokenizer.eos_token_id
    calls = [[*ids_of(make_tool_call_str(index))["input_ids"], end] for index in range(arguments.num_images)]
    beginnings = sorted({tuple(ids[:length]) for ids in calls for length in range(1, len(ids) + 1)})
    return {"sequence_bias": [[[*opening, *ids], CALL_BONUS] for ids in beginnings]}


def make_config(arguments: argparse.Namespace, output_dir: Path, generation_kwargs: dict[str, Any]) -> RLOOConfig:
    """What both trainers are told."""
    return RLOOConfig(
        output_dir=str(output_dir),
        max_steps=1 + arguments.num_steps,
        num_generations=arguments.num_rollouts,
        per_device_train_batch_size=arguments.num_rollouts * arguments.num_episodes,
        gradient_accumulation_steps=1,
        gradient_checkpointing=arguments.gradient_checkpointing,
        max_completion_length=arguments.completion_tokens,
        generation_kwargs=generation_kwargs,
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


def run_in_turns(trainers: dict[str, Any]) -> None:
    """Runs all steps of the trainers, in turns: Fleet's, stock's, Fleet's, ..."""
    turnstile = Turnstile(list(trainers))
    failures: list[BaseException] = []

    def run(kind: str) -> None:
        trainer = trainers[kind]
        try:
            clock = StepClock(kind, turnstile, trainer.stopwatch)
            trainer.add_callback(clock)
            if kind == "stock" and "fleet" in trainers:
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


def step_seconds(trainer: Any) -> list[float]:
    """Of every step but the first."""
    return [seconds["step"] for seconds, _ in trainer.stopwatch.steps[1:]]


def measure_flatness(arguments: argparse.Namespace, folder: Path) -> float:
    """The time of Fleet's step with the larger number of rollouts over that with the smaller: a median of pairs."""
    trainers = {}
    for count in arguments.flatness:
        settings = argparse.Namespace(**vars(arguments) | {"num_rollouts": count})
        trainers[str(count)] = make_trainer("fleet", settings, folder)
    run_in_turns(trainers)
    few, many = map(step_seconds, trainers.values())
    return statistics.median(slow / fast for fast, slow in zip(few, many, strict=True))


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


if __name__ == "__main__":
    main()
