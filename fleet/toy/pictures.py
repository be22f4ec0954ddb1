"""The pictures that the built-in toy model is taught: those of toy_images, byte for byte. Imports no torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from utils.images import list_labelled_images

TOY_DATA_ROOT = Path(__file__).resolve().parents[2] / "toy_images"


def untaught(paths: Sequence[Path]) -> list[Path]:
    """The files that are not a copy of a picture that the toy was taught.

    A file that cannot be read is not among them: the check of images and --bad_images have decided about it.
    """
    taught = [image.path for image in list_labelled_images(TOY_DATA_ROOT)]
    sizes, digests = {path.stat().st_size for path in taught}, {_sha256(path) for path in taught}

    def is_untaught(path: Path) -> bool:
        try:
            # a copy has the same length: a large folder is not read for this
            return path.stat().st_size not in sizes or _sha256(path) not in digests
        except OSError:
            return False

    return [path for path in paths if is_untaught(path)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
