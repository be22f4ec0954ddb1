"""What grows with the number of GPUs under ZeRO-3, by arithmetic, and the time to share rollouts' records, measured.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model_size 32b --network_gbytes 25

docs/scaling.md has the formulas. A GPU's network moves so many GB/s between machines; its matrix products reach the
share of the data sheet that fleet/planning/work.py names.
"""

import argparse
import pickle
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from environment import PickImageEnv  # noqa: E402
from fleet.planning.counted_pass import CountedModel, PassShape, size_of  # noqa: E402
from fleet.planning.machine import PEAK_FLOPS  # noqa: E402
from fleet.planning.published import PUBLISHED, published_config  # noqa: E402
from fleet.planning.work import PassesOfStep, seconds_at, step_flops  # noqa: E402
from fleet.rl.rollouts import RolloutRecord, episode_records, make_records  # noqa: E402
from fleet.toy.model import TOY_DATA_ROOT  # noqa: E402
from fleet.verdicts import verdicts_on  # noqa: E402
from utils.tool_calls import make_tool_call_str  # noqa: E402

GPUS = (8, 16, 64, 256, 1024)
PROMPT, COMPLETION, GROUP_SIZE, PATCHES = 1200, 64, 8, 4 * 1024
# all-gathers of a training pass, forward and backward, the reduce-scatter of gradients, and sampling's one pass
PASSES_OF_WEIGHTS = {"all weights": 4, "adapters": 3}
BFLOAT16 = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_size", default="7b", choices=[size.lower() for size in PUBLISHED], help="(default: 7b)"
    )
    parser.add_argument("--per_device_batch_size", type=int, default=2, help="episodes of a pass (default: 2)")
    parser.add_argument("--network_gbytes", type=float, default=50.0, help="GB/s a GPU (default: 50, as 400 Gb/s)")
    arguments = parser.parse_args()
    config = published_config(f"Qwen/Qwen2.5-VL-{arguments.model_size.upper()}-Instruct")
    size = size_of(CountedModel(config, torch.bfloat16, is_autocast=False))
    groups = arguments.per_device_batch_size
    training = PassShape(groups, PROMPT + GROUP_SIZE * COMPLETION, GROUP_SIZE * COMPLETION, groups * PATCHES)
    sampling = PassShape(groups, PROMPT + 100, 100, groups * PATCHES)
    passes = PassesOfStep(1, 1.0, is_recomputed=True, trains_weights=True, trains_vision=True, is_vision_known=False)
    times = seconds_at(step_flops(config, training, sampling, (1, 32, 32), passes), PEAK_FLOPS["H100"])
    assert times is not None
    record_bytes, read_s = cost_of_records()
    what = f"{groups} episodes of {GROUP_SIZE} rollouts a GPU"
    print(f"{arguments.model_size.upper()}, {size.total / 1e9:.2f} billion parameters, {what}")
    print(f"matrix products take {times[1]:.2f} s a step on an H100")
    print(f"a rollout's record has {record_bytes:,.0f} bytes, and takes {1e6 * read_s:.0f} us to read, measured here")
    print("  GPUs  states GB/GPU  moved GB/GPU  moving s  episodes  records MB       s")
    for num_gpus in GPUS:
        states = 16 * size.total / num_gpus / 1e9
        moved = PASSES_OF_WEIGHTS["all weights"] * BFLOAT16 * size.total * (1 - 1 / num_gpus) / 1e9
        rollouts = num_gpus * groups * GROUP_SIZE
        print(f"{num_gpus:6,} {states:14.1f} {moved:13.1f} {moved / arguments.network_gbytes:9.2f} "
              f"{num_gpus * groups:9,} {rollouts * record_bytes / 1e6:11.1f} {rollouts * read_s:6.2f}")  # fmt: skip


def cost_of_records(num_groups: int = 64) -> tuple[float, float]:
    """(bytes, seconds to read) of a rollout's record as processes send it to each other."""
    env = PickImageEnv(TOY_DATA_ROOT, 4, None, 0)
    episodes = [env.episode(number) for number in range(num_groups)]
    completions = [make_tool_call_str(place % 4) for place in range(num_groups * GROUP_SIZE)]
    by_rollout = [episode for episode in episodes for _ in range(GROUP_SIZE)]
    verdicts, _ = verdicts_on(env, by_rollout, completions)
    digests = [bytes([number % 256, place]) * 8 for number in range(num_groups) for place in range(4)]
    seen, _ = episode_records(env, episodes, digests, list(range(num_groups)))
    ids = [list(range(25))] * len(completions)
    logps = [[-0.1] * 25] * len(completions)
    records: list[RolloutRecord] = make_records(seen, completions, verdicts, [0.0] * len(completions), ids, logps)
    # each process sends its own, one pickle a process
    sent = [pickle.dumps(records[first : first + 2 * GROUP_SIZE]) for first in range(0, len(records), 2 * GROUP_SIZE)]
    start_s = time.perf_counter()
    for content in sent:
        pickle.loads(content)
    return sum(map(len, sent)) / len(records), (time.perf_counter() - start_s) / len(records)


if __name__ == "__main__":
    main()
