"""Folders of splits: the names that stand for train, validation and test, of which train is drawn from.

Owns the words, those of Hugging Face's ImageFolder, and the refusal of folders that could be splits or classes. Paths
are texts, from the data folder on. A place is the number of the split's folder among the parts of a path.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.plain_text import printable

# The words by which ImageFolder knows a split's folder, alone or with more beside them after a number, dot or dash.
SPLIT_BY_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = "|".join(SPLIT_BY_WORD)
SPLIT_FOLDER = re.compile(rf"(?:.*[-._ 0-9])?({_WORD})(?:[-._ 0-9].*)?", re.IGNORECASE)
# A split's folder even beside others; "train station" names a class.
_FILLER = "(?:images?|imgs?|data|dataset|set|split)"
SURE_SPLIT_FOLDER = re.compile(rf"(?:{_FILLER}[-._ ])?({_WORD})[-._ ]?{_FILLER}?[-._ 0-9]*", re.IGNORECASE)
MAX_NAMED = 5


def place_of_splits(root: Path, images: Sequence[str], metadata: Sequence[str]) -> tuple[int | None, list[str]]:
    """(the place of the splits' folders, a line on those left out); (None, no line) without splits.

    Splits stand first, or below the classes' folders. Raises ValueError if folders could be splits or classes, and if
    no split is the one to train on.
    """
    is_listed = any("/" not in name for name in metadata)
    names = images if is_listed else [*images, *metadata]
    for place in (0, 1):
        folders = Counter(parts[place] if len(parts := name.split("/")) > place + 1 else "" for name in names)
        splits = {folder: split for folder in folders if (split := split_of(folder))}
        if len(splits) < len(folders):
            # metadata of the whole folder lists its images itself
            if not is_listed:
                _require_classes(root, folders, names, place)
        elif splits:
            if place == 1 and len({name.split("/")[0] for name in names}) == 1:
                inner = root / names[0].split("/")[0]
                raise ValueError(f"data folder {root} has its splits below {inner}; pass --data_root {inner}")
            return place, _require_train(root, folders, splits)
    return None, []


def is_drawn(name: str, place: int | None) -> bool:
    """True if a path lies in no split's folder, or in that of the split to train on."""
    if place is None:
        return True
    parts = name.split("/")
    return len(parts) <= place + 1 or split_of(parts[place]) == "train"


def without_splits(names: Sequence[str], place: int | None) -> dict[str, str]:
    """Each path without its split's folder, and without a folder of the same name alone in it, as archives have it."""
    if place is None:
        return {name: name for name in names}
    inside = {name: "/".join(part for at, part in enumerate(name.split("/")) if at != place) for name in names}
    is_doubled = place == 0 and all(rest.startswith(f"{name.split('/')[0]}/") for name, rest in inside.items())
    return {name: rest.partition("/")[2] for name, rest in inside.items()} if is_doubled else inside


def split_of(folder: str, pattern: re.Pattern[str] = SPLIT_FOLDER) -> str | None:
    """The split that a folder's name stands for."""
    match = pattern.fullmatch(folder)
    return SPLIT_BY_WORD.get(match[1].lower()) if match else None


def _require_classes(root: Path, folders: Mapping[str, int], names: Sequence[str], place: int) -> None:
    """Raises ValueError if some of these folders are surely splits. A folder train/ among classes of vehicles passes.

    folders: those at one place of all paths, "" for no folder there.
    """
    splits = _sure_splits(folders)
    rest = sorted(folders.keys() - splits.keys())
    if place > 0 and len(set(splits.values())) < 2:
        # inside a class, folders have any names
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
    """The splits among other folders: sure by name, or by several names that differ only in the split's word.

    >>> _sure_splits(["seg_train", "seg_test", "seg_pred", "train station"])
    {'seg_train': 'train', 'seg_test': 'test'}
    """
    alike: dict[str, dict[str, str]] = {}
    for folder in folders:
        match, split = SPLIT_FOLDER.fullmatch(folder), split_of(folder)
        if match and split:
            alike.setdefault(f"{folder[: match.start(1)]}/{folder[match.end(1) :]}", {})[folder] = split
    several = [splits for splits in alike.values() if len(set(splits.values())) > 1]
    sure = {folder: split for folder in folders if (split := split_of(folder, SURE_SPLIT_FOLDER))}
    return sure | {folder: split for splits in several for folder, split in splits.items()}


def _require_train(root: Path, folders: Mapping[str, int], splits: Mapping[str, str]) -> list[str]:
    """One line on the splits left out, if there are any. Raises ValueError without a split to train on."""
    if "train" not in splits.values():
        raise ValueError(
            f"data folder {root} has {_shown(splits)} and no train/; pass the split to draw from, as "
            f"--data_root {root / min(splits)}"
        )
    left_out = [folder for folder in sorted(splits) if splits[folder] != "train"]
    counted = ", ".join(f"{printable(folder)}/ ({count_of(folders[folder], 'file')})" for folder in left_out)
    return [f"left out, as the split train is drawn from: {counted}"] if counted else []


def _shown(splits: Mapping[str, str]) -> str:
    return ", ".join(f"{printable(folder)}/" for folder in sorted(splits)[:MAX_NAMED])


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
