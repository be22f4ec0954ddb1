"""Which pictures the built-in toy model has been taught: those of toy_images, byte for byte. Imports no torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from utils.images import list_labelled_images

TAUGHT_FOLDER = Path(__file__).resolve().parents[2] / "toy_images"


def untaught(paths: Sequence[Path]) -> list[Path]:
    """Those of the files that are no copy of a picture that the toy was taught.

    One that cannot be read counts as none of them: the check of images and --bad_images have said what becomes of it.
    """
    taught = [image.path for image in list_labelled_images(TAUGHT_FOLDER)]
    sizes, digests = {path.stat().st_size for path in taught}, {_sha256(path) for path in taught}

    def is_untaught(path: Path) -> bool:
        try:
            # only a file of the same length can be a copy, so that a large folder is not read for this
            return path.stat().st_size not in sizes or _sha256(path) not in digests
        except OSError:
            return False

    return [path for path in paths if is_untaught(path)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
