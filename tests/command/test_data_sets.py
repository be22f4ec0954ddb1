"""Data sets that the `datasets` library wrote are drawn from as folders of images are, and refused by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

import evaluate
import training
from environment import PickImageEnv
from fleet import check_env
from fleet.command.data_sets import image_root, is_data_set
from fleet.command.evaluate_options import run_options
from fleet.command.options import parse_options
from fleet.command.preflight import check_before_loading, make_environment
from fleet.errors import UsageError
from fleet.run_folder import read_jsonl
from tests.conftest import save_picture
from tests.helpers import toy_path
from tests.helpers_images import png
from utils.images import open_image

COLOURS = ("red", "blue", "green", "black", "white", "gold")
CLASSES = ["a red one", "a blue one", "a green one", "a black one", "a white one", "a gold one"]
FEATURES = Features({"photo": Image(), "kind": ClassLabel(names=CLASSES), "note": Value("string")})


# 30,000 x 30,000 pixels, none of them there
BOMB = png((b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def rows(folder: Path, features: Features = FEATURES, **more: Any) -> Dataset:
    """Six pictures in six colours, whose bytes are in the rows."""
    paths = [save_picture(folder / f"source/{colour}.png", colour) for colour in COLOURS]
    columns = {
        "photo": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "kind": list(range(6)),
        "note": [f"of the {colour} one" for colour in COLOURS],
    }
    return Dataset.from_dict(columns | more, features=features)


def saved(folder: Path) -> Path:
    rows(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_in_splits(folder: Path) -> Path:
    DatasetDict({"test": rows(folder).select(range(3)), "train": rows(folder)}).save_to_disk(folder / "splits")
    return folder / "splits"


def saved_with_paths(folder: Path) -> Path:
    paths = [str(save_picture(folder / f"source/{colour}.png", colour)) for colour in COLOURS]
    data = Dataset.from_dict({"photo": paths, "kind": list(range(6)), "note": list("abcdef")}, features=FEATURES)
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def one_parquet(folder: Path) -> Path:
    rows(folder).to_parquet(folder / "photos.parquet")
    return folder / "photos.parquet"


def parquet_in_splits(folder: Path) -> Path:
    (folder / "pq/data").mkdir(parents=True)
    rows(folder).to_parquet(folder / "pq/data/train-00000-of-00001.parquet")
    rows(folder).select(range(3)).to_parquet(folder / "pq/data/test-00000-of-00001.parquet")
    return folder / "pq"


@pytest.mark.parametrize("write", [saved, saved_in_splits, saved_with_paths, one_parquet, parquet_in_splits])
def test_a_data_set_is_drawn_from_as_its_images_in_a_folder_are(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    task = parse_options(["--data_root", str(write(tmp_path)), "--fixed_correct_index", "none"])
    env = make_environment(task, seed=0)
    assert isinstance(env, PickImageEnv)
    assert [image.label for image in env.images] == CLASSES
    shown = [open_image(image.path).getpixel((0, 0)) for image in env.images]
    assert shown == [Pictures.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]
    # the files are those that were put into it, byte for byte
    source = [(tmp_path / f"source/{colour}.png").read_bytes() for colour in COLOURS]
    assert [image.path.read_bytes() for image in env.images] == source
    findings = check_before_loading(task, {})
    assert findings.data is not None and list(findings.data.sha256s) == [f"{number:08d}.png" for number in range(6)]


def test_the_split_and_the_columns_that_are_named_are_taken(tmp_path: Path) -> None:
    features = Features({**FEATURES, "mask": Image()})
    whole = rows(
        tmp_path, features, mask=[{"bytes": (save_picture(tmp_path / "m.png")).read_bytes(), "path": None}] * 6
    )
    DatasetDict({"train": whole.select(range(2)), "test": whole}).save_to_disk(tmp_path / "saved")
    given = ["--data_root", str(tmp_path / "saved")]
    named = ["--split", "test", "--image_column", "photo", "--label_column", "note"]
    env: Any = make_environment(parse_options([*given, *named]), seed=0)
    assert [image.label for image in env.images] == [f"of the {colour} one" for colour in COLOURS]
    with pytest.raises(UsageError, match="has images in photo, mask of photo, kind, note, mask; name one by"):
        make_environment(parse_options(given), seed=0)


def test_what_is_unpacked_is_kept_until_the_data_set_changes(tmp_path: Path) -> None:
    task = parse_options(["--data_root", str(saved(tmp_path))])
    first = Path(image_root(task))
    times = [path.stat().st_mtime_ns for path in sorted(first.iterdir())]
    image_root.__globals__["_unpacked"].cache_clear()
    assert Path(image_root(task)) == first and times == [path.stat().st_mtime_ns for path in sorted(first.iterdir())]
    rows(tmp_path).select(range(5)).save_to_disk(tmp_path / "saved")
    image_root.__globals__["_unpacked"].cache_clear()
    assert len(list(Path(image_root(task)).glob("*.png"))) == 5


def test_a_broken_image_is_named_by_its_row(tmp_path: Path) -> None:
    whole = rows(tmp_path)
    photos = [{"bytes": b"no picture", "path": None}, *whole.cast_column("photo", Image(decode=False))["photo"][1:]]
    rows(tmp_path, photo=photos).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"1 of 6 images in .*saved cannot be used: 00000000.png is not in a format"):
        check_before_loading(parse_options(["--data_root", str(tmp_path / "saved")]), {})


BAD = {
    "no such split": (["--split", "dev"], "split=dev is not in data_root=", "pass --split with one of test, train"),
    "no such image column": (["--image_column", "kind"], "image_column=kind, but data_root=", "has images in photo"),
    "no words": (["--label_column", "photo"], "label_column=photo, but data_root=", "has words in kind, note"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_name_is_refused_with_what_there_is(tmp_path: Path, case: str) -> None:
    flags, *words = BAD[case]
    with pytest.raises(UsageError) as caught:
        make_environment(parse_options(["--data_root", str(saved_in_splits(tmp_path)), *flags]), seed=0)
    assert all(part in str(caught.value) for part in words)


def with_row_4(folder: Path, column: str, value: Any) -> list[str]:
    """The flags of a data set whose row 4 has this value."""
    values = list(rows(folder).cast_column("photo", Image(decode=False))[column])
    rows(folder, **{column: [*values[:4], value, values[5]]}).save_to_disk(folder / "saved")
    return ["--data_root", str(folder / "saved")]


@pytest.mark.parametrize(("column", "value"), [("note", ""), ("note", None), ("kind", -1), ("kind", None)])
def test_a_row_without_a_label_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    flags = with_row_4(tmp_path, column, value)
    with pytest.raises(UsageError, match=f"row 4: {column} is empty"):
        make_environment(parse_options([*flags, "--label_column", column]), seed=0)


@pytest.mark.parametrize("content", [None, BOMB])
def test_a_row_without_a_picture_is_a_bad_image(tmp_path: Path, content: bytes | None) -> None:
    flags = with_row_4(tmp_path, "photo", content and {"bytes": content, "path": None})
    with pytest.raises(UsageError, match="1 of 6 images in .*saved cannot be used: 00000004.png "):
        check_before_loading(parse_options(flags), {})
    findings = check_before_loading(parse_options([*flags, "--bad_images", "skip"]), {})
    assert findings.data is not None and findings.data.skipped_images == ("00000004.png",)


def test_images_beside_parquet_are_the_folders(tmp_path: Path) -> None:
    one_parquet(tmp_path / "mixed")
    task = parse_options(["--data_root", str(tmp_path / "mixed")])
    env: Any = make_environment(task, seed=0)
    assert {image.label for image in env.images} == {"source"}


def test_parquet_is_found_where_it_lies_and_by_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "deep/set[1]"
    folder.mkdir(parents=True)
    rows(tmp_path).to_parquet(folder / "validation-0[1].parquet")
    rows(tmp_path).select(range(4)).to_parquet(folder / "train-0[1].parquet")
    for split, count in (("train", 4), ("validation", 6)):
        env: Any = make_environment(parse_options(["--data_root", str(tmp_path / "deep"), "--split", split]), seed=0)
        assert len(env.images) == count


def test_an_environment_is_checked_on_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data_root", str(saved_in_splits(tmp_path)), "--split", "train"]
    check_env.main(["examples/zoom.py:ZoomEnv", "--max_turns", "2", "--episodes", "2", *data])
    assert "ZoomEnv is sound" in capsys.readouterr().out


def test_numbers_without_names_are_no_labels(tmp_path: Path) -> None:
    features = Features({"photo": Image(), "kind": Value("int64"), "note": Value("int64")})
    rows(tmp_path, features, note=list(range(6))).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="no column that is sure to hold labels, of photo, kind, note"):
        make_environment(parse_options(["--data_root", str(tmp_path / "saved")]), seed=0)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="photos.parquet does not exist; pass a file of Parquet"):
        make_environment(parse_options(["--data_root", str(tmp_path / "photos.parquet")]), seed=0)


@pytest.mark.parametrize("content", ["nothing", "cut"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, content: str) -> None:
    path = one_parquet(tmp_path)
    path.write_bytes(b"" if content == "nothing" else path.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"photos.parquet cannot be read \("):
        make_environment(parse_options(["--data_root", str(path)]), seed=0)


def test_a_name_on_the_hub_without_a_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="data_root=hub:nobody/nothing cannot be had from the hub"):
        make_environment(parse_options(["--data_root", "hub:nobody/nothing"]), seed=0)


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [("data/pics", "{there}/data/pics"), ("a.parquet", "{there}/a.parquet"), ("hub:owner/name", "hub:owner/name")],
)
def test_a_runs_data_is_found_from_another_directory(tmp_path: Path, recorded: str, wanted: str) -> None:
    (tmp_path / "run/final").mkdir(parents=True)
    config = {"options": {"data_root": recorded}, "directory": str(tmp_path / "there")}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert run_options(str(tmp_path / "run/final"))["data_root"] == wanted.format(there=tmp_path / "there")


def test_a_folder_of_images_has_no_columns(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    assert not is_data_set(str(tmp_path)) and not is_data_set("nowhere") and is_data_set("hub:owner/name")
    assert not is_data_set("owner/name")
    with pytest.raises(UsageError, match="label_column=kind, but a folder of images has no columns"):
        parse_options(["--data_root", str(tmp_path), "--label_column", "kind"])


def test_a_run_on_a_data_set_is_resumed_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.delenv("FLEET_CACHE")
    toy = toy_path()
    monkeypatch.setenv("FLEET_CACHE", str(tmp_path / "cache"))
    data = ["--data_root", str(saved_in_splits(tmp_path)), "--per_device_batch_size", "2", "--report_to", "none"]
    flags = [*data, "--model_id", str(toy), "--sample_steps", "0", "--save_steps", "1", "--output_dir", str(run)]
    training.main([*flags, "--train_steps", "1"])
    training.main([*flags, "--train_steps", "2", "--resume", "auto"])
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    output = tmp_path / "figures.json"
    evaluate.main(["--model_id", str(run / "final"), "--eval_episodes", "4", "--num_samples", "0",
                   "--output", str(output)])  # fmt: skip
    assert json.loads(output.read_text())["episodes"] == 4
