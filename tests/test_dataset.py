"""Rows and batches: random access, the plain processor as oracle, and each episode encoded once."""

from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from tests.helpers import toy_dataset, toy_processor
from toy_model import TOY_DATA_ROOT

TENSORS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def rows_of(*indices: int, dataset: RepeatableEpisodeDataset | None = None) -> list[dict[str, Any]]:
    chosen = dataset or toy_dataset()
    return [chosen[index] for index in indices]


def test_item_i_is_episode_i_however_it_is_read() -> None:
    dataset, env = toy_dataset(seed=3), PickImageEnv(TOY_DATA_ROOT, 4, 0, seed=3)
    hf_dataset = dataset.as_hf_dataset(1000)
    for index in (0, 1, 999):
        assert dataset[index]["episode"] == hf_dataset[index]["episode"] == env.episode(index)
    assert [row["episode"] for row in islice(dataset, 3)] == [env.episode(index) for index in range(3)]


def test_a_row_has_what_trls_own_trainer_reads() -> None:
    hf_dataset = toy_dataset().as_hf_dataset(8)
    assert isinstance(hf_dataset, Dataset) and len(hf_dataset) == 8
    row = hf_dataset[5]
    assert [image.mode for image in row["images"]] == ["RGB"] * 4
    assert sum(part["type"] == "image" for message in row["prompt"] for part in message["content"]) == 4
    assert (row["correct_index"], row["num_candidates"], row["episode_index"]) == (0, 4, 5)


def test_reading_far_ahead_draws_only_what_is_read() -> None:
    drawn: list[int] = []

    class CountingEnv(PickImageEnv):
        def episode(self, index: int) -> Any:
            drawn.append(index)
            return super().episode(index)

    dataset = RepeatableEpisodeDataset(CountingEnv(TOY_DATA_ROOT), 56 * 56)
    hf_dataset = dataset.as_hf_dataset(1_000_000)
    assert drawn == []
    # a group's rows, twice, as TRL reads a batch once for every step that reuses it
    for _ in range(2):
        hf_dataset.__getitems__([900_000] * 4 + [900_001] * 4)
    assert drawn == [900_000, 900_001]


def test_images_are_shrunk_to_the_budget_before_anyone_sees_them() -> None:
    dataset = RepeatableEpisodeDataset(PickImageEnv(TOY_DATA_ROOT), max_pixels=40 * 40)
    assert [image.size for image in dataset[0]["images"]] == [(40, 40)] * 4


@pytest.mark.parametrize("candidates", [2, 5])
def test_batch_equals_the_plain_processor(candidates: int) -> None:
    dataset, processor = toy_dataset(candidates, fixed_correct_index=None), toy_processor()
    batch: Any = VLMDataCollator(processor, 3)(rows_of(*[4] * 3, *[7] * 3, dataset=dataset))
    # an oracle of its own: the chat template in TRL's form, pictures inside the messages
    conversations = []
    for row in rows_of(4, 7, dataset=dataset):
        pictures = iter(row["images"])
        conversations.append([
            {**message, "content": [
                {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ]}
            for message in row["prompt"]
        ])  # fmt: skip
    plain = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    for name in TENSORS:
        assert torch.equal(batch[name], plain[name]), name
    assert batch["num_images"] == [candidates] * 2 and batch["group_size"] == 3
    assert [episode.seed for episode in batch["episodes"]] == [0, 0]


def test_unequal_prompts_are_padded_on_the_left() -> None:
    short, long = toy_dataset(2)[0], toy_dataset(5)[1]
    batch = VLMDataCollator(toy_processor(), 1)([short, long])
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1
    assert batch["attention_mask"][1].all()


def test_each_distinct_episode_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, pictures = toy_processor(), []
    original = type(processor.image_processor).preprocess

    def counting(self: Any, images: Any, **kwargs: Any) -> Any:
        pictures.append(sum(len(group) for group in images) if isinstance(images[0], list) else len(images))
        return original(self, images, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", counting)
    collator = VLMDataCollator(processor, 8)
    rows = rows_of(*[0] * 8, *[1] * 8)
    first, again = collator(rows), collator(rows)
    assert sum(pictures) == 2 * 4, "16 rows of 4 images are 8 different ones"
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    collator(rows_of(*[2] * 8))
    assert sum(pictures) == 3 * 4


def test_episodes_with_equal_words_and_other_pictures_stay_two_groups() -> None:
    batch = VLMDataCollator(toy_processor(), 2)(rows_of(0, 0, 1, 1))
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    first, second = batch["pixel_values"].chunk(2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("indices", [(0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 1)])
def test_broken_groups_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted each episode 2 times in a row"):
        VLMDataCollator(toy_processor(), 2)(rows_of(*indices))


def test_a_right_padding_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_processor().tokenizer, "padding_side", "right")
    with pytest.raises(ValueError, match="pads on the right, but generation needs left padding"):
        VLMDataCollator(toy_processor(), 2)
