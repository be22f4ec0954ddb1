"""Shared by all tests: what the fast group skips, the fuzzing budget, the canonical call, and a folder of pictures."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

_FUZZ_EXAMPLES = os.environ.get("FLEET_FUZZ_EXAMPLES")
# the everyday run tries the same few examples each time; FLEET_FUZZ_EXAMPLES=100000 goes looking for new ones
settings.register_profile(
    "fleet",
    max_examples=int(_FUZZ_EXAMPLES or 200),
    deadline=None,
    derandomize=_FUZZ_EXAMPLES is None,
    database=None,
)
settings.load_profile("fleet")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m fast`, a file without that mark is not even imported: torch alone takes longer than the fast group."""
    is_test_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr == "fast" and is_test_file:
        return "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8") or None
    return None


PICTURES = {
    "black_cross": "black",
    "blue_square": "blue",
    "green_triangle": "green",
    "orange_heart": "orange",
    "red_circle": "red",
    "yellow_star": "yellow",
}


def call_text(index: object) -> str:
    """The canonical call, written out here so that no test takes it from the code that it tests."""
    return f'<tool_call>\n{{"name": "pick_image", "arguments": {{"index": {index}}}}}\n</tool_call>'


def save_picture(path: Path, color: str = "red", size: tuple[int, int] = (4, 4)) -> Path:
    """Writes one plain picture, in the format that its suffix names, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder of six pictures with six labels: black cross, blue square, ..., yellow star."""
    for name, color in PICTURES.items():
        save_picture(tmp_path / "pictures" / f"{name}.png", color)
    return tmp_path / "pictures"
