"""What the environment's tools answer while rollouts of several turns are sampled: from a turn's tokens to given ones.

Owns the way from a call to an observation's tokens, and the pictures that observations show. Judges nothing: the
verdict on a rollout is taken from its turns' texts (fleet/verdicts.py), which asks the environment the same again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dataset import EpisodeBatch
from environment import Episode, EpisodeSource
from fleet.episodes import BrokenEpisode
from fleet.errors import one_line
from fleet.qwen.group_passes import base_qwen, encode_pictures
from fleet.qwen.observations import Picture, encode_observation
from fleet.qwen.token_tree import GivenToken
from fleet.qwen.vision_cache import VisionCache
from fleet.verdicts import Observation, answer_to, shown_images
from utils.images import BadImage, image_digest, name_of_picture
from utils.plain_text import NotPlainText
from utils.tool_calls import ToolCall, parse_call_str


@dataclass(frozen=True)
class TurnSettings:
    """How many turns a rollout may have, and how much room.

    max_turn_length: sampled tokens of one turn. max_context: tokens of a whole conversation, its prompt with them; None
    for as many as the model has positions.
    """

    max_turns: int
    max_turn_length: int
    max_context: int | None = None
    max_pixels: int | None = None  # budget of one picture
    allow_reasoning: bool = False


def tool_answers(
    env: EpisodeSource,
    batch: EpisodeBatch,
    model: nn.Module,
    processor: Any,
    decode: Callable[[Sequence[int]], str],
    settings: TurnSettings,
    cache: VisionCache | None = None,
) -> "ToolAnswers | None":
    """What an environment's tools answer to a batch's groups; None where a rollout has one turn.

    model: may be wrapped by PEFT. The others are ToolAnswers'.
    """
    if settings.max_turns == 1:
        return None
    if settings.max_context is None:
        config = base_qwen(model).config.get_text_config()
        settings = replace(settings, max_context=config.max_position_embeddings)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return ToolAnswers(env, batch["episodes"], lengths, processor, decode, settings, cache)


@dataclass
class ShownObservation:
    """An observation as the model was shown it: for the record of a rollout."""

    text: str
    images: list[Image.Image]
    tokens: list[GivenToken] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The files in a run's folder that keep its pictures."""
        return tuple(name_of_picture(image_digest(image)) for image in self.images)


class ToolAnswers:
    """The answers to P groups of one generation; a tree_sampling.Answers."""

    def __init__(
        self,
        env: EpisodeSource,
        episodes: Sequence[Episode],
        prompt_lengths: Sequence[int],
        processor: Any,
        decode: Callable[[Sequence[int]], str],
        settings: TurnSettings,
        cache: VisionCache | None = None,
    ):
        """prompt_lengths: in tokens. decode: the text of a turn without its end. cache: where vision is frozen."""
        self.env, self.episodes, self.prompt_lengths = env, episodes, prompt_lengths
        self.processor, self.decode, self.settings, self.cache = processor, decode, settings, cache
        self.pictures: dict[bytes, Picture] = {}
        self.broken: str | None = None  # why the environment is, if it is; nothing is asked of it any more
        self.problems: list[str] = []  # of observations that could not be shown
        self._literals = frozenset(processor.tokenizer.get_added_vocab())
        self._known: dict[tuple[int, tuple[str, ...]], ShownObservation | None] = {}

    def __call__(self, group: int, turns: Sequence[Sequence[int]]) -> Sequence[GivenToken]:
        """The tokens that are given behind these turns of a rollout of this group; none if it ends there."""
        if len(turns) >= self.settings.max_turns:
            return ()
        observation = self._answer(group, tuple(map(self.decode, turns)))
        if observation is None:
            return ()
        num_tokens = self.prompt_lengths[group] + sum(map(len, turns)) + self.settings.max_turn_length
        num_tokens += sum(len(shown.tokens) for shown in self.observations(group, turns[:-1])) + len(observation.tokens)
        most = self.settings.max_context
        if most is None or num_tokens <= most:
            return observation.tokens
        self.problems.append(
            f"with it and one more turn a conversation would have up to {num_tokens:,} tokens, wanted at most {most:,} "
            "(--max_context_length)"
        )
        return ()

    def observations(self, group: int, turns: Sequence[Sequence[int]]) -> list[ShownObservation]:
        """What was shown behind each of these turns of a rollout of this group, which were all answered."""
        texts = tuple(map(self.decode, turns))
        found = [self._known[group, texts[: end + 1]] for end in range(len(texts))]
        return [observation for observation in found if observation is not None]

    def shown(
        self, model: nn.Module, digests: Sequence[bytes], most_of_ranks: Callable[[int], int]
    ) -> tuple[list[Tensor], Tensor]:
        """Features of these pictures, (image tokens, width) each, and their grids (N, 3).

        Where the weights are sharded, every rank calls the encoder as often as any other. With a cache each picture is
        encoded alone and kept, so that training takes the same features.
        """
        device = next(model.parameters()).device
        distinct = list(dict.fromkeys(digests))
        if self.cache is None:
            is_needed = most_of_ranks(len(distinct)) > 0
            found = encode_pictures(model, [self.pictures[digest] for digest in distinct]) if is_needed else []
        else:
            num_calls = most_of_ranks(len(self.cache.unknown_places(distinct)))
            found = self.cache.features_of(
                distinct,
                lambda place: encode_pictures(model, [self.pictures[distinct[place]]])[0],
                num_calls=num_calls,
                encode_nothing=lambda: encode_pictures(model, []),
            )
            for digest, features in zip(distinct, found, strict=True):
                self.pictures[digest] = replace(self.pictures[digest], features=features)
        features_of = dict(zip(distinct, found, strict=True))
        grids = [self.pictures[digest].grid_3 for digest in digests]
        return (
            [features_of[digest].to(device) for digest in digests],
            torch.stack(grids).to(device) if grids else torch.empty(0, 3, dtype=torch.int64, device=device),
        )

    def _answer(self, group: int, texts: tuple[str, ...]) -> ShownObservation | None:
        if (group, texts) not in self._known:
            self._known[group, texts] = self._ask(self.episodes[group], texts)
        return self._known[group, texts]

    def _ask(self, episode: Episode, texts: Sequence[str]) -> ShownObservation | None:
        if self.broken is not None:
            return None
        calls = list[ToolCall]()
        for text in texts:
            parsed = parse_call_str(text, self.env.tools, allow_reasoning=self.settings.allow_reasoning)
            if parsed.call is None:
                return None
            calls.append(parsed.call)
        try:
            answer = answer_to(self.env, episode, calls, max_turns=self.settings.max_turns)
        except BrokenEpisode as error:
            self.broken = str(error)
            return None
        if not isinstance(answer, Observation):
            return None
        try:
            images = shown_images(answer, self.settings.max_pixels, self._literals)
        except (NotPlainText, BadImage, OSError) as error:
            self.problems.append(str(error))
            return None
        try:
            tokens, pictures = encode_observation(self.processor, answer.text, images)
        # of the processor's own; a process that raises alone would leave the others waiting
        except Exception as error:
            self.broken = f"the answer to {calls[-1]} cannot be encoded ({type(error).__name__}: {one_line(error)})"
            return None
        # a picture that was shown before has its features
        self.pictures = pictures | self.pictures
        return ShownObservation(answer.text, images, tokens)
