"""When each warning comes, on sequences of figures made by hand: the step, the kind, and what the text names."""

import random
import re
from collections.abc import Sequence

import pytest

from fleet.command.options import build_parser
from fleet.run.diagnostics import PARSE_REMEDIES, Diagnostics, Metrics, is_as_good_as_blind
from utils.tool_calls import ParseStatus

pytestmark = pytest.mark.fast

EVEN = (0.25, 0.25, 0.25, 0.25)
FIRST = (1.0, 0.0, 0.0, 0.0)
SECOND = (0.0, 1.0, 0.0, 0.0)
MISSING: Metrics = {"reward": 0.5, "accuracy": None, "entropy": None, "groups/mixed": None}


def step(
    accuracy: float | None = 0.5,
    groups: tuple[float, float, float] = (0.2, 0.2, 0.6),
    chosen: Sequence[float] = EVEN,
    correct: Sequence[float] = EVEN,
    entropy: float | None = 0.5,
) -> Metrics:
    """The figures of one step. groups: the shares all right, all wrong and mixed."""
    return {
        "reward": accuracy,
        "accuracy": accuracy,
        "entropy": entropy,
        **{f"groups/{kind}": share for kind, share in zip(("all_right", "all_wrong", "mixed"), groups, strict=True)},
        **{f"chosen/{index}": share for index, share in enumerate(chosen)},
        **{f"correct/{index}": share for index, share in enumerate(correct)},
    }


def unparsable(status: str, share: float = 0.8, clipped: float = 0.0) -> Metrics:
    figures = step(0.1, (0, 0.6, 0.4), (0.05, 0.05, 0.05, 0.05))
    return {**figures, f"parse/{status}": share, "completions/clipped_ratio": clipped}


def warned(lines: Sequence[Metrics], fixed_correct_index: int | None = None, window: int = 20) -> list[tuple[int, str]]:
    """Which kinds are warned of, each with the number, from 1, of the line after which it comes."""
    diagnostics = Diagnostics(fixed_correct_index=fixed_correct_index, window=window)
    texts = [(number, text) for number, line in enumerate(lines, start=1) for text in diagnostics.observe(line)]
    kinds = {text: kind.value for kind, text in diagnostics.warnings.items()}
    assert len(kinds) == len(texts)
    return [(number, kinds[text]) for number, text in texts]


def text_of(lines: Sequence[Metrics], fixed_correct_index: int | None = None) -> str:
    diagnostics = Diagnostics(fixed_correct_index=fixed_correct_index)
    (text,) = [text for line in lines for text in diagnostics.observe(line)]
    return text


def rising(num_steps: int, first: float, last: float, entropy: float = 0.5, left: float = 0.02) -> list[Metrics]:
    """Accuracy rises and entropy falls in even steps, and groups are mixed as four draws of that accuracy are."""
    lines = []
    for number in range(num_steps):
        part = number / (num_steps - 1)
        accuracy = first + part * (last - first)
        right, wrong = accuracy**4, (1 - accuracy) ** 4
        groups = (right, wrong, 1 - right - wrong)
        lines.append(step(accuracy, groups, entropy=entropy * (1 - part * (1 - left))))
    return lines


SOLVED = step(1.0, (1, 0, 0), entropy=0.001)
ALL_WRONG = step(0.0, (0, 1, 0), correct=FIRST)
AT_CHANCE = step(0.25)
OLDER = {name.replace("/", "_index/") if name.startswith(("chosen", "correct")) else name: value
         for name, value in AT_CHANCE.items()}  # fmt: skip
ONE_INDEX = step(0.25, (0.24, 0.74, 0.02), SECOND)

