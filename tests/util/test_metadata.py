"""metadata.csv and metadata.jsonl: a row is read as it was meant, or refused by its number, its line and a remedy."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import save_picture
from utils.image_folders import list_labelled_images
from utils.metadata import read_metadata

pytestmark = pytest.mark.fast


def read(folder: Path, content: str | bytes) -> dict[str, str]:
    """The rows of a metadata file with this content: CSV, or JSON Lines if it begins with a bracket."""
    content = content.encode() if isinstance(content, str) else content
    path = folder / ("metadata.jsonl" if content[:1] in (b"{", b"[") else "metadata.csv")
    path.write_bytes(content)
    return read_metadata(path).labels


def json_row(file_name: str = '"a.png"', label: str = '"ant"') -> str:
    return f'{{"file_name": {file_name}, "label": {label}}}\n'


READ = {
    "plain": ("file_name,label\na.png,ant\nb/c.png,bee\n", {"a.png": "ant", "b/c.png": "bee"}),
    "a comma in quotes": ('file_name,label\na.png,"cup, red"\n', {"a.png": "cup, red"}),
    "a quote in quotes": ('file_name,label\na.png,"5"" fork"\n', {"a.png": '5" fork'}),
    "a quote in the middle": ('file_name,label\na.png,5" fork\n', {"a.png": '5" fork'}),
    "byte order mark and Windows lines": (
        b"\xef\xbb\xbffile_name,label\r\na.png,ant\r\nb.png,bee\r\n",
        {"a.png": "ant", "b.png": "bee"},
    ),
    "old Mac lines": (b"file_name,label\ra.png,ant\rb.png,bee\r", {"a.png": "ant", "b.png": "bee"}),
    "blank lines": ("file_name,label\n\na.png,ant\n  \n,\nb.png,bee\n\n", {"a.png": "ant", "b.png": "bee"}),
    "empty columns of a spreadsheet": ("file_name,label,,\na.png,ant,,\n,,,\n", {"a.png": "ant"}),
    "spaces around": ("file_name, label\na.png, ant \n", {"a.png": "ant"}),
    "another column of several lines": ('label,note,file_name\nant,"two\nlines",a.png\n', {"a.png": "ant"}),
    "the label column that comes first": ("file_name,caption,label\na.png,x,ant\n", {"a.png": "ant"}),
    "backslashes": ("file_name,label\nb\\c.png,bee\n", {"b/c.png": "bee"}),
    "ways round": ("file_name,label\n./b//x/../c.png,bee\n", {"b/c.png": "bee"}),
    "zero": (json_row(label="0"), {"a.png": "0"}),
    "a whole number": (json_row(label="-17"), {"a.png": "-17"}),
    "letters and accents apart": (json_row(label='"cafe\\u0301"'), {"a.png": "caf\u00e9"}),
    "spaces of other widths": (json_row(label='"\\u3000red\\u00a0 cup\\u2003"'), {"a.png": "red cup"}),
    "no rows": ("file_name,label\n", {}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize(("content", "wanted"), READ.values(), ids=READ.keys())
def test_rows_are_read_as_they_were_meant(tmp_path: Path, content: str | bytes, wanted: dict[str, str]) -> None:
    assert read(tmp_path, content) == wanted


UNQUOTED = "got 3 values for the 2 columns ['file_name', 'label']; put a text that has a comma in it in quotes"
OPEN_QUOTE = "end a text in quotes with a quote, and write one inside it twice"
OVER_ROWS = "a text in quotes goes on over rows that list images; close its quote"
NOT_BELOW = "is not below"
KIND = "wanted a text or a whole number; write what it shows as text"
# what is in the file, where the fault is, and words of what is said
REFUSED = {
    "a comma without quotes": ("file_name,label\na.png,ant\nb.png,cup, red\n", ":3, row 2: ", UNQUOTED),
    "a space before the quote": ('file_name,label\na.png, "cup, red"\n', ":2, row 1: ", UNQUOTED),
    "a quote that is never closed": ('file_name,label\na.png,ant\nb.png,"5 inch\nc.png,x\n', ":3, row 2: ", OPEN_QUOTE),
    "text behind the quote": ('file_name,label\na.png,"5" inch\n', ":2, row 1: ", OPEN_QUOTE),
    "a quote that the next row closes": ('file_name,label\na.png,"5 inch\nb.png,6 inch"\n', ":2, row 1: ", OVER_ROWS),
    "such a quote in another column": (
        'file_name,label,note\na.png,ant,"5 inch\nb.JPG,bee,6"\n', ":2, row 1: ", OVER_ROWS,
    ),
    "too few values": ("file_name,label\na.png\n", ":2, row 1: ", "got 1 values for the 2 columns"),
    "the header again": ("file_name,label\na.png,ant\nfile_name,label\n", ":3, row 2: ", "repeats the header; remove"),
    "one column": ("file_name\na.png\n", ", header: ", "wanted 'file_name' and one of"),
    "no header": ("a.png,ant\nb.png,bee\n", ", header: ", "wanted 'file_name' and one of"),
    "a column twice": ("file_name,label,label\na.png,x,y\n", ": ", "names ['label'] more than once; name every column"),
    "semicolons": ("file_name;label\na.png;ant\n", ": ", "parted by semicolons, wanted commas; save it with commas"),
    "tabs": ("file_name\tlabel\na.png\tant\n", ": ", "parted by tabs, wanted commas; save it with commas"),
    "another encoding": (b"file_name,label\na.png,caf\xe9\n", ":2: ", "save it as UTF-8"),
    "16-bit text": ("file_name,label\na.png,ant\n".encode("utf-16"), ":1: ", "save it as UTF-8"),
    "one file twice": ("file_name,label\na.png,x\nb.png,y\n./a.png,z\n", ":4, row 3: ", "listed before, in row 1;"),
    "an empty label": ("file_name,label\na.png, \n", ":2, row 1: ", "its label is empty; write what the image shows"),
    "a wide space": (json_row(label='"\\u3000"'), ":1, row 1: ", "its label is empty"),
    "null": (json_row(label="null"), ":1, row 1: ", "its label is empty"),
    "true": (json_row(label="true"), ":1, row 1: ", KIND),
    "a fraction": (json_row(label="1.5"), ":1, row 1: ", KIND),
    "not a number": (json_row(label="NaN"), ":1, row 1: ", KIND),
    "a list": (json_row(label='["ant"]'), ":1, row 1: ", KIND),
    "an object": (json_row(label='{"en": "ant"}'), ":1, row 1: ", KIND),
    "a key twice": ('{"file_name": "a.png", "label": "x", "label": "y"}\n', ":1, row 1: ", "'label' is given twice"),
    "a row behind a blank line": ("\n".join([json_row(), "", "{"]), ":4, row 2: ", "write one JSON object per image"),
    "no file name": (json_row("null"), ":1, row 1: ", "its file_name is null; write the image's path"),
    "several files": (json_row('["a.png", "b.png"]'), ":1, row 1: ", "its file_name is [\"a.png\", \"b.png\"]; write"),
    "file_names": ('{"file_names": ["a.png"], "label": "x"}\n', ":1, row 1: ", "write a row for each image"),
    "another's file name": ('{"mask_file_name": "a.png", "label": "x"}\n', ":1, row 1: ", "write a row for each image"),
    "from the root": (json_row('"/etc/a.png"'), ":1, row 1: ", NOT_BELOW),
    "out of the folder": (json_row('"x/../../a.png"'), ":1, row 1: ", NOT_BELOW),
    "out of the folder, backslashes": (json_row('"..\\\\a.png"'), ":1, row 1: ", NOT_BELOW),
    "a drive": (json_row('"C:\\\\a.png"'), ":1, row 1: ", NOT_BELOW),
    "an address": (json_row('"https://a.example/a.png"'), ":1, row 1: ", NOT_BELOW),
}  # fmt: skip


@pytest.mark.parametrize(("content", "place", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_a_guess_is_refused_by_its_row(
    tmp_path: Path, content: str | bytes, place: str, words: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, content)
    message = str(refusal.value)
    name = "metadata.jsonl" if (tmp_path / "metadata.jsonl").exists() else "metadata.csv"
    assert message.startswith(f"{tmp_path / name}{place}") and words in message and "\n" not in message


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    rows = "".join(f"{number:06d}.png,thing {number % 7}\n" for number in range(20_000))
    listed = read(tmp_path, "file_name,label\n" + rows)
    assert len(listed) == 20_000 and listed["019999.png"] == f"thing {19_999 % 7}"
    # one text for each label, however many rows have it
    assert len({id(label) for label in listed.values()}) == 7


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_is_no_file_is_named_and_not_waited_for(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    save_picture(tmp_path / "red.png")
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a (pipe|folder), but metadata is read from a file"):
        list_labelled_images(tmp_path)
