"""A checkpoint is of the run whose folder it lies in, or it is named: by the run's id, and without one by its flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from fleet.command.resume_check import why_of_another_run

pytestmark = pytest.mark.fast

OPTIONS = {"seed": 0, "learning_rate": 1e-4, "train_steps": 60, "output_dir": "runs/a", "lora_rank": None}
RUN: dict[str, Any] = {
    "run_id": "a1", "options": OPTIONS, "idle_flags": ["lora_rank"], "data_digest": "d1", "num_processes": 2,
}  # fmt: skip
OLD = {name: value for name, value in RUN.items() if name != "run_id"}  # begun before runs had an id


def with_options(run: dict[str, Any], **options: object) -> dict[str, Any]:
    return run | {"options": run["options"] | options}


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        (RUN, RUN, None),
        (RUN, with_options(RUN, train_steps=9, output_dir="/moved/a"), None),
        (OLD, OLD, None),
        (RUN, OLD, None),
        (OLD, with_options(OLD, train_steps=9, output_dir="/moved/a"), None),
        (OLD, with_options(OLD, lora_rank=8), None),
        (OLD, {"options": {}}, None),
        (RUN, RUN | {"run_id": "b2"}, "it is another run's (with the same flags)"),
        (
            RUN,
            with_options(RUN, seed=7, learning_rate=2e-4) | {"run_id": "b2"},
            "it is another run's (learning_rate is 0.0002 there and 0.0001 here, seed is 7 there and 0 here)",
        ),
        (OLD, with_options(OLD, seed=7), "it is another run's (seed is 7 there and 0 here)"),
        (RUN, with_options(OLD, seed=7), "it is another run's (seed is 7 there and 0 here)"),
        (OLD, OLD | {"data_digest": "d2"}, "it is another run's (other images)"),
        (OLD, OLD | {"num_processes": 4}, "it is another run's (another number of processes)"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(
    here: dict[str, Any], there: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run_config.json").write_text(json.dumps(there))
    assert why_of_another_run(here, tmp_path) == why


def test_one_that_says_nothing_of_its_run_is_taken(tmp_path: Path) -> None:
    assert why_of_another_run(RUN, tmp_path) is None
    (tmp_path / "run_config.json").write_text("{torn")
    assert "run_config.json cannot be read" in str(why_of_another_run(RUN, tmp_path))
