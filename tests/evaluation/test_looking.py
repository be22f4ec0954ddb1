"""The look curve's figures and the rule for blind gains: hand-made points, and false alarms counted by simulation."""

import random
from itertools import pairwise, product
from math import comb

import pytest

from environment import PickImageEnv
from fleet.controls import Control
from fleet.evaluation.figures import Answers, EvaluationPlan, evaluate, level_without_looking
from fleet.evaluation.held_out import draw_held_out
from fleet.evaluation.looking import LOOK_CONTROLS, Hits, LookPoint, gains_blindly, p_of_at_least, p_of_rise
from tests.conftest import call_text

pytestmark = pytest.mark.fast

M = 32
NUM_POINTS = 10


def hits(num_right: int, first: int = 0) -> Hits:
    """Right on `num_right` of M episodes from the `first` on."""
    return tuple((number - first) % M < num_right for number in range(M))


def point(true: int, grey: int, first_grey: int = 0) -> LookPoint:
    return LookPoint(0, hits(true), hits(grey, first_grey), hits(true))


START = point(8, 8)
# the point, and true if it is a blind gain
CASES = {
    "all by a leak": (point(32, 32), True),
    "most by a leak": (point(26, 26), True),
    "a leak, and a little by looking": (point(29, 26), True),
    "a leak, and as much by looking": (point(32, 20), False),
    "it looks": (point(32, 8), False),
    "it looks, and grey is lucky": (point(32, 14), False),
    "nothing rose": (point(8, 8), False),
    "both rose a little": (point(13, 13), False),
    "both fell": (point(0, 0), False),
    "grey alone rose": (point(8, 30), False),
}


@pytest.mark.parametrize(("now", "is_blind"), CASES.values(), ids=CASES.keys())
def test_which_rise_is_a_blind_gain(now: LookPoint, is_blind: bool) -> None:
    assert gains_blindly(START, now, level=0.25, num_points=NUM_POINTS) is is_blind


def test_a_task_whose_answer_is_always_the_same_needs_no_look() -> None:
    assert not gains_blindly(START, point(32, 32), level=1.0, num_points=NUM_POINTS)


def test_valid_calls_that_are_learnt_bring_a_policy_to_chance_and_are_no_leak() -> None:
    assert not gains_blindly(point(0, 0), point(9, 9), level=0.25, num_points=NUM_POINTS)
    assert gains_blindly(point(0, 0), point(24, 24), level=0.25, num_points=NUM_POINTS)


def test_a_policy_that_looked_at_first_and_then_gains_by_a_leak_alone() -> None:
    looked = LookPoint(0, hits(16), hits(8), hits(16))
    assert gains_blindly(looked, LookPoint(10, hits(32), hits(28), hits(32)), level=0.25, num_points=NUM_POINTS)


def test_a_start_that_knows_the_leak_gains_nothing_by_it() -> None:
    assert not gains_blindly(point(30, 30), point(32, 32), level=0.25, num_points=NUM_POINTS)


def test_more_points_ask_for_more_evidence() -> None:
    now = point(20, 20)
    assert [gains_blindly(START, now, level=0.25, num_points=number) for number in (1, 100, 100_000)] == [
        True,
        True,
        False,
    ]


def test_episodes_that_were_left_out_do_not_count() -> None:
    none: Hits = (None,) * M
    assert not gains_blindly(START, LookPoint(1, hits(32), none, none), level=0.25, num_points=NUM_POINTS)
    half = tuple(hit if number % 2 else None for number, hit in enumerate(hits(32)))
    shown = LookPoint(1, hits(32), half, half)
    assert shown.figures()["control/grey"] == 1.0 and shown.figures()["control/swapped_episodes"] == 16
    assert gains_blindly(START, shown, level=0.25, num_points=1)


def test_a_point_is_the_same_after_a_checkpoint() -> None:
    given = LookPoint(25, (True, False, None), (False, None, True), (None, None, None))
    assert LookPoint.from_json(given.as_json()) == given
    assert "control/swapped" not in given.figures()


def test_the_p_value_of_a_rise_is_that_of_all_signs() -> None:
    for changes in product((-2, -1, 0, 1, 2), repeat=4):
        moved = [change for change in changes if change]
        sums = [sum(s * c for s, c in zip(signs, moved, strict=True)) for signs in product((1, -1), repeat=len(moved))]
        assert p_of_rise(changes) == sum(total >= sum(changes) for total in sums) / len(sums)
    assert p_of_rise([1] * 14 + [-1] * 3) == sum(comb(17, k) for k in range(14, 18)) / 2**17
    assert p_of_at_least(3, 4, 0.5) == 5 / 16 and p_of_at_least(4, 4, 1.0) == 1.0 and p_of_at_least(0, 0, 0.5) == 1.0


# --- false alarms -----------------------------------------------------------------------------------------------------


