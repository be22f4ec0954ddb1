"""Images as files: which ones a folder offers, what each one shows, and how one becomes pixels.

Owns the folder layouts, the decoding rules (EXIF rotation, RGB, limits) and the pixel budget. Knows no model.
"""

import csv
import hashlib
import json
import math
import re
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
LABEL_COLUMNS = ("label", "name", "text", "caption")
MAX_FILE_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's image processor refuses this and beyond
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


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the words that name what it shows."""

    path: Path
    label: str


def list_labelled_images(data_root: str | Path) -> tuple[LabelledImage, ...]:
    """Every image of a folder with its label, sorted by path, so that all machines see the same order.

    Three layouts, the first that fits: a `metadata.csv`/`metadata.jsonl` in Hugging Face ImageFolder form (column
    `file_name`, and `label`, `name`, `text` or `caption`); one sub-folder per class, whose name is the label; plain
    files, whose name is the label ("red_circle_2.png" shows a "red circle"). Hidden files are passed over.
    Raises FileNotFoundError or NotADirectoryError for a bad folder, ValueError for bad metadata.
    """
    root = Path(data_root)
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; pass --data_root with a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; pass --data_root with a folder of images")
    for metadata_name in METADATA_NAMES:
        if (root / metadata_name).is_file():
            return _list_by_metadata(root / metadata_name)
    paths = sorted(path for path in root.rglob("*") if _is_visible_image(path.relative_to(root)) and path.is_file())
    return tuple(LabelledImage(path, _label_from_place(path.relative_to(root))) for path in paths)


def open_image(source: str | Path | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The picture as upright RGB, shrunk to at most `max_pixels` with its aspect ratio kept.

    source: a path, or a PIL image. max_pixels: width times height in pixels; None keeps the size. An animation gives
    its first frame; transparency is laid on white. Raises ValueError naming the file if it cannot be decoded, is
    larger than 89 megapixels, or is narrower than 1:200.
    """
    if isinstance(source, Image.Image):
        return _prepared(source, "given by the environment", max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"image {source} has more than the {MAX_FILE_PIXELS:,} pixels allowed (a decompression bomb?); "
            "shrink it or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"image {source} is not in a format that Pillow reads; convert it or remove it") from error
    except (OSError, SyntaxError, EOFError, ValueError, struct.error) as error:
        # what Pillow raises for a broken file depends on its format and on where it is broken
        raise ValueError(f"image {source} cannot be decoded ({error}); replace it or remove it") from error
    return _prepared(image, str(source), max_pixels)


def first_bad_image(images: Iterable[LabelledImage]) -> str | None:
    """Why the first image that will not load does not, naming it; None when every one decodes in full."""
    for image in images:
        try:
            open_image(image.path)
        except ValueError as error:
            return str(error)
    return None


def _is_visible_image(relative: Path) -> bool:
    return relative.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in relative.parts)


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
        if not image_path.is_file():
            raise ValueError(f"{path}, row {number}: image {image_path} does not exist; correct its file_name")
        listed[image_path] = label
    return tuple(LabelledImage(image_path, listed[image_path]) for image_path in sorted(listed))


def _prepared(image: Image.Image, source: str, max_pixels: int | None) -> Image.Image:
    width, height = image.size
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"image {source} is {width}x{height} pixels, narrower than 1:{MAX_ASPECT_RATIO}, which Qwen2.5-VL refuses; "
            "crop it or remove it"
        )
    # the orientation alone is read: rewriting all of a file's EXIF, as Pillow's own helper does, fails on odd tags
    turn = UPRIGHT_BY_ORIENTATION.get(image.getexif().get(EXIF_ORIENTATION, 1))
    return _shrink(_rgb(image if turn is None else image.transpose(turn)), max_pixels)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_greyscale(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_deep_greyscale(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale in 8 bits; Pillow's own conversion clips everything over 255 to white."""
    grey = image.convert("F")
    brightest = cast(float, grey.getextrema()[1])
    if image.mode.startswith("I;16"):
        scale = 1 / 257
    elif brightest <= 1 and image.mode == "F":
        scale = 255.0
    else:
        scale = 1.0 if brightest <= 255 else 255 / max(brightest, 65535)
    return grey.point(lambda value: value * scale).convert("L").convert("RGB")


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
