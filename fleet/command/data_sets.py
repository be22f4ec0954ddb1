"""Data sets of Hugging Face's `datasets` as folders of images: each is unpacked once, its images as they lie in it.

The rest of Fleet sees a folder with a metadata.jsonl: the checks of images, resume and reports are the same for all.
Imports `datasets` where a data set is named, and then alone.
"""

import glob
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fleet.cache import cache_folder, keeping, made_once
from fleet.errors import UsageError, one_line
from fleet.progress import count_progress
from utils.heif import HEIF_SUFFIXES
from utils.image_folders import IMAGE_SUFFIXES
from utils.metadata import LABEL_COLUMNS
from utils.plain_text import printable
from utils.split_folders import split_of

logger = logging.getLogger("fleet")

HUB = "hub:"  # before the name of a data set there, so that no folder is taken for one
METADATA_NAME = "metadata.jsonl"
SAVED_SPLITS, SAVED_STATE = "dataset_dict.json", "state.json"  # that save_to_disk writes
MIN_SHOWN = 5000  # images whose unpacking is shown as it goes
COLUMN_FLAGS = ("image_column", "label_column", "split")
UNPACKING = 1  # the number of the way in which data sets are written out: another one does it anew


class ImageFlags(Protocol):
    """The flags that say where images come from."""

    @property
    def data_root(self) -> str: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def label_column(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


def is_data_set(data_root: str) -> bool:
    """True if --data_root names a saved data set, parquet, or a data set of the hub, and no folder of images."""
    path = Path(data_root)
    if data_root.startswith(HUB) or path.suffix == ".parquet":
        return True
    return path.is_dir() and (_is_saved(path) or bool(_parquet_files(path)))


def _is_saved(folder: Path) -> bool:
    return (folder / SAVED_SPLITS).is_file() or (folder / SAVED_STATE).is_file()


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """The Parquet files in a folder and below, as patterns, by split; none where an image lies beside them."""
    found: dict[str, list[str]] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES | HEIF_SUFFIXES:
                return {}
            if suffix == ".parquet" and not name.startswith("."):
                split = split_of(stem) or split_of(Path(place).name) or "train"
                found.setdefault(split, []).append(glob.escape(os.path.join(place, name)))
    return found


def image_root(task: ImageFlags) -> str:
    """The folder of the task's images: --data_root, or where the data set that it names is unpacked.

    Raises UsageError for a data set that cannot be read, and for columns that it lacks.
    """
    if not is_data_set(task.data_root):
        return task.data_root
    # a data set is unpacked where its first reader asks, and there may be several a command
    return _unpacked(task.data_root, task.image_column, task.label_column, task.split)


@lru_cache
def _unpacked(data_root: str, image_column: str | None, label_column: str | None, split: str | None) -> str:
    rows, split_name = _chosen_split(data_root, _load(data_root), split)
    named = f"data_root={data_root}"
    if len(rows) == 0:
        raise UsageError(f"{named} has no rows; pass one that has images")
    image = _image_column(named, rows.features, image_column)
    label = _label_column(named, rows.features, label_column)
    folder = cache_folder() / f"data-{_digest(rows, [split_name, image, label])}"
    made_once(
        folder,
        lambda path: (path / METADATA_NAME).is_file(),
        lambda path: _write_out(named, rows, image, label, path),
        f"the images of {data_root}",
    )
    of_split = f", split {split_name}" if split_name else ""
    logger.info(f"{data_root}{of_split}: {len(rows):,} images of column {image}, labels of {label}, in {folder}")
    return str(folder)


def _load(data_root: str) -> Any:
    """The data set, or its splits by name. Raises UsageError if it cannot be had."""
    import datasets

    path, is_on_hub = Path(data_root), data_root.startswith(HUB)
    if not is_on_hub and not path.exists():
        raise UsageError(f"data_root={data_root} does not exist; pass a file of Parquet, or a folder of images")
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if is_on_hub:
            return datasets.load_dataset(data_root.removeprefix(HUB))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        if _is_saved(path):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset("parquet", data_files=_parquet_files(path))
    # of the library and of all that it reads with
    except Exception as error:
        what = "cannot be had from the hub" if is_on_hub else "cannot be read"
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise UsageError(
            f"data_root={data_root} {what} ({reason}); pass a folder of images, a data set that save_to_disk wrote, "
            "parquet, or with a connection hub:owner/name"
        ) from error
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


def _chosen_split(data_root: str, loaded: Any, split: str | None) -> tuple[Any, str | None]:
    """(the rows to draw from, the name of their split). Raises UsageError for a split that there is not."""
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise UsageError(f"split={split}, but data_root={data_root} has no splits; drop --split")
        return loaded, None
    chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if chosen not in loaded:
        raise UsageError(
            f"{'split' if split else 'no split is named, and the default'}={chosen} is not in data_root={data_root}; "
            f"pass --split with one of {', '.join(loaded)}"
        )
    return loaded[chosen], chosen


def _image_column(named: str, features: Mapping[str, Any], given: str | None) -> str:
    """The column of images. Raises UsageError if there is none, or several and none is named."""
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if given is not None:
        if given not in found:
            raise UsageError(f"image_column={given}, but {named} has images in {_listed(found)}; pass one of these")
        return given
    if len(found) != 1:
        raise UsageError(
            f"{named} has images in {_listed(found)} of {_listed(features)}; "
            + ("name one by --image_column" if found else "lists of images and nested ones are not read: flatten them")
        )
    return found[0]


def _holds_images(feature: Any) -> bool:
    """True for the library's images, and for what parquet makes of them."""
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return (
        type(feature).__name__ == "Image" or is_struct or getattr(feature, "dtype", None) in ("binary", "large_binary")
    )


def _label_column(named: str, features: Mapping[str, Any], given: str | None) -> str:
    """The column of labels: text, or classes with names. Raises UsageError if there is none."""
    usable = [name for name, feature in features.items() if _names_of(feature) or _is_text(feature)]
    if given is not None:
        if given not in usable:
            raise UsageError(
                f"label_column={given}, but {named} has words in {_listed(usable)}; pass one of these, or give the "
                "classes names (ClassLabel)"
            )
        return given
    classes = [name for name in usable if _names_of(features[name])]
    found = classes if len(classes) == 1 else [name for name in LABEL_COLUMNS if name in usable][:1]
    if not found:
        raise UsageError(
            f"{named} has no column that is sure to hold labels, of {_listed(features)}; name one of text or of "
            "classes with names by --label_column"
        )
    return found[0]


def _names_of(feature: Any) -> list[str]:
    return list(getattr(feature, "names", None) or ())


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names)) or "no column"


