"""The images that a folder offers, each with its label: by named files, a folder per class, or metadata.

Owns the layouts, those of Hugging Face's ImageFolder among them, and the notes on what is passed over. Opens no image.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.file_kinds import kind_of
from utils.heif import HEIF_REMEDY, HEIF_SUFFIXES, is_heif_read
from utils.metadata import METADATA_NAMES, read_metadata
from utils.plain_text import normalized, printable
from utils.split_folders import MAX_NAMED, count_of, is_drawn, place_of_splits, split_of, without_splits

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA_ENDINGS = frozenset({".csv", ".jsonl", ".json", ".ndjson", ".tsv", ".txt", ".parquet", ".arrow", ".xlsx"})
# A literal such as <|image_pad|> stays, for the check of labels to find.
WORD_BREAKS = re.compile(r"(<\|?/?\w+\|?>)|[_\-\s]+")
REMEDIES = {
    HEIF_REMEDY: HEIF_SUFFIXES,
    "convert": frozenset({".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".dng", ".cr2", ".nef"}),
    "unpack": frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}),
    "write the images out as files": frozenset({".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".npy", ".npz"}),
}


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the words that name what it shows."""

    path: Path
    label: str


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder. notes: a line for each thing in it that is not drawn from, with the reason."""

    images: tuple[LabelledImage, ...]
    notes: tuple[str, ...]


def list_labelled_images(data_root: str | Path) -> tuple[LabelledImage, ...]:
    """Every image of a folder with its label, sorted by path: the same order on all machines. See list_folder."""
    return list_folder(data_root).images


def list_folder(data_root: str | Path, gone: Iterable[str] = ()) -> ImageFolder:
    """The images of a folder with their labels, sorted by path, and notes on the rest of the folder.

    Three layouts, the first that fits: `metadata.csv`/`metadata.jsonl` in Hugging Face ImageFolder form, in the folder
    or below it (column `file_name`, and `label`, `name`, `text` or `caption`); one sub-folder per class, whose name is
    the label; plain files, whose name is the label ("red_circle_2.png" shows a "red circle"). In folders of splits
    (train, validation, test, and ImageFolder's other words for them), each of these lies inside, and train is drawn
    from. Links are followed, to folders too; hidden files are passed over. Only metadata is opened: a broken image is
    listed too. `~` is the user's own folder. gone: paths from the folder on, with slashes, of images that were there
    and are listed as if they still were.
    Raises FileNotFoundError or NotADirectoryError for a bad folder, OSError for one that cannot be listed, ValueError
    for bad metadata, for folders that could be splits or classes, and for a folder that holds other files alone.
    """
    root = Path(os.path.expanduser(data_root))
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; pass --data_root with a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; pass --data_root with a folder of images")
    for name in METADATA_NAMES:
        _require_file(root / name)
    images, metadata, others = _files_by_kind(root)
    images += sorted(set(gone).difference(images))
    notes = _notes_of_others(others)
    if notes and not images and not metadata:
        raise ValueError(f"data folder {root} has no image that is read ({notes[0]}); pass a folder of images")
    place, left_out = place_of_splits(root, images, metadata)
    notes += left_out
    images = [name for name in images if is_drawn(name, place)]
    metadata = [name for name in metadata if is_drawn(name, place)]
    if metadata:
        listed, notes_of_metadata = _labels_by_metadata(root, metadata, images)
        notes += notes_of_metadata
        labels = {name: label for name, label in listed.items() if is_drawn(name, place)}
        if unlisted := sum(name not in labels for name in images):
            notes.append(f"passed over {count_of(unlisted, 'image')} that no metadata lists")
    else:
        labels = {name: _label_from_place(inside) for name, inside in without_splits(images, place).items()}
        _require_words_of_pictures(root, labels)
    # a path sorts by its parts
    order = sorted(labels, key=lambda name: name.split("/"))
    return ImageFolder(tuple(LabelledImage(root / name, labels[name]) for name in order), tuple(notes))


def require_distinct_labels(images: Iterable[LabelledImage]) -> None:
    """Raises ValueError for two labels that differ only in case or the form of letters: they would sound alike."""
    by_key: dict[str, LabelledImage] = {}
    for label, image in {image.label: image for image in images}.items():
        key = unicodedata.normalize("NFKC", label).casefold()
        other = by_key.setdefault(key, image)
        if other.label != label:
            raise ValueError(
                f"the labels '{printable(other.label)}' ({printable(other.path)}) and '{printable(label)}' "
                f"({printable(image.path)}) differ in case or form alone; write them alike, or tell them apart"
            )


def require_enough(images: Sequence[LabelledImage], num_shown: int, data_root: str | Path, *, are_named: bool) -> None:
    """Raises ValueError for fewer images, or labels if images are asked for by name, than an episode shows."""
    if are_named:
        require_distinct_labels(images)
    if len(images) < num_shown:
        raise ValueError(
            f"data folder {data_root} has {len(images)} images, but candidates_per_episode={num_shown} "
            "distinct ones are shown; add images or lower --candidates_per_episode"
        )
    labels = sorted({image.label for image in images})
    if are_named and len(labels) < num_shown:
        raise ValueError(
            f"data folder {data_root} has {len(labels)} different labels ({labels[:6]}), but with "
            f"--fixed_correct_index none each of the candidates_per_episode={num_shown} images needs its own; "
            "add classes, or lower --candidates_per_episode"
        )


def _require_file(path: Path) -> None:
    """Raises ValueError for a pipe or the like under metadata's name: opening it would wait."""
    kind = kind_of(path)
    if kind not in (None, "a file", "a link to nothing"):
        raise ValueError(f"{path} is {kind}, but metadata is read from a file; replace it or remove it")


def _files_by_kind(root: Path) -> tuple[list[str], list[str], Counter[str]]:
    """(images, metadata, the number of other files by suffix) in a folder and below; paths are from it on.

    Raises ValueError for metadata under another name.
    """
    images, metadata, others = [], [], Counter[str]()
    reads_heif = is_heif_read()
    for path in _files(root):
        name = path.rpartition("/")[2]
        suffix = os.path.splitext(name)[1].lower()
        if name in METADATA_NAMES:
            _require_file(root / path)
            metadata.append(path)
        elif suffix in METADATA_ENDINGS and name.casefold() == f"metadata{suffix}":
            raise ValueError(
                f"{root / path} is not read, as metadata is {' or '.join(METADATA_NAMES)}; save it as one of them, or "
                "remove it"
            )
        elif suffix in IMAGE_SUFFIXES or (reads_heif and suffix in HEIF_SUFFIXES):
            images.append(path)
        else:
            others[suffix or "without an ending"] += 1
    return images, metadata, others


def _files(root: Path, below: str = "", above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """The paths, from the root on, of all files below it that are not hidden. below: a folder in it, "" or "a/b/".

    above: the folders that this one is in, which no link leads back to.
    """
    folder = root / below
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise OSError(f"folder {folder} cannot be listed ({error.strerror}); make it readable or move it") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # an entry's own is_dir raises for a link that leads round in a circle
        if os.path.isdir(entry):
            yield from _files(root, f"{below}{entry.name}/", above | {real})
        else:
            yield f"{below}{entry.name}"


def _notes_of_others(others: Mapping[str, int]) -> list[str]:
    """One line on the kinds of files that are passed over, most first; no line without such files."""
    if not others:
        return []
    kinds = sorted(others, key=lambda suffix: (-others[suffix], suffix))
    counted = ", ".join(f"{others[suffix]:,} {printable(suffix)}" for suffix in kinds[:MAX_NAMED])
    more = f", and {len(kinds) - MAX_NAMED} kinds more" if len(kinds) > MAX_NAMED else ""
    found = {remedy: sorted(suffixes & others.keys()) for remedy, suffixes in REMEDIES.items()}
    remedies = "; ".join(f"{remedy} {', '.join(suffixes)}" for remedy, suffixes in found.items() if suffixes)
    remedy = f"; to have their images drawn from: {remedies}" if remedies else ""
    return [f"passed over {count_of(sum(others.values()), 'file')} not read as images: {counted}{more}{remedy}"]


def _label_from_place(name: str) -> str:
    folder, _, rest = name.partition("/")
    stem = os.path.splitext(name)[0]
    words = folder if rest else re.sub(r"[_\-\s]*\d+$", "", stem)
    return normalized(WORD_BREAKS.sub(lambda match: match[1] or " ", words)) or normalized(folder if rest else stem)


def _require_words_of_pictures(root: Path, labels: Mapping[str, str]) -> None:
    """Raises ValueError for files that are named after their splits, as train_0.png, and not after their picture."""
    splits = {split_of(label) for label in set(labels.values())}
    if None not in splits and len(splits) > 1:
        raise ValueError(
            f"data folder {root} has files named after splits, as {printable(min(labels))}; move those of each split "
            "into a folder of its name, or write a metadata.csv"
        )


def _labels_by_metadata(root: Path, metadata: Sequence[str], images: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the label of each image that the metadata files list, the files' notes).

    The letters of a path may have another form in the metadata than on the disk.
    Raises ValueError for an image that two files list, and for images without metadata in or above their folder.
    """
    prefixes = tuple(name[: name.rfind("/") + 1] for name in metadata)
    there = set(images)
    by_form = {unicodedata.normalize("NFC", name): name for name in images if not name.isascii()}
    labels: dict[str, str] = {}
    notes: list[str] = []
    for name, prefix in zip(metadata, prefixes, strict=True):
        if prefixes.count(prefix) > 1:
            raise ValueError(f"{root / prefix} has both {' and '.join(METADATA_NAMES)}; keep one of the two")
        read = read_metadata(root / name)
        notes += read.notes
        for listed, label in read.labels.items():
            path = prefix + listed
            if path not in there and not path.isascii():
                path = by_form.get(unicodedata.normalize("NFC", path), path)
            if path in labels:
                raise ValueError(f"{root / name} lists {printable(listed)}, listed before; keep one of the two")
            labels[path] = label
    if outside := [name for name in images if not name.startswith(prefixes)]:
        raise ValueError(
            f"{root / metadata[0]} labels images, but {count_of(len(outside), 'image')} outside it are in no metadata, "
            f"first {printable(outside[0])}; write one {METADATA_NAMES[0]} in {root} that lists all of them"
        )
    return labels, notes
