"""Where one optimizer step goes, operation by operation: stock TRL's and Fleet's, as a Markdown file.

    python benchmarks/step_profile.py --num_rollouts 8 --output docs/step_profile.md

Takes step_time.py's flags for the model and the task. The second step of each trainer is profiled.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks import step_time  # noqa: E402
from benchmarks.comparison import device_name  # noqa: E402
from fleet.run.config import installed_versions  # noqa: E402

NUM_OPERATIONS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "step_profile.md")
    own, rest = parser.parse_known_args()
    step_time.refuse_no_file(parser, "--output", own.output)
    sys.argv = [sys.argv[0], *rest]
    arguments = step_time.parse_arguments()
    step_time.keep_libraries_quiet()
    with step_time.prepared_folder(arguments) as folder:
        parts = [operations_of_a_step(kind, arguments, folder) for kind in ("stock", "fleet")]
    versions = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    heading = (
        "# One optimizer step, before and after\n\n"
        f"`python benchmarks/step_profile.py {' '.join(rest)}` on {device_name()}; {versions}. Seconds are "
        "of the operation itself, under the profiler, which slows small operations.\n"
    )
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text("\n".join([heading, *parts]), encoding="utf-8")
    print(f"wrote {own.output}")


def operations_of_a_step(kind: str, arguments: argparse.Namespace, folder: Path) -> str:
    """A Markdown section with the operations that take most of a step's time, on the GPU if there is one."""
    trainer = step_time.make_trainer(kind, arguments, folder)
    trainer.create_optimizer_and_scheduler(2)
    loader = iter(trainer.get_train_dataloader())
    trainer.model.train()

    def step() -> None:
        trainer.training_step(trainer.model, next(loader), 1)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    trainer.current_gradient_accumulation_steps = 1
    step()
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        step()
    clock = "self_device_time_total" if gpu else "self_cpu_time_total"

    def time_of(row: Any) -> float:
        return float(getattr(row, clock))

    rows: list[Any] = [row for row in profiler.key_averages() if time_of(row) > 0]
    total = sum(time_of(row) for row in rows)
    rows.sort(key=time_of, reverse=True)
    lines = [
        f"## {'Stock TRL' if kind == 'stock' else 'Fleet'}: {total / 1e6:.2f} s in operations\n",
        "| operation | calls | seconds | share |",
        "|---|---|---|---|",
    ]
    for row in rows[:NUM_OPERATIONS]:
        lines.append(f"| `{row.key}` | {row.count:,} | {time_of(row) / 1e6:.3f} | {time_of(row) / total:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
