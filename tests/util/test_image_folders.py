"""What a folder offers: its layouts, its splits, and what is passed over, said in a line each."""

import unicodedata
from pathlib import Path

import pytest

from environment import PickImageEnv
from tests.conftest import save_picture
from utils import image_folders
from utils.image_folders import list_folder, list_labelled_images, require_distinct_labels

pytestmark = pytest.mark.fast

HEADER = "file_name,label\n"


def fill(folder: Path, files: list[str] | dict[str, str]) -> Path:
    """Writes a picture for every name, or the text that stands beside it."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files[name] if isinstance(files, dict) else ""
        if content:
            path.write_text(content, encoding="utf-8")
        else:
            save_picture(path)
    return folder


def labels_of(folder: Path) -> dict[str, str]:
    return {image.path.relative_to(folder).as_posix(): image.label for image in list_folder(folder).images}


def refusal_of(folder: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        list_folder(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- splits -----------------------------------------------------------------------------------------------------------

# files, what is drawn from with its label, and the folders that are said to be left out
SPLITS = {
    "above classes": (
        ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "test/cat/1.png"],
        {"train/cat/1.png": "cat", "train/dog/1.png": "dog"},
        ["test/ (1 file)", "val/ (1 file)"],
    ),
    "above named files": (["train/red_cup.png", "validation/jug.png"], {"train/red_cup.png": "red cup"},
                          ["validation/ (1 file)"]),
    "capitals": (["Train/cat/1.png", "TEST/cat/1.png", "TEST/cat/2.png"], {"Train/cat/1.png": "cat"},
                 ["TEST/ (2 files)"]),
    "years": (["train2017/cat/1.png", "val2017/cat/1.png"], {"train2017/cat/1.png": "cat"}, ["val2017/ (1 file)"]),
    "words beside": (["images_train/cat/1.png", "images-dev/cat/1.png"], {"images_train/cat/1.png": "cat"},
                     ["images-dev/ (1 file)"]),
    "parts of one": (["train-1/cat/1.png", "train-2/dog/1.png"],
                     {"train-1/cat/1.png": "cat", "train-2/dog/1.png": "dog"}, []),
    "a class named train": (["training/train/1.png", "training/car/1.png", "testing/car/1.png"],
                            {"training/train/1.png": "train", "training/car/1.png": "car"}, ["testing/ (1 file)"]),
    "below classes": (["cat/train/1.png", "dog/train/1.png", "dog/test/1.png"],
                      {"cat/train/1.png": "cat", "dog/train/1.png": "dog"}, ["test/ (1 file)"]),
    "a folder twice": (["seg_train/seg_train/cat/1.png", "seg_test/seg_test/cat/1.png"],
                       {"seg_train/seg_train/cat/1.png": "cat"}, ["seg_test/ (1 file)"]),
    "train alone": (["train/cat/1.png", "train/dog/1.png"], {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}, []),
}  # fmt: skip


@pytest.mark.parametrize(("files", "wanted", "left_out"), SPLITS.values(), ids=SPLITS.keys())
def test_train_is_drawn_from_and_the_rest_is_said_to_be_left_out(
    tmp_path: Path, files: list[str], wanted: dict[str, str], left_out: list[str]
) -> None:
    fill(tmp_path, files)
    assert labels_of(tmp_path) == wanted
    said = f"left out, as the split train is drawn from: {', '.join(left_out)}"
    assert list_folder(tmp_path).notes == ((said,) if left_out else ())


def test_metadata_inside_a_split_is_read(tmp_path: Path) -> None:
    rows = f"{HEADER}a.png,ant\nb.png,bee\n"
    fill(tmp_path, {"train/a.png": "", "train/b.png": "", "train/metadata.csv": rows, "test/a.png": ""})
    assert labels_of(tmp_path) == {"train/a.png": "ant", "train/b.png": "bee"}


def test_metadata_above_splits_lists_what_is_in_train(tmp_path: Path) -> None:
    rows = f"{HEADER}train/a.png,ant\ntest/b.png,bee\n"
    fill(tmp_path, {"train/a.png": "", "test/b.png": "", "metadata.csv": rows})
    assert labels_of(tmp_path) == {"train/a.png": "ant"}


@pytest.mark.parametrize(
    "classes",
    [["train", "car", "bus"], ["train station", "airport"], ["test tube", "beaker"], ["dev board", "valley", "evals"]],
)
def test_classes_that_sound_like_splits_stay_classes(tmp_path: Path, classes: list[str]) -> None:
    fill(tmp_path, [f"{name}/1.png" for name in classes])
    assert sorted(labels_of(tmp_path).values()) == sorted(classes)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/cat/1.png", "extra/1.png"], "has train/ beside extra/: if those are splits, pass a folder"),
        (["cat/1.png", "dog/1.png", "test/1.png"], "has test/ beside cat/, dog/: if those are splits"),
        (["train/cat/1.png", "cover.png"], "has train/ beside files: if those are splits"),
        (["train/1.png", "test/1.png", "unlabelled/1.png"], "has test/, train/ beside unlabelled/: "),
        (["test/cat/1.png", "val/cat/1.png"], "has test/, val/ and no train/; pass the split to draw from, as --data_"),
        (["data/train/cat/1.png", "data/test/cat/1.png"], "has its splits below {}/data; pass --data_root {}/data"),
        (["seg_train/a/1.png", "seg_test/a/1.png", "seg_pred/1.png"], "has seg_test/, seg_train/ beside seg_pred/: "),
        (["train_0.png", "test_0.png", "test_1.png"], "has files named after splits, as test_0.png; move those of"),
    ],
)
def test_what_could_be_splits_or_classes_is_refused(tmp_path: Path, files: list[str], words: str) -> None:
    fill(tmp_path, files)
    assert words.replace("{}", str(tmp_path)) in refusal_of(tmp_path)


# --- metadata and where it stands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": "", "metadata.csv": HEADER, "metadata.jsonl": "{}"}, "both metadata.csv and metadata.jsonl; keep"),
        ({"a.png": "", "Metadata.CSV": HEADER}, "Metadata.CSV is not read, as metadata is metadata.csv or"),
        ({"a.png": "", "metadata.parquet": "PAR1"}, "metadata.parquet is not read, as metadata is metadata.csv or"),
        ({"a/1.png": "", "b/1.png": "", "b/metadata.csv": f"{HEADER}1.png,bee\n"}, "but 1 image outside it are in no"),
        (
            {"b/1.png": "", "metadata.csv": f"{HEADER}b/1.png,x\n", "b/metadata.csv": f"{HEADER}1.png,y\n"},
            "listed before; keep one of the two",
        ),
    ],
)  # fmt: skip
def test_two_sources_of_labels_are_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    fill(tmp_path, files)
    assert words in refusal_of(tmp_path)


def test_what_no_metadata_lists_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": "", "b.png": "", "c.png": "", "metadata.csv": f"{HEADER}a.png,ant\n"})
    assert labels_of(tmp_path) == {"a.png": "ant"}
    assert list_folder(tmp_path).notes == ("passed over 2 images that no metadata lists",)


def test_columns_that_could_be_the_labels_too_are_said_not_to_be_read(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"a.png": "", "b.png": "", "metadata.csv": "file_name,text,label,id\na.png,a mug,0,7\nb.png,a cup,1,8\n"},
    )
    assert labels_of(tmp_path) == {"a.png": "0", "b.png": "1"}
    assert list_folder(tmp_path).notes == (
        f"{tmp_path / 'metadata.csv'}: labels are of the first of the columns label, name, text, caption: text is not "
        "read where there is label",
    )


@pytest.mark.parametrize(
    "files",
    [
        {"ant_1.png": "", "bee.png": "", "ant_2.png": ""},
        {"ant/1.png": "", "bee/x.png": "", "ant/2.png": ""},
        {"train/ant/1.png": "", "train/bee/x.png": "", "test/ant/2.png": ""},
        {"a.png": "", "b.png": "", "metadata.csv": f"{HEADER}a.png,ant\nb.png,bee\n"},
    ],
    ids=["files", "classes", "splits", "metadata"],
)
def test_an_image_that_is_gone_can_be_listed_as_it_was(tmp_path: Path, files: dict[str, str]) -> None:
    fill(tmp_path, files)
    before = list_labelled_images(tmp_path)
    gone = next(iter(files))
    (tmp_path / gone).unlink()
    assert list_folder(tmp_path, gone=[gone]).images == before
    assert gone in {str(image.path.relative_to(tmp_path)) for image in before}


def test_a_name_is_found_in_whatever_form_its_letters_are(tmp_path: Path) -> None:
    on_disk, listed = unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")
    fill(tmp_path, {on_disk: "", "metadata.csv": f"{HEADER}{listed},cup\n"})
    assert [image.path.name for image in list_labelled_images(tmp_path)] == [on_disk]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_from_names_have_one_form(tmp_path: Path) -> None:
    fill(tmp_path, [unicodedata.normalize("NFC", "café_1.png"), unicodedata.normalize("NFD", "café_2.png")])
    assert [image.label for image in list_labelled_images(tmp_path)] == [unicodedata.normalize("NFC", "café")] * 2


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("STRASSE", "straße"), ("\ufb01sh", "fish"), ("x²", "X2")])
def test_labels_that_differ_in_case_or_form_alone_cannot_be_asked_for(tmp_path: Path, pair: tuple[str, str]) -> None:
    fill(tmp_path, [f"{label}/1.png" for label in (*pair, "dog")])
    words = "differ in case or form alone; write them alike, or tell them apart"
    with pytest.raises(ValueError, match=words):
        require_distinct_labels(list_labelled_images(tmp_path))
    with pytest.raises(ValueError, match=words):
        PickImageEnv(tmp_path, 2, None)
    # where no label is asked for, they may
    assert len(PickImageEnv(tmp_path, 2, 0).images) == 3


# --- what is passed over ----------------------------------------------------------------------------------------------


def test_files_passed_over_are_counted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folders, "is_heif_read", lambda: False)
    fill(tmp_path, {"a.png": "", "1.heic": "x", "2.HEIC": "x", "b/3.avif": "x", "4.parquet": "x", "LICENSE": "x"})
    assert list_folder(tmp_path).notes == (
        "passed over 5 files not read as images: 2 .heic, 1 .avif, 1 .parquet, 1 without an ending; to have their "
        "images drawn from: pip install pillow-heif to read .heic; convert .avif; write the images out as files "
        ".parquet",
    )


@pytest.mark.parametrize("name", ["shard-000.tar", "data.zip", "photo.avif", "train/0000.parquet", "x.tfrecord"])
def test_a_folder_of_such_files_alone_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {name: "x"})
    message = refusal_of(tmp_path)
    assert message.startswith(
        f"data folder {tmp_path} has no image that is read (passed over 1 file not read as images"
    )
    assert f"1 {Path(name).suffix}; to have their images drawn from: " in message


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "pictures", ["red_cup.png"])
    assert [image.path for image in list_labelled_images("~/pictures")] == [tmp_path / "pictures" / "red_cup.png"]
