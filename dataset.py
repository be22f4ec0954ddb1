"""Episodes become batches: an endless random-access dataset, and a collator that encodes each episode once.

Owns the rows that TRL sees and the batch that the trainer gets. Knows the processor's outputs, but no model.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import datasets
import torch
from PIL import Image

from fleet.episode_numbers import MAX_REPLACEMENTS, REPLACEMENT_STRIDE
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, Message
from fleet.errors import ProcessStopped, RunStopped
from fleet.known_answers import answerable_episode
from utils.images import BadImage, image_digest, open_image
from utils.plain_text import NotPlainText, require_plain_messages

Row = dict[str, Any]

STAND_IN_SIDE_PX = 56


class EpisodeBatch(TypedDict):
    """P distinct episodes, encoded once each, for groups of G rollouts. On one device; a group is never split.

    L is the longest prompt, left-padded; I the images of all episodes in order; N the patches of all images.
    """

    input_ids: torch.Tensor  # (P, L) int64
    attention_mask: torch.Tensor  # (P, L) int64, 0 on padding
    mm_token_type_ids: torch.Tensor  # (P, L) int64, 1 on image tokens
    pixel_values: torch.Tensor  # (N, patch values) float32
    image_grid_thw: torch.Tensor  # (I, 3) int64, patches of each image along time, height, width
    num_images: list[int]  # P ints that sum to I
    image_digests: list[bytes]  # I, equal for equal pictures
    episodes: list[Episode]  # P
    numbers: list[int]  # P; of the episodes in the data set, which name the draws of their rollouts
    faults: list[str | None]  # P; the reason why another episode stands in, or None
    broken: list[str | None]  # P; the reason why there is no such episode, which stops the run, or None
    images: list[list[Image.Image]]  # P lists of RGB pictures, for vLLM and for reports
    prompts: list[list[Message]]  # P conversations
    group_size: int  # G


class RepeatableEpisodeDataset:
    """Endless episodes by number: item i is `env.episode(i)`, on every rank, in every run and after every resume.

    An episode with an image that has gone bad since it was checked is replaced by number i + k * 1,000,000,007, for the
    first k that is sound. Its row gives the reason in `fault`, and `count_faults` decides what follows. Where the
    environment gives something that is no episode, the row gives the reason in `broken`. The run stops when it comes
    to that row: a worker that reads ahead must not end it earlier, nor one process alone.
    """

    def __init__(self, env: EpisodeSource, max_pixels: int | None = None):
        """max_pixels: budget of one image; None keeps its size. Spent here, so that vLLM sees the same pixels."""
        self.env, self.max_pixels = env, max_pixels
        self._latest_rows: dict[int, Row] = {}

    def __getitem__(self, index: int) -> Row:
        """The row of episode `index`, 0 or greater. Raises RunStopped if neither it nor 100 others can be shown."""
        fault = None
        for number in range(index, index + (1 + MAX_REPLACEMENTS) * REPLACEMENT_STRIDE, REPLACEMENT_STRIDE):
            try:
                # with the answer, which is recorded: a failure is told here, where every process hears of it
                episode = answerable_episode(self.env, number)
                pictures = [open_image(image, self.max_pixels) for image in episode.images]
            except (BadImage, OSError) as error:
                fault = fault or f"episode {index}: {error}"
            except BrokenEpisode as error:
                return broken_row(index, str(error) if fault is None else f"{fault}; in its place, {error}")
            else:
                return episode_row(episode, index, pictures, fault)
        raise ProcessStopped(
            f"{fault}; {MAX_REPLACEMENTS} other episodes cannot be shown either: is the data folder gone?"
        )

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, itertools.count())

    def as_hf_dataset(self, num_episodes: int) -> datasets.Dataset:
        """The first episodes as TRL's map-style data set. Rows are made when read, so a resume skips at no cost."""
        indices = datasets.Dataset.from_dict({"episode_index": range(num_episodes)})
        return indices.with_transform(self._rows_by_column)

    def _rows_by_column(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        if torch.utils.data.get_worker_info() is not None and os.getpgrp() != os.getpid():
            # launchers stop a process by its group; a worker must outlive its process's last step
            os.setpgid(0, 0)
        # a group reads its episode G times in a row, and TRL a whole batch again for every step that reuses it
        indices = batch["episode_index"]
        self._latest_rows = {index: self._latest_rows.get(index) or self[index] for index in dict.fromkeys(indices)}
        rows = [self._latest_rows[index] for index in indices]
        return {column: [row[column] for row in rows] for column in rows[0]}


def episode_row(
    episode: Episode, index: int, pictures: list[Image.Image], fault: str | None = None, broken: str | None = None
) -> Row:
    """An episode as a row of the data set.

    Its columns: `episode_index`; `prompt` (chat messages) and `images` (RGB pictures), which TRL's own trainer reads
    too; `correct_index` (None where the task picks no image) and `num_candidates`, which a reward of TRL's reads;
    `episode`; `fault` and `broken`, as in EpisodeBatch.
    """
    return {
        "episode_index": index,
        "prompt": list(episode.messages),
        "images": pictures,
        "correct_index": episode.correct_index,
        "num_candidates": episode.num_candidates,
        "episode": episode,
        "fault": fault,
        "broken": broken,
    }


def broken_row(index: int, reason: str) -> Row:
    """A row in place of an episode that does not exist; the run stops before anything is generated for it."""
    picture = Image.new("RGB", (STAND_IN_SIDE_PX, STAND_IN_SIDE_PX))
    episode = Episode((picture,), ({"role": "user", "content": [{"type": "image"}]},), 0, ("",), None, 0)
    return episode_row(episode, index, [picture], broken=reason)


def require_episodes(broken_by_rank: Sequence[Sequence[str | None]]) -> None:
    """Raises RunStopped, the same on every rank, if `broken` of any rank's batch holds a reason."""
    for rank, reason in _with_ranks(broken_by_rank):
        raise RunStopped(
            f"process {rank}: the environment is broken: {reason}; every checkpoint is whole: correct the file of "
            "--env and pass --resume auto"
        )


def count_faults(faults_by_rank: Sequence[Sequence[str | None]], *, skips_bad_images: bool) -> int:
    """The number of replaced episodes of all ranks. Raises RunStopped for one unless bad images are skipped."""
    faults = _with_ranks(faults_by_rank)
    if faults and not skips_bad_images:
        rank, fault = faults[0]
        raise RunStopped(
            f"process {rank}: {fault}; or pass --bad_images skip to have the episode replaced, with --resume"
        )
    return len(faults)


def _with_ranks(reasons_by_rank: Sequence[Sequence[str | None]]) -> list[tuple[int, str]]:
    return [(rank, reason) for rank, reasons in enumerate(reasons_by_rank) for reason in reasons if reason is not None]


class VLMDataCollator:
    """Makes one EpisodeBatch of P episodes' rows, G neighbouring rows each; encodes every episode once."""

    def __init__(self, processor: Any, num_rollouts: int):
        """num_rollouts: G, the rows of each episode. Raises ValueError if the processor pads on the right."""
        if processor.tokenizer.padding_side != "left":
            raise ValueError(
                f"the processor pads on the {processor.tokenizer.padding_side}, but generation needs left padding; "
                "load it with padding_side='left', as load_qwen25_vl does"
            )
        self.processor, self.num_rollouts = processor, num_rollouts
        self._literals = frozenset(processor.tokenizer.get_added_vocab())
        self._latest: tuple[list[int], EpisodeBatch] | None = None

    def __call__(self, rows: Sequence[Row]) -> EpisodeBatch:
        """The batch of these rows. Raises ValueError for split groups, RunStopped for text that is a model's token."""
        # the episode's number makes a group: two episodes may have equal token ids and different pictures
        firsts, given = rows[:: self.num_rollouts], [row["episode_index"] for row in rows]
        indices = given[:: self.num_rollouts]
        if given != [index for index in indices for _ in range(self.num_rollouts)]:
            raise ValueError(
                f"rows of episodes {given}, but wanted each episode {self.num_rollouts} times in a row; make the batch "
                "size a multiple of num_rollouts and do not shuffle rows"
            )
        # TRL reads a batch again for every step that reuses its generations; it is encoded once
        if self._latest is None or self._latest[0] != indices:
            self._latest = indices, self._encode(firsts)
        return self._latest[1]

    def _encode(self, firsts: Sequence[Row]) -> EpisodeBatch:
        for row in firsts:
            try:
                require_plain_messages(row["prompt"], f"episode {row['episode_index']}", self._literals)
            except NotPlainText as error:
                raise ProcessStopped(f"{error}, and correct the environment or its data") from error
        prompts, images = [row["prompt"] for row in firsts], [row["images"] for row in firsts]
        texts = self.processor.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        encoded = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        return EpisodeBatch(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            mm_token_type_ids=encoded["mm_token_type_ids"],
            pixel_values=encoded["pixel_values"],
            image_grid_thw=encoded["image_grid_thw"],
            num_images=[len(pictures) for pictures in images],
            image_digests=[image_digest(picture) for pictures in images for picture in pictures],
            episodes=[row["episode"] for row in firsts],
            numbers=[row["episode_index"] for row in firsts],
            faults=[row["fault"] for row in firsts],
            broken=[row["broken"] for row in firsts],
            images=images,
            prompts=prompts,
            group_size=self.num_rollouts,
        )


def images_of(num_images: Sequence[int], place: int) -> range:
    """The places of an episode's images among those of all episodes.

    >>> images_of([2, 3], 1)
    range(2, 5)
    """
    first = sum(num_images[:place])
    return range(first, first + num_images[place])


def pick_episodes(batches: Sequence[EpisodeBatch], chosen: Sequence[tuple[int, int]], padding_id: int) -> EpisodeBatch:
    """A batch of these batches' episodes, as (number of the batch, place of the episode in it), in order."""
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]
    longest = max(lengths[number][place] for number, place in chosen)
    grids = [batch["image_grid_thw"].split(batch["num_images"]) for batch in batches]
    patches = [
        batch["pixel_values"].split([int(grid.prod(dim=1).sum()) for grid in of_batch])
        for batch, of_batch in zip(batches, grids, strict=True)
    ]

    def rows(name: str, fill: int) -> torch.Tensor:
        """The prompts' rows without their padding, and then with as much as the longest of them needs."""
        found = [
            torch.nn.functional.pad(ids[-length:], (longest - length, 0), value=fill)
            for number, place in chosen
            for ids, length in [(batches[number][name][place], lengths[number][place])]  # type: ignore[literal-required]
        ]
        return torch.stack(found)

    def entries(name: str) -> list[Any]:
        return [batches[number][name][place] for number, place in chosen]  # type: ignore[literal-required]

    images = [(number, image) for number, place in chosen for image in images_of(batches[number]["num_images"], place)]
    return EpisodeBatch(
        input_ids=rows("input_ids", padding_id),
        attention_mask=rows("attention_mask", 0),
        mm_token_type_ids=rows("mm_token_type_ids", 0),
        pixel_values=torch.cat([patches[number][place] for number, place in chosen]),
        image_grid_thw=torch.cat([grids[number][place] for number, place in chosen]),
        num_images=entries("num_images"),
        image_digests=[batches[number]["image_digests"][image] for number, image in images],
        episodes=entries("episodes"),
        numbers=entries("numbers"),
        faults=entries("faults"),
        broken=entries("broken"),
        images=entries("images"),
        prompts=entries("prompts"),
        group_size=batches[0]["group_size"],
    )


