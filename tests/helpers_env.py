"""Environments of a user's own, written for a test: a sound one of two methods, in which one thing is changed."""

from pathlib import Path

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
