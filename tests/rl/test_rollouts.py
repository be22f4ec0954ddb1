"""The logged figures of a batch, worked out by hand for three groups of two."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from environment import Judgement, Outcome, judge
from fleet.rl.rollouts import EpisodeRecord, GroupRecord, RolloutRecord, rollout_metrics
from tests.conftest import call_text
from utils.tool_calls import ParseStatus

pytestmark = pytest.mark.fast

RIGHT = Judgement(Outcome.CORRECT, ParseStatus.OK, 0)
WRONG = Judgement(Outcome.WRONG_INDEX, ParseStatus.OK, 2)
OUT_OF_RANGE = Judgement(Outcome.INDEX_OUT_OF_RANGE, ParseStatus.OK, 7)
NEGATIVE = Judgement(Outcome.INDEX_OUT_OF_RANGE, ParseStatus.OK, -1)
PROSE = Judgement(Outcome.UNPARSABLE, ParseStatus.NO_CALL, None)
CUT_OFF = Judgement(Outcome.UNPARSABLE, ParseStatus.MALFORMED_JSON, None)


def record(verdict: Judgement, num_candidates: int = 3) -> RolloutRecord:
    episode = EpisodeRecord("?", None, 0, ("",) * num_candidates, ("",) * num_candidates)
    return RolloutRecord(episode, "?", verdict, reward=0.0, advantage=0.0)


def metrics_of(*verdicts: Judgement, group_size: int) -> dict[str, float]:
    return rollout_metrics([record(verdict) for verdict in verdicts], group_size)


def test_every_figure_of_three_groups():
    metrics = metrics_of(RIGHT, RIGHT, WRONG, PROSE, RIGHT, OUT_OF_RANGE, group_size=2)
    assert metrics == pytest.approx(
        {
            "accuracy": 3 / 6,
            "valid_call": 4 / 6,
            "outcome/correct": 3 / 6,
            "outcome/wrong_index": 1 / 6,
            "outcome/index_out_of_range": 1 / 6,
            "outcome/unparsable": 1 / 6,
            "parse/ok": 5 / 6,
            "parse/no_call": 1 / 6,
            "parse/multiple_calls": 0,
            "parse/extra_text": 0,
            "parse/malformed_json": 0,
            "parse/wrong_name": 0,
            "parse/bad_arguments": 0,
            "parse/too_long": 0,
            "groups/all_right": 1 / 3,
            "groups/all_wrong": 1 / 3,
            "groups/mixed": 1 / 3,
            "chosen_index/0": 3 / 6,
            "chosen_index/1": 0,
            "chosen_index/2": 1 / 6,
            "correct_index/0": 1,
            "correct_index/1": 0,
            "correct_index/2": 0,
        }
    )


# verdicts, size of a group, then the shares of groups all right, all wrong and mixed
GROUPS = {
    "one of four right": ([RIGHT, WRONG, WRONG, WRONG], 4, (0, 0, 1)),
    "three of four right": ([RIGHT, RIGHT, RIGHT, PROSE], 4, (0, 0, 1)),
    "all right": ([RIGHT] * 4, 4, (1, 0, 0)),
    "all wrong in the same way": ([WRONG] * 4, 4, (0, 1, 0)),
    "all wrong, though rewards differ": ([WRONG, PROSE, OUT_OF_RANGE, CUT_OFF], 4, (0, 1, 0)),
    "groups of two are not one of four": ([RIGHT, RIGHT, WRONG, WRONG], 2, (1 / 2, 1 / 2, 0)),
    "order within the groups matters": ([RIGHT, WRONG, RIGHT, WRONG], 2, (0, 0, 1)),
    "four groups": ([RIGHT, RIGHT, WRONG, RIGHT, PROSE, RIGHT, PROSE, WRONG], 2, (1 / 4, 1 / 4, 1 / 2)),
}


@pytest.mark.parametrize(("verdicts", "group_size", "shares"), GROUPS.values(), ids=GROUPS.keys())
def test_groups(verdicts, group_size, shares):
    metrics = metrics_of(*verdicts, group_size=group_size)
    assert tuple(metrics[f"groups/{kind}"] for kind in ("all_right", "all_wrong", "mixed")) == shares


def test_chosen_index_counts_every_rollout_but_names_only_indices_in_range():
    metrics = metrics_of(WRONG, NEGATIVE, OUT_OF_RANGE, PROSE, group_size=2)
    chosen = {name: share for name, share in metrics.items() if name.startswith("chosen_index/")}
    assert chosen == {"chosen_index/0": 0, "chosen_index/1": 0, "chosen_index/2": 1 / 4}


def test_chosen_index_reaches_as_far_as_the_largest_episode():
    metrics = rollout_metrics([record(RIGHT, 2), record(RIGHT, 2), record(RIGHT, 5), record(RIGHT, 5)], 2)
    assert [name for name in metrics if name.startswith("chosen")] == [f"chosen_index/{index}" for index in range(5)]


def test_names_are_the_same_whatever_happened():
    assert list(metrics_of(RIGHT, RIGHT, group_size=2)) == list(metrics_of(PROSE, CUT_OFF, group_size=2))


@pytest.mark.parametrize(("num_rollouts", "group_size"), [(0, 2), (3, 2), (2, 4), (5, 4)])
def test_anything_but_whole_groups_is_refused(num_rollouts, group_size):
    with pytest.raises(ValueError, match=f"{num_rollouts} rollouts, but wanted .* whole groups of {group_size}"):
        metrics_of(*[RIGHT] * num_rollouts, group_size=group_size)


ANSWERS = st.sampled_from([call_text(index) for index in (-1, 0, 1, 2, 3)] + ["", "?", call_text("true")])


@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=4))
def test_shares_of_a_family_sum_to_one(groups):
    answers = [text for group in groups for text in group]
    metrics = metrics_of(*[judge(text, 0, 3) for text in answers], group_size=2)
    assert all(0 <= share <= 1 for share in metrics.values())
    for family in ("outcome/", "parse/", "groups/"):
        assert math.isclose(sum(share for name, share in metrics.items() if name.startswith(family)), 1)
    assert metrics["accuracy"] == metrics["outcome/correct"]
    assert metrics["chosen_index/0"] == answers.count(call_text(0)) / len(answers)


def test_a_group_comes_back_from_its_line():
    rollouts = tuple(RolloutRecord(record(RIGHT).episode, "said", verdict, 0.5, -0.25) for verdict in (RIGHT, NEGATIVE))
    group = GroupRecord(3, 1, record(RIGHT).episode, rollouts)
    assert GroupRecord.from_json(json.loads(json.dumps(group.as_json()))) == group


def test_a_dropped_reward_is_null_in_a_line_and_comes_back_as_none():
    dropped = RolloutRecord(record(PROSE).episode, "said", PROSE, math.nan)
    line = GroupRecord(3, 1, record(PROSE).episode, (dropped,)).as_json()
    assert line["rollouts"][0]["reward"] is line["rollouts"][0]["advantage"] is None
    assert math.isnan(GroupRecord.from_json(line).rollouts[0].reward)


def test_a_line_of_before_labels_were_checked_is_read():
    line = GroupRecord(3, 1, record(RIGHT).episode, (record(RIGHT),)).as_json()
    assert GroupRecord.from_json({**line, "labels": []}).episode.labels == ()


@pytest.mark.parametrize("change", [{"correct_index": 3}, {"correct_index": -1}, {"images": [], "labels": []}])
def test_a_line_with_an_index_of_no_picture_is_refused(change: dict[str, Any]):
    line = GroupRecord(3, 1, record(RIGHT).episode, (record(RIGHT),)).as_json()
    with pytest.raises(ValueError, match="no picture"):
        GroupRecord.from_json({**line, **change})
