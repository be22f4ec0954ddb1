"""Photos of phones: opened as other pictures are where pillow-heif is installed, else named with the remedy."""

from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from tests.conftest import save_picture
from utils import image_folders, images
from utils.image_folders import list_folder
from utils.images import BadImage, checked_sha256, open_image

pytestmark = pytest.mark.fast


def save_heic(path: Path, orientation: int = 1) -> Path:
    """A picture of 64 x 48 whose left half is red and whose right half is blue, held as `orientation` says."""
    picture = Image.new("RGB", (64, 48), "red")
    picture.paste("blue", (32, 0, 64, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow_heif.from_pillow(picture).save(path, quality=95, exif=exif.tobytes())
    return path


def test_a_photo_opens_upright_and_as_it_was(tmp_path: Path) -> None:
    picture = np.asarray(open_image(save_heic(tmp_path / "a.heic"))).astype(int)
    assert picture.shape == (48, 64, 3)
    # lossy, and the edge is blurred
    assert np.abs(picture[:, :28] - (255, 0, 0)).max() < 12 and np.abs(picture[:, 36:] - (0, 0, 255)).max() < 12
    # 6: turned by a quarter to the right, so that what was left is on top
    turned = np.asarray(open_image(save_heic(tmp_path / "b.heic", orientation=6))).astype(int)
    assert turned.shape == (64, 48, 3)
    assert np.abs(turned[:28] - (255, 0, 0)).max() < 12 and np.abs(turned[36:] - (0, 0, 255)).max() < 12


def test_photos_are_listed_with_their_labels(tmp_path: Path) -> None:
    save_heic(tmp_path / "red_barn_1.HEIC")
    save_picture(tmp_path / "old_mill.png")
    folder = list_folder(tmp_path)
    assert [(image.path.name, image.label) for image in folder.images] == [
        ("old_mill.png", "old mill"), ("red_barn_1.HEIC", "red barn"),
    ]  # fmt: skip
    assert folder.notes == () and len(checked_sha256(folder.images[1].path)) == 32


def test_a_broken_photo_is_a_bad_image(tmp_path: Path) -> None:
    path = save_heic(tmp_path / "a.heic")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadImage, match="cannot be decoded|is not in a format"):
        open_image(path)


def test_without_the_package_they_are_passed_over_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(tmp_path / "a.png")
    path = save_heic(tmp_path / "b.heic")
    monkeypatch.setattr(image_folders, "is_heif_read", lambda: False)
    monkeypatch.setattr(images, "heif_formats", lambda: ())
    (note,) = list_folder(tmp_path).notes
    assert note == (
        "passed over 1 file not read as images: 1 .heic; to have their images drawn from: pip install pillow-heif to "
        "read .heic"
    )
    with pytest.raises(BadImage, match="is not in a format that is read"):
        open_image(path)
