"""The files of a run's folder: their names, and how those of one JSON object a line are read.

Imports nothing heavy, so that a report can be written wherever the folder was copied to.
"""

import json
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
ROLLOUTS_NAME = "rollouts.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
SEPARATE_EVALUATION_NAME = "evaluation.json"  # where evaluate.py may have been told to write
THUMBNAILS_NAME = "thumbnails"
CURVE_NAME = "curve.png"
REPORT_NAME = "report.html"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one per line, in order.

    A last line torn by a kill is left out; any other broken line raises ValueError naming the file and the line.
    """
    # bytes, as text would also split at U+2028 inside a string, and a torn line may end inside a character
    lines = path.read_bytes().splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is {line[:40]!r}, but wanted a JSON object; remove that line")
        objects.append(value)
    return objects
