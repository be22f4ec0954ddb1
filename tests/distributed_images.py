"""Started by tests/test_image_agreement.py, once per rank: what this rank settles on, one JSON object per scenario.

python tests/distributed_images.py SCENARIOS, a JSON list of objects: `data_roots` and `local` (LOCAL_RANK,
LOCAL_WORLD_SIZE) by rank, `flags`. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import PartialState
from accelerate.utils import gather_object

from dataset import RepeatableEpisodeDataset, count_faults
from fleet.command.image_check import find_bad_images
from fleet.command.options import parse_options
from fleet.command.preflight import make_environment
from fleet.errors import RunStopped, UsageError
from fleet.run.data import agree_on_data


def settled(rank: int, data_root: str, local: tuple[int, int], flags: list[str]) -> dict[str, object]:
    """What one scenario comes to: the digest, what is left out and the first episodes, or the refusal."""
    options = parse_options(["--data_root", data_root, *flags])
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": str(local[0]), "LOCAL_WORLD_SIZE": str(local[1])}
    try:
        data = agree_on_data(
            options, find_bad_images(make_environment(options, options.seed), options, "toy", variables)
        )
        labels = [data.env.episode(index).labels for index in range(20)]
        if rank == 1:
            (Path(data_root) / "blue_1.png").unlink()
        gather_object([rank])  # the file is gone for both
        # only rank 1 has an episode that shows it
        shows_it = [any(label == "blue" for label in episode) for episode in labels]
        row = RepeatableEpisodeDataset(data.env)[shows_it.index(rank == 1)]
        num_replaced = count_faults(gather_object([[row["fault"]]]), skips_bad_images=options.bad_images == "skip")
    except (RunStopped, UsageError) as error:
        return {"refusal": str(error)}
    return {"digest": data.data_digest, "skipped": data.skipped_images, "labels": labels, "replaced": num_replaced}


def main() -> None:
    rank = int(os.environ["RANK"])
    PartialState(cpu=True)
    for scenario in json.loads(sys.argv[1]):
        found = settled(rank, scenario["data_roots"][rank], scenario["local"][rank], scenario["flags"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
