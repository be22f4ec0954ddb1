"""The figures of a report's tiles and tables: estimates with their intervals, and what each row means.

Owns how a figure is written and which evaluations are shown. Reads no file and draws nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet.controls import CONTROL_MEANINGS, NO_SUCH_CONTROL
from fleet.evaluation.figures import confusion, estimate_at
from fleet.rl.rollouts import GroupRecord
from fleet.run_folder import EVALUATION_SCHEMA_VERSION, finite

MAX_CHOICES = 16  # of a table by choice; a task with more has no such table
MAX_COLUMNS = 4  # evaluations side by side; of more, the first and the last are shown
Document = Mapping[str, Any]
# what a run took beside what was predicted: its name in config.json, in words, the unit, and the places
COMPARED = (
    ("memory_gib", "peak memory of a process", "GiB", 2),
    ("step_tokens", "tokens of a training step, at most", "tokens", 0),
    ("step_s", "a step", "s", 2),
)


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
    """Counts by right choice (row) and the choice made (column); the last column is none of them."""

    choices: Sequence[str]
    rows: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class Level:
    """An accuracy that a policy reaches without looking."""

    name: str
    accuracy: float
    detail: str


MEANINGS = {
    "greedy_accuracy": "Share of held-out episodes whose most likely answer is right.",
    "sampled_accuracy": "Share of sampled answers that are right.",
    "chance": "What an answer without looking would score, as the environment says.",
    "best_constant_choice": "What always choosing one and the same would score.",
}


def percent(share: float | None) -> str:
    """A share in percent with one decimal, as 97.3%; a dash if it is unknown."""
    return "–" if share is None else f"{100 * share:.1f}%"


def ordered_evaluations(documents: Sequence[Document]) -> list[Document]:
    """Evaluations by step, each step's last one only, then those that belong to no step.

    Raises ValueError for a document of a schema that is neither this one nor the one before.
    """
    documents = [_updated(document) for document in documents]
    for document in documents:
        if document.get("schema_version") != EVALUATION_SCHEMA_VERSION:
            raise ValueError(
                f"an evaluation has schema_version={document.get('schema_version')!r}, but this report reads "
                f"{EVALUATION_SCHEMA_VERSION}; write the report with the version of Fleet that evaluated"
            )
    by_step = {document["step"]: document for document in documents if document.get("step") is not None}
    return [by_step[step] for step in sorted(by_step)] + [doc for doc in documents if doc.get("step") is None]


def _updated(document: Document) -> Document:
    """A document of version 1, of the task that picks an image, as one of version 2; any other as it is."""
    if document.get("schema_version") != 1:
        return document
    updated = dict(document) | {"schema_version": EVALUATION_SCHEMA_VERSION}
    best = updated.pop("best_constant_index", None) or {}
    updated["choices"] = [str(index) for index in range(updated.pop("candidates", 0))]
    updated["best_constant_choice"] = {**best, "choice": str(best.get("index"))}
    updated["accuracy_by_choice"] = updated.pop("accuracy_by_correct_index", None)
    return updated


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
    lacking: list[Row] = []
    for control, meaning in CONTROL_MEANINGS.items():
        name = f"Control: {control.replace('_', ' ')}"
        if columns and not any((document.get("controls") or {}).get(control) for document in columns):
            lacking.append(Row(name, _sentence(NO_SUCH_CONTROL), tuple(Cell("–") for _ in columns)))
        else:
            rows.append(_row(columns, name, _sentence(meaning), "controls", control))
    models = sorted({str(document["baseline"].get("model")) for document in columns if document.get("baseline")})
    rows += [
        _row(columns, "Baseline", f"Greedy accuracy of {', '.join(models)}.", "baseline", "greedy_accuracy"),
        Row(
            "Lead over the baseline",
            "Difference in points, its interval, p of the paired test, and the episodes only one of the two got right.",
            tuple(_difference_cell(document) for document in columns),
        ),
    ]
    return [row for row in rows if any(cell.text != "–" for cell in row.cells)] + lacking


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}.".replace(" %", "%")


def _row(columns: Sequence[Document], name: str, meaning: str, *keys: str) -> Row:
    """The row of the figure under nested keys of each document."""
    cells = []
    for document in columns:
        estimate = estimate_at(document, *keys)
        detail = estimate.interval("–") if estimate else ""
        if estimate and keys == ("best_constant_choice",):
            detail = f"always {document['best_constant_choice'].get('choice')}"
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


def accuracy_by_choice_rows(columns: Sequence[Document]) -> list[Row]:
    """Accuracy on the episodes for which each choice is right; a row each, none for more than MAX_CHOICES."""
    choices = list(dict.fromkeys(choice for document in columns for choice in document.get("accuracy_by_choice") or {}))
    if len(choices) > MAX_CHOICES:
        return []
    return [_row(columns, choice, "", "accuracy_by_choice", choice) for choice in choices]


def heat_map(last: Document | None, groups: Sequence[GroupRecord]) -> HeatMap | None:
    """Choices made by right choice, from the last evaluation, else from the recorded rollouts.

    None without both, and for a task with no choices or more than MAX_CHOICES.
    """
    if last and last.get("confusion"):
        source = f"{column_title(last)}, greedy answers on held-out episodes"
        found = HeatMap(last["choices"], last["confusion"], source)
    else:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        choices = list(dict.fromkeys(choice for group in groups for choice in group.episode.choices))
        judged = [(one.episode.solution, one.chosen) for one in rollouts if one.episode.solution in choices]
        found = HeatMap(choices, confusion(judged, choices), "all recorded rollouts, sampled in training")
    return found if 0 < len(found.choices) <= MAX_CHOICES else None


def choices_left_out(last: Document | None, groups: Sequence[GroupRecord]) -> str:
    """The sentence that says why a task of more than MAX_CHOICES has no tables by choice; "" for any other."""
    of_groups = {choice for group in groups for choice in group.episode.choices}
    num_choices = len((last or {}).get("choices") or of_groups)
    if num_choices <= MAX_CHOICES:
        return ""
    return f"No tables by choice: the task has {num_choices:,} choices, and they show at most {MAX_CHOICES}."


def comparison_rows(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, predicted, measured) as a run's config.json has them; none where either is missing."""
    predicted, measured = config.get("prediction"), config.get("measured")
    if not isinstance(predicted, dict) or not isinstance(measured, dict):
        return []
    step_s = predicted.get("step_s") or [None, None]
    known = {
        "memory_gib": predicted.get("memory_gpu_gib", {}).get("total"),
        "step_tokens": predicted.get("step_tokens", {}).get("tree"),
        "step_s": step_s[1],
    }
    return [
        (what, _amount(known[name], unit, places), _amount(measured.get(name), unit, places))
        for name, what, unit, places in COMPARED
        if measured.get(name) is not None
    ]


def _amount(value: float | None, unit: str, places: int) -> str:
    return "-" if value is None else f"{value:,.{places}f} {unit}"
