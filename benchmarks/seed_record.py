"""What the benchmarks of several seeds share: their flags, their JSON file and the frame of their picture."""

import argparse
import contextlib
import json
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fleet.run.config import installed_versions

REPOSITORY = Path(__file__).resolve().parent.parent


def seeds_parser(
    words: str | None, name: str, *, steps: str, num_seeds: int = 3, plot: str | None = None, is_scored: bool = True
) -> argparse.ArgumentParser:
    """The parser of a benchmark. words: its help. name: of its folder in runs/ and its file in benchmarks/results/.

    steps: the default of --train_steps, in words. plot: the name of its picture in docs/. is_scored: takes
    --eval_episodes.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=num_seeds, help=f"seeds 0 to N - 1 (default: {num_seeds})")
    parser.add_argument("--train_steps", type=int, help=f"of each run (default: {steps})")
    if is_scored:
        parser.add_argument("--eval_episodes", type=int, help="held out (default: the commands' own)")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / name, help=f"(default: runs/{name})")
    results = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    parser.add_argument("--json", type=Path, default=results, help=f"(default: benchmarks/results/{name}.json)")
    if plot is not None:
        parser.add_argument("--plot", type=Path, default=REPOSITORY / "docs" / plot, help=f"(default: docs/{plot})")
    return parser


def write_record(path: Path, command: Sequence[str], runs: Any) -> None:
    """Writes the record of `runs`. command: the words that make them again, behind "python"."""
    record = {
        "command": shlex.join(["python", *command]),
        "device": f"{os.cpu_count()} cores of {platform.machine()}, no GPU",
        "versions": installed_versions(),
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def drawn_over_steps(
    path: Path, *, num_panels: int = 1, inches: tuple[float, float] = (8, 3.6), legend: str = "center right"
) -> Iterator[Sequence[Any]]:
    """Gives matplotlib's axes of shares over optimizer steps; behind it they are framed and saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, num_panels, figsize=inches, dpi=150, sharey=True, squeeze=False)
    yield panels[0]
    for axes in panels[0]:
        axes.set(xlabel="optimizer step", ylim=(0, 1.04))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0][0].legend(frameon=False, loc=legend, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