def false_alarms(kind: str, num_runs: int, num_candidates: int = 4) -> tuple[int, int]:
    """(runs with two blind points in a row, runs with one) of `num_runs`, without any leak.

    looks: right on true pictures ever oftener, and guesses grey ones. habits: answers by the instruction alone, another
    way at each point. habit: the same from the second point on.
    """
    rng, alarms, singles = random.Random(f"{kind}/{num_candidates}"), 0, 0
    for _ in range(num_runs):
        rights = [rng.randrange(num_candidates) for _ in range(M)]
        level = max(1 / num_candidates, max(rights.count(place) for place in range(num_candidates)) / M)
        ease = [rng.random() for _ in range(M)]
        points: list[LookPoint] = []
        for number in range(NUM_POINTS + 1):
            guessed = tuple(rng.randrange(num_candidates) == right for right in rights)
            if kind == "habit" and number > 1:
                guessed = tuple(bool(hit) for hit in points[-1].is_right_grey)
            seen = guessed
            if kind == "looks":
                accuracy = 0.46 + 0.5 * number / NUM_POINTS
                seen = tuple(value < accuracy for value in ease)
            points.append(LookPoint(number, seen, guessed, seen))
        found = [gains_blindly(points[0], now, level=level, num_points=NUM_POINTS) for now in points]
        alarms += any(first and second for first, second in pairwise(found))
        singles += any(found)
    return alarms, singles


@pytest.mark.parametrize(("kind", "most"), [("looks", 0), ("habits", 0), ("habit", 2)])
def test_luck_alone_hardly_ever_alarms(kind: str, most: int) -> None:
    alarms, singles = false_alarms(kind, 1000)
    assert alarms <= most and singles <= 5


# --- points from answers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(picture_folder):
    env = PickImageEnv(picture_folder, 4, None, seed=77)
    return EvaluationPlan(env, tuple(draw_held_out(env, M)[0]), seed=77, controls=LOOK_CONTROLS)


def answers_of(plan: EvaluationPlan, kind: str):
    """A policy that knows the answers to the plan's own pictures ("looks"), or goes by its instruction alone."""
    by_images = {episode.images: episode.labels for episode in plan.episodes}

    def say(episode):
        words = episode.messages[-1]["content"][-1]["text"]
        if kind == "blind":
            return call_text(len(words) % 4)
        labels = by_images.get(episode.images, episode.labels if episode.images[0] in all_paths else ())
        return call_text(labels.index(episode.target) if episode.target in labels else 0)

    all_paths = {path for episode in plan.episodes for path in episode.images}
    return lambda episodes, num_samples: [Answers(say(episode)) for episode in episodes]


def test_a_plan_asks_for_its_own_controls_alone(plan: EvaluationPlan) -> None:
    evaluation = evaluate(answers_of(plan, "blind"), plan, "blind")
    asked = {control for control, found in evaluation.hits.items() if any(hit is not None for hit in found)}
    assert asked == {Control.BLANK_IMAGES, Control.SWAPPED_IMAGES}
    assert evaluation.document["controls"]["redrawn_images"] is None


def test_a_blind_policy_answers_grey_pictures_as_true_ones_and_follows_no_swap(plan: EvaluationPlan) -> None:
    blind = LookPoint.of(evaluate(answers_of(plan, "blind"), plan, "blind"), plan.episodes, 5)
    assert blind.is_right == blind.is_right_grey and blind.step == 5
    assert blind.figures()["control/swapped"] == 0.0 and blind.figures()["control/episodes"] == M


def test_the_first_episodes_of_an_evaluation_give_the_same_point(plan: EvaluationPlan) -> None:
    whole = EvaluationPlan(plan.env, plan.episodes, seed=77)
    few = EvaluationPlan(plan.env, plan.episodes[:8], seed=77, controls=LOOK_CONTROLS)
    policy = answers_of(plan, "blind")
    from_whole = LookPoint.of(evaluate(policy, whole, "m"), few.episodes, 0)
    assert from_whole == LookPoint.of(evaluate(policy, few, "m"), few.episodes, 0)
    assert len(from_whole.is_right) == 8
    # an episode whose picture has gone bad is left out of the evaluation
    rest = EvaluationPlan(plan.env, plan.episodes[1:], seed=77)
    without_first = LookPoint.of(evaluate(policy, rest, "m"), few.episodes, 0)
    assert without_first.is_right == (None, *from_whole.is_right[1:])


def test_the_level_is_chance_or_the_commonest_answer(plan: EvaluationPlan, picture_folder) -> None:
    counts = [sum(episode.correct_index == place for episode in plan.episodes) for place in range(4)]
    assert level_without_looking(plan) == max(0.25, max(counts) / M)
    fixed = PickImageEnv(picture_folder, 4, 0, seed=77)
    assert level_without_looking(EvaluationPlan(fixed, tuple(draw_held_out(fixed, 8)[0]), seed=77)) == 1.0
