"""What a run took, beside what was predicted of it: peak memory, tokens and seconds of a step."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fleet.model_folder.files import read_json
from fleet.planning.machine import GIB, resident_bytes
from fleet.processes import gather_by_rank
from fleet.report.tables import comparison_rows
from fleet.run.records import rendered
from fleet.run_folder import CONFIG_NAME, write_atomically


def measured_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures of this run, the largest of all processes. lines: of metrics.jsonl. Every process takes part.

    Memory is what tensors held on the GPU, or without one the resident memory of the process.
    """
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_bytes("VmHWM")
    most = max(gather_by_rank(peak))
    return {
        "memory_gib": round(most / GIB, 3) or None,
        "step_tokens": _largest(lines, "step_tokens"),
        # the first step makes what later ones have
        "step_s": _median_of_later(_known(lines, "step_time_s")),
    }


def note_measured(folder: Path, figures: Mapping[str, float | None]) -> str:
    """Writes the figures into config.json, and gives them beside the prediction there, as a table for the terminal."""
    config = read_json(folder / CONFIG_NAME)
    config["measured"] = dict(figures)
    write_atomically(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    rows = comparison_rows(config)
    table = Table("", "predicted", "measured", title="predicted and measured", title_justify="left", show_edge=False,
                  pad_edge=False)  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return rendered(table, 110) if rows else ""


def _known(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for line in lines if (value := line.get(name)) is not None]


def _largest(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max(_known(lines, name), default=None)


def _median_of_later(seconds: Sequence[float]) -> float | None:
    later = seconds[1:] or seconds
    return round(statistics.median(later), 4) if later else None
