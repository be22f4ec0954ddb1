"""The forms of what a run shows and leaves: sample tables, lines of rollouts and curve.png.

recorder.py decides when they are shown and written. The figures in them come from the trainer.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.command.options import ResolvedDefault
from fleet.rl.rollouts import GroupRecord, RolloutRecord
from fleet.run_folder import write_atomically
from model_utils import PartSize
from utils.plain_text import printable
from utils.tool_calls import ParseStatus


def distinct_rollouts(rollouts: Sequence[RolloutRecord], max_rows: int = 4) -> list[RolloutRecord]:
    """A few different completions, one of each outcome first."""
    distinct = {(rollout.episode, rollout.conversation): rollout for rollout in reversed(rollouts)}
    first_of_outcome = {rollout.verdict.outcome: rollout for rollout in distinct.values()}
    others = [rollout for rollout in distinct.values() if rollout not in first_of_outcome.values()]
    return [*first_of_outcome.values(), *others][:max_rows]


def sample_table(rollouts: Sequence[RolloutRecord], step: int) -> str:
    """Completions as a table for the terminal."""
    table = Table(title=f"step {step}: sample completions", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("wanted", "completion", "outcome"):
        table.add_column(name, overflow="fold")
    for name in ("reward", "advantage"):
        table.add_column(name, justify="right")
    for rollout in rollouts:
        verdict, episode = rollout.verdict, rollout.episode
        outcome = str(verdict.outcome)
        if verdict.parse_status is not ParseStatus.OK:
            outcome = f"{outcome}: {verdict.parse_status.value}"
        style = "green" if verdict.is_right else "yellow" if verdict.is_valid_call else "red"
        table.add_row(
            Text(_cut(f"{episode.solution} ({episode.target})" if episode.target else episode.solution)),
            Text(_cut(rollout.conversation, 160 * max(1, len(rollout.turns)))),
            Text(outcome, style=style),
            f"{rollout.reward:.2f}",
            f"{rollout.advantage:+.2f}",
        )
    return rendered(table, 110)


def group_lines(rollouts: Sequence[RolloutRecord], group_size: int, step: int) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl for whole groups of rollouts."""
    groups = [tuple(rollouts[start : start + group_size]) for start in range(0, len(rollouts), group_size)]
    return [GroupRecord(step, number, group[0].episode, group).as_json() for number, group in enumerate(groups)]


def look_line(figures: Mapping[str, float]) -> str:
    """A point of the look curve in a line for the terminal.

    >>> look_line({"control/true": 0.75, "control/grey": 0.25, "control/episodes": 32.0})
    'right on 75 % of 32 held-out episodes, on 25 % with every picture grey'
    """
    parts = [f"right on {100 * figures['control/true']:.0f} % of {figures['control/episodes']:.0f} held-out episodes"]
    if "control/grey" in figures:
        parts.append(f"on {100 * figures['control/grey']:.0f} % with every picture grey")
    if "control/swapped" in figures:
        parts.append(f"follows {100 * figures['control/swapped']:.0f} % of swapped pictures")
    return ", ".join(parts)


def resolved_table(filled: Sequence[ResolvedDefault]) -> str:
    """The defaults that were chosen for this case, and why, as a table for the terminal."""
    table = Table(
        "flag", "value", "why", title="defaults for this case", title_justify="left", show_edge=False, pad_edge=False
    )
    for default in filled:
        table.add_row(f"--{default.flag}", Text(printable(default.value)), default.reason)
    return rendered(table, 110)


def parameters_table(sizes: Mapping[str, PartSize], learning_rates: Mapping[str, float]) -> str:
    """What trains of each part of the model, and at which rate, as a table for the terminal."""
    table = Table(title="trainable parameters", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("part")
    for name in ("trainable", "of", "adapters", "rate"):
        table.add_column(name, justify="right")
    for part, size in sizes.items():
        rate = f"{learning_rates[part]:g}" if size.trainable else "frozen"
        table.add_row(part, f"{size.trainable:,}", f"{size.total:,}", f"{size.adapters:,}", rate)
    return rendered(table, 110)


def rendered(table: Table, width: int) -> str:
    """A table as text for the terminal, whose width it takes; `width` characters wide in a log file."""
    is_terminal = sys.stderr.isatty()
    target = io.StringIO()
    Console(file=target, width=None if is_terminal else width, force_terminal=is_terminal).print(table)
    return target.getvalue()


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws reward and accuracy over steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=150)
    axes = figure.subplots()
    metrics = [line for line in metrics if "reward" in line]
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else ""  # a line needs two
    for name, colour in (("reward", "#d1495b"), ("accuracy", "#00798c")):
        values: list[Any] = [line.get(name) for line in metrics]
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=f"mean {name}")
    axes.set(xlabel="optimizer step", title=title)
    low, high = axes.dataLim.intervaly
    # else a reward of the user's own lies outside
    if not (low < 0 or high > 1):
        axes.set_ylim(-0.02, 1.04)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _cut(text: str, max_chars: int = 160) -> str:
    """The text in one line of so many characters at most."""
    flat = printable(text)
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"
