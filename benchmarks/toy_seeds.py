"""Runs the demo's command once per seed and writes what came of it: a table, a JSON file and a picture.

    python benchmarks/toy_seeds.py --num_seeds 5

Each run is a process of its own, started as a user would. Run it with nothing else running: it reports seconds.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import drawn_over_steps, seeds_parser, write_record  # noqa: E402
from fleet.run_folder import read_jsonl  # noqa: E402

WINDOW = 5  # steps that a figure is a mean of
GOAL = 0.95


def main() -> None:
    parser = seeds_parser(
        __doc__, "toy_seeds", steps="the demo's 60", num_seeds=5, plot="toy_curve.png", is_scored=False
    )
    arguments = parser.parse_args()
    if arguments.train_steps is not None and arguments.train_steps < WINDOW:
        parser.error(f"--train_steps {arguments.train_steps}, but figures are means of {WINDOW} steps; pass as many")
    flags = [] if arguments.train_steps is None else ["--train_steps", str(arguments.train_steps)]
    runs = [run_seed(seed, flags, arguments.output_dir / f"seed-{seed}") for seed in range(arguments.num_seeds)]
    print(markdown_table(runs))
    command = ["benchmarks/toy_seeds.py", "--num_seeds", str(arguments.num_seeds), *flags]
    write_record(arguments.json, command, runs)
    draw(runs, arguments.plot)


def run_seed(seed: int, flags: list[str], output_dir: Path) -> dict[str, Any]:
    """One run of the demo with this seed: its figures, and the reward of every step."""
    command = ["accelerate", "launch", "training.py", "--fixed_correct_index", "0", "--seed", str(seed), *flags]
    start_s = time.perf_counter()
    subprocess.run([*command, "--output_dir", str(output_dir), "--overwrite"], cwd=REPOSITORY, check=True)
    command_s = time.perf_counter() - start_s
    lines = read_jsonl(output_dir / "metrics.jsonl")
    rewards = [line["reward"] for line in lines]
    means = [sum(rewards[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(rewards) + 1)]
    return {
        "seed": seed,
        "first_reward": rewards[0],
        "last_reward": means[-1],
        "last_accuracy": sum(line["accuracy"] for line in lines[-WINDOW:]) / WINDOW,
        "steps_to_goal": next((number + WINDOW for number, mean in enumerate(means) if mean >= GOAL), None),
        "training_s": sum(line["step_time_s"] for line in lines),
        "command_s": command_s,
        "rewards": rewards,
    }


def markdown_table(runs: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table."""
    rows = [
        f"| seed | reward, step 1 | reward, last {WINDOW} steps | accuracy, last {WINDOW} | steps to {GOAL} "
        "| training | whole command |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {run['seed']} | {run['first_reward']:.2f} | {run['last_reward']:.3f} | {run['last_accuracy']:.3f} "
        f"| {run['steps_to_goal']} | {run['training_s']:.0f} s | {run['command_s']:.0f} s |"
        for run in runs
    ]
    return "\n".join(rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws every seed's reward over steps, and their mean."""
    with drawn_over_steps(path, legend="lower right") as (axes,):
        steps = range(1, len(runs[0]["rewards"]) + 1)
        for run in runs:
            axes.plot(steps, run["rewards"], color="#9db4c0", linewidth=0.9)
        mean = [sum(rewards) / len(runs) for rewards in zip(*(run["rewards"] for run in runs), strict=True)]
        axes.plot(steps, mean, color="#d1495b", linewidth=2.2, label=f"mean of {len(runs)} seeds")
        axes.axhline(0.25, color="#5c6b73", linestyle=":", linewidth=1, label="right by chance")
        axes.set(ylabel="mean reward", title="accelerate launch training.py")


if __name__ == "__main__":
    main()
