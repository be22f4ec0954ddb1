"""HEIC and HEIF, the photos of phones: read where the package pillow-heif is installed, which Pillow itself is not."""

from functools import cache
from importlib.util import find_spec

HEIF_SUFFIXES = frozenset({".heic", ".heif"})
HEIF_REMEDY = "pip install pillow-heif to read"


def is_heif_read() -> bool:
    """True if pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


@cache
def heif_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that pillow-heif adds, after it has added them; none where it is missing."""
    if not is_heif_read():
        return ()
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return ("HEIF",)
