"""Images as files: which ones a folder offers, what each one shows, and how one becomes pixels.

Owns the folder layouts, the decoding rules (formats, EXIF rotation, RGB, limits) and the pixel budget. Knows no model.
Which of a run's images are bad, and what then, is decided in image_check.py.
"""

import csv
import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Pillow knows 40 more, some of which start other programs (EPS) or read from elsewhere
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
LABEL_COLUMNS = ("label", "name", "text", "caption")
MAX_FILE_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold
MAX_FILE_BYTES = 2**28  # what a decoder may hold besides the pixels
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's image processor refuses this and beyond
STRIP_PIXELS = 2**20  # converted at a time, so that a large picture is held twice at most
MAX_TILE_PIXELS = 2**24  # of a TIFF smaller than that: its decoder holds a whole tile however small the picture is
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323
EXIF_ORIENTATION = 0x0112
UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FILE_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the words that name what it shows."""

    path: Path
    label: str


class BadImage(ValueError):
    """An image that cannot be used: which one, why, and what to do about it; all of it on one line."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(name, reason, remedy)
        self.name, self.reason, self.remedy = name, reason, remedy

    def __str__(self) -> str:
        return f"image {self.name} {self.reason}; {self.remedy}"


def list_labelled_images(data_root: str | Path) -> tuple[LabelledImage, ...]:
    """Every image of a folder with its label, sorted by path, so that all machines see the same order.

    Three layouts, the first that fits: a `metadata.csv`/`metadata.jsonl` in Hugging Face ImageFolder form (column
    `file_name`, and `label`, `name`, `text` or `caption`); one sub-folder per class, whose name is the label; plain
    files, whose name is the label ("red_circle_2.png" shows a "red circle"). Links are followed, to folders too; hidden
    files are passed over. Nothing is opened: what has an image's suffix is listed, also if it is broken.
    Raises FileNotFoundError or NotADirectoryError for a bad folder, OSError for one that cannot be listed, ValueError
    for bad metadata.
    """
    root = Path(data_root)
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; pass --data_root with a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; pass --data_root with a folder of images")
    for metadata_name in METADATA_NAMES:
        if (root / metadata_name).is_file():
            return _list_by_metadata(root / metadata_name)
    return tuple(LabelledImage(path, _label_from_place(path.relative_to(root))) for path in sorted(_image_paths(root)))


