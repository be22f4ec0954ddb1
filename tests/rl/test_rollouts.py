"""The logged figures of a batch, worked out by hand for three groups of two."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from environment import Outcome, PickImageTask
from fleet.episodes import Episode
from fleet.rl.rollouts import (
    EpisodeRecord,
    GroupRecord,
    RolloutRecord,
    episode_records,
    instruction_of,
    make_records,
    picture_chosen,
    rollout_metrics,
)
from fleet.verdicts import Verdict, verdict_on
from tests.conftest import call_text
from utils.tool_calls import ParseStatus, ToolCall

pytestmark = pytest.mark.fast

OUTCOMES = [str(outcome) for outcome in Outcome]


def picked(outcome: str, index: int) -> Verdict:
    is_valid = outcome in ("correct", "wrong_index")
    components = {"correct": float(outcome == "correct"), "valid_call": float(is_valid)}
    return Verdict(outcome, outcome == "correct", components, call=ToolCall("pick_image", {"index": index}))


def refused(status: str) -> Verdict:
    return Verdict("unparsable", is_right=False, parse_status=ParseStatus(status))


RIGHT, WRONG = picked("correct", 0), picked("wrong_index", 2)
OUT_OF_RANGE, NEGATIVE = picked("index_out_of_range", 7), picked("index_out_of_range", -1)
PROSE, CUT_OFF = refused("no_call"), refused("malformed_json")


def record(verdict: Verdict, num_candidates: int = 3) -> RolloutRecord:
    choices = tuple(str(index) for index in range(num_candidates))
    episode = EpisodeRecord("?", None, 0, ("",) * num_candidates, ("",) * num_candidates, choices, "0")
    return RolloutRecord(episode, "?", verdict, reward=0.0, advantage=0.0)


def metrics_of(*verdicts: Verdict, group_size: int) -> dict[str, float]:
    return rollout_metrics([record(verdict) for verdict in verdicts], group_size, OUTCOMES)


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
            "chosen/0": 3 / 6,
            "chosen/1": 0,
            "chosen/2": 1 / 6,
            "correct/0": 1,
            "correct/1": 0,
            "correct/2": 0,
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


def test_chosen_counts_every_rollout_but_names_only_choices():
    metrics = metrics_of(WRONG, NEGATIVE, OUT_OF_RANGE, PROSE, group_size=2)
    chosen = {name: share for name, share in metrics.items() if name.startswith("chosen/")}
    assert chosen == {"chosen/0": 0, "chosen/1": 0, "chosen/2": 1 / 4}


def test_chosen_reaches_as_far_as_the_largest_episode():
    metrics = rollout_metrics([record(RIGHT, 2), record(RIGHT, 2), record(RIGHT, 5), record(RIGHT, 5)], 2, OUTCOMES)
    assert [name for name in metrics if name.startswith("chosen")] == [f"chosen/{index}" for index in range(5)]


def test_a_task_without_choices_has_its_own_outcomes_and_no_figures_by_choice():
    episode = EpisodeRecord("Click.", "cat", None, ("cat",), ("a.webp",), (), '{"x": 1, "y": 2}')
    call = ToolCall("click", {"x": 1, "y": 2})
    hit = Verdict("hit", is_right=True, components={"closeness": 0.5}, call=call)
    metrics = rollout_metrics(
        [RolloutRecord(episode, "?", verdict, 0.5) for verdict in (hit, refused("wrong_name"))],
        2,
        ["hit", "miss", "unparsable"],
    )
    assert {name: share for name, share in metrics.items() if not name.startswith("parse/")} == {
        "accuracy": 0.5,
        "valid_call": 0.5,
        "outcome/hit": 0.5,
        "outcome/miss": 0,
        "outcome/unparsable": 0.5,
        "groups/all_right": 0,
        "groups/all_wrong": 0,
        "groups/mixed": 1,
    }


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
    episode = Episode((Path("a.png"), Path("b.png"), Path("c.png")), correct_index=0)
    metrics = metrics_of(*[verdict_on(PickImageTask(), episode, text) for text in answers], group_size=2)
    assert all(0 <= share <= 1 for share in metrics.values())
    for family in ("outcome/", "parse/", "groups/"):
        assert math.isclose(sum(share for name, share in metrics.items() if name.startswith(family)), 1)
    assert metrics["accuracy"] == metrics["outcome/correct"]
    assert metrics["chosen/0"] == answers.count(call_text(0)) / len(answers)


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


def test_a_line_of_an_older_fleet_is_read():
    line = {
        "step": 3, "group": 1, "instruction": "Pick the cat.", "target": "cat", "correct_index": 1,
        "labels": ["dog", "cat"], "images": ["a.webp", "b.webp"],
        "rollouts": [
            {"completion": "?", "outcome": outcome, "parse_status": status, "index": index, "reward": 0.0,
             "advantage": None}
            for outcome, status, index in (
                ("correct", "ok", 1), ("wrong_index", "ok", 0), ("index_out_of_range", "ok", 7),
                ("unparsable", "no_call", None))
        ],
    }  # fmt: skip
    group = GroupRecord.from_json(line)
    assert (group.episode.choices, group.episode.solution) == (("0", "1"), "1")
    verdicts = [rollout.verdict for rollout in group.rollouts]
    assert [(verdict.is_right, verdict.is_valid_call) for verdict in verdicts] == [
        (True, True), (False, True), (False, False), (False, False),
    ]  # fmt: skip
    assert [(rollout.chosen, picture_chosen(rollout)) for rollout in group.rollouts] == [
        ("1", 1), ("0", 0), (None, None), (None, None),
    ]  # fmt: skip


def test_the_instruction_is_the_last_text_of_the_user():
    said = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "Pick."}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    assert instruction_of(said) == "Pick."
    assert instruction_of([{"role": "user", "content": [{"type": "image"}]}]) == ""


def test_records_name_each_groups_pictures_choices_and_answer():
    task = PickImageTask()
    episodes = [
        Episode(tuple(map(Path, names)), ({"role": "user", "content": [{"type": "text", "text": asks}]},), index)
        for names, asks, index in (("ab", "One?", 1), ("cde", "Two?", 0))
    ]
    texts = [call_text(1), call_text(0), "none", call_text(2)]
    verdicts = [verdict_on(task, episodes[place // 2], text) for place, text in enumerate(texts)]
    seen, broken = episode_records(task, episodes, [bytes([number]) * 16 for number in range(5)])
    assert broken is None
    records = make_records(seen, texts, verdicts, [1, 2, 3, 4])
    first, second = records[0].episode, records[2].episode
    assert (first.images, first.choices, first.solution) == (("0" * 16 + ".webp", "01" * 8 + ".webp"), ("0", "1"), "1")
    assert second.images == ("02" * 8 + ".webp", "03" * 8 + ".webp", "04" * 8 + ".webp")
    assert (second.choices, second.solution, second.instruction) == (("0", "1", "2"), "0", "Two?")
    assert [(record.chosen, record.reward) for record in records] == [("1", 1), ("0", 2), (None, 3), ("2", 4)]
    assert [record.verdict.outcome for record in records] == ["correct", "wrong_index", "unparsable", "wrong_index"]
