"""Images as files: which ones a folder offers, what each one shows, and how one becomes pixels.

Owns the folder layouts, the decoding rules (EXIF rotation, RGB, limits) and the pixel budget. Knows no model.
"""

import csv
import json
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
LABEL_COLUMNS = ("label", "name", "text", "caption")
MAX_FILE_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's image processor refuses this and beyond


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
        return _shrink(_upright_rgb(source), max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                _refuse_extreme_size(image, source)
                return _shrink(_upright_rgb(image), max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"image {source} has more than the {MAX_FILE_PIXELS:,} pixels allowed (a decompression bomb?); "
            "shrink it or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"image {source} is not in a format that Pillow reads; convert it or remove it") from error
    except (OSError, SyntaxError, EOFError) as error:
        # Pillow reports a broken PNG chunk as SyntaxError
        raise ValueError(f"image {source} cannot be decoded ({error}); replace it or remove it") from error


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
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = (
                list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(ln) for ln in file if ln.strip()]
            )
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); write one JSON object or CSV row per image") from error
    listed = []
    for number, row in enumerate(rows, start=1):
        columns = sorted(str(column) for column in row) if isinstance(row, dict) else []
        label_column = next((column for column in LABEL_COLUMNS if column in columns), None)
        if "file_name" not in columns or label_column is None:
            raise ValueError(
                f"{path}, row {number}: got columns {columns}, wanted 'file_name' and one of {list(LABEL_COLUMNS)}"
            )
        image_path = path.parent / str(row["file_name"])
        if not image_path.is_file():
            raise ValueError(f"{path}, row {number}: image {image_path} does not exist; correct its file_name")
        listed.append(LabelledImage(image_path, str(row[label_column]).strip()))
    return tuple(sorted(listed, key=lambda image: image.path))


def _refuse_extreme_size(image: Image.Image, source: str | Path) -> None:
    width, height = image.size
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"image {source} is {width}x{height} pixels, narrower than 1:{MAX_ASPECT_RATIO}, which Qwen2.5-VL refuses; "
            "crop it or remove it"
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB":
        return upright.copy()
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_deep_greyscale(upright)
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def _from_deep_greyscale(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale in 8 bits; Pillow's own conversion clips everything over 255 to white."""
    grey = image.convert("F")
    brightest = cast(float, grey.getextrema()[1])
    scale = 1.0 if brightest <= 255 else 255 / max(brightest, 65535)
    return grey.point(lambda value: value * scale).convert("L").convert("RGB")


def _shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    num_pixels = image.width * image.height
    if max_pixels is None or num_pixels <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / num_pixels)
    size = max(1, math.floor(image.width * scale)), max(1, math.floor(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
