"""What each control changes of an episode, and what it leaves."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from environment import Episode, PickImageEnv
from fleet.controls import blanked, redrawn, with_order_permuted, with_picture_swapped, with_pictures_redrawn
from tests.conftest import save_picture

pytestmark = pytest.mark.fast


@pytest.fixture
def env(picture_folder: Path) -> PickImageEnv:
    return PickImageEnv(picture_folder, 4, None, seed=5)


def label_at(episode: Episode, index: int) -> tuple[str, str]:
    image = episode.images[index]
    assert isinstance(image, Path)
    return episode.labels[index], image.stem.replace("_", " ")


def test_blank_pictures_have_the_size_of_theirs_and_nothing_on_them(tmp_path: Path) -> None:
    paths = (save_picture(tmp_path / "a.png", "red", (6, 9)), save_picture(tmp_path / "b.png", "blue", (12, 4)))
    episode = Episode(paths, ({"role": "user", "content": []},), 1, ("a", "b"), "b", 0)
    blank = blanked(episode)
    assert [image.size for image in blank.images if isinstance(image, Image.Image)] == [(6, 9), (12, 4)]
    assert {
        colour for image in blank.images if isinstance(image, Image.Image) for _, colour in image.getcolors() or ()
    } == {(128, 128, 128)}
    assert (blank.correct_index, blank.labels, blank.messages) == (1, ("a", "b"), episode.messages)


def test_a_swap_moves_the_chosen_picture_and_one_other(env: PickImageEnv) -> None:
    partners = set()
    for number in range(40):
        episode = env.episode(number)
        index = number % 4
        swapped, place = with_picture_swapped(episode, index, random.Random(number)) or pytest.fail("no swap")
        moved = [i for i in range(4) if swapped.images[i] != episode.images[i]]
        assert sorted(moved) == sorted([index, place]) and place != index
        assert swapped.images[place] == episode.images[index] and swapped.images[index] == episode.images[place]
        assert all(label_at(swapped, i)[0] == label_at(swapped, i)[1] for i in range(4))
        assert swapped.labels[swapped.correct_index or 0] == episode.target, "the target is still the answer"
        assert swapped.messages == episode.messages
        partners.add((index, place))
    assert len(partners) == 12, "every other place comes up"


def test_a_permutation_brings_another_picture_to_the_chosen_place(env: PickImageEnv) -> None:
    orders = set()
    for number in range(60):
        episode = env.episode(number)
        index = number % 4
        permuted = with_order_permuted(episode, index, random.Random(number)) or pytest.fail("no permutation")
        assert permuted.images[index] != episode.images[index]
        assert sorted(map(str, permuted.images)) == sorted(map(str, episode.images))
        assert all(label_at(permuted, i)[0] == label_at(permuted, i)[1] for i in range(4))
        assert permuted.labels[permuted.correct_index or 0] == episode.target
        assert permuted.messages == episode.messages, "new ones are the environment's to make"
        orders.add(tuple(episode.images.index(image) for image in permuted.images))
    assert len(orders) > 15, "the others are shuffled too"


def test_the_same_picture_everywhere_can_neither_be_swapped_nor_permuted(env: PickImageEnv) -> None:
    episode = env.episode(0)
    same = Episode(episode.images[:1] * 4, episode.messages, 2, ("x",) * 4, None, 0)
    assert with_picture_swapped(same, 2, random.Random(0)) is None
    assert with_order_permuted(same, 2, random.Random(0)) is None
    # with one other picture, it is the only one to swap with
    odd = Episode((*episode.images[:1] * 3, episode.images[1]), episode.messages, 3, ("x",) * 4, None, 0)
    swapped, place = with_picture_swapped(odd, 0, random.Random(0)) or pytest.fail("no swap")
    assert (place, swapped.correct_index) == (3, 0)


def test_redrawing_moves_scales_and_shades_within_its_limits() -> None:
    picture = Image.new("RGB", (100, 100), (200, 220, 240))
    picture.paste((40, 20, 10), (40, 40, 60, 60))
    sides, centres, shades = [], [], []
    for seed in range(200):
        drawn = redrawn(picture, random.Random(seed))
        assert drawn.size == (100, 100) and drawn.mode == "RGB"
        corner = drawn.getpixel((0, 0))
        assert isinstance(corner, tuple)
        shades.append(corner[1] / 220)
        background = Image.new("RGB", drawn.size, corner)
        change = ImageChops.difference(drawn, background).convert("L").point([0] * 60 + [255] * 196)
        left, top, right, bottom = change.getbbox() or pytest.fail("nothing is drawn")
        sides.append(right - left)
        centres += [(left + right) / 2, (top + bottom) / 2]
    assert 14 <= min(sides) <= 16 and 24 <= max(sides) <= 27, "20 pixels, a quarter less or more"
    assert 35 <= min(centres) <= 38 and 62 <= max(centres) <= 65, "50, 14 to either side"
    assert 0.79 <= min(shades) <= 0.83 and max(shades) <= 255 / 220 + 0.01
    assert redrawn(picture, random.Random(7)).tobytes() == redrawn(picture, random.Random(7)).tobytes()


def test_redrawn_pictures_keep_their_order_and_answer(env: PickImageEnv) -> None:
    episode = env.episode(3)
    changed = with_pictures_redrawn(episode, random.Random(0))
    assert (changed.correct_index, changed.labels, changed.messages) == (
        episode.correct_index,
        episode.labels,
        episode.messages,
    )
    assert all(isinstance(image, Image.Image) for image in changed.images)
