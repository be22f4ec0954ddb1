"""What reading images takes of memory, measured in a process of its own: a few MiB for what is hostile, 8 bytes a
pixel for what is large (Pillow's WebP decoder: 16), and no picture beside the next one.
"""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests import HANG_S
from tests.helpers_images import png, tiff

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
ROOM = 48 * MIB  # the decoders' own tables and buffers, and what the allocator keeps
SIDE = 3000

MEASURE = r"""
import json, re, sys
from fleet.command.image_check import check_share
from utils.images import LabelledImage
from pathlib import Path

def peak():
    # not getrusage, whose peak is also that of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

check_share([LabelledImage(Path(sys.argv[1]), "")], ".", 0, 1)  # loads Pillow's plugins
before = peak()
problems = check_share([LabelledImage(Path(path), "") for path in sys.argv[2:]], ".", 0, 1).problems
print(json.dumps([peak() - before, sorted(problems.items())]))
"""


def added_memory(first: Path, *paths: Path) -> tuple[int, list[int]]:
    """(bytes that checking these files adds to the peak of the process, which of them are refused)."""
    command = [sys.executable, "-c", MEASURE, str(first), *map(str, paths)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=HANG_S)
    added, problems = json.loads(done.stdout)
    return added, [place for place, _ in problems]


def zeros(num_bytes: int) -> bytes:
    """That many zeros, deflated a thousandfold."""
    deflate = zlib.compressobj(1)
    blocks = [deflate.compress(bytes(MIB)) for _ in range(num_bytes // MIB)]
    return b"".join([*blocks, deflate.flush()])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "small.webp")
    return tmp_path / "small.webp"


def test_hostile_files_take_a_few_mib(tmp_path: Path, small: Path) -> None:
    bomb, header = zeros(400 * MIB), (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    pixels, end = (b"IDAT", zlib.compress(bytes(8 * 9))), (b"IEND", b"")
    frames = [Image.effect_noise((32, 32), number % 100) for number in range(1000)]
    contents = {
        "pixels beyond the last.png": png(header, (b"IDAT", bomb), end),
        "profile.png": png(header, (b"iCCP", b"a\0\0" + bomb), pixels, end),
        "compressed text.png": png(header, (b"zTXt", b"a\0\0" + bomb), pixels, end),
        "international text.png": png(header, (b"iTXt", b"a\0\1\0\0\0" + bomb), pixels, end),
        "400 megapixels.png": png((b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)), (b"IDAT", bomb)),
        "400 megapixels.tif": tiff(20_000, 20_000, bomb, {278: 20_000}),
        "strip beyond the last row.tif": tiff(100, 100, bomb, {278: 100}),
        "tile of 400 megapixels.tif": tiff(8, 8, bomb, {322: 20_000, 323: 20_000}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    (tmp_path / "sparse.png").touch()
    with (tmp_path / "sparse.png").open("r+b") as file:
        file.truncate(2**36)
    paths = [tmp_path / name for name in (*contents, "sparse.png", "moving.gif", "moving.webp", "moving.png")]
    added, refused = added_memory(small, *paths)
    assert [paths[place].name for place in refused] == [
        "profile.png",
        "compressed text.png",
        "international text.png",
        "400 megapixels.png",
        "400 megapixels.tif",
        "tile of 400 megapixels.tif",
        "sparse.png",
    ]
    assert added < ROOM


def test_a_large_file_without_pixels_takes_three_times_its_size(tmp_path: Path, small: Path) -> None:
    content = png((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"tEXt", b"a\0" + bytes(64 * MIB)))
    (tmp_path / "text.png").write_bytes(content)
    added, refused = added_memory(small, tmp_path / "text.png")
    assert refused == [0]
    assert len(content) < added < 3 * len(content) + ROOM


def test_large_pictures_take_8_bytes_a_pixel_one_after_the_other(tmp_path: Path, small: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode, name, settings in (
        ("RGBA", "a.png", {"compress_level": 1}),
        ("LA", "b.png", {"compress_level": 1}),
        ("I;16", "c.png", {"compress_level": 1}),
        ("F", "d.tif", {}),
        ("CMYK", "e.jpg", {}),
        ("RGB", "f.jpg", {"progressive": True, "exif": turned}),
    ):
        Image.new(mode, (SIDE, SIDE)).save(tmp_path / name, **settings)
    paths = sorted(path for path in tmp_path.iterdir() if path != small)
    added, refused = added_memory(small, *paths)
    assert refused == [] and len(paths) == 6
    assert 4 * SIDE * SIDE < added < 8 * SIDE * SIDE + ROOM


def test_a_large_webp_takes_16_bytes_a_pixel(tmp_path: Path, small: Path) -> None:
    Image.new("RGBA", (SIDE, SIDE)).save(tmp_path / "a.webp", quality=1, method=0)
    added, refused = added_memory(small, tmp_path / "a.webp", tmp_path / "a.webp")
    assert refused == []
    assert 4 * SIDE * SIDE < added < 16 * SIDE * SIDE + ROOM
