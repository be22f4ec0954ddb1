"""Images as files: the way from a file to pixels. image_folders.py lists a folder's images, and is named from here too.

Owns the decoding rules (formats, EXIF rotation, RGB, limits) and the pixel budget. Knows no model.
fleet/command/image_check.py decides what becomes of a run's bad images.
"""

import contextlib
import hashlib
import math
import os
import warnings
from array import array
from io import BufferedReader
from pathlib import Path
from typing import cast

from PIL import ExifTags, Image, UnidentifiedImageError

from utils.file_kinds import kind_of
from utils.heif import heif_formats
from utils.image_folders import LabelledImage as LabelledImage
from utils.image_folders import list_labelled_images as list_labelled_images
from utils.plain_text import printable

# Pillow knows 40 more, some of which start other programs (EPS) or read from elsewhere
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # and HEIF, where pillow-heif is installed
MAX_FILE_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold
MAX_FILE_BYTES = 2**28  # what a decoder may hold besides the pixels
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's image processor refuses this and beyond
STRIP_PIXELS = 2**20  # converted at a time, so that a large picture is held twice at most
MAX_TILE_PIXELS = 2**24  # of a TIFF smaller than that: its decoder holds a whole tile however small the picture is
UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING_TURNS = tuple(UPRIGHT_BY_ORIENTATION[orientation] for orientation in (5, 6, 7, 8))


class BadImage(ValueError):
    """An image that cannot be used. Its text is one line: the image, the reason, the remedy."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(name, reason, remedy)
        self.name, self.reason, self.remedy = name, reason, remedy

    def __str__(self) -> str:
        return f"image {self.name} {self.reason}; {self.remedy}"


def open_image(source: str | Path | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """The picture as upright RGB, shrunk to at most `max_pixels` with its aspect ratio kept.

    source: a path, or a PIL image. max_pixels: width times height in pixels; None keeps the size. An animation gives
    its first frame; transparency is laid on white. Raises BadImage, a ValueError that names the file, for what is no
    file of one of the formats, cannot be decoded, or has over 256 MiB, over 89 megapixels or sides beyond 1:200.
    """
    if isinstance(source, Image.Image):
        picture = _decoded(source, "given by the environment", max_pixels)
        return picture.copy() if picture is source else picture
    with _regular_file(source) as file:
        return _decoded(file, printable(source), max_pixels)


def image_size(source: str | Path | Image.Image) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header alone. Raises BadImage where `open_image` would by it."""
    with contextlib.ExitStack() as stack:
        image = source
        if not isinstance(image, Image.Image):
            file = stack.enter_context(_regular_file(image))
            try:
                image = Image.open(file, formats=known_formats())
            except Exception as error:
                raise BadImage(printable(source), "is no picture that is read", "replace it or remove it") from error
        turn = UPRIGHT_BY_ORIENTATION.get(_orientation(image))
        return image.size if turn not in SWAPPING_TURNS else (image.height, image.width)


def known_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    return IMAGE_FORMATS + heif_formats()


def checked_sha256(path: str | Path) -> bytes:
    """The 32 bytes of the SHA-256 of a file that opens as an image. Raises BadImage as open_image does."""
    with _regular_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        _decoded(file, printable(path), None)
    return digest


def _regular_file(path: str | Path) -> BufferedReader:
    """The file, open. Raises BadImage for anything else: opening a pipe would wait for a writer that may never come."""
    try:
        kind, num_bytes = kind_of(Path(path)), os.stat(path).st_size
        if kind == "a file" and 0 < num_bytes <= MAX_FILE_BYTES:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:
        # ValueError: a name that no file can have, which metadata may hold
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BadImage(printable(path), f"cannot be read ({reason})", "replace it or remove it") from error
    if kind != "a file":
        raise BadImage(printable(path), f"is {kind}, not a file", "remove it")
    if num_bytes == 0:
        raise BadImage(printable(path), "is empty", "replace it or remove it")
    reason = f"is a file of {num_bytes:,} bytes, more than the {MAX_FILE_BYTES:,} allowed"
    raise BadImage(printable(path), reason, "shrink it or remove it")


