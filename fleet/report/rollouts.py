"""The rollouts that a report embeds: the choice of groups and thumbnails, and their form as JSON inside a page.

Owns the caps that keep a report small enough to open on a phone. Shows nothing: the page's script does.
"""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jinja2.utils import htmlsafe_json_dumps

from fleet.rl.rollouts import GroupRecord, RolloutRecord, picture_chosen
from fleet.run_folder import finite
from fleet.verdicts import CORRECT, VALID_CALL

MAX_GROUPS = 1_600
MAX_THUMBNAILS = 400
MAX_GROUPS_BYTES = 2_500_000
MAX_THUMBNAILS_BYTES = 1_500_000
MISSING, LEFT_OUT = -1, -2  # the position of a picture that is not embedded: no such file, or over the cap
Item = TypeVar("Item")
# JSON whose strings end no script element and open no comment; in ASCII, so U+2028 is escaped too
safe_json = partial(htmlsafe_json_dumps, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class EmbeddedRollouts:
    """`json_text` is safe inside a script element; the counts tell how much of the run it holds."""

    json_text: str
    num_groups: int
    num_groups_recorded: int
    num_thumbnails: int
    num_thumbnails_recorded: int


def embed(groups: Sequence[GroupRecord], thumbnails_dir: Path) -> EmbeddedRollouts:
    """The groups that fit under the caps, evenly spread over the run, with each of their thumbnails once."""
    limit = MAX_GROUPS
    while True:
        chosen = spread(groups, limit)
        uris, position_by_name = _thumbnails(chosen, thumbnails_dir)
        groups_json = safe_json([_compact(group, position_by_name) for group in chosen])
        if len(groups_json) <= MAX_GROUPS_BYTES or len(chosen) <= 2:
            break
        limit = max(2, int(0.95 * len(chosen) * MAX_GROUPS_BYTES / len(groups_json)))
    return EmbeddedRollouts(
        json_text=f'{{"images":{safe_json(uris)},"groups":{groups_json}}}',
        num_groups=len(chosen),
        num_groups_recorded=len(groups),
        num_thumbnails=len(uris),
        num_thumbnails_recorded=len(set(_names(groups))),
    )


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` (2 or more) of the items, evenly spaced, the first and the last among them.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(position * (len(items) - 1) / (limit - 1))] for position in range(limit)]


def _compact(group: GroupRecord, position_by_name: dict[str, int]) -> dict[str, Any]:
    """The group as the page's script reads it: each picture is a position, each rollout a list of its values."""
    line = group.as_json()
    line["images"] = [position_by_name[name] for name in line["images"]]
    line["rollouts"] = [_shown(rollout, position_by_name) for rollout in group.rollouts]
    return line


def _shown(rollout: RolloutRecord, position_by_name: dict[str, int]) -> list[Any]:
    """A rollout's values in the order in which the script names them. Of several turns, each with its tool's answer."""
    turns = [
        [turn.completion, turn.observation, [position_by_name[name] for name in turn.images]] for turn in rollout.turns
    ]
    verdict = rollout.verdict
    own = {name: value for name, value in verdict.components.items() if name not in (CORRECT, VALID_CALL)}
    kind = "right" if verdict.is_right else "valid" if verdict.is_valid_call else "refused"
    call = None if verdict.call is None else str(verdict.call)
    picture = picture_chosen(rollout)
    figures = [finite(rollout.reward), finite(rollout.advantage)]
    return [
        turns or rollout.completion,
        str(verdict.outcome),
        str(verdict.parse_status),
        kind,
        call,
        picture,
        own,
        *figures,
    ]


def _thumbnails(groups: Sequence[GroupRecord], folder: Path) -> tuple[list[str], dict[str, int]]:
    """Data URIs, and for every name the position of its URI, or MISSING or LEFT_OUT."""
    uris: list[str] = []
    position_by_name: dict[str, int] = {}
    num_bytes = 0
    for name in dict.fromkeys(_names(_widely_spread_first(groups))):
        uri = _data_uri(folder, name)
        if uri is None:
            position_by_name[name] = MISSING
        elif len(uris) == MAX_THUMBNAILS or num_bytes + len(uri) > MAX_THUMBNAILS_BYTES:
            position_by_name[name] = LEFT_OUT
        else:
            position_by_name[name] = len(uris)
            uris.append(uri)
            num_bytes += len(uri)
    return uris, position_by_name


def _names(groups: Iterable[GroupRecord]) -> Iterator[str]:
    for group in groups:
        yield from group.episode.images
        for rollout in group.rollouts:
            yield from rollout.images


def _widely_spread_first(groups: Sequence[GroupRecord]) -> Iterator[GroupRecord]:
    """First, last, the middle, the quarters, ..., some of them again: pictures under the cap cover the whole run."""
    stride = 1 << max(len(groups) - 1, 0).bit_length()
    while stride:
        yield from groups[::stride]
        yield from groups[-1:]
        stride //= 2


def _data_uri(folder: Path, name: str) -> str | None:
    path = folder / name
    # a name with a folder in it would reach files outside the run
    if path.suffix != ".webp" or Path(name).name != name or not path.is_file():
        return None
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
