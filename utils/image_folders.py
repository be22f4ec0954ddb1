"""Which images a folder offers, and the words for what each shows: named files, a folder per class, or metadata.

Owns the layouts, those of Hugging Face's ImageFolder among them, and what of a folder is passed over. Opens no image.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.metadata import METADATA_NAMES, read_metadata
from utils.plain_text import normalized, printable

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# The words by which ImageFolder knows a split's folder, alone or with more beside them after a number, dot or dash.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = "|".join(word for words in SPLIT_WORDS.values() for word in words)
SPLIT_FOLDER = re.compile(rf"(?:.*[-._ 0-9])?({_WORD})(?:[-._ 0-9].*)?", re.IGNORECASE)
# What is a split's folder also beside others: "train station" names a class.
_FILLER = "(?:images?|imgs?|data|dataset|set|split)"
SURE_SPLIT_FOLDER = re.compile(rf"(?:{_FILLER}[-._ ])?({_WORD})[-._ ]?{_FILLER}?[-._ 0-9]*", re.IGNORECASE)
METADATA_ENDINGS = frozenset({".csv", ".jsonl", ".json", ".ndjson", ".tsv", ".txt", ".parquet", ".arrow", ".xlsx"})
# A literal such as <|image_pad|> stays what it is, for the check of labels to find.
WORD_BREAKS = re.compile(r"(<\|?/?\w+\|?>)|[_\-\s]+")
REMEDIES = {
    "convert": frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".dng", ".cr2", ".nef"}),
    "unpack": frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}),
    "write the images out as files": frozenset({".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".npy", ".npz"}),
}
MAX_NAMED = 5


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the words that name what it shows."""

    path: Path
    label: str


@dataclass(frozen=True)
class ImageFolder:
    """What a folder offers. notes: what of it is not drawn from, and why, a line each."""

    images: tuple[LabelledImage, ...]
    notes: tuple[str, ...]


@dataclass
class _Found:
    """What lies in a folder and below, by path from it on: images, metadata files, and how many others by suffix."""

    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def list_labelled_images(data_root: str | Path) -> tuple[LabelledImage, ...]:
    """Every image of a folder with its label, sorted by path, so that all machines see the same order.

    See list_folder, which also says what is passed over.
    """
    return list_folder(data_root).images


def list_folder(data_root: str | Path) -> ImageFolder:
    """The images of a folder with their labels, sorted by path, and what of the folder is not drawn from.

    Three layouts, the first that fits: `metadata.csv`/`metadata.jsonl` in Hugging Face ImageFolder form, in the folder
    or below it (column `file_name`, and `label`, `name`, `text` or `caption`); one sub-folder per class, whose name is
    the label; plain files, whose name is the label ("red_circle_2.png" shows a "red circle"). In folders of splits
    (train, validation, test, and what ImageFolder takes for them), each of these lies inside, and train is drawn from.
    Links are followed, to folders too; hidden files are passed over. Nothing is opened but metadata: what has an
    image's suffix is listed, also if it is broken. `~` is the user's own folder.
    Raises FileNotFoundError or NotADirectoryError for a bad folder, OSError for one that cannot be listed, ValueError
    for bad metadata, for what could be splits or classes, and for a folder in which there is nothing but other files.
    """
    root = Path(os.path.expanduser(data_root))
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; pass --data_root with a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; pass --data_root with a folder of images")
    found = _Found()
    for folder, name in _files(root):
        _sort_in(found, root, folder, name)
    notes = _notes_of_others(found.others)
    if notes and not found.images and not found.metadata:
        raise ValueError(f"data folder {root} has no image that is read ({notes[0]}); pass a folder of images")
    place, left_out = _place_of_splits(root, found)
    notes += left_out
    images = [name for name in found.images if _is_drawn(name, place)]
    metadata = [name for name in found.metadata if _is_drawn(name, place)]
    if metadata:
        listed = _labels_by_metadata(root, metadata, images)
        labels = {name: label for name, label in listed.items() if _is_drawn(name, place)}
        if unlisted := sum(name not in labels for name in images):
            notes.append(f"passed over {_count(unlisted, 'image')} that no metadata lists")
    else:
        labels = {name: _label_from_place(inside) for name, inside in _without_splits(images, place).items()}
        _require_words_of_pictures(root, labels)
    # as paths are sorted, by their parts
    order = sorted(labels, key=lambda name: name.replace("/", "\0"))
    return ImageFolder(tuple(LabelledImage(root / name, labels[name]) for name in order), tuple(notes))