def _decoded(source: BufferedReader | Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    """The picture of an open file or a PIL image, as open_image gives it. name: of the image, for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source, formats=known_formats())
            _require_size(image, name)
            image.load()
        # the orientation alone is read: rewriting all of a file's EXIF, as Pillow's own helper does, fails on odd tags
        turn = UPRIGHT_BY_ORIENTATION.get(_orientation(image))
        return _shrink(_rgb(image if turn is None else image.transpose(turn), name), max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        reason = f"has more than the {MAX_FILE_PIXELS:,} pixels allowed (a decompression bomb?)"
        raise BadImage(name, reason, "shrink it or remove it") from error
    except UnidentifiedImageError as error:
        known = ", ".join(known_formats())
        raise BadImage(name, f"is not in a format that is read ({known})", "convert it or remove it") from error
    except Exception as error:
        # what Pillow raises for a broken file depends on its format and on where it is broken
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(name, f"cannot be decoded ({reason})", "replace it or remove it") from error


def _require_size(image: Image.Image, name: str) -> None:
    """Raises DecompressionBombError for a picture of too many pixels, BadImage for too large tiles or too narrow."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    tile_pixels = int(tags.get(ExifTags.Base.TileWidth, 0)) * int(tags.get(ExifTags.Base.TileLength, 0))
    if width * height > MAX_FILE_PIXELS:
        raise Image.DecompressionBombError  # as Pillow does at twice as many
    if tile_pixels > max(MAX_TILE_PIXELS, width * height):
        raise BadImage(name, f"has tiles of {tile_pixels:,} pixels (a decompression bomb?)", "replace it or remove it")
    if min(width, height) == 0:
        raise BadImage(name, f"is {width}x{height} pixels", "replace it or remove it")
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        size = f"{width}x{height} pixels, narrower than 1:{MAX_ASPECT_RATIO}"
        raise BadImage(name, f"is {size}, which Qwen2.5-VL refuses", "crop it or remove it")


def _orientation(image: Image.Image) -> int:
    """EXIF's number for the way the picture was held; 1, upright, where its EXIF cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Pillow's reader raises what comes up; a photo with a damaged note is a photo
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in RGB; itself if it is, else converted by strips. Raises BadImage for odd greyscale values."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, STRIP_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    is_deep = image.mode.startswith("I") or image.mode == "F"
    scale = _scale_to_8_bits(image, boxes, name) if is_deep else 1.0
    converted = Image.new("RGB", image.size)
    for box in boxes:
        strip = image.crop(box)
        if is_deep:
            strip = strip.convert("F").point(lambda value: value * scale).convert("L")
        elif "A" in strip.getbands() or "transparency" in strip.info:
            rgba = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        converted.paste(strip.convert("RGB"), box)
    return converted


def _scale_to_8_bits(image: Image.Image, boxes: list[tuple[int, int, int, int]], name: str) -> float:
    """The factor for 16-bit, 32-bit and float greyscale; Pillow's own conversion clips what is over 255 to white.

    White is the most that the picture's bits can say: 1 for a float picture within 0 to 1, else 255, or what 9 to 16
    bits hold, as cameras save 12 in a file of 16. Raises BadImage for values below 0 or not finite, and for a 16-bit
    picture that is as good as black, which may hold 8-bit values.
    """
    extrema = [_extrema(image.crop(box)) for box in boxes]
    darkest, brightest = min(low for low, _ in extrema), max(high for _, high in extrema)
    if not all(math.isfinite(value) and value >= 0 for pair in extrema for value in pair):
        reason = f"has values below 0 or that are no numbers (from {darkest:g} to {brightest:g})"
        raise BadImage(name, reason, "save it with 8 bits or remove it")
    if image.mode == "F" and brightest <= 1:
        return 255.0
    if image.mode.startswith("I;16") and 0 < brightest <= 255:
        reason = f"has 16 bits and no value above {brightest:g}, which would be shown black"
        raise BadImage(name, reason, "save it with 8 bits or remove it")
    if brightest <= 255:
        return 1.0
    num_bits = int(brightest).bit_length()
    return 255 / (2**num_bits - 1 if num_bits <= 16 else brightest)


def _extrema(strip: Image.Image) -> tuple[float, float]:
    """The least and the greatest value; not finite if any is not, which Pillow's own comparison passes over."""
    total = sum(array("f", strip.tobytes())) if strip.mode == "F" else 0.0
    if not math.isfinite(total):
        return total, total
    return cast(tuple[float, float], strip.convert("F").getextrema())


def _shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    size = shrunk_size(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """(width, height) of a picture of this size once it is shrunk to at most `max_pixels`, as `open_image` does it.

    >>> shrunk_size((1000, 500), 50_000)
    (316, 158)
    """
    if max_pixels is None or size[0] * size[1] <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (size[0] * size[1]))
    # a long side rounded against a short one of few pixels could pass the aspect ratio or the budget
    short = max(1, math.floor(min(size) * scale))
    long = min(math.floor(max(size) * scale), short * (MAX_ASPECT_RATIO - 1), max_pixels // short)
    return (long, short) if size[0] >= size[1] else (short, long)


def name_of_picture(digest: bytes) -> str:
    """The file in a run's folder that keeps a picture. digest: of image_digest."""
    return f"{digest.hex()[:16]}.webp"


def image_digest(image: Image.Image) -> bytes:
    """Sixteen bytes that stand for a picture: equal for equal mode, size and pixels."""
    header = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).digest()
