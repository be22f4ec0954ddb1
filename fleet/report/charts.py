"""The curves of a report as inline SVG: one small chart per figure, in colours that the page's style sheet decides.

Owns the choice of figures and their smoothing. The page writes the legends, as text that wraps on a phone.
"""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fleet.evaluation.figures import estimate_at
from fleet.evaluation.intervals import share
from fleet.report.rollouts import spread
from fleet.report.tables import Document, Level, percent
from fleet.run_folder import finite
from utils.tool_calls import ParseStatus

MAX_POINTS = 500  # drawn of a line; of longer runs, every second step or fewer
SIZE_INCHES = (4.2, 2.5)
Metrics = Sequence[Mapping[str, Any]]
# the colour that matplotlib draws with, by the style sheet's variable that takes its place
SENTINELS = {
    name: f"#0102{number:02x}"
    for number, name in enumerate(
        ["muted", "grid", "accent", "held-out", "good", "fair", "bad", "other", *(f"series-{k}" for k in range(8))]
    )
}
LEVEL_MARKS = {"dashed": (5, 3), "dotted": (1.2, 2.2)}
LENGTH_KEY = "completions/mean_length"
LINE_CHARTS = (
    ("entropy", "Entropy", "nats per token"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("kl", "KL to the reference", "nats per token"),
    (LENGTH_KEY, "Completion length", "tokens"),
    ("step_time_s", "Step time", "seconds"),
)
# figure, the number of its episodes, words, colour
LOOK_LINES = (
    ("control/true", "control/episodes", "right, true pictures", "accent"),
    ("control/swapped", "control/swapped_episodes", "follows a swapped picture", "good"),
    ("control/grey", "control/episodes", "right, every picture grey", "held-out"),
)
LOOK_MEANING = (
    "A model that looks is right on true pictures, near chance on grey ones, and follows a picture that trades places. "
    "Where the grey line rises along, the answer leaks into something else than the pictures."
)
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # the metrics used for the layout; the page sets its own font
    "font.size": 10,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), SENTINELS["muted"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), SENTINELS["grid"]),
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class LegendEntry:
    """A line of a chart in words. mark: "line", "dashed", "dotted", "point" or "area"."""

    label: str
    colour: str
    mark: str
    latest: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing with its words. `svg` is Fleet's own markup; every text in it is escaped."""

    title: str
    unit: str
    latest: str
    legend: tuple[LegendEntry, ...]
    note: str
    svg: str


@dataclass(frozen=True)
class Stack:
    """A family of shares, drawn as areas. rest: the name of the area from their sum to 1, if it may be less than 1."""

    title: str
    prefix: str
    colours: Mapping[str, str]
    unit: str = "shares of rollouts"
    leaves_out_absent: bool = False
    rest: str = ""


OUTCOME_COLOURS = {"correct": "good", "wrong_index": "fair", "index_out_of_range": "other", "unparsable": "bad"}
CHOICE_STACK = Stack("Choices made", "chosen/", {}, rest="none of them")
GROUP_COLOURS = {"all_right": "good", "mixed": "accent", "all_wrong": "bad"}
PARSE_COLOURS = {status.value: f"series-{number}" for number, status in enumerate(ParseStatus)} | {"ok": "good"}
STACKS = (
    Stack("Parse statuses", "parse/", PARSE_COLOURS, leaves_out_absent=True),
    Stack("Groups", "groups/", GROUP_COLOURS, unit="shares of episodes"),
    CHOICE_STACK,
    replace(CHOICE_STACK, prefix="chosen_index/"),  # of a run of an older Fleet
)


