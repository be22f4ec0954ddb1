"""The vision tower's windows attended together, against its own loop: features, gradients, and the number of calls."""

from typing import Any

import pytest
import torch

from fleet.qwen import vision_windows
from tests.helpers import toy_model

GRIDS = {
    "one image": [[1, 16, 16]],
    "four alike": [[1, 16, 16]] * 4,
    "of all sizes": [[1, 16, 16], [1, 20, 12], [1, 32, 28], [1, 10, 6], [1, 2, 2], [1, 16, 16]],
}


def features_and_gradients(model: Any, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = pixels.clone().requires_grad_()
    features = torch.cat(model.model.get_image_features(pixels, grids, return_dict=True).pooler_output)
    (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum().backward()
    assert pixels.grad is not None
    return features.detach(), pixels.grad


def test_the_windows_are_of_four_patches_on_the_toy() -> None:
    vision = toy_model().config.vision_config
    assert vision.window_size // vision.patch_size == 4


@pytest.mark.parametrize("name", GRIDS)
def test_windows_together_give_what_each_gives_alone(name: str) -> None:
    torch.manual_seed(0)
    grids = torch.tensor(GRIDS[name])
    pixels = torch.randn(int(grids.prod(dim=1).sum()), 3 * 2 * 14 * 14)
    loop, together = toy_model(vision_attn_implementation="sdpa"), toy_model()
    assert together.model.visual.config._attn_implementation == vision_windows.NAME
    assert together.model.language_model.config._attn_implementation == "sdpa"
    for found, expected in zip(
        features_and_gradients(together, pixels, grids), features_and_gradients(loop, pixels, grids), strict=True
    ):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("name", "is_even"), [("one image", True), ("four alike", True), ("of all sizes", False)])
def test_a_layer_takes_one_call_for_each_length(name: str, is_even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, grids = toy_model(), torch.tensor(GRIDS[name])
    lengths: list[int] = []

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(vision_windows, "scaled_dot_product_attention", attention)
    model.model.get_image_features(torch.randn(int(grids.prod(dim=1).sum()), 1176), grids)
    # one call for each length that there is: a layer of windows has those of windows, another those of images
    full, windows = set(grids.prod(dim=1).tolist()), set(window_lengths(grids.tolist(), side=4))
    depth, num_full = model.config.vision_config.depth, len(model.config.vision_config.fullatt_block_indexes)
    assert len(lengths) == num_full * len(full) + (depth - num_full) * len(windows)
    assert (len(lengths) == depth) is is_even


def window_lengths(grids: list[list[int]], side: int) -> list[int]:
    """The patches of each window, cut at the images' edges. side: of a whole window, in patches."""
    return [
        min(side, height - top) * min(side, width - left)
        for _, height, width in grids
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def test_bounds_are_read_once_a_pass_and_never_taken_for_others() -> None:
    latest = vision_windows._LatestBounds(size=2)
    bounds = [torch.tensor([0, 2, 4]), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2, 5])]
    found = [latest.windows_of(these) for these in (*bounds, *bounds)]
    assert [[length for length, _ in windows] for windows in found] == [[2], [1, 2], [1, 3]] * 2
    assert found[0][0][1] is None
    patches = [[places.tolist() for _, places in windows if places is not None] for windows in found[1:3]]
    assert patches == [[[2], [0, 1]], [[0, 1], [2, 3, 4]]]
    assert latest.windows_of(bounds[2]) is latest.windows_of(bounds[2])
    # another tensor in the place of one that is gone is another one
    del bounds[2]
    assert [length for length, _ in latest.windows_of(torch.tensor([0, 4, 8]))] == [4]
