"""Trains the toy on each example of docs/your_own_task.md once per seed and scores it: a table, a JSON file, a picture.

    python benchmarks/example_seeds.py --num_seeds 3

Each run is a process of its own, started as a user would. Run it with nothing else running: it reports seconds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import drawn_over_steps, seeds_parser, write_record  # noqa: E402
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
    parser = seeds_parser(__doc__, "example_seeds", steps="the example's own", plot="examples_curves.png")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="(default: all)")
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
    with drawn_over_steps(path, num_panels=len(found), inches=(10, 3.2), legend="lower right") as panels:
        for axes, (name, runs) in zip(panels, found.items(), strict=True):
            for run, color in zip(runs, ("#d1495b", "#2e6f95", "#5c6b73"), strict=False):
                steps = range(1, len(run["accuracies"]) + 1)
                axes.plot(steps, run["accuracies"], color=color, linewidth=1.2, label=f"seed {run['seed']}")
            chance = runs[0]["evaluation"]["chance"]["value"]
            axes.axhline(chance, color="#5c6b73", linestyle=":", linewidth=1, label="right by chance")
            axes.set_title(name.replace("_", " "))
        panels[0].set_ylabel("share of right rollouts")


if __name__ == "__main__":
    main()
