"""Rows and batches: random access, the plain processor as oracle, and each episode encoded once."""

import copy
import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from dataset import RepeatableEpisodeDataset, VLMDataCollator, count_faults
from environment import Episode, PickImageEnv, ToolCall
from fleet.command.options import parse_options
from fleet.command.preflight import make_environment
from fleet.controls import Control, checked_edit
from fleet.errors import RunStopped
from fleet.evaluation.held_out import RunEpisodes, make_plan
from fleet.toy.model import TOY_DATA_ROOT
from tests.conftest import save_picture
from tests.helpers import toy_dataset, toy_processor
from utils.plain_text import QWEN_ADDED_TOKENS

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


# --- images that go bad during a run ----------------------------------------------------------------------------------

STRIDE = 1_000_000_007


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures that a test may break."""
    for number, color in enumerate(("black", "blue", "green", "grey", "orange", "pink", "red", "white")):
        save_picture(tmp_path / "pictures" / f"{color}_{number}.png", color)
    return tmp_path / "pictures"


def shows(dataset: RepeatableEpisodeDataset, index: int, name: str) -> bool:
    return name in {Path(str(image)).name for image in dataset.env.episode(index).images}


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (os.unlink, "cannot be read (No such file or directory)"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:50]), "cannot be decoded"),
    "emptied": (lambda path: path.write_bytes(b""), "is empty"),
    "a folder now": (become_a_folder, "is a folder, not a file"),
    "a pipe now": (become_a_pipe, "is a pipe, not a file"),
}


@pytest.mark.parametrize(("spoil", "words"), BREAK.values(), ids=BREAK.keys())
def test_episode_of_an_image_that_went_bad_is_replaced_by_a_fixed_other_one(
    pictures: Path, spoil: Callable[[Path], object], words: str
) -> None:
    dataset, same_again = (RepeatableEpisodeDataset(PickImageEnv(pictures)) for _ in range(2))
    spoil(pictures / "red_6.png")
    rows = [dataset[index] for index in range(40)]
    replaced = [index for index in range(40) if shows(dataset, index, "red_6.png")]
    assert 5 < len(replaced) < 35
    for index, row in enumerate(rows):
        assert row["episode_index"] == index, "the group keeps its number"
        if index not in replaced:
            assert row["fault"] is None and row["episode"] == dataset.env.episode(index)
            continue
        assert row["fault"].startswith(f"episode {index}: image {pictures}/red_6.png ") and words in row["fault"]
        first_sound = next(k for k in range(1, 100) if not shows(dataset, index + k * STRIDE, "red_6.png"))
        assert row["episode"] == dataset.env.episode(index + first_sound * STRIDE)
        assert len(row["images"]) == row["num_candidates"] == 4
    again = [same_again[index] for index in range(40)]
    assert [(row["episode"], row["fault"]) for row in again] == [(row["episode"], row["fault"]) for row in rows]


def test_a_group_is_replaced_whole_and_the_batch_says_so(pictures: Path) -> None:
    dataset = RepeatableEpisodeDataset(PickImageEnv(pictures), 56 * 56)
    (pictures / "red_6.png").unlink()
    bad = next(index for index in range(40) if shows(dataset, index, "red_6.png"))
    good = next(index for index in range(40) if not shows(dataset, index, "red_6.png"))
    rows = dataset.as_hf_dataset(40).__getitems__([bad] * 3 + [good] * 3)
    batch = VLMDataCollator(toy_processor(), 3)(rows)
    assert [fault is None for fault in batch["faults"]] == [False, True]
    assert batch["episodes"][1] == dataset.env.episode(good)


class Quoting(PickImageEnv):
    """An environment whose prompt quotes something."""

    quoted = "<|im_end|>"

    def instruction(self, episode: Episode) -> str:
        return f"Pick what {self.quoted} shows."


def test_a_prompt_that_holds_a_token_of_qwens_is_a_broken_episode_by_name(pictures: Path) -> None:
    row = RepeatableEpisodeDataset(Quoting(pictures), 56 * 56)[3]
    assert row["broken"] == (
        "episode 3: the user message holds <|im_end|> ('Pick what <|im_end|> shows. The index is'), which is a token "
        "to the model, not text; write it otherwise"
    )


def test_a_prompt_that_holds_a_token_of_this_model_alone_ends_the_run_by_name(pictures: Path) -> None:
    class QuotingOwn(Quoting):
        quoted = "<own>"

    rows = rows_of(3, 3, dataset=RepeatableEpisodeDataset(QuotingOwn(pictures), 56 * 56))
    words = (
        "episode 3: the user message holds <own> ('Pick what <own> shows. The index is'), which is a token to the "
        "model, not text; write it otherwise, and correct the environment or its data"
    )
    processor = copy.deepcopy(toy_processor())
    processor.tokenizer.add_tokens(["<own>"])
    collator = VLMDataCollator(processor, 2)
    for num_workers in (0, 1):
        with pytest.raises(RunStopped) as refusal:
            next(iter(torch.utils.data.DataLoader(rows, 2, collate_fn=collator, num_workers=num_workers)))
        # the others do not know, so this process says it itself
        assert (str(refusal.value), refusal.value.is_of_all) == (words, False)


def test_the_toys_tokens_are_among_qwens() -> None:
    assert toy_processor().tokenizer.get_added_vocab().keys() <= QWEN_ADDED_TOKENS


def test_no_folder_at_all_ends_the_run(pictures: Path) -> None:
    dataset = RepeatableEpisodeDataset(PickImageEnv(pictures))
    pictures.rename(pictures.with_name("gone"))
    with pytest.raises(RunStopped, match="episode 3: image .* cannot be read .*; 100 other episodes cannot be shown"):
        dataset[3]


def test_environment_that_opens_pictures_itself_is_replaced_alike(pictures: Path) -> None:
    class Opening(PickImageEnv):
        def episode(self, index: int) -> Episode:
            episode = super().episode(index)
            return replace(episode, images=tuple(Image.open(str(image)) for image in episode.images))

    dataset = RepeatableEpisodeDataset(Opening(pictures))
    plain = RepeatableEpisodeDataset(PickImageEnv(pictures))
    (pictures / "red_6.png").unlink()
    bad = next(index for index in range(40) if shows(plain, index, "red_6.png"))
    assert dataset[bad]["fault"].startswith(f"episode {bad}: [Errno 2] No such file or directory")


def test_a_mistake_in_an_environment_is_no_bad_image(pictures: Path) -> None:
    class Failing(PickImageEnv):
        def episode(self, index: int) -> Episode:
            raise KeyError("a mistake")

    row = RepeatableEpisodeDataset(Failing(pictures))[7]
    assert row["fault"] is None and row["episode_index"] == 7
    assert row["broken"].startswith("episode 7 failed with KeyError: 'a mistake' (in episode(): ")


def test_faults_are_counted_or_stop_every_rank_with_the_same_words() -> None:
    faults: list[list[str | None]] = [
        [None, None],
        ["episode 5: image a.png is empty; replace it", None],
        ["episode 7: image b.png", None],
    ]
    assert count_faults(faults, skips_bad_images=True) == 2
    assert count_faults([[None], [None]], skips_bad_images=False) == 0
    with pytest.raises(RunStopped) as refusal:
        count_faults(faults, skips_bad_images=False)
    assert str(refusal.value) == (
        "process 1: episode 5: image a.png is empty; replace it; or pass --bad_images skip to have the episode "
        "replaced, with --resume"
    )


MOVING_ENV = """
import os
from environment import PickImageEnv

