"""The third command line: one HTML page that shows a whole run.

    python report.py runs/look

The page is made in fleet/report. Imports neither torch nor transformers, so it runs wherever a run's folder was copied.
"""

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from fleet.errors import UsageError
from fleet.report.page import (
    LAST_STEPS,
    TEMPLATE_NAME,
    RunRecords,
    Tile,
    headline,
    levels,
    read_run,
    render_page,
    training_seconds,
    write_report,
)
from fleet.run_folder import REPORT_NAME
from utils.plain_text import printable

__all__ = [
    "LAST_STEPS", "TEMPLATE_NAME", "RunRecords", "Tile", "headline", "levels", "main", "read_run", "render_page",
    "training_seconds", "write_report",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and returns the exit code: 0, or 2 with a reason of one line if it is not a run's folder."""
    parser = argparse.ArgumentParser(prog="report.py", description="Write one HTML page that shows a whole run.")
    parser.add_argument(
        "run_dir", type=expanduser, metavar="RUN_DIR", help="folder that training.py wrote (--output_dir)"
    )
    parser.add_argument("--output", type=expanduser, metavar="FILE", help=f"the page (default: RUN_DIR/{REPORT_NAME})")
    options = parser.parse_args(arguments)
    try:
        path = write_report(Path(options.run_dir), None if options.output is None else Path(options.output))
    except UsageError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print(f"wrote {printable(path)} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