# the right index of the run, its lines, then which kinds come after which line
RUNS: dict[str, tuple[int | None, Sequence[Metrics], list[tuple[int, str]]]] = {
    "learns in 60 steps": (0, rising(60, 0.25, 0.99), []),
    "learns in 60 steps to look": (None, rising(60, 0.25, 0.99), []),
    "learns in 300 steps": (None, rising(300, 0.25, 0.98), []),
    "learns, then stays solved for a window": (0, rising(60, 0.25, 0.99) + [SOLVED] * 40, [(77, "solved")]),
    "a plateau at 0.98": (None, rising(60, 0.25, 0.98) + [step(0.98, (0.92, 0, 0.08), entropy=0.01)] * 200, []),
    "chance for four windows": (None, [AT_CHANCE] * 80, []),
    "chance for four windows, then learns": (None, [AT_CHANCE] * 80 + rising(60, 0.25, 0.9), []),
    "accuracy stays at 0.4, above chance": (None, [step(0.4)] * 200, []),
    "solved from the start": (0, [SOLVED] * 100, [(20, "solved")]),
    "all wrong": (0, [ALL_WRONG] * 100, [(20, "all_wrong")]),
    "all wrong for less than a window": (0, [ALL_WRONG] * 19 + [step()] * 60, []),
    "2 % of groups mixed is no signal": (0, [step(0.01, (0, 0.98, 0.02))] * 20, [(20, "all_wrong")]),
    "3 % of groups mixed is one": (0, [step(0.01, (0, 0.97, 0.03), correct=FIRST)] * 100, []),
    "tied both ways": (0, [step(0.5, (0.5, 0.5, 0))] * 60, [(20, "all_tied")]),
    "all wrong, learns, then solved": (
        0, [ALL_WRONG] * 20 + rising(60, 0.1, 0.99) + [SOLVED] * 30, [(20, "all_wrong"), (97, "solved")],
    ),
    "one index": (None, [step(0.25, chosen=SECOND)] * 60, [(20, "not_looking")]),
    "one index, as it should be": (1, [step(0.98, (0.92, 0, 0.08), SECOND, SECOND)] * 60, []),
    "one index for a while": (None, [step(0.25, chosen=SECOND)] * 15 + [step(0.5)] * 60, []),
    "one index and tied": (None, [ONE_INDEX] * 60, [(20, "all_tied"), (20, "not_looking")]),
    "one index, among few valid calls": (None, [step(0.1, chosen=(0, 0.4, 0, 0))] * 60, []),
    "one index, among many": (None, [step(0.15, chosen=(0, 0.6, 0, 0))] * 60, [(20, "not_looking")]),
    "one index mostly, but it looks": (None, [step(1.0, chosen=(0.96, 0.04), correct=(0.96, 0.04))] * 60, []),
    "one index, which always is right": (None, [step(1.0, chosen=SECOND, correct=SECOND)] * 60, [(20, "not_looking")]),
    "chance for five windows": (None, [AT_CHANCE] * 120, [(100, "not_looking")]),
    "worse than chance": (None, [step(0.1)] * 120, [(100, "not_looking")]),
    "a hair above chance": (None, [step(0.255)] * 120, [(100, "not_looking")]),
    "above chance, but for the last window": (None, [step(0.4)] * 80 + [AT_CHANCE] * 20, []),
    "above chance, with much scatter": (None, [step(0.15), step(0.45)] * 50, []),
    "chance, where chance is the task": (0, [step(0.25, correct=FIRST)] * 120, []),
    "chance, in an environment that draws whatever the flag": (0, [AT_CHANCE] * 120, [(100, "not_looking")]),
    "a task without choices": (None, [step(0.25, chosen=(), correct=())] * 120, []),
    "lines of an older run": (None, [OLDER] * 120, []),
    "chance, correct_index not logged": (None, [step(0.25, correct=())] * 120, []),
    "no call": (0, [unparsable("no_call")] * 60, [(10, "unparsable")]),
    "half are no call": (0, [unparsable("no_call", 0.5)] * 60, []),
    "no call at first": (0, [unparsable("no_call", 1 - number / 30) for number in range(30)], []),
    "no call, ever more": (0, [unparsable("no_call", number / 30) for number in range(30)], [(21, "unparsable")]),
    "another reason later": (
        0, [unparsable("no_call")] * 10 + [unparsable("extra_text")] * 10, [(10, "unparsable")],
    ),
    "entropy falls, accuracy does not rise": (
        None, [step(0.6)] * 20 + [step(0.6, entropy=0.02)] * 40, [(40, "entropy_collapse")],
    ),
    "entropy falls to 5 %": (None, [step(0.6)] * 20 + [step(0.6, entropy=0.025)] * 40, []),
    "entropy falls, accuracy rises": (None, [step(0.6)] * 20 + [step(0.7, entropy=0.02)] * 20, []),
    "entropy falls, all is right": (None, [step(0.96)] * 20 + [step(0.96, entropy=0.001)] * 40, []),
    "no entropy to begin with": (None, [step(0.6, entropy=0.0)] * 60, []),
    "every figure is missing": (None, [MISSING] * 120, []),
    "some figures are missing": (0, [ALL_WRONG, MISSING] * 10, [(20, "all_wrong")]),
    "most figures are missing": (0, [ALL_WRONG, MISSING, MISSING] * 20, []),
    "not a number": (0, [step(float("nan"), (0, float("nan"), 0), entropy=float("inf"))] * 60, []),
    "steps without a reward": (0, [{"loss": 0.0, "groups/mixed": 0.0}] * 10 + [SOLVED] * 20, [(30, "solved")]),
}  # fmt: skip


@pytest.mark.parametrize(("fixed_correct_index", "lines", "expected"), RUNS.values(), ids=RUNS.keys())
def test_which_warning_comes_after_which_step(fixed_correct_index, lines, expected):
    assert warned(lines, fixed_correct_index) == expected


