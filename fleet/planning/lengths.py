"""The tokens of a run's prompts and completions, from the user's own pictures, prompts and answers."""

import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from environment import EpisodeSource
from fleet.command.image_check import images_of
from fleet.episodes import BrokenEpisode, Episode, checked_episode
from fleet.known_answers import solution_of
from utils.images import BadImage, image_size, shrunk_size
from utils.tool_calls import make_call_str

# episodes whose prompts are read: those that checks draw too, and more where pictures are in no list
NUM_EPISODES_OF_LIST, NUM_EPISODES = 2, 16
MAX_SIZES_READ = 4096  # pictures whose headers are read; they are taken evenly from the whole list
# characters of a token, where no tokenizer is at hand: fewer than Qwen's have in English, so that lengths are not small
CHARS_PER_TOKEN = 3.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of the run's prompts and answers.

    image_tokens: (least, mean, most) of one picture. num_images: of a prompt, at most. prompt, longest_prompt: tokens
    of the mean and the longest prompt. answer: of the longest gold answer, its end included. patches: of the
    pictures of the longest prompt, before they are merged. is_estimate: no tokenizer was at hand.
    """

    image_tokens: tuple[int, float, int]
    num_images: int
    prompt: float
    longest_prompt: int
    answer: int
    patches: int
    is_estimate: bool


class Grid:
    """Tokens of a picture: patches merged in squares, at the pixel budget of Fleet and of the processor."""

    def __init__(self, vision_config: Any, max_pixels: int | None, processor_pixels: tuple[int, int]):
        """processor_pixels: its least and most pixels of a picture."""
        self.side = vision_config.patch_size * vision_config.spatial_merge_size
        self.merged = vision_config.spatial_merge_size**2
        self.max_pixels, self.processor_pixels = max_pixels, processor_pixels

    def tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of a picture of this (width, height)."""
        width, height = shrunk_size(size, self.max_pixels)
        least, most = self.processor_pixels
        high, wide = smart_resize(height, width, factor=self.side, min_pixels=least, max_pixels=most)
        return (high // self.side) * (wide // self.side)


def lengths_of(env: EpisodeSource, grid: Grid, processor: Any) -> Lengths | None:
    """The lengths of an environment's prompts; None if none of its first episodes can be shown.

    processor: None where none is at hand.
    """
    known = images_of(env)
    episodes = list(_sound_episodes(env, NUM_EPISODES if known is None else NUM_EPISODES_OF_LIST))
    if not episodes:
        return None
    count = _counter(processor)
    texts = [_prompt_text(episode, processor) for episode in episodes]
    per_episode = [[grid.tokens(image_size(image)) for image in episode.images] for episode in episodes]
    sizes = [token for tokens in per_episode for token in tokens]
    if known:
        step = max(1, len(known) // MAX_SIZES_READ)
        with suppress(BadImage, OSError):
            sizes = [grid.tokens(image_size(image.path)) for image in known[::step]]
    num_images = max(len(tokens) for tokens in per_episode)
    # a placeholder of the text is one of the picture's tokens
    text_lengths = [count(text) - len(tokens) for text, tokens in zip(texts, per_episode, strict=True)]
    most = max(sizes, default=0)
    if known:
        longest, of_images = max(text_lengths) + num_images * most, num_images * most
    else:
        of_images = max(map(sum, per_episode))
        longest = max(text + sum(tokens) for text, tokens in zip(text_lengths, per_episode, strict=True))
    mean_of_images = num_images * statistics.fmean(sizes) if known else statistics.fmean(map(sum, per_episode))
    return Lengths(
        (min(sizes, default=0), statistics.fmean(sizes) if sizes else 0.0, most),
        num_images,
        statistics.fmean(text_lengths) + mean_of_images,
        longest,
        max((count(_answer(env, episode)) + 1 for episode in episodes), default=1),
        of_images * grid.merged,
        is_estimate=processor is None,
    )


def _sound_episodes(env: EpisodeSource, count: int) -> Iterator[Episode]:
    for number in range(count):
        # the checks of images and environments decide about those
        with suppress(BadImage, OSError, BrokenEpisode):
            yield checked_episode(env, number)


def _counter(processor: Any) -> Any:
    if processor is None:
        return lambda text: round(len(text) / CHARS_PER_TOKEN)
    return lambda text: len(processor.tokenizer(text)["input_ids"])


def _prompt_text(episode: Episode, processor: Any) -> str:
    if processor is not None:
        return processor.apply_chat_template(list(episode.messages), tokenize=False, add_generation_prompt=True)
    contents = (message["content"] for message in episode.messages)
    parts = (content if isinstance(content, str) else "".join(map(_text_of, content)) for content in contents)
    return "".join(parts) + "<|im_start|>role<|im_end|>" * (1 + len(episode.messages))


def _text_of(part: Any) -> str:
    return part.get("text", "<|vision|>")


def _answer(env: EpisodeSource, episode: Episode) -> str:
    return make_call_str(solution_of(env, episode))