def open_image(source: str | Path | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The picture as upright RGB, shrunk to at most `max_pixels` with its aspect ratio kept.

    source: a path, or a PIL image. max_pixels: width times height in pixels; None keeps the size. An animation gives
    its first frame; transparency is laid on white. Raises BadImage, a ValueError that names the file, if it is no file
    of 256 MiB at most in one of the formats, cannot be decoded, is larger than 89 megapixels, or is narrower than
    1:200.
    """
    if isinstance(source, Image.Image):
        picture = _decoded(source, "given by the environment", max_pixels)
        return picture.copy() if picture is source else picture
    with _regular_file(source) as file:
        return _decoded(file, printable(source), max_pixels)


def checked_sha256(path: str | Path) -> bytes:
    """The 32 bytes of a file's SHA-256, once it is known to open as an image. Raises BadImage as open_image does."""
    with _regular_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        _decoded(file, printable(path), None)
    return digest


def printable(path: str | Path) -> str:
    """A path as it is shown in a line of text: as it is, or quoted if a character of it would break the line."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _image_paths(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What has an image's suffix in a folder and below. above: the folders it is in, which no link leads back to."""
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise OSError(f"folder {folder} cannot be listed ({error.strerror}); make it readable or move it") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _image_paths(folder / entry.name, above | {real})
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield folder / entry.name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link that leads round in a circle
        return False


def _label_from_place(relative: Path) -> str:
    words = relative.parts[0] if len(relative.parts) > 1 else re.sub(r"[_\- ]*\d+$", "", relative.stem)
    return re.sub(r"[_\- ]+", " ", words).strip() or relative.stem


def _list_by_metadata(path: Path) -> tuple[LabelledImage, ...]:
    """The images that a metadata file lists. Raises ValueError naming the line that is wrong."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = (
                list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(ln) for ln in file if ln.strip()]
            )
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); write one JSON object or CSV row per image") from error
    listed: dict[Path, str] = {}
    for number, row in enumerate(rows, start=1):
        columns = sorted(str(column) for column in row) if isinstance(row, dict) else []
        label_column = next((column for column in LABEL_COLUMNS if column in columns), None)
        if "file_name" not in columns or label_column is None:
            raise ValueError(
                f"{path}, row {number}: got columns {columns}, wanted 'file_name' and one of {list(LABEL_COLUMNS)}"
            )
        label = str(row[label_column] or "").strip()
        if not label:
            raise ValueError(f"{path}, row {number}: its {label_column} is empty; write what the image shows")
        image_path = path.parent / str(row["file_name"])
        if image_path in listed:
            raise ValueError(f"{path}, row {number}: image {image_path} is listed before; keep one of the two rows")
        listed[image_path] = label
    return tuple(LabelledImage(image_path, listed[image_path]) for image_path in sorted(listed))


def _regular_file(path: str | Path) -> BufferedReader:
    """The file, open. Raises BadImage for what is none: opening a pipe would wait for a writer that may never come."""
    try:
        status = os.stat(path)
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is not None:
            raise BadImage(printable(path), f"is a {kind}, not a file", "remove it")
        if status.st_size == 0:
            raise BadImage(printable(path), "is empty", "replace it or remove it")
        if status.st_size > MAX_FILE_BYTES:
            reason = f"is a file of {status.st_size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed"
            raise BadImage(printable(path), reason, "shrink it or remove it")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except BadImage:
        raise
    except (OSError, ValueError) as error:
        # ValueError: a name that no file can have, which metadata may hold
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BadImage(printable(path), f"cannot be read ({reason})", "replace it or remove it") from error


def _decoded(source: BufferedReader | Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    """What open_image gives of an open file or a PIL image. name: of the image, for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source, formats=IMAGE_FORMATS)
            _require_size(image, name)
            image.load()
        # the orientation alone is read: rewriting all of a file's EXIF, as Pillow's own helper does, fails on odd tags
        turn = UPRIGHT_BY_ORIENTATION.get(_orientation(image))
        return _shrink(_rgb(image if turn is None else image.transpose(turn)), max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise BadImage(name, f"is not in a format that is read ({known})", "convert it or remove it") from error
    except Exception as error:
        # what Pillow raises for a broken file depends on its format and on where it is broken
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(name, f"cannot be decoded ({reason})", "replace it or remove it") from error


def _require_size(image: Image.Image, name: str) -> None:
    """Raises BadImage for a picture of too many pixels, in all or in the tiles of its file, or too narrow."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    tile_pixels = int(tags.get(TIFF_TILE_WIDTH, 0)) * int(tags.get(TIFF_TILE_LENGTH, 0))
    if width * height > MAX_FILE_PIXELS:
        raise _too_large(name)
    if tile_pixels > max(MAX_TILE_PIXELS, width * height):
        raise BadImage(name, f"has tiles of {tile_pixels:,} pixels (a decompression bomb?)", "replace it or remove it")
    if min(width, height) == 0:
        raise BadImage(name, f"is {width}x{height} pixels", "replace it or remove it")
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        size = f"{width}x{height} pixels, narrower than 1:{MAX_ASPECT_RATIO}"
        raise BadImage(name, f"is {size}, which Qwen2.5-VL refuses", "crop it or remove it")


def _too_large(name: str) -> BadImage:
    reason = f"has more than the {MAX_FILE_PIXELS:,} pixels allowed (a decompression bomb?)"
    return BadImage(name, reason, "shrink it or remove it")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how the picture was held; 1, upright, where its EXIF cannot be read."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # Pillow's reader raises what comes up; a photo with a damaged note is a photo
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB; itself if it is, else converted strip by strip."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, STRIP_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    is_deep = image.mode.startswith("I") or image.mode == "F"
    scale = _scale_to_8_bits(image, boxes) if is_deep else 1.0
    converted = Image.new("RGB", image.size)
    for box in boxes:
        strip = image.crop(box)
        converted.paste(_deep_strip_rgb(strip, scale) if is_deep else _strip_rgb(strip), box)
    return converted


def _strip_rgb(strip: Image.Image) -> Image.Image:
    if "A" in strip.getbands() or "transparency" in strip.info:
        rgba = strip.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return strip.convert("RGB")


def _deep_strip_rgb(strip: Image.Image, scale: float) -> Image.Image:
    return strip.convert("F").point(lambda value: value * scale).convert("L").convert("RGB")


def _scale_to_8_bits(image: Image.Image, boxes: list[tuple[int, int, int, int]]) -> float:
    """What 16-bit, 32-bit and float greyscale is multiplied with; Pillow's own conversion clips over 255 to white."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    brightest = max(cast(float, image.crop(box).convert("F").getextrema()[1]) for box in boxes)
    if brightest <= 1 and image.mode == "F":
        return 255.0
    return 1.0 if brightest <= 255 else 255 / max(brightest, 65535)


def _shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    # a long side rounded against a short one of few pixels could pass the aspect ratio or the budget
    short = max(1, math.floor(min(image.size) * scale))
    long = min(math.floor(max(image.size) * scale), short * (MAX_ASPECT_RATIO - 1), max_pixels // short)
    return image.resize((long, short) if image.width >= image.height else (short, long), Image.Resampling.BICUBIC)


def image_digest(image: Image.Image) -> bytes:
    """Sixteen bytes that stand for a picture: equal for equal mode, size and pixels."""
    header = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).digest()
