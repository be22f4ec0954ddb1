"""The JSON file that the benchmarks of several seeds leave: the command, the machine, the versions, the runs."""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.run.config import installed_versions


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