def require_distinct_labels(images: Iterable[LabelledImage]) -> None:
    """Raises ValueError for two labels that differ in case or in the form of their letters alone.

    Who is asked for one of them could not tell it from the other.
    """
    by_key: dict[str, LabelledImage] = {}
    for label, image in {image.label: image for image in images}.items():
        key = unicodedata.normalize("NFKC", label).casefold()
        other = by_key.setdefault(key, image)
        if other.label != label:
            raise ValueError(
                f"the labels '{printable(other.label)}' ({printable(other.path)}) and '{printable(label)}' "
                f"({printable(image.path)}) differ in case or form alone; write them alike, or tell them apart"
            )


def _sort_in(found: _Found, root: Path, folder: str, name: str) -> None:
    """Counts one file among images, metadata or others. Raises ValueError for metadata under another name."""
    suffix = os.path.splitext(name)[1].lower()
    if name in METADATA_NAMES:
        found.metadata.append(folder + name)
    elif suffix in METADATA_ENDINGS and name.casefold() == f"metadata{suffix}":
        raise ValueError(
            f"{root / folder / name} is not read, as metadata is {' or '.join(METADATA_NAMES)}; save it as one of "
            "them, or remove it"
        )
    elif suffix in IMAGE_SUFFIXES:
        found.images.append(folder + name)
    else:
        found.others[suffix or "without an ending"] += 1


def _files(root: Path, below: str = "", above: frozenset[Path] = frozenset()) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file in a folder and below that is not hidden. folder: from the root on, "" or "a/b/".

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
        if _is_folder(entry):
            yield from _files(root, f"{below}{entry.name}/", above | {real})
        else:
            yield below, entry.name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link that leads round in a circle
        return False


