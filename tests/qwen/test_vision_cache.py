"""The cache of image features: what it holds, what it forgets, whom it refuses, and that pictures are told apart."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image

from fleet.qwen.vision_cache import VisionCache, vision_is_frozen
from model_utils import make_lora_config
from tests.helpers import toy_model
from utils.images import image_digest


class CountingEncoder:
    """Features that name their picture; remembers which it was asked for."""

    def __init__(self, digests: list[bytes]):
        self.digests = digests
        self.places: list[int] = []

    def __call__(self, place: int) -> torch.Tensor:
        self.places.append(place)
        return torch.full((4, 8), float(self.digests[place][0]))


def ask(cache: VisionCache, names: bytes, num_calls: int = 0) -> tuple[list[float], list[int]]:
    """The features that come of it, and the places that are encoded for them."""
    digests = [bytes([name]) for name in names]
    encoder = CountingEncoder(digests)
    features = cache.features_of(digests, encoder, num_calls=num_calls)
    return [float(image[0, 0]) for image in features], encoder.places


def frozen_cache(max_bytes: int = 10**6) -> VisionCache:
    return VisionCache(toy_model(freeze=("tower", "merger")), max_bytes)


def test_an_image_is_encoded_once() -> None:
    cache = frozen_cache()
    assert ask(cache, b"aba") == ([97.0, 98.0, 97.0], [0, 1])
    assert ask(cache, b"bca") == ([98.0, 99.0, 97.0], [1])
    assert ask(cache, b"cab") == ([99.0, 97.0, 98.0], [])


def test_the_encoder_runs_as_often_as_another_ranks_must() -> None:
    cache = frozen_cache()
    ask(cache, b"ab")
    assert ask(cache, b"ba", num_calls=2) == ([98.0, 97.0], [0, 0])
    assert ask(cache, b"bca", num_calls=3) == ([98.0, 99.0, 97.0], [1, 0, 0])
    assert ask(cache, b"de", num_calls=2) == ([100.0, 101.0], [0, 1])


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    cache = frozen_cache(max_bytes=2 * 4 * 8 * 4)  # two images of 4 x 8 floats
    ask(cache, b"ab")
    ask(cache, b"a")
    ask(cache, b"c")
    assert cache.num_bytes == 256
    assert ask(cache, b"a")[1] == [] and ask(cache, b"b")[1] == [0]


def test_a_batch_larger_than_the_cache_still_gets_its_features() -> None:
    cache = frozen_cache(max_bytes=200)
    assert ask(cache, b"abcabc") == ([97.0, 98.0, 99.0] * 2, [0, 1, 2])
    assert cache.num_bytes <= 200


def models_that_train_vision() -> dict[str, Any]:
    only_merger = toy_model(freeze=("tower", "merger"))
    only_merger.model.visual.merger.requires_grad_(True)
    lora = make_lora_config(rank=2)
    lora.target_modules = r".*visual.*\.proj"
    return {"all": toy_model(), "merger": only_merger, "adapter": get_peft_model(toy_model(), lora)}


@pytest.mark.parametrize("part", ["all", "merger", "adapter"])
def test_a_model_whose_features_change_is_refused(part: str) -> None:
    model = models_that_train_vision()[part]
    assert not vision_is_frozen(model)
    with pytest.raises(ValueError, match="cannot be kept while the vision tower, its merger or an adapter in them"):
        VisionCache(model, 10**6)


def test_the_usual_adapter_leaves_vision_frozen() -> None:
    assert vision_is_frozen(get_peft_model(toy_model(), make_lora_config()))


def test_pictures_are_told_apart_by_their_pixels_and_shape() -> None:
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")
    pictures = [red, blue, Image.new("RGB", (2, 4), "red"), Image.new("L", (4, 2)), Image.new("L", (12, 2))]
    digests = [image_digest(picture) for picture in pictures]
    assert len(set(digests)) == 5 and {len(digest) for digest in digests} == {16}
    assert image_digest(red.copy()) == digests[0]
