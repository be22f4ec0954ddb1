"""Both toy tasks with groups of one accord replaced and with all groups kept: steps and seconds to 0.95, seed by seed.

    python benchmarks/dynamic_sampling_seeds.py --num_seeds 3

The accuracy is of all groups that were sampled, replaced ones too, so it is of the same episodes in both. A pair of
runs goes one after the other, in turns. Run it with nothing else running: it reports seconds.
"""

import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import seeds_parser, write_record  # noqa: E402
from fleet.run_folder import read_jsonl  # noqa: E402

WINDOW = 5  # steps that a figure is a mean of
GOAL = 0.95
TASKS = {"a fixed index": ["--fixed_correct_index", "0"], "pictures by name": ["--fixed_correct_index", "none"]}
KINDS = {"all groups kept": 0, "replaced": 4}  # attempts


def main() -> None:
    parser = seeds_parser(__doc__, "dynamic_sampling", steps="the demos' 60 and 100", is_scored=False)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK",
                        help=f"some of: {', '.join(TASKS)} (default: all)")  # fmt: skip
    arguments = parser.parse_args()
    flags = [] if arguments.train_steps is None else ["--train_steps", str(arguments.train_steps)]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, task in enumerate(arguments.only):
        for seed in range(arguments.num_seeds):
            for kind, attempts in KINDS.items():
                folder = arguments.output_dir / f"task-{number}-seed-{seed}-attempts-{attempts}"
                given = [*TASKS[task], *flags, "--seed", str(seed), "--dynamic_sampling", str(attempts)]
                found.setdefault(f"{task}, {kind}", []).append(run_seed(given, folder) | {"seed": seed})
    print(markdown_table(found))
    command = ["benchmarks/dynamic_sampling_seeds.py", "--num_seeds", str(arguments.num_seeds), *flags]
    write_record(arguments.json, command, found)


def run_seed(flags: list[str], output_dir: Path) -> dict[str, Any]:
    """The figures of one run."""
    command = ["accelerate", "launch", "training.py", *flags]
    subprocess.run([*command, "--output_dir", str(output_dir), "--overwrite"], cwd=REPOSITORY, check=True)
    lines = read_jsonl(output_dir / "metrics.jsonl")
    accuracies = [line["accuracy"] for line in lines]
    seconds = list(accumulate(line["step_time_s"] for line in lines))
    ends = range(WINDOW, len(lines) + 1)
    steps = next((end for end in ends if sum(accuracies[end - WINDOW : end]) / WINDOW >= GOAL), None)
    return {
        "steps_to_goal": steps,
        "seconds_to_goal": None if steps is None else seconds[steps - 1],
        "last_accuracy": sum(accuracies[-WINDOW:]) / WINDOW,
        "training_s": seconds[-1],
        "mixed_when_trained": 1 - sum(line["frac_reward_zero_std"] for line in lines) / len(lines),
        "groups_per_kept": sum(line.get("dynamic_sampling/groups_per_kept", 1) for line in lines) / len(lines),
        "accuracies": accuracies,
    }


def markdown_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The runs as a Markdown table, seeds side by side."""
    rows = [
        f"| task, groups of one accord | steps to {GOAL} | seconds to {GOAL} | accuracy, last {WINDOW} steps "
        "| share of groups that teach | groups sampled for one kept | all steps |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = (
        ("steps_to_goal", "{}"), ("seconds_to_goal", "{:.1f}"), ("last_accuracy", "{:.2f}"),
        ("mixed_when_trained", "{:.2f}"), ("groups_per_kept", "{:.1f}"), ("training_s", "{:.0f} s"),
    )  # fmt: skip
    for name, runs in found.items():
        cells = [", ".join("–" if run[field] is None else form.format(run[field]) for run in runs)
                 for field, form in columns]  # fmt: skip
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
