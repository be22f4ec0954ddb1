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
# name of the result, what the table calls it, the flags; memory is measured in the rows that the others vary
ROWS: list[tuple[str, str, list[str]]] = [
    ("g4", "4 rollouts", ["--num_rollouts", "4"]),
    ("g8", "8 rollouts", ["--num_rollouts", "8"]),
    ("g16", "16 rollouts", ["--num_rollouts", "16", *TIME_ALONE]),
    ("g8_beta", "8 rollouts, beta 0.05", ["--num_rollouts", "8", "--beta", "0.05", *TIME_ALONE]),
    ("g8_frozen", "8 rollouts, frozen vision, images new", ["--num_rollouts", "8", "--freeze_vision", *TIME_ALONE]),
    (
        "g8_frozen_known",
        "8 rollouts, frozen vision, 12 images in all",
        ["--num_rollouts", "8", "--freeze_vision", "--num_pictures", "12", *TIME_ALONE],
    ),
    (
        "g8_frozen_known_4_episodes",
        "the same, 4 episodes a step",
        ["--num_rollouts", "8", "--freeze_vision", "--num_pictures", "12", "--num_episodes", "4", *TIME_ALONE],
    ),
    ("g8_lora", "8 rollouts, LoRA", ["--num_rollouts", "8", "--use_lora", *TIME_ALONE]),
    ("g8_one_episode", "8 rollouts, 1 episode a step", ["--num_rollouts", "8", "--num_episodes", "1", *TIME_ALONE]),
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
        "| | step: Fleet | stock | ratio (spread) | of ideal | generate | train | of ideal | memory added | overhead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, label in [(name, label) for name, label, _ in ROWS if name in results]:
        found = results[name]
        step, train = found["step"], found["train"]
        memory = f"{found['memory']['ratio']:.1f}x less" if "memory" in found else ""
        lines.append(
            f"| {label} | {step['fleet_s_median']:.2f} s | {step['stock_s_median']:.2f} s "
            f"| **{step['ratio_median']:.1f}x** ({step['ratio_min']:.1f} to {step['ratio_max']:.1f}) "
            f"| {step['share_of_ideal']:.0%} | {found['generate']['ratio_median']:.1f}x "
            f"| {train['ratio_median']:.1f}x | {train['share_of_ideal']:.0%} | {memory} "
            f"| {found['overhead']['fleet_share_median']:.1%} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """How the ratio and the seconds of a step grow with the number of rollouts."""
    from matplotlib.figure import Figure

    found = [results[name] for name in ("g4", "g8", "g16") if name in results]
    groups = [result["settings"]["num_rollouts"] for result in found]
    ratios = [result["step"]["ratio_median"] for result in found]
    spread = [
        [result["step"]["ratio_median"] - result["step"]["ratio_min"] for result in found],
        [result["step"]["ratio_max"] - result["step"]["ratio_median"] for result in found],
    ]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(groups, ratios, yerr=spread, marker="o", capsize=3, color="#1f6f8b", label="measured")
    ideals = [result["ideal"]["ratio"] for result in found]
    left.plot(groups, ideals, linestyle="--", color="0.5", label="by FLOPs alone")
    left.set(title="Whole step: stock TRL's time over Fleet's", xlabel="rollouts per episode", ylim=(0, None))
    for kind, color in (("stock", "#c1553b"), ("fleet", "#1f6f8b")):
        seconds = [result["step"][f"{kind}_s_median"] for result in found]
        right.plot(groups, seconds, marker="o", color=color, label={"stock": "stock TRL", "fleet": "Fleet"}[kind])
    right.set(title="Seconds a step", xlabel="rollouts per episode", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(groups)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
