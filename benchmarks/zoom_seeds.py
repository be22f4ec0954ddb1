"""Trains the toy on the example of two turns once per seed and scores it, beside policies that follow a script.

    python benchmarks/zoom_seeds.py --num_seeds 3

Each run is a process of its own, started as a user would. Run it with nothing else running: it reports seconds.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.example_seeds import cell, run_seed  # noqa: E402
from benchmarks.seed_record import drawn_over_steps, seeds_parser, write_record  # noqa: E402
from environment import Episode, ToolCall, Verdict  # noqa: E402
from examples.zoom import NUM_OPTIONS, NUM_PICTURES, ZoomEnv  # noqa: E402
from fleet.evaluation.intervals import share  # noqa: E402

NUM_EPISODES = 2000  # of a scripted policy
ROWS = {
    "right, held out": ("greedy_accuracy",),
    "right with grey pictures": ("controls", "blank_images"),
}


def never_looks(episode: Episode, rng: random.Random) -> list[ToolCall]:
    """Guesses at once."""
    return [ToolCall("answer", {"option": rng.randrange(NUM_OPTIONS)})]


def looks_at_another(episode: Episode, rng: random.Random) -> list[ToolCall]:
    """Looks at a picture that is not asked for, and guesses: none of the options names it."""
    others = [index for index in range(NUM_PICTURES) if index != episode.answer["asked"]]
    return [ToolCall("zoom", {"index": rng.choice(others)}), *never_looks(episode, rng)]


def looks_and_reads(episode: Episode, rng: random.Random) -> list[ToolCall]:
    """Looks at the picture that is asked for, and finds its label among the options."""
    asked = episode.answer["asked"]
    option = episode.answer["options"].index(episode.labels[asked])
    return [ToolCall("zoom", {"index": asked}), ToolCall("answer", {"option": option})]


POLICIES: dict[str, Callable[[Episode, random.Random], list[ToolCall]]] = {
    "never looks": never_looks,
    "looks at another picture": looks_at_another,
    "looks and reads": looks_and_reads,
}


def main() -> None:
    parser = seeds_parser(__doc__, "zoom_seeds", steps="the example's own", plot="zoom_curve.png")
    arguments = parser.parse_args()
    steps = arguments.train_steps
    of_run = [] if steps is None else ["--train_steps", str(steps), "--warmup_steps", str(min(steps, 10) - 1)]
    of_scoring = [] if arguments.eval_episodes is None else ["--eval_episodes", str(arguments.eval_episodes)]
    runs = [
        run_seed("zoom", seed, arguments.output_dir / f"seed-{seed}", of_run, of_scoring)
        for seed in range(arguments.num_seeds)
    ]
    before = scored_before(arguments.output_dir / "before.json", of_scoring)
    scripted = {name: scripted_share(policy) for name, policy in POLICIES.items()}
    print(markdown_table(runs, before, scripted))
    command = ["benchmarks/zoom_seeds.py", "--num_seeds", str(arguments.num_seeds), *of_run, *of_scoring]
    write_record(arguments.json, command, {"seeds": runs, "before": before, "scripted": scripted})
    draw(runs, scripted, arguments.plot)


def scored_before(output: Path, of_scoring: list[str]) -> dict[str, Any]:
    """The evaluation of the toy that training starts from. of_scoring: further flags."""
    task = ["--env", "examples/zoom.py:ZoomEnv", "--max_turns", "2"]
    output.parent.mkdir(parents=True, exist_ok=True)
    command = ["evaluate.py", "--model_id", "toy", *task, "--output", str(output), "--overwrite", *of_scoring]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True)
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def scripted_share(policy: Callable[[Episode, random.Random], list[ToolCall]]) -> dict[str, Any]:
    """The share of right answers of a scripted policy, as an evaluation has shares."""
    env, rng = ZoomEnv(str(REPOSITORY / "toy_images"), seed=10**9), random.Random(0)
    num_right = 0
    for number in range(NUM_EPISODES):
        episode = env.episode(number)
        verdict = env.respond(episode, policy(episode, rng))
        assert isinstance(verdict, Verdict), "a policy ends with an answer"
        num_right += verdict.is_right
    return share(num_right, NUM_EPISODES).as_json()


def markdown_table(runs: list[dict[str, Any]], before: dict[str, Any], scripted: dict[str, dict[str, Any]]) -> str:
    """The figures of the seeds side by side, of the toy before, and of the scripted policies, as a Markdown table."""
    episodes, seeds = runs[0]["evaluation"]["episodes"], ", ".join(str(run["seed"]) for run in runs)
    documents = [run["evaluation"] for run in runs]
    rows = [f"| {episodes} held-out episodes, seeds {seeds} | |", "|---|---|"]
    for name, path in {"greedy": ("greedy_accuracy",), "sampled": ("sampled_accuracy",)}.items():
        rows.append(f"| the toy before training, {name} | {cell([before], path)} |")
    rows += [f"| {title} | {cell(documents, path)} |" for title, path in ROWS.items()]
    seconds = ", ".join(f"{run['training_s']:.0f}" for run in runs)
    rows.append(f"| time of the steps | {seconds} s |")
    for name, figure in scripted.items():
        low, high = figure["ci95"]
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append(f"| a script that {name}, {NUM_EPISODES} episodes | {100 * figure['value']:.1f} % ({interval}) |")
    return "\n".join(rows)


def draw(runs: list[dict[str, Any]], scripted: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the share of right rollouts by step, a line for each seed, and the scripted policies across."""
    with drawn_over_steps(path) as (axes,):
        for run, color in zip(runs, ("#d1495b", "#2e6f95", "#5c6b73"), strict=False):
            steps = range(1, len(run["accuracies"]) + 1)
            axes.plot(steps, run["accuracies"], color=color, linewidth=1.4, label=f"seed {run['seed']}")
        for (name, shown), style in zip(scripted.items(), (":", "--", "-."), strict=True):
            label = f"a script that {name}: {100 * shown['value']:.0f} %"
            axes.axhline(shown["value"], color="#8d99ae", linestyle=style, linewidth=1, label=label)
        axes.set(ylabel="share of right rollouts", title="zoom, then answer")


if __name__ == "__main__":
    main()
