"""Bad images stop a run or are left out, the same on every process; what is drawn from has a digest."""

import dataclasses
import hashlib
import logging
from pathlib import Path

import pytest

from environment import Episode, PickImageEnv, PickImageTask
from fleet.command import image_check
from fleet.command.image_check import (
    Findings,
    ImageShare,
    check_share,
    find_bad_images,
    first_difference,
    listing_of,
    settle,
    without_images,
)
from fleet.command.options import Options, parse_options
from fleet.errors import UsageError
from tests.conftest import save_picture, save_truncated
from utils.images import checked_sha256

pytestmark = pytest.mark.fast

COLORS = ("black", "blue", "green", "grey", "orange", "pink", "red", "white")
ALONE: dict[str, str] = {}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight pictures, black_0 to white_7."""
    folder = tmp_path / "pictures"
    for number, color in enumerate(COLORS):
        save_picture(folder / f"{color}_{number}.png", color)
    return folder


def options_of(data: Path, *flags: str) -> Options:
    return parse_options(["--data_root", str(data), *flags])


def env_of(data: Path) -> PickImageEnv:
    return PickImageEnv(data)


def shares_of(data: Path, stride: int) -> list[ImageShare]:
    """What the processes of one machine find."""
    return [check_share(env_of(data).images, data, first, stride) for first in range(stride)]


def found_in(env, options: Options, variables, beginning=None):
    return find_bad_images(env, options, options.model_id, variables, beginning)


def refusal_of(check, *arguments) -> str:
    with pytest.raises(UsageError) as refusal:
        check(*arguments)
    return str(refusal.value)


# --- stop and skip ----------------------------------------------------------------------------------------------------


def test_one_bad_image_stops_the_run_with_the_reason_and_the_remedy(data: Path) -> None:
    save_picture(data / "red_6.png", size=(400, 2))
    assert refusal_of(found_in, env_of(data), options_of(data), ALONE) == (
        f"1 of 8 images in {data} cannot be used: red_6.png is 400x2 pixels, narrower than 1:200, which Qwen2.5-VL "
        "refuses; replace or remove what is bad, or pass --bad_images skip to leave it out"
    )


def test_the_first_five_of_many_are_named(data: Path) -> None:
    for color in COLORS[:7]:
        (next(data.glob(f"{color}_*"))).write_text("")
    message = refusal_of(found_in, env_of(data), options_of(data), ALONE)
    assert message == (
        f"7 of 8 images in {data} cannot be used: black_0.png is empty; blue_1.png is empty; green_2.png is empty; "
        "grey_3.png is empty; orange_4.png is empty; and 2 more; replace or remove what is bad, or pass --bad_images "
        "skip to leave it out"
    )


def test_skip_leaves_bad_images_out_and_says_so(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "green_2.png").write_text("")
    (data / "white_7.png").write_text("")
    with caplog.at_level(logging.INFO, logger="fleet"):
        found = found_in(env_of(data), options_of(data, "--bad_images", "skip"), ALONE)
    assert found.data is not None and found.data.skipped_images == ("green_2.png", "white_7.png")
    assert [record.message for record in caplog.records] == [
        f"left out: 2 of 8 images in {data} cannot be used: green_2.png is empty; white_7.png is empty\n"
    ]
    for name in ("green_2.png", "white_7.png"):
        (data / name).unlink()
    rest = env_of(data)
    assert [found.data.env.episode(i) for i in range(50)] == [rest.episode(i) for i in range(50)]


def test_skip_with_nothing_bad_changes_nothing_and_says_nothing(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fleet"):
        skip = found_in(env_of(data), options_of(data, "--bad_images", "skip"), ALONE).data
    stop = found_in(env_of(data), options_of(data), ALONE).data
    assert skip is not None and stop is not None and caplog.records == []
    assert (skip.skipped_images, skip.data_digest) == ((), stop.data_digest)
    assert skip.env.episode(3) == stop.env.episode(3) == env_of(data).episode(3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--candidates_per_episode", "7"], "has 6 images, but candidates_per_episode=7"),
        (["--candidates_per_episode", "4", "--fixed_correct_index", "none"], "has 3 different labels"),
    ],
)
def test_what_is_left_must_be_enough(tmp_path: Path, flags: list[str], words: str) -> None:
    for color in ("black", "blue", "green"):
        for number in range(2):
            save_picture(tmp_path / f"{color}_{number}.png", color)
    for name in ("red_0.png", "white_0.png"):
        (tmp_path / name).write_text("")
    options = options_of(tmp_path, "--bad_images", "skip", *flags)
    env = PickImageEnv(tmp_path, options.candidates_per_episode, options.fixed_correct_index)
    message = refusal_of(found_in, env, options, ALONE)
    assert (
        f"2 of 8 images in {tmp_path} cannot be used: red_0.png is empty; white_0.png is empty; left out, " in message
    )
    assert words in message


# --- many processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 11])
def test_shares_of_any_number_of_processes_amount_to_the_same(data: Path, stride: int) -> None:
    save_truncated(data / "blue_1.png")
    save_truncated(data / "pink_5.png")
    options = options_of(data, "--bad_images", "skip")
    alone = found_in(env_of(data), options, ALONE).data
    assert alone is not None
    settled = settle(options, env_of(data), shares_of(data, stride))
    assert (settled.data_digest, settled.skipped_images) == (alone.data_digest, ("blue_1.png", "pink_5.png"))
    assert settled.env.episode(9) == alone.env.episode(9)


def test_each_image_is_read_by_one_process_of_a_machine(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Path) -> bytes:
        read.append(path.name)
        return bytes(32)

    monkeypatch.setattr(image_check, "checked_sha256", reading)
    variables = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
    for rank in range(3):
        found = found_in(env_of(data), options_of(data), variables | {"LOCAL_RANK": str(rank)})
        assert found.data is None, "what the others find is not known yet"
    assert read == [
        "black_0.png", "grey_3.png", "red_6.png",
        "blue_1.png", "orange_4.png", "white_7.png",
        "green_2.png", "pink_5.png",
    ]  # fmt: skip


def test_a_process_alone_reads_everything_whatever_its_local_rank_says(data: Path) -> None:
    found = found_in(env_of(data), options_of(data), {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert found.share is not None and list(found.share.sha256s) == list(range(8))


def test_an_image_that_is_bad_on_one_machine_is_left_out_on_all(data: Path, tmp_path: Path) -> None:
    first = shares_of(data, 2)
    save_truncated(data / "red_6.png")
    second = shares_of(data, 2)
    settled = settle(options_of(data, "--bad_images", "skip"), env_of(data), first + second)
    assert settled.skipped_images == ("red_6.png",)
    assert "1 of 8 images" in refusal_of(settle, options_of(data), env_of(data), first + second)


def test_machines_with_another_file_are_told_which(data: Path) -> None:
    first = shares_of(data, 2)
    save_picture(data / "red_6.png", "white")
    save_picture(data / "white_7.png", "red")
    message = refusal_of(settle, options_of(data), env_of(data), first + shares_of(data, 2))
    assert message == (
        "the machines hold different files: red_6.png is another one for process 2 than for process 0; give every "
        "machine the same data folder"
    )


def test_machines_with_as_many_processes_as_they_like(data: Path) -> None:
    settled = settle(options_of(data), env_of(data), shares_of(data, 3) + shares_of(data, 1))
    assert settled.data_digest == settle(options_of(data), env_of(data), shares_of(data, 1)).data_digest


def test_an_image_that_no_process_reads_is_noticed(data: Path) -> None:
    twice_the_first = [shares_of(data, 2)[0]] * 2
    assert "no process was to check blue_1.png" in refusal_of(settle, options_of(data), env_of(data), twice_the_first)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([("a.png", "a")], "b.png is there for process 0, not for process 1"),
        ([("a.png", "a"), ("b.png", "b"), ("c\n.png", "c")], r"c\n.png is there for process 1, not for process 0"),
        ([("a.png", "a"), ("b.png", "x")], "b.png is labelled 'b' for process 0, 'x' for process 1"),
        ([("b.png", "b"), ("a.png", "a")], "process 1 has the same images in another order"),
    ],
)
def test_the_first_difference_of_two_folders_is_named(other: list[tuple[str, str]], words: str) -> None:
    assert first_difference([[("a.png", "a"), ("b.png", "b")], other]) == words


# --- the digest -------------------------------------------------------------------------------------------------------


def digest_of(data: Path, *flags: str) -> str:
    found = found_in(env_of(data), options_of(data, *flags), ALONE)
    assert found.data is not None and found.data.data_digest is not None
    return found.data.data_digest


def test_the_digest_is_of_names_labels_and_bytes(tmp_path: Path) -> None:
    expected = hashlib.sha256()
    for color in ("blue", "green", "red", "white"):
        content = save_picture(tmp_path / f"{color}_1.png", color).read_bytes()
        expected.update(f"{color}_1.png\0{color}\0".encode() + hashlib.sha256(content).digest())
    assert digest_of(tmp_path) == expected.hexdigest()


def test_the_digest_is_of_the_folder_not_of_where_it_lies(data: Path, tmp_path: Path) -> None:
    before = digest_of(data)
    assert digest_of(data.rename(tmp_path / "moved")) == before


def test_the_digest_changes_with_what_is_drawn_from(data: Path) -> None:
    digests = [digest_of(data)]
    content = (data / "red_6.png").read_bytes()
    (data / "red_6.png").write_bytes(content + b"\n")
    digests.append(digest_of(data))
    (data / "red_6.png").write_bytes(content)
    assert digest_of(data) == digests[0]
    (data / "red_6.png").rename(data / "rose_6.png")
    digests.append(digest_of(data))
    (data / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{p.name},x\n" for p in sorted(data.glob("*.png")))
    )
    digests.append(digest_of(data))
    assert len(set(digests)) == 4


def test_bad_images_that_are_left_out_are_not_in_the_digest(data: Path) -> None:
    (data / "red_6.png").write_text("")
    left_out = digest_of(data, "--bad_images", "skip")
    (data / "red_6.png").unlink()
    assert digest_of(data) == left_out


# --- environments of one's own ----------------------------------------------------------------------------------------


class Wrapping(PickImageTask):
    """An environment that keeps images as PickImageEnv does, and has no way to leave some out."""

    def __init__(self, data: Path):
        self.env = PickImageEnv(data)
        self.images = self.env.images

    def episode(self, index: int) -> Episode:
        return self.env.episode(index)

    def prompt_messages(self, episode: Episode) -> list[dict[str, object]]:
        return self.env.prompt_messages(episode)


class Deriving(PickImageEnv):
    """Draws from a list of its own, which it derives anew when images are left out."""

    def __init__(self, data: Path):
        super().__init__(data)
        self.names = [image.path.name for image in self.images]

    def without_images(self, paths):
        narrowed = super().without_images(paths)
        narrowed.names = [image.path.name for image in narrowed.images]
        return narrowed


def test_environment_that_cannot_leave_images_out_says_so(data: Path) -> None:
    options = options_of(data, "--bad_images", "skip", "--env", "mine.py:Wrapping")
    found_in(Wrapping(data), options, ALONE)
    (data / "red_6.png").write_text("")
    message = refusal_of(found_in, Wrapping(data), options, ALONE)
    assert "red_6.png is empty; left out, env=mine.py:Wrapping has no method without_images(paths)" in message
    stop = dataclasses.replace(options, bad_images="stop")
    assert "red_6.png is empty; replace or remove" in refusal_of(found_in, Wrapping(data), stop, ALONE)


def test_environment_that_can_is_asked_to(data: Path) -> None:
    (data / "red_6.png").write_text("")
    found = found_in(Deriving(data), options_of(data, "--bad_images", "skip"), ALONE)
    assert found.data is not None and isinstance(found.data.env, Deriving)
    assert len(found.data.env.names) == 7 and "red_6.png" not in found.data.env.names


def test_environment_without_a_list_of_images_has_nothing_to_check(data: Path) -> None:
    for images in (None, [data / "red_6.png"], "pictures", 7):
        env = Wrapping(data)
        env.images = images  # type: ignore[assignment]
        found = found_in(env, options_of(data), ALONE)
        assert found.share is None
        assert found.data == image_check.RunData(env, None, ())
        assert settle(options_of(data), env, [None, None]) == image_check.RunData(env)
    several = found_in(env, options_of(data), {"WORLD_SIZE": "2"})
    assert several == Findings(env, None, None)


def test_narrowed_environment_leaves_the_first_one_as_it_was(data: Path) -> None:
    env = env_of(data)
    before = env.episode(5)
    narrowed = without_images(env, ["red_6.png"], options_of(data))
    assert len(env.images) == 8 and env.episode(5) == before
    assert listing_of(narrowed, data) == [entry for entry in listing_of(env, data) if entry[0] != "red_6.png"]


def test_check_of_a_share_keeps_the_digests_by_the_place_of_its_images(data: Path) -> None:
    save_truncated(data / "orange_4.png")
    share = check_share(env_of(data).images, data, 1, 3)
    read = {1: checked_sha256(data / "blue_1.png"), 7: checked_sha256(data / "white_7.png")}
    assert share.sha256s == read and share.problems.keys() == {4}
