"""Runs are predicted: auto checkpointing follows memory and stays on resume; measured stands beside predicted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import training
from fleet.command.options import parse_options, resolve_options
from fleet.command.preflight import make_environment
from fleet.planning.machine import Machine, machine_here
from fleet.report.page import write_report
from fleet.report.tables import comparison_rows
from fleet.run.build import prediction
from fleet.run.build.settings import make_rloo_config

RUN = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--save_steps", "1",
       "--gradient_checkpointing", "auto"]  # fmt: skip


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def with_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    def smaller(num_local_processes: int, *, has_gpu: bool) -> Machine:
        return replace(machine_here(num_local_processes, has_gpu=has_gpu), device_bytes=num_bytes, base_bytes=0)

    monkeypatch.setattr("fleet.run.build.prediction.machine_here", smaller)


def test_activations_are_computed_again_where_memory_needs_it_and_after_a_resume_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with_memory(monkeypatch, 20 * 2**20)
    training.main([*RUN, "--train_steps", "1", "--output_dir", str(run)])
    config = config_of(run)
    assert (
        config["options"]["gradient_checkpointing"] is True and config["prediction"]["gradient_checkpointing"] is True
    )
    assert "gradient checkpointing on" in capfd.readouterr().err
    # with room for all of it, the run stays what it was
    with_memory(monkeypatch, 2**40)
    training.main([*RUN, "--train_steps", "2", "--output_dir", str(run), "--resume"])
    assert config_of(run)["options"]["gradient_checkpointing"] is True
    assert "gradient checkpointing on" in capfd.readouterr().err


def test_with_room_nothing_is_computed_again_and_the_measured_stands_beside_the_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    training.main([*RUN, "--train_steps", "2", "--output_dir", str(run)])
    config = config_of(run)
    assert config["options"]["gradient_checkpointing"] is False
    measured, predicted = config["measured"], config["prediction"]
    assert 0 < measured["step_tokens"] <= predicted["step_tokens"]["tree"]
    assert measured["memory_gib"] > 0 and measured["step_s"] > 0
    shown = capfd.readouterr().err
    assert "gradient checkpointing off" in shown and "predicted and measured" in shown
    page = write_report(run).read_text()
    for what, *figures in comparison_rows(config):
        assert f">{what}</th>" in page and all(f"<td>{figure}</td>" in page for figure in figures)


def test_a_run_that_cannot_be_counted_says_so_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("fleet.planning.plan.counts_of", broken)
    run = tmp_path / "run"
    training.main([*RUN, "--train_steps", "1", "--output_dir", str(run)])
    shown = capfd.readouterr().err
    assert "no prediction of memory: the run could not be counted (RuntimeError: no such kernel)" in shown
    # memory before speed, where nothing is known
    assert config_of(run)["options"]["gradient_checkpointing"] is True and config_of(run)["prediction"] is None


@pytest.mark.parametrize(
    ("fits_elsewhere", "asked", "is_checkpointed"),
    [(True, "auto", False), (False, "auto", True), (False, False, False), (True, True, True)],
)
def test_the_process_with_the_least_memory_decides_for_all(
    fits_elsewhere: bool, asked: bool | str, is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "gather_by_rank", lambda own: [own, fits_elsewhere])
    options, _ = resolve_options(parse_options(["--gradient_checkpointing", str(asked).lower()]), has_bf16_gpu=False)
    env = make_environment(options, options.seed)
    decided, found = prediction.predict_together(options, make_rloo_config(options), env)
    assert decided is is_checkpointed
    # what is recorded is of the way that is taken, here too, where the other would fit
    assert found.found is not None and found.found.is_checkpointed is is_checkpointed