def _digest(rows: Any, choices: list[str | None]) -> str:
    """Sixteen hex digits of what is unpacked: the files that the rows lie in, as they are now, and the choices."""
    files = [Path(entry["filename"]) for entry in rows.cache_files]
    kept = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(json.dumps([UNPACKING, kept, len(rows), *choices]).encode()).hexdigest()[:16]


def _write_out(named: str, rows: Any, image: str, label: str, folder: Path) -> None:
    """Writes each row's image as it is, and the labels as metadata. Raises UsageError for a row without either."""
    import datasets

    names = _names_of(rows.features[label])
    lines = []
    plain = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    is_long = len(rows) >= MIN_SHOWN
    with (
        keeping(folder.parent, f"the images of {named}"),
        count_progress(f"unpacking {named}", len(rows), "image", is_shown=is_long) as note_done,
    ):
        for number, row in enumerate(plain):
            words = _words_of(row[label], names)
            if not words.strip():
                raise UsageError(f"{named}, row {number}: {label} is empty; give it a label or remove the row")
            content = _bytes_of(row[image], f"{named}, row {number}: {image}")
            name = f"{number:08d}{_ending(content)}"
            (folder / name).write_bytes(content)
            lines.append(json.dumps({"file_name": name, "label": words}, ensure_ascii=False))
            note_done(1)
    # last, as it marks the folder as whole
    with keeping(folder.parent, f"the images of {named}"):
        (folder / METADATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _words_of(value: Any, names: list[str]) -> str:
    """A label in words; none where a row has none, which is -1 for classes."""
    if names and value is not None:
        return names[value] if 0 <= value < len(names) else ""
    return "" if value is None else str(value)


def _bytes_of(stored: Mapping[str, Any] | None, what: str) -> bytes:
    """The bytes of an image as a row holds it: within, or in a file; none for an empty one, which is a bad image.

    Raises UsageError for a file that is not there.
    """
    if not stored or stored["bytes"] or not stored["path"]:
        return bytes((stored and stored["bytes"]) or b"")
    if not os.path.isfile(stored["path"]):
        raise UsageError(f"{what} is {printable(stored['path'])}, which is not there; restore it or remove the row")
    return Path(stored["path"]).read_bytes()


def _ending(content: bytes) -> str:
    """The ending of an image file with these bytes; of one that is broken too, which the check of images names."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            known = {"JPEG": ".jpg", "TIFF": ".tif", "MPO": ".jpg"}
            return known.get(str(image.format), f".{str(image.format).lower()}")
    # Pillow raises whatever comes up, a decompression bomb's error too
    except Exception:
        return ".png"
