"""Two real processes agree on what is bad, as one machine's or as two machines'."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.command.image_check import find_bad_images
from fleet.command.options import parse_options
from fleet.command.preflight import make_environment
from tests import HANG_S
from tests.conftest import save_picture, save_truncated

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_MACHINE, TWO_MACHINES = [(0, 2), (1, 2)], [(0, 1), (0, 1)]


def pictures(folder: Path) -> Path:
    for number, color in enumerate(("black", "blue", "green", "orange", "pink", "red", "white", "yellow")):
        save_picture(folder / f"{color}_{number}.png", color)
    return folder


def test_two_processes_settle_on_the_same(tmp_path: Path) -> None:
    sound, spoilt = pictures(tmp_path / "sound"), pictures(tmp_path / "spoilt")
    save_truncated(spoilt / "orange_3.png")  # in the share of rank 1 where both are of one machine
    renamed, repainted = (Path(shutil.copytree(sound, tmp_path / name)) for name in ("renamed", "repainted"))
    (renamed / "white_6.png").rename(renamed / "snow_6.png")
    save_picture(repainted / "pink_4.png", "grey")
    expected = find_bad_images(make_environment(of(spoilt, "skip"), 0), of(spoilt, "skip"), "toy", {}).data
    assert expected is not None
    labels = [list(expected.env.episode(index).labels) for index in range(20)]

    def scenario(local: list[tuple[int, int]], flag: str, *folders: Path) -> dict[str, object]:
        return {"local": local, "flags": ["--bad_images", flag], "data_roots": [str(folder) for folder in folders]}

    refused, skipped, other_names, other_bytes, other_bytes_skipping, vanished = by_both_ranks(
        scenario(ONE_MACHINE, "stop", spoilt, spoilt),
        scenario(ONE_MACHINE, "skip", spoilt, spoilt),
        scenario(TWO_MACHINES, "stop", sound, renamed),
        scenario(TWO_MACHINES, "stop", sound, repainted),
        scenario(TWO_MACHINES, "skip", sound, repainted),
        scenario(ONE_MACHINE, "stop", sound, sound),
    )
    assert refused["refusal"].startswith(f"1 of 8 images in {spoilt} cannot be used: orange_3.png cannot be decoded (")
    assert skipped == {"digest": expected.data_digest, "skipped": ["orange_3.png"], "labels": labels, "replaced": 1}
    assert other_names == {
        "refusal": "the machines hold different images: snow_6.png is there for process 1, not for process 0; give "
        "every machine the same data folder"
    }
    assert (
        other_bytes
        == other_bytes_skipping
        == {
            "refusal": "the machines hold different files: pink_4.png is another one for process 1 than for process 0; "
            "give every machine the same data folder"
        }
    )
    assert vanished["refusal"].startswith("process 1: episode ")
    assert f"image {sound}/blue_1.png cannot be read (No such file or directory)" in vanished["refusal"]


def of(folder: Path, bad_images: str):
    return parse_options(["--data_root", str(folder), "--bad_images", bad_images])


def by_both_ranks(*scenarios: dict[str, object]) -> list[dict]:
    """What both ranks come to in each scenario, which must be the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "tests/distributed_images.py", json.dumps(scenarios)],
            cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=HANG_S) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    of_ranks = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]
    assert of_ranks[0] == of_ranks[1] and len(of_ranks[0]) == len(scenarios)
    return of_ranks[0]