def prompts_of_rollouts(batch: EpisodeBatch) -> tuple[list[list[int]], list[list[Image.Image]]]:
    """Each rollout's prompt ids without padding, and its pictures; B = P * G of each, group after group."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    prompts = [prompt for ids, mask in pairs for prompt in [ids[mask].tolist()] * batch["group_size"]]
    return prompts, [pictures for pictures in batch["images"] for _ in range(batch["group_size"])]


def repeat_episodes(batch: EpisodeBatch, first: int, last: int) -> dict[str, Any]:
    """Episodes first to last - 1 as TRL has them: each prompt and its pixels once per rollout, group after group.

    With B = (last - first) * G rows: `prompt_ids`, `prompt_mask` and `mm_token_type_ids` are (B, L) int64,
    `pixel_values` and `image_grid_thw` hold the images of row after row, `num_images` is B ints.
    """
    chosen = [episode for episode in range(first, last) for _ in range(batch["group_size"])]
    grids = batch["image_grid_thw"].split(batch["num_images"])
    patches = batch["pixel_values"].split([int(grid.prod(dim=1).sum()) for grid in grids])
    return {
        "prompt_ids": batch["input_ids"][chosen],
        "prompt_mask": batch["attention_mask"][chosen],
        "mm_token_type_ids": batch["mm_token_type_ids"][chosen],
        "pixel_values": torch.cat([patches[episode] for episode in chosen]),
        "image_grid_thw": torch.cat([grids[episode] for episode in chosen]),
        "num_images": [batch["num_images"][episode] for episode in chosen],
    }
