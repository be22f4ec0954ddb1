"""The check of an environment's controls: each changed episode can be shown, answered, and changed alike again.

Imports no torch.
"""

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from fleet.controls import Control, Edited, checked_edit
from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, shown
from fleet.known_answers import solution_of
from fleet.own_code.environment_trial import comparable_fields, require_same
from fleet.own_code.findings import Kind, Ledger
from fleet.own_code.probes import is_taken
from fleet.verdicts import verdict_on_call
from utils.images import open_image
from utils.tool_calls import ToolCall


def check_controls(
    env: EpisodeSource,
    ledger: Ledger,
    index: int,
    episode: Episode,
    calls: Sequence[ToolCall],
    *,
    is_right: bool,
) -> None:
    """Findings about the changed episodes of each control. calls: that the policy may have said to the episode.

    is_right: the gold answer to the episode as it is is judged right.
    """
    for control, call in ((control, call) for control in Control for call in calls):
        with ledger.catching(Kind.EDITED, where=f"episode {index}: ", subject=control):
            changed, again = (checked_edit(env, episode, control, call, random.Random(index)) for _ in range(2))
            if changed is None or again is None:
                continue
            first, now = (comparable_fields(one.episode) for one in (changed, again))
            require_same(index, first, now, f"edited again for {control}", "draw from the rng alone")
            _require_sound(env, control, changed, is_right=is_right)
            if control is Control.BLANK_IMAGES and not all(map(_is_blank, changed.episode.images)):
                ledger.add(
                    Kind.BLANK_SHOWS,
                    f"episode {index}: the episode of control {control} still shows something, but wanted pictures of "
                    "one colour; return fleet.controls.blanked(episode)",
                )


def _require_sound(env: EpisodeSource, control: Control, changed: Edited, *, is_right: bool) -> None:
    """Raises BrokenEpisode for a changed episode that cannot be shown or answered."""
    name, episode, expected = f"the episode of control {control}", changed.episode, changed.expected
    for image in episode.images:
        open_image(image)
    if expected is not None and not (isinstance(expected, ToolCall) and is_taken(expected, env.tools)):
        raise BrokenEpisode(
            f"{name} expects {shown(expected)}, but wanted a call that the schemas take; correct edited()"
        )
    gold = solution_of(env, episode)
    if is_right and expected is None and not verdict_on_call(env, episode, gold).is_right:
        raise BrokenEpisode(f"{name} has the solution {gold}, which is judged wrong; change its answer with it")


def _is_blank(image: Any) -> bool:
    picture: Image.Image = open_image(image)
    extrema: Any = picture.getextrema()
    return all(darkest == brightest for darkest, brightest in extrema)
