"""Lengths of prompts against the real processor, on pictures of unequal sizes."""

from pathlib import Path

import pytest
from PIL import Image

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.planning.lengths import Grid, lengths_of
from tests.helpers import toy_config, toy_processor

SIZES = ((56, 56), (112, 56), (300, 90), (90, 300), (28, 28), (57, 113))


@pytest.fixture
def env(tmp_path: Path) -> PickImageEnv:
    for name, size in zip("abcdef", SIZES, strict=True):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    # a photo that lies on its side, upright by its EXIF alone
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (280, 84), "blue").save(tmp_path / "g.jpg", exif=exif)
    return PickImageEnv(tmp_path, 3, 0)


@pytest.mark.parametrize("max_pixels", [56 * 56, 112 * 112])
def test_tokens_are_those_of_the_real_processor(env: PickImageEnv, max_pixels: int) -> None:
    processor = toy_processor()
    size = processor.image_processor.size
    grid = Grid(toy_config().vision_config, max_pixels, (size["shortest_edge"], size["longest_edge"]))
    dataset, collate = RepeatableEpisodeDataset(env, max_pixels), VLMDataCollator(processor, 1)
    batches = [collate([dataset[number]]) for number in range(40)]
    grids = [row for batch in batches for row in (batch["image_grid_thw"].prod(dim=1) // 4).tolist()]
    found = lengths_of(env, grid, processor)
    assert found is not None and not found.is_estimate
    assert (found.image_tokens[0], found.image_tokens[2]) == (min(grids), max(grids))
    text = batches[0]["input_ids"].shape[1] - int((batches[0]["mm_token_type_ids"] == 1).sum())
    assert found.longest_prompt == text + 3 * max(grids)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= found.longest_prompt
    assert found.patches == 3 * max(grids) * 4


def test_without_a_tokenizer_lengths_are_not_small(env: PickImageEnv) -> None:
    grid = Grid(toy_config().vision_config, 56 * 56, (56 * 56, 10**7))
    estimated = lengths_of(env, grid, None)
    assert estimated is not None and estimated.is_estimate
    # about 150 tokens of text in Qwen's tokenizer, as it has four characters a token
    assert 120 < estimated.longest_prompt - 3 * 4 < 300
