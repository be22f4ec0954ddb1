"""The findings of a check of an environment: their kinds, and the ledger that collects them.

Owns the names of the kinds, and which are mistakes and which are notes. Imports no torch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fleet.episodes import BrokenEpisode
from utils.images import BadImage
from utils.plain_text import NotPlainText


class Kind(StrEnum):
    """A kind of mistake in an environment, or a note on one that works."""

    CONSTRUCTOR = "constructor"  # fails, or needs an argument that nobody gives
    SIGNATURE = "signature"  # a method does not take what it is given
    NO_TOOLS = "no tools"
    TOOL_UNFIT = "tool unfit"  # a tool or a schema that Fleet refuses, such as one that takes any value
    SCHEMA_INVALID = "schema invalid"  # JSON Schema refuses it
    TOOLS_CHANGE = "tools change"
    OUTCOMES = "outcomes"
    EPISODE_RAISES = "episode raises"
    EPISODE_FIELD = "episode field"
    EPISODE_IMPURE = "episode impure"  # another one when asked for again
    OTHER_INSTANCE = "other instance"
    OTHER_PROCESS = "other process"
    EPISODE_CHANGED = "episode changed"  # by a method that it was given to
    BAD_IMAGE = "bad image"
    PROMPT_RAISES = "prompt raises"
    MESSAGES = "messages"
    LITERAL = "literal"  # a text holds what is a token to the model
    SOLUTION_RAISES = "solution raises"
    SOLUTION_UNFIT = "solution unfit"  # no call that the schemas take
    SOLUTION_TEXT = "solution text"  # fits the schemas, but the parser refuses its text
    SOLUTION_IMPURE = "solution impure"
    RESPOND_RAISES = "respond raises"
    NO_VERDICT = "no verdict"
    OBSERVATION = "observation"
    UNKNOWN_OUTCOME = "unknown outcome"
    VERDICT_VALUE = "verdict value"  # is_right or a component
    RESPOND_IMPURE = "respond impure"
    GOLD_WRONG = "gold wrong"
    GOLD_NOT_BEST = "gold not best"
    GOLD_EARNS_NOTHING = "gold earns nothing"  # no more than a completion without a call
    ALL_RIGHT = "all right"
    BLIND_CALL = "blind call"  # one call is right in every episode, though their gold answers differ
    CHANCE = "chance"
    CHANCE_EXCEEDED = "chance exceeded"
    CHOICES = "choices"
    CHOICES_WITHOUT_SOLUTION = "choices without solution"
    CHOICES_ALIKE = "choices alike"
    DRAFTS = "drafts"
    EDITED = "edited"
    BLANK_SHOWS = "blank shows"
    EXPLOIT = "exploit"
    NO_SEED = "no seed"
    SEED_IGNORED = "seed ignored"
    REPEATS = "repeats"
    SAME_ANSWER = "same answer"
    CHANCE_MISSED = "chance missed"
    LONG_CALL = "long call"
    TOOL_UNNAMED = "tool unnamed"  # no message of the prompt names a tool
    NEGATIVE_REWARD = "negative reward"
    OUTCOME_UNCLEAR = "outcome unclear"  # right at times, and wrong at others

    @property
    def is_mistake(self) -> bool:
        """True for what makes an environment unsound; false for a note."""
        return self not in NOTES


NOTES = frozenset(
    {Kind.NO_SEED, Kind.SEED_IGNORED, Kind.REPEATS, Kind.SAME_ANSWER, Kind.CHANCE_MISSED, Kind.LONG_CALL,
     Kind.TOOL_UNNAMED, Kind.NEGATIVE_REWARD, Kind.OUTCOME_UNCLEAR}
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One mistake or note. message: one line, of the first time; times: it was found."""

    kind: Kind
    message: str
    times: int = 1

    def __str__(self) -> str:
        more = {1: "", 2: " (and once more)"}.get(self.times, f" (and {self.times - 1} times more)")
        return f"{'mistake' if self.kind.is_mistake else 'note'}: {self.kind}: {self.message}{more}"


@dataclass
class Ledger:
    """All that was found so far, in the order in which it was found first."""

    by_subject: dict[tuple[Kind, str], Finding] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """The findings, mistakes first."""
        return sorted(self.by_subject.values(), key=lambda finding: not finding.kind.is_mistake)

    def has(self, *kinds: Kind) -> bool:
        """True if a finding of one of these kinds is there."""
        return any(kind in kinds for kind, _ in self.by_subject)

    def add(self, kind: Kind, message: str, subject: str = "") -> None:
        """Enters a finding; of one kind and subject the first is kept, and the rest are counted."""
        first = self.by_subject.get((kind, subject))
        words = " ".join(message.split())
        self.by_subject[kind, subject] = (
            Finding(kind, words) if first is None else replace(first, times=first.times + 1)
        )

    @contextlib.contextmanager
    def catching(self, kind: Kind, *, raised: Kind | None = None, where: str = "", subject: str = "") -> Iterator[None]:
        """Within it, an error of the environment becomes a finding.

        kind: of a value that is refused; raised: of an error of the environment's own code, if that is another kind.
        A picture that does not open is BAD_IMAGE. where: stands before the error's words.
        """
        try:
            yield
        except (BrokenEpisode, NotPlainText) as error:
            root = root_of(error)
            found = raised if raised is not None and is_raised(error) else kind
            found = Kind.LITERAL if isinstance(root, NotPlainText) else found
            self.add(found, f"{where}{error}", subject)
        except (BadImage, OSError) as error:
            self.add(Kind.BAD_IMAGE, f"{where}{error}")


def is_raised(error: BaseException) -> bool:
    """True if the environment's own code raised, false if it gave a value that is refused."""
    return error.__cause__ is not None and not isinstance(error.__cause__, BrokenEpisode)


def root_of(error: BaseException) -> BaseException:
    """The first of the errors that led to this one."""
    return error if error.__cause__ is None else root_of(error.__cause__)