def test_steps_without_a_reward_do_not_count():
    lines = [line for _ in range(20) for line in (SOLVED, {"loss": 0.0, "groups/mixed": 1.0})]
    assert warned(lines, 0) == [(39, "solved")]


def test_the_window_is_an_argument():
    assert warned([SOLVED] * 10, 0, window=4) == [(4, "solved")]
    with pytest.raises(ValueError, match="window=3, but .* at least 4"):
        Diagnostics(fixed_correct_index=0, window=3)


# how the picks made without looking are spread; a step has 8 episodes of 4 rollouts
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (6, 2, 1, 1), (97, 1, 1, 1)], ids=["even", "skewed", "one index"])
def test_blind_picks_are_told_from_looking_ones(weights):
    def line(rng: random.Random, looks: float) -> Metrics:
        rights = [rng.randrange(4) for _ in range(8) for _ in range(4)]
        for start in range(0, 32, 4):
            rights[start : start + 4] = [rights[start]] * 4
        picks = [right if rng.random() < looks else rng.choices(range(4), weights)[0] for right in rights]
        accuracy = sum(pick == right for pick, right in zip(picks, rights, strict=True)) / 32
        shares = [[numbers.count(index) / 32 for index in range(4)] for numbers in (picks, rights)]
        return step(accuracy, chosen=shares[0], correct=shares[1])

    rng = random.Random(0)
    blind = [[line(rng, looks=0.0) for _ in range(100)] for _ in range(12)]
    looking = [[line(rng, looks=0.2) for _ in range(100)] for _ in range(12)]
    assert sum(is_as_good_as_blind(lines) for lines in blind) >= 10
    assert not any(is_as_good_as_blind(lines) for lines in looking)


@pytest.mark.parametrize("accuracy", [0.8, 1.0])
def test_one_episode_a_step_that_is_looked_at_is_not_blind(accuracy):
    rng = random.Random(0)

    def line() -> Metrics:
        right = rng.randrange(4)
        pick = right if rng.random() < accuracy else (right + 1) % 4
        shares = [[float(number == index) for index in range(4)] for number in (pick, right)]
        return step(float(pick == right), chosen=shares[0], correct=shares[1])

    assert not is_as_good_as_blind([line() for _ in range(100)])


# what the run shows, its right index, and what the text must say
TEXTS: dict[str, tuple[Sequence[Metrics], int | None, str]] = {
    "solved, fixed": ([SOLVED] * 20, 0, r"right in 100% .* last 20 .* --candidates_per_episode, or --fixed_.* none$"),
    "solved, drawn": ([SOLVED] * 20, None, r"a higher --candidates_per_episode$"),
    "all wrong": ([ALL_WRONG] * 20, 0, r"wrong in 100% .* --num_rollouts, .* --temperature, .* --allow_reasoning"),
    "tied": ([step(0.4, (0.4, 0.6, 0))] * 20, 0, r"all right \(40%\) or all wrong \(60%\) .* raise --temperature"),
    "one index": ([step(0.25, chosen=SECOND)] * 20, None, r"100% .* are 1, right 25% .* --beta 0.01$"),
    "chance": ([AT_CHANCE] * 100, None, r"for 100 logged steps its accuracy, lately 0.25, .* raise --learning_rate"),
    "no call": ([unparsable("no_call")] * 10, 0, r"^80% .* no_call: the sample tables .* --model_id"),
    "extra text": ([unparsable("extra_text")] * 10, 0, r"extra_text: pass --allow_reasoning true"),
    "cut off": (
        [unparsable("malformed_json", clipped=0.9)] * 10, 0,
        r"malformed_json: most are cut off .* raise --max_completion_length",
    ),
    "not cut off": (
        [unparsable("malformed_json", clipped=0.1)] * 10, 0,
        r"malformed_json: lower --temperature",
    ),
    "too long is not helped by more length": (
        [unparsable("too_long", clipped=1.0)] * 10, 0,
        r"too_long: a call has at most 4,096 .* lower --temperature or --max_completion_length",
    ),
    "entropy": (
        [step(0.6)] * 20 + [step(0.6, entropy=0.02)] * 20, None, r"to 4.0% .* of 0.60 .* lower --learning_rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "fixed_correct_index", "pattern"), TEXTS.values(), ids=TEXTS.keys())
def test_a_warning_names_the_figures_and_the_remedy(lines, fixed_correct_index, pattern):
    assert re.search(pattern, text_of(lines, fixed_correct_index))


def test_every_way_not_to_parse_has_a_remedy():
    assert set(PARSE_REMEDIES) == set(ParseStatus) - {ParseStatus.OK}


def test_every_flag_that_a_remedy_names_exists(request):
    source = (request.config.rootpath / "fleet/run/diagnostics.py").read_text(encoding="utf-8")
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"--[a-z0-9_]+", source))
    assert len(named) > 8 and named <= known
