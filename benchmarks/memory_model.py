"""The error of predicted memory: short runs of training.py on the CPU, each beside what was predicted before it.

    python benchmarks/memory_model.py --json memory.json
    python benchmarks/memory_model.py --only plain lora

A Qwen2.5-VL of random weights, pictures of noise. Measured is the peak of a process's resident memory, in which the C
library is told to give freed tensors back at once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator would reuse them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.seed_record import write_record  # noqa: E402

SIDE_PX = 224
STEPS = 2  # the second has the optimizer's states beside a pass
BASE = ["--per_device_batch_size", "2", "--num_rollouts", "4", "--max_completion_length", "32", "--train_steps",
        str(STEPS), "--image_max_pixels", str(SIDE_PX**2), "--report_to", "none", "--sample_steps", "0",
        "--dtype", "float32", "--gradient_checkpointing", "false",
        # random weights answer nothing right, and a step on which all rollouts are alike makes no pass
        "--reward", "tests/length_reward.py:score"]  # fmt: skip
TWO = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
ZERO3 = ["accelerate", "launch", "--config_file", "tests/zero3_cpu.yaml", *TWO]
DDP = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
CHECKPOINTED = ["--gradient_checkpointing", "true"]
LORA = ["--use_lora", "true"]
# the launcher, and flags beside BASE; a later flag wins
CONFIGURATIONS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "checkpointed": ([], CHECKPOINTED),
    "lora": ([], LORA),
    "lora, checkpointed": ([], [*LORA, *CHECKPOINTED]),
    "frozen vision": ([], ["--freeze", "tower,merger"]),
    "frozen language model": ([], ["--freeze", "language_model"]),
    "two micro-batches": ([], ["--gradient_accumulation_steps", "2"]),
    "with a reference model": ([], ["--beta", "0.05"]),
    "ZeRO-3, two processes": (ZERO3, []),
    "ZeRO-3, two processes, checkpointed": (ZERO3, CHECKPOINTED),
    "DDP, two processes": (DDP, []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS), metavar="NAME",
                        help=f"some of: {', '.join(CONFIGURATIONS)} (default: all)")  # fmt: skip
    parser.add_argument("--model_size", default="150m", help="of random weights (default: 150m)")
    parser.add_argument("--json", type=Path, help="file for the results (default: none)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), arguments.model_size)
        for configuration in arguments.only:
            rows.append({"configuration": configuration, **run(Path(name), configuration)})
            print(as_line(rows[-1]), flush=True)
            if arguments.json is not None:
                words = ["benchmarks/memory_model.py", "--model_size", arguments.model_size]
                write_record(arguments.json, words, rows)


def make_inputs(folder: Path, size: str) -> None:
    """Writes the model and the pictures, in a process of its own that gives its memory back."""
    code = (
        "import sys, torch; from pathlib import Path; from benchmarks import random_model as made; "
        "folder, size, side = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]); "
        "made.build(folder / 'model', size, side, torch.float32); made.draw_noise(folder / 'pictures', 12, side)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), size, str(SIDE_PX)], check=True, cwd=REPOSITORY)


def run(folder: Path, configuration: str) -> dict[str, Any]:
    """The prediction and the measurement that a run leaves in its config.json."""
    launcher, flags = CONFIGURATIONS[configuration]
    output = folder / "run"
    command = [*(launcher or [sys.executable]), "training.py", "--model_id", str(folder / "model"), "--data_root",
               str(folder / "pictures"), *BASE, *flags, "--output_dir", str(output), "--overwrite"]  # fmt: skip
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{configuration}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    if config["num_processes"] != (2 if launcher else 1):
        raise SystemExit(f"{configuration}: ran in {config['num_processes']} processes; correct its launcher")
    predicted, measured = config["prediction"], config["measured"]
    total, peak = predicted["memory_gpu_gib"]["total"], measured["memory_gib"]
    return {
        "predicted_gib": total,
        "measured_gib": peak,
        "error": total / peak - 1,
        "parts_gib": predicted["memory_gpu_gib"],
        "predicted_tokens": predicted["step_tokens"]["tree"],
        "measured_tokens": measured["step_tokens"],
    }


def as_line(row: dict[str, Any]) -> str:
    return (
        f"{row['configuration']:36} predicted {row['predicted_gib']:5.2f} GiB, measured {row['measured_gib']:5.2f}, "
        f"{row['error']:+7.1%}, tokens {row['predicted_tokens']:,} and {row['measured_tokens'] or 0:,.0f}"
    )


if __name__ == "__main__":
    main()
