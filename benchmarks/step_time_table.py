"""Runs step_time.py over the settings of docs/performance.md, and writes the table, the results and the plot.

    python benchmarks/step_time_table.py

Every row is a process of its own. Run it with nothing else running: it reports seconds. On two CPU cores it takes
about half an hour, nearly all of it stock TRL's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

TIME_ALONE = ["--measure_memory", "false"]
RANDOM = ["--completions", "random", *TIME_ALONE]
ONE_EPISODE = ["--num_episodes", "1"]
# name of the result, what the table calls it, the flags
ROWS: list[tuple[str, str, list[str]]] = [
    ("calls_g8", "calls, 8 rollouts", ["--num_rollouts", "8", "--two_passes", "--flatness", "4,64", *TIME_ALONE]),
    ("calls_g16", "calls, 16 rollouts", ["--num_rollouts", "16", "--two_passes", *TIME_ALONE]),
    (
        "calls_g32",
        "calls, 32 rollouts, 1 episode a step",
        ["--num_rollouts", "32", *ONE_EPISODE, "--two_passes", *TIME_ALONE],
    ),
    ("random_g8", "random tokens, 8 rollouts", ["--num_rollouts", "8", *RANDOM]),
    ("random_g16", "random tokens, 16 rollouts", ["--num_rollouts", "16", *RANDOM]),
    (
        "random_g32",
        "random tokens, 32 rollouts, 1 episode a step",
        ["--num_rollouts", "32", *ONE_EPISODE, *RANDOM],
    ),
    ("calls_g8_beta", "calls, 8 rollouts, beta 0.05", ["--num_rollouts", "8", "--beta", "0.05", *TIME_ALONE]),
    (
        "calls_g8_frozen",
        "calls, 8 rollouts, frozen vision",
        ["--num_rollouts", "8", "--freeze", "tower,merger", *TIME_ALONE],
    ),
    ("calls_g8_lora", "calls, 8 rollouts, LoRA", ["--num_rollouts", "8", "--use_lora", *TIME_ALONE]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "step_time")
    parser.add_argument("--plot", type=Path, default=REPOSITORY / "docs" / "step_time.png")
    names = [name for name, _, _ in ROWS]
    parser.add_argument(
        "--only",
        nargs="*",
        choices=names,
        help="rows to measure; the others are read, or left out with further flags of step_time.py (default: all)",
    )
    arguments, extra = parser.parse_known_args()
    results = {}
    for name, label, flags in ROWS:
        if extra and arguments.only is not None and name not in arguments.only:
            continue
        path = arguments.results / f"{name}.json"
        command = [*flags, *extra]
        if arguments.only is None or name in arguments.only:
            print(f"--- {label}", flush=True)
            start = [sys.executable, "benchmarks/step_time.py", *command, "--json", str(path)]
            subprocess.run(start, cwd=REPOSITORY, check=True)
        results[name] = json.loads(path.read_text())
        if results[name]["command"] != f"python benchmarks/step_time.py {' '.join(command)}":
            raise SystemExit(f"{path} is of `{results[name]['command']}`; measure {name} again")
    print(markdown_table(results))
    draw(results, arguments.plot)


def markdown_table(results: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    lines = [
        "| | step: Fleet | stock | ratio (spread) | in two passes | generate | passes to sample | overhead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in [(name, label) for name, label, _ in ROWS if name in results]:
        found = results[name]
        step, passes = found["step"], found["passes"]
        two = f"{found['two_passes']['ratio_median']:.1f}x" if "two_passes" in found else ""
        lines.append(
            f"| {label} | {step['fleet_s_median']:.2f} s | {step['stock_s_median']:.2f} s "
            f"| **{step['ratio_median']:.1f}x** ({step['ratio_min']:.1f} to {step['ratio_max']:.1f}) | {two} "
            f"| {found['generate']['ratio_median']:.1f}x "
            f"| {passes['generation_forwards']} for {passes['stock_generation_forwards']} "
            f"| {found['overhead']['fleet_share_median']:.1%} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """How the ratio and the seconds of a step grow with the number of rollouts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = {"calls": ("canonical calls", "#1f6f8b"), "random": ("random tokens", "#8a7a3b")}
    for kind, (label, color) in kinds.items():
        found = [results[name] for name in (f"{kind}_g8", f"{kind}_g16", f"{kind}_g32") if name in results]
        groups = [result["settings"]["num_rollouts"] for result in found]
        ratios = [result["step"]["ratio_median"] for result in found]
        spread = [
            [result["step"]["ratio_median"] - result["step"]["ratio_min"] for result in found],
            [result["step"]["ratio_max"] - result["step"]["ratio_median"] for result in found],
        ]
        left.errorbar(groups, ratios, yerr=spread, marker="o", capsize=3, color=color, label=label)
        seconds = [result["step"]["fleet_s_median"] / result["settings"]["num_episodes"] for result in found]
        right.plot(groups, seconds, marker="o", color=color, label=f"Fleet, {label}")
        stock = [result["step"]["stock_s_median"] / result["settings"]["num_episodes"] for result in found]
        right.plot(groups, stock, marker="o", color=color, linestyle="--", alpha=0.6, label=f"stock TRL, {label}")
    left.set(title="Whole step: stock TRL's time over Fleet's", xlabel="rollouts per episode", ylim=(0, None))
    right.set(title="Seconds a step, per episode", xlabel="rollouts per episode", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks([8, 16, 32])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