os.chdir("/")

class Env(PickImageEnv):
    def __init__(self, **settings):
        os.chdir("..")
        super().__init__(**settings)
        os.chdir("/")

    def draw_episode(self, seed, index):
        os.chdir("/")
        return super().draw_episode(seed, index)

    def prompt_messages(self, episode):
        os.chdir("/")
        return super().prompt_messages(episode)
"""


def test_an_environment_that_changes_the_working_directory_does_not_move_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "env.py").write_text(MOVING_ENV)
    for place, color in enumerate(("red", "blue", "green", "black", "white")):
        save_picture(tmp_path / f"pictures/{place}.png", color)
    monkeypatch.chdir(tmp_path / "work")
    data_root = str(tmp_path / "pictures")
    options = parse_options(
        ["--env", "../env.py:Env", "--data_root", data_root, "--eval_episodes", "2", "--eval_steps", "1"]
    )
    env = make_environment(options, options.seed)
    row = RepeatableEpisodeDataset(env)[0]
    assert len(row["images"]) == 4
    assert len(make_plan(options, [RunEpisodes(env, 3)]).episodes) == 2
    pick, rng = ToolCall("pick_image", {"index": 0}), random.Random(0)
    assert checked_edit(env, row["episode"], Control.PERMUTED_ORDER, pick, rng) is not None
    assert Path.cwd() == tmp_path / "work"
