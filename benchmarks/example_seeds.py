"""Trains the toy on each example of docs/your_own_task.md once per seed and scores it: a table, a JSON file, a picture.

    python benchmarks/example_seeds.py --num_seeds 3

Each run is a process of its own, started as a user would. Run it with nothing else running: it reports seconds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import write_record  # noqa: E402
from fleet.run_folder import read_jsonl  # noqa: E402

EXAMPLES = {"click": "ClickEnv", "counting": "CountingEnv", "odd_one_out": "OddOneOutEnv"}
CLASSES = EXAMPLES | {"zoom": "ZoomEnv"}  # zoom_seeds.py runs the example of two turns
# row: where the figure stands in an evaluation, and what is good
ROWS = {
    "right": (("greedy_accuracy",), ""),
    "chance, as the environment says": (("chance",), ""),
    "best answer that is always the same": (("best_constant_choice",), ""),
    "right with grey pictures": (("controls", "blank_images"), "near chance"),
    "follows what it chose to its new place": (("controls", "swapped_images"), "near 100 %"),
    "stays at its place in another order": (("controls", "permuted_order"), "low"),
    "right with each picture redrawn": (("controls", "redrawn_images"), 'as "right"'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="(default: all)")
    parser.add_argument("--num_seeds", type=int, default=3, help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--train_steps", type=int, help="of each run (default: the example's own)")
    parser.add_argument("--eval_episodes", type=int, help="held out (default: the command's own)")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "examples", help="(default: runs/)")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks" / "results" / "example_seeds.json")
    parser.add_argument("--plot", type=Path, default=REPOSITORY / "docs" / "examples_curves.png")
    arguments = parser.parse_args()
    steps = arguments.train_steps
    of_run = [] if steps is None else ["--train_steps", str(steps), "--warmup_steps", str(min(steps, 10) - 1)]
    of_scoring = [] if arguments.eval_episodes is None else ["--eval_episodes", str(arguments.eval_episodes)]
    found = {
        name: [
            run_seed(name, seed, arguments.output_dir / f"{name}-{seed}", of_run, of_scoring)
            for seed in range(arguments.num_seeds)
        ]
        for name in arguments.only
    }
    print(markdown_table(found))
    command = ["benchmarks/example_seeds.py", "--num_seeds", str(arguments.num_seeds), *of_run, *of_scoring]
    write_record(arguments.json, command, found)
    draw(found, arguments.plot)


def run_seed(name: str, seed: int, output_dir: Path, of_run: list[str], of_scoring: list[str]) -> dict[str, Any]:
    """One seed of one example: the evaluation of its end, the accuracy of every step, and the seconds of its steps.

    of_run, of_scoring: further flags of training and of scoring.
    """
    env = ["--env", f"examples/{name}.py:{CLASSES[name]}", "--config", f"examples/{name}.yaml"]
    launch = ["accelerate", "launch", "training.py", *env, "--seed", str(seed), *of_run]
    subprocess.run([*launch, "--output_dir", str(output_dir), "--overwrite"], cwd=REPOSITORY, check=True)
    figures = output_dir / "evaluation.json"
    scoring = ["evaluate.py", "--model_id", str(output_dir / "final"), "--output", str(figures), *of_scoring]
    subprocess.run([sys.executable, *scoring], cwd=REPOSITORY, check=True)
    lines = [line for line in read_jsonl(output_dir / "metrics.jsonl") if "accuracy" in line]
    return {
        "seed": seed,
        # names of folders are this machine's own
        "evaluation": json.loads(figures.read_text()) | {"model": f"{name}, seed {seed}"},
        "accuracies": [line["accuracy"] for line in lines],
        "training_s": sum(line["step_time_s"] for line in lines),
    }


def markdown_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The figures of each example, its seeds side by side, as a Markdown table."""
    runs = next(iter(found.values()))
    episodes, seeds = runs[0]["evaluation"]["episodes"], ", ".join(str(run["seed"]) for run in runs)
    names = " | ".join(name.replace("_", " ") for name in found)
    rows = [f"| {episodes} held-out episodes, seeds {seeds} | {names} | good is |", "|---" * (len(found) + 2) + "|"]
    for title, (path, good) in ROWS.items():
        cells = " | ".join(cell([run["evaluation"] for run in runs], path) for runs in found.values())
        rows.append(f"| {title} | {cells} | {good} |".replace("  ", " "))
    seconds = " | ".join(", ".join(f"{run['training_s']:.0f}" for run in runs) + " s" for runs in found.values())
    return "\n".join([*rows, f"| time of the steps | {seconds} | |"])


def cell(documents: list[dict[str, Any]], path: tuple[str, ...]) -> str:
    """One figure of several evaluations in percent; "–" where there is none."""
    values = []
    for document in documents:
        figure: Any = document
        for name in path:
            figure = (figure or {}).get(name)
        values.append(figure and f"{100 * figure['value']:.0f}")
    return "–" if None in values else ", ".join(map(str, values)) + " %"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the share of right rollouts by step, a panel for each example and a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(10, 3.2), dpi=150, sharey=True, squeeze=False)
    for axes, (name, runs) in zip(panels[0], found.items(), strict=True):
        for run, color in zip(runs, ("#d1495b", "#2e6f95", "#5c6b73"), strict=False):
            steps = range(1, len(run["accuracies"]) + 1)
            axes.plot(steps, run["accuracies"], color=color, linewidth=1.2, label=f"seed {run['seed']}")
        chance = runs[0]["evaluation"]["chance"]["value"]
        axes.axhline(chance, color="#5c6b73", linestyle=":", linewidth=1, label="right by chance")
        axes.set(xlabel="optimizer step", ylim=(0, 1.04), title=name.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("share of right rollouts")
    panels[0][0].legend(frameon=False, loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
