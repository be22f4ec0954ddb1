"""Shared by all tests: what the fast group skips, the fuzzing budget, the canonical call, and a folder of pictures."""

import os
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

# `accelerate` is beside the Python that runs the tests, also when nobody activated its environment
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# several GPUs in one process are refused, and what these tests check needs none
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

_FUZZ_EXAMPLES = os.environ.get("FLEET_FUZZ_EXAMPLES")
# the everyday run tries the same few examples each time; FLEET_FUZZ_EXAMPLES=1000000 goes looking for new ones
NUM_FUZZED_STRINGS = int(_FUZZ_EXAMPLES or 20_000)
FUZZ_SEED = 0 if _FUZZ_EXAMPLES is None else random.SystemRandom().getrandbits(32)
settings.register_profile(
    "fleet",
    max_examples=max(NUM_FUZZED_STRINGS // 100, 1),
    deadline=None,
    derandomize=_FUZZ_EXAMPLES is None,
    database=None,
)
settings.load_profile("fleet")


def pytest_configure() -> None:
    """Gives each process of pytest-xdist cores of its own: threads of two that wait on one core slow both tenfold."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        number, of = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::of] or [cores[number % len(cores)]])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m fast`, a file without that mark is not even imported: torch alone takes longer than the fast group."""
    is_test_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr == "fast" and is_test_file:
        return "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8") or None
    return None


PICTURES = {
    "black_cross": "black",
    "blue_square": "blue",
    "green_triangle": "green",
    "orange_heart": "orange",
    "red_circle": "red",
    "yellow_star": "yellow",
}


def call_text(index: object) -> str:
    """The canonical call, written out here so that no test takes it from the code that it tests."""
    return f'<tool_call>\n{{"name": "pick_image", "arguments": {{"index": {index}}}}}\n</tool_call>'


def save_picture(path: Path, color: str = "red", size: tuple[int, int] = (4, 4)) -> Path:
    """Writes one plain picture, in the format that its suffix names, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def save_truncated(path: Path) -> Path:
    """Writes the first two thirds of a picture's file."""
    content = save_picture(path, size=(64, 64)).read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def save_png_of_zeros(path: Path, width: int, height: int, num_rows: int | None = None) -> Path:
    """Writes a 1-bit black PNG of any size at little cost; all its rows of pixels, or `num_rows` of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = bytes(((width + 7) // 8 + 1) * (height if num_rows is None else num_rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures with six labels: black cross, blue square, ..., yellow star. Read, never written."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for name, color in PICTURES.items():
        save_picture(folder / f"{name}.png", color)
    return folder
