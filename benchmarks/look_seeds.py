"""Runs `make demo-look`'s commands once per seed and writes what came of it: a table, a JSON file and a picture.

    python benchmarks/look_seeds.py --num_seeds 3

Each seed trains and is then scored beside the toy it started from, in processes of their own, as a user would. Run it
with nothing else running: it reports seconds.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import drawn_over_steps, seeds_parser, write_record  # noqa: E402
from fleet.run_folder import read_jsonl  # noqa: E402

COLUMNS = {
    "greedy accuracy": ("greedy_accuracy",),
    "blank pictures": ("controls", "blank_images"),
    "follows a swapped picture": ("controls", "swapped_images"),
    "stays at its place": ("controls", "permuted_order"),
    "redrawn pictures": ("controls", "redrawn_images"),
}


def main() -> None:
    parser = seeds_parser(__doc__, "look_seeds", steps="the demo's 100", plot="look_curve.png")
    arguments = parser.parse_args()
    of_both = [] if arguments.eval_episodes is None else ["--eval_episodes", str(arguments.eval_episodes)]
    of_run = [] if arguments.train_steps is None else ["--train_steps", str(arguments.train_steps)]
    runs = [
        run_seed(seed, arguments.output_dir / f"seed-{seed}", [*of_run, *of_both], of_both)
        for seed in range(arguments.num_seeds)
    ]
    print(markdown_table(runs))
    command = ["benchmarks/look_seeds.py", "--num_seeds", str(arguments.num_seeds), *of_run, *of_both]
    write_record(arguments.json, command, runs)
    draw(runs, arguments.plot)


def run_seed(seed: int, output_dir: Path, of_run: list[str], of_scoring: list[str]) -> dict[str, Any]:
    """One seed: the evaluation of its end with the toy's beside it, held-out accuracies on the way, and seconds.

    of_run, of_scoring: further flags of training and of scoring.
    """
    flags = ["--fixed_correct_index", "none", "--eval_steps", "25", "--seed", str(seed), *of_run]
    start_s = time.perf_counter()
    launch = ["accelerate", "launch", "training.py", *flags, "--output_dir", str(output_dir), "--overwrite"]
    subprocess.run(launch, cwd=REPOSITORY, check=True)
    command_s = time.perf_counter() - start_s
    figures = output_dir / "evaluation.json"
    scoring = ["--model_id", str(output_dir / "final"), "--baseline", "toy", "--output", str(figures), *of_scoring]
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "evaluate.py", *scoring], cwd=REPOSITORY, check=True)
    lines = read_jsonl(output_dir / "metrics.jsonl")
    # names of folders are this machine's own
    evaluation = json.loads(figures.read_text()) | {"model": f"seed {seed}"}
    return {
        "seed": seed,
        "evaluation": evaluation,
        "held_out": [[line["step"], line["eval/greedy_accuracy"]] for line in lines if "eval/greedy_accuracy" in line],
        "accuracies": [line["accuracy"] for line in lines if "accuracy" in line],
        "training_s": sum(line.get("step_time_s", 0) for line in lines),
        "command_s": command_s,
        "evaluate_s": time.perf_counter() - start_s,
    }


def markdown_table(runs: list[dict[str, Any]]) -> str:
    """The toy before, and each seed's run after, as a Markdown table."""
    rows = [
        f"| | {' | '.join(COLUMNS)} | gain (paired) | training | whole command |",
        "|---" * (len(COLUMNS) + 4) + "|",
        f"| before | {' | '.join(cells(runs[0]['evaluation']['baseline']))} | | | |",
    ]
    for run in runs:
        gain = run["evaluation"]["baseline"]["difference"]
        low, high = gain["ci95"]
        points = f"{100 * gain['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(
            f"| seed {run['seed']} | {' | '.join(cells(run['evaluation']))} | {points} "
            f"| {run['training_s']:.0f} s | {run['command_s']:.0f} s |"
        )
    return "\n".join(rows)


def cells(document: dict[str, Any]) -> list[str]:
    """The figures of COLUMNS in percent with their intervals."""
    found = []
    for path in COLUMNS.values():
        figure: Any = document
        for name in path:
            figure = figure[name]
        low, high = figure["ci95"]
        found.append(f"{100 * figure['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    return found


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws every seed's accuracy on what it trains on, and on held-out episodes."""
    with drawn_over_steps(path) as (axes,):
        for run in runs:
            label = "training, sampled" if run["seed"] == 0 else None
            axes.plot(
                range(1, len(run["accuracies"]) + 1), run["accuracies"], color="#9db4c0", linewidth=0.9, label=label
            )
        for run, marker in zip(runs, "osD^v<>p", strict=False):
            steps, values = zip(*run["held_out"], strict=True)
            axes.plot(
                steps,
                values,
                color="#d1495b",
                marker=marker,
                linewidth=1.4,
                label=f"held out, greedy, seed {run['seed']}",
            )
        axes.axhline(0.25, color="#5c6b73", linestyle=":", linewidth=1, label="right by chance")
        axes.set(ylabel="accuracy", title="make demo-look")


if __name__ == "__main__":
    main()