def running_mean_steps(num_steps: int) -> int:
    """The number of logged steps that the strong lines and the areas average over: a twentieth of the run.

    >>> running_mean_steps(200), running_mean_steps(12)
    (10, 1)
    """
    return max(1, num_steps // 20)


def draw_charts(
    metrics: Metrics, evaluations: Sequence[Document], levels: Sequence[Level], rights: Collection[str] = ()
) -> list[Chart]:
    """Every chart that there are finite figures for. evaluations: those of no step are not drawn.

    rights: the names of outcomes that count as right.
    """
    stepped = [document for document in evaluations if document.get("step") is not None]
    charts = [_line(metrics, "reward", "Reward", "mean per rollout"), _accuracy(metrics, stepped, levels)]
    charts.append(_look_curve(metrics, levels))
    outcomes = Stack("Outcomes", "outcome/", dict.fromkeys(sorted(rights), "good") | OUTCOME_COLOURS)
    charts += [_stacked(metrics, stack) for stack in (outcomes, *STACKS)]
    charts += [_line(metrics, key, title, unit) for key, title, unit in LINE_CHARTS]
    return [chart for chart in charts if chart is not None]


def _line(metrics: Metrics, key: str, title: str, unit: str) -> Chart | None:
    steps, values = _series(metrics, key)
    # a bare call has one length: without reasoning, lengths hardly change
    if not len(steps) or (key == LENGTH_KEY and values.max() <= 1.25 * values.min()):
        return None
    smooth, note = _running_mean(values), ""
    figure, axes = _new_axes(steps[0], steps[-1])
    _draw_line(axes, steps, values, smooth)
    if key == "reward" and values.min() >= 0 and values.max() <= 1:
        axes.set_ylim(-0.03, 1.05)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    elif values.min() >= 0:
        top = _top_of_frame(values)
        axes.set_ylim(0, top or 1)
        num_above = int((values > top).sum())
        note = f"{num_above} above the frame, up to {_short(values.max())}" if num_above else ""
    svg = _svg(figure, key, f"{title} over steps, last {_short(smooth[-1])}")
    return Chart(title, unit, _short(smooth[-1]), (), note, svg)


def _top_of_frame(values: np.ndarray) -> float:
    """The largest value with some air; but a few far above the others, as a first step that warms up, are cut off."""
    highest, usual = float(values.max()), float(np.percentile(values, 98))
    return 1.12 * (usual if highest > 3 * usual else highest)


def _accuracy(metrics: Metrics, evaluations: Sequence[Document], levels: Sequence[Level]) -> Chart | None:
    steps, values = _series(metrics, "accuracy")
    held_out = [(document["step"], estimate_at(document, "greedy_accuracy")) for document in evaluations]
    points = [(step, found) for step, found in held_out if found]
    if not len(steps) and not points:
        return None
    drawn_steps = [*steps, *(step for step, _ in points)]
    figure, axes = _new_axes(min(drawn_steps), max(drawn_steps))
    legend, latest = [], ""
    if len(steps):
        smooth = _running_mean(values)
        latest = percent(smooth[-1])
        _draw_line(axes, steps, values, smooth)
        legend.append(LegendEntry("training rollouts", "accent", "line", latest))
    for step, found in points:
        assert found.value is not None, "estimate_at gives none without"
        axes.plot([step, step], found.ci95, color=SENTINELS["held-out"], linewidth=1.6, clip_on=False, zorder=4)
        axes.plot([step], [found.value], "o", color=SENTINELS["held-out"], markersize=5, clip_on=False, zorder=5)
    if points:
        legend.append(LegendEntry("held-out, greedy, 95% interval", "held-out", "point", percent(points[-1][1].value)))
    legend += _draw_levels(axes, levels)
    words = "; ".join(f"{entry.label} {entry.latest}" for entry in legend)
    svg = _svg(figure, "accuracy", f"Accuracy over steps, last: {words}")
    return Chart("Accuracy", "share of right answers", latest, tuple(legend), "", svg)


def _draw_levels(axes: Axes, levels: Sequence[Level]) -> list[LegendEntry]:
    """Draws the levels, on an axis of percents."""
    _set_percent(axes, -0.03, 1.05)
    legend = []
    for level, (mark, dashes) in zip(levels, LEVEL_MARKS.items(), strict=False):
        axes.axhline(level.accuracy, color=SENTINELS["muted"], linewidth=1.1, linestyle=(0, dashes), zorder=1)
        legend.append(LegendEntry(level.name.lower(), "muted", mark, percent(level.accuracy)))
    return legend


def _look_curve(metrics: Metrics, levels: Sequence[Level]) -> Chart | None:
    """The look curve with Wilson's intervals: accuracy on true and grey pictures, and the swaps that are followed."""
    points = [line for line in metrics if finite(line.get("control/true")) is not None]
    if not points:
        return None
    figure, axes = _new_axes(points[0]["step"], points[-1]["step"])
    legend = []
    for name, counted, words, colour in LOOK_LINES:
        known = [line for line in points if finite(line.get(name)) is not None and finite(line.get(counted))]
        if known:
            found = [share(line[name] * line[counted], int(line[counted])) for line in known]
            steps = _thinned(np.array([float(line["step"]) for line in known]))
            shares, lows, highs = _thinned(np.array([(line.value, *line.ci95) for line in found], dtype=float).T)
            axes.fill_between(steps, lows, highs, color=SENTINELS[colour], alpha=0.15, linewidth=0)
            axes.plot(steps, shares, color=SENTINELS[colour], linewidth=2, marker="o", markersize=3)
            legend.append(LegendEntry(words, colour, "line", percent(shares[-1])))
    legend += _draw_levels(axes, levels)
    words = "; ".join(f"{entry.label} {entry.latest}" for entry in legend)
    unit = f"greedy, {points[-1]['control/episodes']:.0f} held-out episodes, 95% intervals"
    svg = _svg(figure, "control", f"Look curve over steps, last: {words}")
    return Chart("Does it look?", unit, "", tuple(legend), _look_note(points), svg)


def _look_note(points: Metrics) -> str:
    """The look curve's caption: the meaning of its lines, and the points at which the rule for blind gains held."""
    blind = [line["step"] for line in points if line.get("control/gains_blindly")]
    if not blind:
        return LOOK_MEANING
    return f"{LOOK_MEANING} Gained without looking at {len(blind)} of {len(points)} points, first at step {blind[0]:,}."


def _stacked(metrics: Metrics, stack: Stack) -> Chart | None:
    rows = [{name: finite(row[name]) for name in row if name.startswith(stack.prefix)} for row in metrics]
    whole = [number for number, row in enumerate(rows) if row and None not in row.values()]
    if not whole:
        return None
    steps = np.array([float(metrics[number]["step"]) for number in whole])
    shares_by_entry = _areas([rows[number] for number in whole], stack)
    legend, shares = tuple(shares_by_entry), np.stack([*shares_by_entry.values()])
    figure, axes = _new_axes(steps[0], steps[-1])
    if len(steps) == 1:  # an area needs a width
        steps, shares = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(shares, 2, axis=1)
    colours = [SENTINELS[entry.colour] for entry in legend]
    axes.stackplot(_thinned(steps), _thinned(shares), colors=colours, linewidth=0, alpha=0.85)
    _set_percent(axes, 0, 1)
    words = ", ".join(f"{entry.label} {entry.latest}" for entry in legend)
    svg = _svg(figure, stack.prefix, f"{stack.title} over steps, last: {words}")
    return Chart(stack.title, stack.unit, "", legend, "", svg)


def _areas(rows: Sequence[Mapping[str, float | None]], stack: Stack) -> dict[LegendEntry, np.ndarray]:
    """A stack's areas, (n,) float64 shares each, from the bottom up: names with a colour, others, the rest up to 1."""
    found = {name.removeprefix(stack.prefix) for row in rows for name in row}
    names = [name for name in stack.colours if name in found]
    names += sorted(found - stack.colours.keys(), key=lambda name: (len(name), name))
    shares = {name: _running_mean(np.array([row.get(stack.prefix + name) or 0.0 for row in rows])) for name in names}
    shown = [name for name in names if shares[name].max() > 0 or not stack.leaves_out_absent] or names[:1]
    if stack.rest:
        shares[stack.rest] = np.clip(1 - np.sum([*shares.values()], axis=0), 0, 1)
        shown.append(stack.rest)
    colours = {name: f"series-{number % 8}" for number, name in enumerate(names)}
    colours |= {**stack.colours, stack.rest: "muted"}
    return {
        LegendEntry(name.replace("_", " "), colours[name], "area", percent(shares[name][-1])): shares[name]
        for name in shown
    }


def _series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one figure, (n,) float64 each."""
    pairs = [(float(row["step"]), value) for row in metrics if (value := finite(row.get(key))) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those before it; never with later ones, which would move a rise to the left."""
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - running_mean_steps(len(values)))
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[ends] - sums[starts]) / (ends - starts)


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS of the last axis, evenly spaced, the first and the last among them."""
    return values[..., spread(range(values.shape[-1]), MAX_POINTS)]


def _new_axes(first_step: float, last_step: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.set_xlim(first_step - (first_step == last_step), last_step + (first_step == last_step))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("step")
        axes.tick_params(length=0, pad=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
    return figure, axes


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: np.ndarray) -> None:
    marker = "o" if len(steps) == 1 else ""
    if running_mean_steps(len(values)) > 1:
        axes.plot(_thinned(steps), _thinned(values), color=SENTINELS["accent"], linewidth=1, alpha=0.3, zorder=2)
    axes.plot(_thinned(steps), _thinned(smooth), color=SENTINELS["accent"], linewidth=2.2, marker=marker, zorder=3)


def _set_percent(axes: Axes, low: float, high: float) -> None:
    axes.set_ylim(low, high)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element to put into a page: no size of its own, ids of its own, the page's colours."""
    prefix = re.sub(r"\W", "-", name)
    target = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": prefix}):
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r' id="', f' id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for variable, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
