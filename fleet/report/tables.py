"""The figures of a report's tiles and tables: estimates with their intervals, and what each row means.

Owns how a figure is written and which evaluations are shown. Reads no file and draws nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet.controls import CONTROL_MEANINGS
from fleet.evaluation.figures import confusion, estimate_at
from fleet.rl.rollouts import GroupRecord
from fleet.run_folder import EVALUATION_SCHEMA_VERSION, finite

MAX_COLUMNS = 4  # evaluations side by side; of more, the first and the last are shown
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One figure of a table: the value and, below it, its interval or the like."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, one sentence that says what it means, and a cell per evaluation."""

    name: str
    meaning: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """Counts by correct index (row) and chosen index (column); the last column is no valid pick."""

    rows: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class Level:
    """An accuracy that a policy reaches without looking."""

    name: str
    accuracy: float
    detail: str


MEANINGS = {
    "greedy_accuracy": "Share of held-out episodes whose most likely answer picks the right image.",
    "sampled_accuracy": "Share of sampled answers that pick the right image.",
    "chance": "What picking an image at random would score.",
    "best_constant_index": "What always picking one and the same index would score.",
}


def percent(share: float | None) -> str:
    """A share in percent with one decimal, as 97.3%; a dash if it is unknown."""
    return "–" if share is None else f"{100 * share:.1f}%"


def ordered_evaluations(documents: Sequence[Document]) -> list[Document]:
    """Evaluations by step, each step's last one only, then those that belong to no step.

    Raises ValueError for a document of another schema.
    """
    for document in documents:
        if document.get("schema_version") != EVALUATION_SCHEMA_VERSION:
            raise ValueError(
                f"an evaluation has schema_version={document.get('schema_version')!r}, but this report reads "
                f"{EVALUATION_SCHEMA_VERSION}; write the report with the version of Fleet that evaluated"
            )
    by_step = {document["step"]: document for document in documents if document.get("step") is not None}
    return [by_step[step] for step in sorted(by_step)] + [doc for doc in documents if doc.get("step") is None]


def first_and_last(evaluations: Sequence[Document]) -> tuple[Document, Document] | None:
    """The evaluations before and after training; those of no step only if there are no others."""
    of_training = [document for document in evaluations if document.get("step") is not None] or evaluations
    return (of_training[0], of_training[-1]) if of_training else None


def shown_columns(evaluations: Sequence[Document]) -> list[Document]:
    """All evaluations if they are few, else the first, the last, and those that belong to no step."""
    if len(evaluations) <= MAX_COLUMNS:
        return list(evaluations)
    stepped = [document for document in evaluations if document.get("step") is not None]
    separate = [document for document in evaluations if document.get("step") is None]
    ends = [stepped[0], stepped[-1]] if len(stepped) > 1 else stepped
    return ends + separate[len(ends) - MAX_COLUMNS :]


def column_title(document: Document) -> str:
    """The place of an evaluation in training."""
    return "separate" if document.get("step") is None else f"step {document['step']}"


def setting(document: Document) -> str:
    """The number, seed and form of an evaluation's episodes, in one sentence."""
    samples = f", {document['num_samples']} samples each" if document.get("num_samples") else ""
    style = f", {document['prompt_style']} prompts" if document.get("prompt_style") else ""
    return f"{document.get('episodes', '?')} episodes, drawn with seed {document.get('seed', '?')}{samples}{style}."


def evaluation_rows(columns: Sequence[Document]) -> list[Row]:
    """The rows of the evaluation table that at least one of the evaluations has."""
    rows = [_row(columns, key.replace("_", " ").capitalize(), meaning, key) for key, meaning in MEANINGS.items()]
    ks = sorted({int(k) for document in columns for k in document.get("pass_at_k") or {}})
    rows[2:2] = [
        _row(columns, f"pass@{k}", f"Probability of a right answer among {k} sampled.", "pass_at_k", str(k)) for k in ks
    ]
    for control, meaning in CONTROL_MEANINGS.items():
        sentence = f"{meaning[0].upper()}{meaning[1:]}.".replace(" %", "%")
        rows.append(_row(columns, f"Control: {control.replace('_', ' ')}", sentence, "controls", control))
    models = sorted({str(document["baseline"].get("model")) for document in columns if document.get("baseline")})
    rows += [
        _row(columns, "Baseline", f"Greedy accuracy of {', '.join(models)}.", "baseline", "greedy_accuracy"),
        Row(
            "Lead over the baseline",
            "Difference in points, its interval, p of the paired test, and the episodes only one of the two got right.",
            tuple(_difference_cell(document) for document in columns),
        ),
    ]
    return [row for row in rows if any(cell.text != "–" for cell in row.cells)]


def _row(columns: Sequence[Document], name: str, meaning: str, *keys: str) -> Row:
    """The row of the figure under nested keys of each document."""
    cells = []
    for document in columns:
        estimate = estimate_at(document, *keys)
        detail = estimate.interval("–") if estimate else ""
        if estimate and keys == ("best_constant_index",):
            detail = f"index {document['best_constant_index'].get('index')}"
        cells.append(Cell(percent(estimate.value if estimate else None), detail))
    return Row(name, meaning, tuple(cells))


def _difference_cell(document: Document) -> Cell:
    estimate = estimate_at(document, "baseline", "difference")
    if estimate is None or estimate.value is None:
        return Cell("–")
    difference, (low, high) = document["baseline"]["difference"], estimate.ci95
    details = [f"{100 * low:+.1f} to {100 * high:+.1f}"]
    if (p_value := finite(difference.get("p_value"))) is not None:
        details.append("p < 0.001" if p_value < 0.001 else f"p={p_value:.3f}")
    alone = [difference.get(f"only_{whose}_right") for whose in ("model", "baseline")]
    if None not in alone:
        details.append(" vs ".join(map(str, alone)))
    return Cell(f"{100 * estimate.value:+.1f}", "; ".join(details))


def accuracy_by_index_rows(columns: Sequence[Document]) -> list[Row]:
    """Accuracy on the episodes whose correct index is 0, 1, ...; a row each."""
    indices = sorted({int(index) for document in columns for index in document.get("accuracy_by_correct_index") or {}})
    return [_row(columns, str(index), "", "accuracy_by_correct_index", str(index)) for index in indices]


def heat_map(last: Document | None, groups: Sequence[GroupRecord]) -> HeatMap | None:
    """Chosen by correct index, from the last evaluation, else from the recorded rollouts; None without both."""
    if last and last.get("confusion"):
        return HeatMap(last["confusion"], f"{column_title(last)}, greedy answers on held-out episodes")
    if not groups:
        return None
    judged = [(rollout.episode.correct_index, rollout.verdict) for group in groups for rollout in group.rollouts]
    num_candidates = max(group.episode.num_candidates for group in groups)
    return HeatMap(confusion(judged, num_candidates), "all recorded rollouts, sampled in training")
