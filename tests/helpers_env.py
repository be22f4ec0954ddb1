"""Environments of a user's own, written for a test, and the verdicts and records of one that picks an image."""

from pathlib import Path

from environment import Outcome, Verdict, judge
from fleet.rl.rollouts import EpisodeRecord
from utils.tool_calls import ParseStatus, ToolCall

SOUND = '''import random

import numpy as np
from PIL import Image

from environment import Episode
from utils.images import list_labelled_images


class Sound:
    def change(self, index):
        """Fields of the episode that are other ones."""
        return {}

    def episode(self, index):
        pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue")]
        fields = {"images": pictures, "messages": (), "correct_index": index % 3, "labels": "a b c".split(),
                  "target": None, "seed": 0}
        return Episode(**fields | self.change(index))

    def prompt_messages(self, episode):
        content = [{"type": "image"} for _ in episode.images] + ["Pick the image."]
        return [{"role": "user", "content": content}]


class Mine(Sound):
    """The one that is named."""
'''


def write_env(folder: Path, body: str = "") -> str:
    """Writes my_env.py, in whose class `body` stands; returns what --env takes. Later lines of `body` are indented."""
    path = folder / "my_env.py"
    path.write_text(f"{SOUND}\n    {body}\n", encoding="utf-8")
    return f"{path}:Mine"


def pick_verdict(outcome: Outcome, status: ParseStatus = ParseStatus.OK, index: int | None = None) -> Verdict:
    """The verdict of a task that picks an image, written out."""
    components = {"correct": float(outcome is Outcome.CORRECT), "valid_call": float(outcome in list(Outcome)[:2])}
    if index is None:
        return Verdict(outcome, is_right=False, parse_status=status)
    return Verdict(outcome, outcome is Outcome.CORRECT, components, status, ToolCall("pick_image", {"index": index}))


def judged_verdict(text: str, correct_index: int, num_candidates: int) -> Verdict:
    """The verdict that `judge` gives on a text, as the trainer records it."""
    found = judge(text, correct_index, num_candidates)
    return pick_verdict(found.outcome, found.parse_status, found.index)


def pick_record(correct_index: int, labels: tuple[str, ...], target: str | None = None, instruction: str = "?",
                images: tuple[str, ...] | None = None) -> EpisodeRecord:  # fmt: skip
    """The record of an episode that asks for one of these pictures."""
    shown = ("",) * len(labels) if images is None else images
    choices = tuple(str(index) for index in range(len(labels)))
    return EpisodeRecord(instruction, target, correct_index, labels, shown, choices, str(correct_index))
