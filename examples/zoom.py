"""An environment of two turns: pictures too far away to be read, a tool that shows one of them near, and an answer.

    accelerate launch training.py --env examples/zoom.py:ZoomEnv --config examples/zoom.yaml

The instruction names the picture to look at and four labels, of which one is its own. Without a look at that picture
chance is 1 in 4: none of the other three labels belongs to a picture of the episode, so that no other look tells more.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from PIL import Image

from environment import Control, Environment, Episode, Observation, ToolCall, Verdict, sample_distinct
from utils.images import list_labelled_images

NUM_PICTURES, NUM_OPTIONS = 2, 4
FAR_PX = 28  # of the side of a picture in the prompt
INTEGER = {"type": "integer"}


class Outcome(StrEnum):
    """The ways in which a rollout can end."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_SUCH_PICTURE = "no_such_picture"
    NO_SUCH_OPTION = "no_such_option"


class ZoomEnv(Environment):
    """Two pictures of a folder, shown from afar; the tools `zoom` and `answer`."""

    tools = (
        {
            "name": "zoom",
            "description": "Show one image near.",
            "parameters": {"type": "object", "properties": {"index": INTEGER}, "required": ["index"]},
        },
        {
            "name": "answer",
            "description": "Say which option the image shows.",
            "parameters": {"type": "object", "properties": {"option": INTEGER}, "required": ["option"]},
        },
    )
    outcomes = Outcome

    def __init__(self, data_root: str = "toy_images", seed: int = 0):
        """data_root: of pictures of at least five different labels. seed: of all episodes."""
        self.seed = seed
        self.paths = {image.label: image.path for image in list_labelled_images(data_root)}
        if len(self.paths) < NUM_PICTURES + NUM_OPTIONS - 1:
            raise ValueError(
                f"data_root={data_root} has {len(self.paths)} labels, wanted at least "
                f"{NUM_PICTURES + NUM_OPTIONS - 1}; add pictures"
            )

    def episode(self, index: int) -> Episode:
        """Episode `index`: all that is random in it comes from a generator of (seed, index) alone."""
        rng = random.Random(f"zoom/{self.seed}/{index}")
        labels = sample_distinct(sorted(self.paths), NUM_PICTURES + NUM_OPTIONS - 1, rng)
        shown, others = labels[:NUM_PICTURES], labels[NUM_PICTURES:]
        asked = rng.randrange(NUM_PICTURES)
        options = [shown[asked], *others]
        rng.shuffle(options)
        answer = {"asked": asked, "options": options, "option": options.index(shown[asked]), "is_blank": False}
        far = Image.new("RGB", (FAR_PX, FAR_PX), "grey")
        return Episode(images=(far,) * NUM_PICTURES, labels=tuple(shown), seed=self.seed, answer=answer)

    def instruction(self, episode: Episode) -> str:
        """The question."""
        options = ", ".join(f"{number} {label}" for number, label in enumerate(episode.answer["options"]))
        return f"Zoom into image {episode.answer['asked']}. Which is it: {options}?"

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        """The picture as it is for a zoom, and the verdict on an answer."""
        call = turns[-1]
        if call.name == "answer":
            option = call.arguments["option"]
            if option not in range(NUM_OPTIONS):
                return Verdict(Outcome.NO_SUCH_OPTION, is_right=False, components={"correct": 0.0, "valid_call": 0.0})
            is_right = option == episode.answer["option"]
            return Verdict(Outcome.RIGHT if is_right else Outcome.WRONG, is_right)
        index = call.arguments["index"]
        if index not in range(NUM_PICTURES):
            return Verdict(Outcome.NO_SUCH_PICTURE, is_right=False, components={"correct": 0.0, "valid_call": 0.0})
        path = self.paths[episode.labels[index]]
        near = Image.new("RGB", (2 * FAR_PX, 2 * FAR_PX), "grey") if episode.answer["is_blank"] else path
        return Observation(f"Image {index}: ", (near,))

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        """A look at the picture that is asked for, then the answer."""
        look = ToolCall("zoom", {"index": episode.answer["asked"]})
        return ToolCall("answer", {"option": episode.answer["option"]}) if look in turns else look

    def choices(self, episode: Episode) -> list[ToolCall]:
        """Every answer."""
        return [ToolCall("answer", {"option": option}) for option in range(NUM_OPTIONS)]

    def edited(self, episode: Episode, control: Control, call: ToolCall, rng: random.Random) -> Episode | None:
        """With blank pictures a zoom shows grey."""
        if control is Control.BLANK_IMAGES:
            return replace(episode, answer={**episode.answer, "is_blank": True})
        return None
