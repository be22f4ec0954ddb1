"""The table that evaluate.py prints, for tasks that lack choices, chance or controls."""

from typing import Any

import pytest

from fleet.evaluation.intervals import share
from fleet.run.build.evaluation import table

HALF = share(1, 2).as_json()


def document(**changes: Any) -> dict[str, Any]:
    names = ("blank_images", "swapped_images", "permuted_order", "redrawn_images")
    return {
        "model": "toy", "baseline": None, "num_samples": 0, "greedy_accuracy": HALF, "sampled_accuracy": None,
        "pass_at_k": {}, "chance": None, "choices": None, "best_constant_choice": None, "accuracy_by_choice": None,
        "controls": dict.fromkeys(names), "outcome": {"inside": HALF, "far_off": share(0, 2).as_json()},
        "parse_status": {"ok": share(2, 2).as_json()},
    } | changes  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]


def test_what_a_task_lacks_is_said_in_words() -> None:
    assert rows_of(table(document())) == [
        ["greedy accuracy", "50.0 % (9.5 to 90.5)", ""],
        ["chance", "-", "the environment does not say"],
        ["blank images", "-", "no such control for this environment"],
        ["swapped images", "-", "no such control for this environment"],
        ["permuted order", "-", "no such control for this environment"],
        ["redrawn images", "-", "no such control for this environment"],
        ["outcome: inside", "50.0 % (9.5 to 90.5)", ""],
        ["parse status: ok", "100.0 % (34.2 to 100.0)", ""],
    ]


@pytest.mark.parametrize("choice", ["[/b]", "[red]", "\x1b[31m"])
def test_names_of_an_environment_are_shown_as_they_are(choice: str) -> None:
    named = document(
        choices=[choice],
        best_constant_choice={**HALF, "choice": choice},
        accuracy_by_choice={choice: HALF},
        outcome={choice: HALF},
    )
    shown = choice.replace("\x1b", "\\x1b")
    rows = rows_of(table(named))
    assert ["best constant choice", "50.0 % (9.5 to 90.5)", f"always {shown}"] in rows
    assert [f"outcome: {shown}", "50.0 % (9.5 to 90.5)", ""] in rows
    assert [f"right where {shown} is", "50.0 % (9.5 to 90.5)", ""] in rows