def _notes_of_others(others: Mapping[str, int]) -> list[str]:
    """What kinds of files are passed over, most first, in one line; none if there are none."""
    if not others:
        return []
    kinds = sorted(others, key=lambda suffix: (-others[suffix], suffix))
    counted = ", ".join(f"{others[suffix]:,} {printable(suffix)}" for suffix in kinds[:MAX_NAMED])
    more = f", and {len(kinds) - MAX_NAMED} kinds more" if len(kinds) > MAX_NAMED else ""
    remedies = [
        f"{remedy} {', '.join(sorted(suffixes & others.keys()))}"
        for remedy, suffixes in REMEDIES.items()
        if suffixes & others.keys()
    ]
    remedy = f"; to have their images drawn from: {'; '.join(remedies)}" if remedies else ""
    number = sum(others.values())
    return [f"passed over {_count(number, 'file')} not read as images: {counted}{more}{remedy}"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _split_of(folder: str, pattern: re.Pattern[str] = SPLIT_FOLDER) -> str | None:
    """The split that a folder's name stands for."""
    match = pattern.fullmatch(folder)
    return next((split for split, words in SPLIT_WORDS.items() if match and match[1].lower() in words), None)


def _place_of_splits(root: Path, found: _Found) -> tuple[int | None, list[str]]:
    """(at which place of a path its split's folder stands, a line on what is left out); (None, no line) without splits.

    They stand first, or below the classes' folders. Raises ValueError where folders could be splits or classes, and
    where none is the one to train on.
    """
    is_listed = any("/" not in name for name in found.metadata)
    names = found.images if is_listed else [*found.images, *found.metadata]
    for place in (0, 1):
        folders = Counter(parts[place] if len(parts := name.split("/")) > place + 1 else "" for name in names)
        splits = {folder: split for folder in folders if (split := _split_of(folder))}
        if len(splits) < len(folders):
            # metadata of the whole folder says itself what is drawn from
            if not is_listed:
                _require_classes(root, folders, names, place)
        elif splits:
            if place == 1 and len({name.split("/")[0] for name in names}) == 1:
                inner = root / names[0].split("/")[0]
                raise ValueError(f"data folder {root} has its splits below {inner}; pass --data_root {inner}")
            return place, _require_train(root, folders, splits)
    return None, []


def _require_classes(root: Path, folders: Mapping[str, int], names: Sequence[str], place: int) -> None:
    """Raises ValueError if some of these folders are surely splits, unless it is "train" among classes, as a car.

    folders: those at one place of all paths, "" for no folder there.
    """
    splits = _sure_splits(folders)
    rest = sorted(folders.keys() - splits.keys())
    if place > 0 and len(set(splits.values())) < 2:
        # a class's images are in folders of whatever names
        return
    has_files_alone = all(name.count("/") == 1 for name in names if name.split("/")[0] in splits)
    is_vehicle = all(folder.lower() == "train" for folder in splits) and has_files_alone
    if not splits or (is_vehicle and len(rest) > 1 and "" not in rest):
        return
    beside = ", ".join(f"{folder}/" if folder else "files" for folder in rest[:MAX_NAMED])
    raise ValueError(
        f"data folder {root} has {_shown(splits)} beside {printable(beside)}: if those are splits, pass a folder that "
        "holds the one to draw from alone as --data_root; if they are classes, rename them or write a metadata.csv"
    )


def _sure_splits(folders: Iterable[str]) -> dict[str, str]:
    """The splits among folders of other kinds: by their names alone, and where names differ in the split's word alone.

    >>> _sure_splits(["seg_train", "seg_test", "seg_pred", "train station"])
    {'seg_train': 'train', 'seg_test': 'test'}
    """
    alike: dict[str, dict[str, str]] = {}
    for folder in folders:
        match, split = SPLIT_FOLDER.fullmatch(folder), _split_of(folder)
        if match and split:
            alike.setdefault(f"{folder[: match.start(1)]}/{folder[match.end(1) :]}", {})[folder] = split
    several = [splits for splits in alike.values() if len(set(splits.values())) > 1]
    sure = {folder: split for folder in folders if (split := _split_of(folder, SURE_SPLIT_FOLDER))}
    return sure | {folder: split for splits in several for folder, split in splits.items()}


def _require_train(root: Path, folders: Mapping[str, int], splits: Mapping[str, str]) -> list[str]:
    """A line on what is left out, if anything is. Raises ValueError without a split to train on."""
    if "train" not in splits.values():
        raise ValueError(
            f"data folder {root} has {_shown(splits)} and no train/; pass the split to draw from, as "
            f"--data_root {root / min(splits)}"
        )
    left_out = [folder for folder in sorted(splits) if splits[folder] != "train"]
    counted = ", ".join(f"{printable(folder)}/ ({_count(folders[folder], 'file')})" for folder in left_out)
    return [f"left out, as the split train is drawn from: {counted}"] if counted else []


def _shown(splits: Mapping[str, str]) -> str:
    return ", ".join(f"{printable(folder)}/" for folder in sorted(splits)[:MAX_NAMED])


def _is_drawn(name: str, place: int | None) -> bool:
    """Whether a path is no split's, or the split's that is trained on."""
    if place is None:
        return True
    parts = name.split("/")
    return len(parts) <= place + 1 or _split_of(parts[place]) == "train"


def _without_splits(names: Sequence[str], place: int | None) -> dict[str, str]:
    """Each path without its split's folder; an archive's split may hold a folder of its own name alone."""
    inside = {name: name if place is None else "/".join(_but(name.split("/"), place)) for name in names}
    is_doubled = place == 0 and all(
        "/" in rest and rest.split("/")[0] == name.split("/")[0] for name, rest in inside.items()
    )
    return {name: rest.partition("/")[2] for name, rest in inside.items()} if is_doubled else inside


def _but(parts: Sequence[str], place: int) -> list[str]:
    return [*parts[:place], *parts[place + 1 :]]


def _label_from_place(name: str) -> str:
    folder, _, rest = name.partition("/")
    stem = os.path.splitext(name)[0]
    words = folder if rest else re.sub(r"[_\-\s]*\d+$", "", stem)
    return normalized(WORD_BREAKS.sub(lambda match: match[1] or " ", words)) or normalized(folder if rest else stem)


def _require_words_of_pictures(root: Path, labels: Mapping[str, str]) -> None:
    """Raises ValueError for files that are named after their splits, as train_0.png, and not after what they show."""
    splits = {_split_of(label) for label in set(labels.values())}
    if None not in splits and len(splits) > 1:
        raise ValueError(
            f"data folder {root} has files named after splits, as {printable(min(labels))}; move those of each split "
            "into a folder of its name, or write a metadata.csv"
        )


def _labels_by_metadata(root: Path, metadata: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    """The label of each image that the metadata files list, whatever form the letters of its path have there.

    Raises ValueError for an image that two of them list, and for images where there is no metadata.
    """
    folders = [name.rpartition("/")[0] for name in metadata]
    prefixes = tuple(f"{folder}/" if folder else "" for folder in folders)
    there = set(images)
    by_form = {unicodedata.normalize("NFC", name): name for name in images if not name.isascii()}
    labels: dict[str, str] = {}
    for name, folder, prefix in zip(metadata, folders, prefixes, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"{root / folder} has both {' and '.join(METADATA_NAMES)}; keep one of the two")
        for listed, label in read_metadata(root / name).items():
            path = prefix + listed
            if path not in there and not path.isascii():
                path = by_form.get(unicodedata.normalize("NFC", path), path)
            if path in labels:
                raise ValueError(f"{root / name} lists {printable(listed)}, listed before; keep one of the two")
            labels[path] = label
    if outside := [name for name in images if not name.startswith(prefixes)]:
        raise ValueError(
            f"{root / metadata[0]} says what images show, but {_count(len(outside), 'image')} elsewhere are in none, "
            f"{printable(outside[0])} first; write one {METADATA_NAMES[0]} in {root} that lists all of them"
        )
    return labels
