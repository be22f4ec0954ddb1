"""The toy says of pictures that it has not been taught that it cannot know them."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.command.evaluate_options import parse_evaluate_options
from fleet.run.model_setup import say_what_the_toy_has_not_seen, untaught
from fleet.toy.model import TOY_DATA_ROOT
from tests.conftest import save_picture

TAUGHT = sorted(TOY_DATA_ROOT.glob("*.png"))
LOOKS = parse_evaluate_options(["--fixed_correct_index", "none"])


def test_a_copy_under_another_name_is_known_and_a_changed_file_is_not(tmp_path: Path) -> None:
    copy, changed, other = tmp_path / "1.png", tmp_path / "2.png", save_picture(tmp_path / "red_circle.png")
    shutil.copy(TAUGHT[0], copy)
    content = bytearray(TAUGHT[1].read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert untaught([*TAUGHT, copy]) == []
    assert untaught([copy, changed, other]) == [changed, other]
    assert untaught([tmp_path / "gone.png", other]) == [other]


def test_it_is_said_where_sight_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = [save_picture(tmp_path / "red_circle.png"), TAUGHT[0]]
    with caplog.at_level(logging.INFO, logger="fleet"):
        say_what_the_toy_has_not_seen("toy", LOOKS, TAUGHT)
        # what is always right needs no eyes; nor has Fleet taught another model
        say_what_the_toy_has_not_seen("toy", replace(LOOKS, fixed_correct_index=0), own)
        say_what_the_toy_has_not_seen("Qwen/Qwen2.5-VL-3B-Instruct", LOOKS, own)
        assert caplog.messages == []
        say_what_the_toy_has_not_seen("toy", LOOKS, own)
    (message,) = caplog.messages
    assert "and not 1 of these 2: it cannot know them by name" in message
