"""metadata.csv and metadata.jsonl: the files that one lists, each with its label. Read strictly, a row at a time.

Owns the form, that of Hugging Face's ImageFolder. A row that could mean two things is refused by its number and line.
"""

import csv
import json
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from utils.plain_text import normalized, printable
from utils.tool_calls import object_with_unique_keys

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
LABEL_COLUMNS = ("label", "name", "text", "caption")
FILE_COLUMN = "file_name"
ROW_IN_A_TEXT = re.compile(r'\n[^\n]*\.(png|jpe?g|webp|bmp|gif|tiff?)"?,', re.IGNORECASE)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}

# the place of a row in errors, as "metadata.csv:3, row 2", and its values by column
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Metadata:
    """The label of each file that a metadata file lists, by its path from the metadata's folder on.

    notes: columns that could have been the labels' too and are not read, in one line if there are any.
    """

    labels: dict[str, str]
    notes: tuple[str, ...]


def read_metadata(path: Path) -> Metadata:
    """The files and labels of a metadata file, with slashes in its paths.

    Time and memory grow with the rows. Raises ValueError that names the row, the problem and the remedy.
    """
    listed: dict[str, str] = {}
    unread: dict[str, None] = {}  # columns that could be the labels' and are not, in their order
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for where, values in _csv_rows(path, file) if path.suffix == ".csv" else _json_rows(path, file):
                column, *others = (column for column in LABEL_COLUMNS if column in values)
                unread |= dict.fromkeys(f"{other} is not read where there is {column}" for other in others)
                name, label = _file_name(values[FILE_COLUMN], where, path.parent), _label(values[column], where, column)
                if name in listed:
                    before = list(listed).index(name) + 1
                    raise ValueError(
                        f"{where}: image {path.parent / name} is listed before, in row {before}; keep one of the two"
                    )
                # many images have one label, which is kept once
                listed[name] = sys.intern(label)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{_line_of_other_text(path)}: cannot be read ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable or move it") from error
    note = f"{path}: labels are of the first of the columns {', '.join(LABEL_COLUMNS)}: {', '.join(unread)}"
    return Metadata(listed, (note,) if unread else ())


def _line_of_other_text(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            try:
                content.decode()
            except UnicodeDecodeError:
                return line
    return 1


def _csv_rows(path: Path, file: TextIO) -> Iterator[Row]:
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    number, line = 0, 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(path, cells)
                continue
            number += 1
            where = f"{path}:{start}, row {number}"
            _require_cells(where, header, cells)
            yield where, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        # a file that ends in the middle of a quoted text is broken where the quote opens
        where = "header" if header is None else f"row {number + 1}"
        raise ValueError(
            f"{path}:{line}, {where}: cannot be read ({error}); end a text in quotes with a quote, and write one "
            'inside it twice, ""'
        ) from error


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    """The names of the columns. Raises ValueError for names given twice or missing, and for columns without commas."""
    header = [cell.strip() for cell in cells]
    while header and not header[-1]:
        header.pop()
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise ValueError(f"{path}: its header names {printable(twice)} more than once; name every column once")
    for separator, words in SEPARATORS.items():
        columns = [column.strip() for column in header[0].split(separator)]
        if len(header) == 1 and len(columns) > 1 and FILE_COLUMN in columns:
            raise ValueError(f"{path}: its columns are parted by {words}, wanted commas; save it with commas")
    _require_columns(f"{path}, header", header, "name them so in the first line")
    return header


def _require_cells(where: str, header: Sequence[str], cells: Sequence[str]) -> None:
    """Raises ValueError for a row of another length than the header's, for the header again, for rows inside a text."""
    if any("\n" in cell and ROW_IN_A_TEXT.search(cell) for cell in cells):
        raise ValueError(f"{where}: a text in quotes goes on over rows that list images; close its quote")
    if [cell.strip() for cell in cells[: len(header)]] == list(header):
        raise ValueError(f"{where}: it repeats the header; remove it")
    if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
        raise ValueError(
            f"{where}: got {len(cells)} values for the {len(header)} columns {list(header)}; put a text that has a "
            'comma in it in quotes: "cup, red"'
        )


def _json_rows(path: Path, file: TextIO) -> Iterator[Row]:
    filled = ((line, text) for line, text in enumerate(file, start=1) if text.strip())
    for number, (line, text) in enumerate(filled, start=1):
        where = f"{path}:{line}, row {number}"
        try:
            values = json.loads(text, object_pairs_hook=object_with_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: cannot be read ({printable(error)}); write one JSON object per image, each on one line"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: got a {type(values).__name__}, wanted one JSON object a line")
        _require_columns(where, list(values), "write both")
        yield where, values


def _require_columns(where: str, columns: Sequence[str], remedy: str) -> None:
    if FILE_COLUMN in columns and any(column in columns for column in LABEL_COLUMNS):
        return
    several = [column for column in columns if re.fullmatch(r"(.+_)?file_names|.+_file_name", column)]
    if several and FILE_COLUMN not in columns:
        remedy = f"{several[0]!r} is for other things than one image a row; write a row for each image to draw from"
    raise ValueError(
        f"{where}: got columns {printable(sorted(columns))}, wanted {FILE_COLUMN!r} and one of {list(LABEL_COLUMNS)}; "
        f"{remedy}"
    )


def _file_name(value: object, where: str, folder: Path) -> str:
    """The path of a row's image from `folder`, the metadata's, on, in one spelling."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: its {FILE_COLUMN} is {_shown(value)}; write the image's path from {folder} on")
    name = posixpath.normpath(value.replace("\\", "/"))
    if name.startswith(("/", "../")) or name in (".", "..") or re.match(r"[A-Za-z]:[/\\]|\w+://", value):
        raise ValueError(
            f"{where}: its {FILE_COLUMN} {_shown(value)} is not below {folder}; move the image there and write its "
            "path from there on"
        )
    return name


def _label(value: object, where: str, column: str) -> str:
    """The words for a row's image, from its value in this column: a text, or a whole number."""
    label = normalized(value or "") if value is None or isinstance(value, str) else str(value)
    if not label:
        raise ValueError(f"{where}: its {column} is empty; write what the image shows")
    if type(value) not in (str, int):
        raise ValueError(
            f"{where}: its {column} is {_shown(value)}, wanted a text or a whole number; write what it shows as text"
        )
    return label


def _shown(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))[:80]
