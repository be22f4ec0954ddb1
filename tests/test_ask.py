"""fleet/ask.py: one question to one model, from the command line."""

from pathlib import Path

import pytest

from fleet import ask
from fleet.errors import UsageError
from tests.helpers import REPOSITORY, toy_path
from utils.tool_calls import make_tool_call_str

TOY_IMAGES = REPOSITORY / "toy_images"
PAIR = [str(TOY_IMAGES / "red_circle.png"), str(TOY_IMAGES / "blue_square.png")]


def test_a_model_answers_with_a_call_and_the_picture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    ask.main(["--model_id", toy_path(), "--images", *PAIR, "--instruction", "Pick the red circle."])
    first, second, instruction, *answer, picked = capsys.readouterr().out.splitlines()
    assert [first, second, instruction] == [f"0: {PAIR[0]}", f"1: {PAIR[1]}", "Pick the red circle."]
    for index, path in enumerate(PAIR):
        if "\n".join(answer) == make_tool_call_str(index):
            assert picked == f"picked {index}: {path}"
            break
    else:
        raise AssertionError(f"the toy answers with one of two calls, not {answer}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (make_tool_call_str(1), f"picked 1: {PAIR[1]}"),
        (make_tool_call_str(2), "picked 2, but there are 2 pictures"),
        (make_tool_call_str(-1), "picked -1, but there are 2 pictures"),
        ("the red one", "picked nothing: no_call"),
    ],
)
def test_an_answer_is_described_by_what_it_picks(text: str, wanted: str) -> None:
    _, question, _ = ask.parse_question(["--images", *PAIR])
    assert ask.describe_answer(question, text) == wanted


def test_a_folder_is_shown_in_the_order_of_its_names() -> None:
    _, question, temperature = ask.parse_question(["--images", str(TOY_IMAGES), "--temperature", "0.5"])
    assert question.images == tuple(sorted(TOY_IMAGES.glob("*.png")))
    assert (question.instruction, temperature) == ("Pick the correct image.", 0.5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "images is missing; pass --images"),
        (["--images", "no-such-folder"], "no-such-folder does not exist"),
        (["--images", PAIR[0]], "got 1 from"),
        (["--images", *PAIR * 17], "got 34 from"),
        (["--images", str(TOY_IMAGES), PAIR[0]], "is a folder beside other paths"),
        (["--images", *PAIR, "--temperature", "-1"], "temperature=-1.0, but it must be at least 0"),
        (["--images", *PAIR, "--model_id", "no/such/folder"], "model_id=no/such/folder is no folder"),
        (["--images", *PAIR, "--image_max_pixels", "1"], "image_max_pixels=1, but it must be at least 784"),
        (["--image", "x"], "unknown flag --image, did you mean --images"),
    ],
)
def test_what_cannot_be_asked_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        ask.parse_question(flags)
    assert words in str(refusal.value)


def test_a_model_that_goes_by_names_must_be_told_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="instruction is missing"):
        ask.parse_question(["--images", *PAIR, "--model_id", "Qwen/Qwen2.5-VL-3B-Instruct"])


def test_a_picture_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"broken\.png"):
        ask.main(["--model_id", toy_path(), "--images", PAIR[0], str(broken), "--instruction", "Pick the red circle."])
