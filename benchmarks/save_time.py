"""What whole checkpoints cost: seconds that a save keeps training waiting, beside Trainer's own, and those behind it.

    python benchmarks/save_time.py --json benchmarks/results/save_time.json

Saves of the toy model's trainer in turns, Trainer's way and Fleet's, in one process; medians. Fleet's manifest is
hashed and flushed in the background, which is measured too, as is the check that a resume makes.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trl import RLOOTrainer

from fleet.rl.checkpoints import find_damage
from fleet.run.config import git_commit, installed_versions
from tests.helpers import fleet_trainer, rloo_config


def main() -> None:
    """Measures, prints, and writes the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_pairs", type=int, default=40, help="saves of each kind (default: 40)")
    parser.add_argument("--json", type=Path, help="where to write the record (default: nowhere)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder), arguments.num_pairs)
    record |= {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, CPU",
        "commit": git_commit(),
        "versions": installed_versions(),
    }
    print(json.dumps({name: value for name, value in record.items() if name != "versions"}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, num_pairs: int) -> dict[str, Any]:
    """The record: medians in seconds, the bytes of a checkpoint, and the share that Fleet's saves take longer."""
    args = rloo_config(folder, max_steps=1, save_strategy="steps", save_steps=1000, save_total_limit=2)
    trainer = fleet_trainer(args)
    trainer.train()
    seconds: dict[str, list[float]] = {"trainer": [], "fleet": [], "background": [], "check": []}
    for number in range(1, num_pairs + 1):
        trainer.state.global_step = number
        # Trainer's own method, which TRL's and Fleet's build on, writes beside Fleet's checkpoints
        trainer.args.output_dir = str(folder / "trainer")
        seconds["trainer"].append(timed(lambda: super(RLOOTrainer, trainer)._save_checkpoint(trainer.model, None)))
        trainer.args.output_dir = str(folder)
        seconds["fleet"].append(timed(lambda: trainer._save_checkpoint(trainer.model, None)))
        seconds["background"].append(timed(trainer.checkpoints.wait))
        checkpoint = folder / f"checkpoint-{number}"
        seconds["check"].append(timed(lambda path=checkpoint: find_damage(path)))  # type: ignore[misc]
        assert find_damage(checkpoint) is None
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    pairs = [fleet / stock - 1 for fleet, stock in zip(seconds["fleet"], seconds["trainer"], strict=True)]
    return {
        "num_pairs": num_pairs,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        **medians,
        "longer_by": statistics.median(pairs),
        "longer_by_quartiles": statistics.quantiles(pairs, n=4)[::2],
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
