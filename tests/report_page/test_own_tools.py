"""The report of a task with a tool of its own, opened in a real browser: records and figures are Fleet's own."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from environment import Environment, Episode, load_environment_class
from fleet.evaluation.figures import Answers, EvaluationPlan, evaluate
from fleet.rl.rollouts import GroupRecord, episode_records, make_records, rollout_metrics
from fleet.verdicts import outcome_names, verdict_on
from report import write_report
from tests.helpers import REPOSITORY
from tests.report_page.pages import metrics_line, write_lines, write_run
from utils.images import open_image
from utils.tool_calls import make_call_str

NUM_EPISODES = 6
PROSE = "It is the left one."
DASH = "\u2013"


def gold(env: Environment, episode: Episode) -> str:
    return make_call_str(env.solution(episode, ()))


def write_own_run(folder: Path, env: Environment, others: Sequence[str]) -> Path:
    """A run of one step: each group says the gold answer and `others`; the evaluation is of the gold answers."""
    write_run(folder)
    (folder / "thumbnails").mkdir()
    episodes = [env.with_messages(env.episode(number)) for number in range(NUM_EPISODES)]
    texts, digests = [], []
    for episode in episodes:
        texts += [gold(env, episode), *others]
        picture = open_image(episode.images[0])
        digests.append(hashlib.sha256(picture.tobytes()).digest())
        picture.save(folder / "thumbnails" / f"{digests[-1].hex()[:16]}.webp")
    size = 1 + len(others)
    verdicts = [verdict_on(env, episodes[place // size], text) for place, text in enumerate(texts)]
    rewards = [float(verdict.is_right) for verdict in verdicts]
    records = make_records(episode_records(env, episodes, digests)[0], texts, verdicts, rewards)
    groups = [
        GroupRecord(1, number, records[number * size].episode, tuple(records[number * size : (number + 1) * size]))
        for number in range(NUM_EPISODES)
    ]
    write_lines(folder / "rollouts.jsonl", [group.as_json() for group in groups])
    # the figures of any run, and in place of PickImage's those of this environment
    common = {
        name: value for name, value in metrics_line(1, 0.5).items() if "outcome/" not in name and "chosen/" not in name
    }
    write_lines(folder / "metrics.jsonl", [common | rollout_metrics(records, size, outcome_names(env))])
    plan = EvaluationPlan(env, tuple(episodes), seed=0)
    document = evaluate(lambda asked, _: [Answers(gold(env, episode)) for episode in asked], plan, "scripted").document
    write_lines(folder / "evaluations.jsonl", [document | {"step": 1}])
    return folder


def own(name: str, **arguments: int) -> Environment:
    env: Environment = load_environment_class(f"{REPOSITORY}/examples/{name}")(**arguments)
    return env


def wanted_of(run: Path) -> list[str]:
    return [json.loads(line)["solution"] for line in (run / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture
def click_run(tmp_path: Path) -> Path:
    # the corner is paper in every episode
    return write_own_run(
        tmp_path / "click",
        own("click.py:ClickEnv"),
        ['<tool_call>\n{"name": "click", "arguments": {"x": 0, "y": 0}}\n</tool_call>', PROSE],
    )


@pytest.fixture
def counting_run(tmp_path: Path) -> Path:
    return write_own_run(
        tmp_path / "counting",
        own("counting.py:CountingEnv"),
        ['<tool_call>\n{"name": "count", "arguments": {"n": 9}}\n</tool_call>', PROSE],
    )


def table_of(shown) -> dict[str, str]:
    names = [text.split("\n")[0] for text in shown.texts("#evaluation-table tbody th")]
    return dict(
        zip(names, (text.split("\n")[0].strip() for text in shown.texts("#evaluation-table tbody td")), strict=True)
    )


def test_a_click_is_shown_by_its_own_outcomes_without_choices(visit, click_run):
    shown = visit(write_report(click_run))
    groups = shown.walk()
    assert [group["outcomes"] for group in groups] == [["inside", "background", "unparsable"]] * NUM_EPISODES
    assert [group["widths"] for group in groups] == [[56]] * NUM_EPISODES
    said = "\n".join(shown.texts("#groups header"))
    assert all(f"wanted: {wanted}" in said for wanted in wanted_of(click_run))
    assert {text.strip() for text in shown.texts("#groups figcaption")} == {""}
    # no picture is picked, so none is framed as the right one
    assert shown.page.locator("#groups .right").count() == shown.page.locator("#heat-map").count() == 0
    assert shown.page.locator("#by-choice-table").count() == 0
    table = table_of(shown)
    assert table["Greedy accuracy"] == table["Control: swapped images"] == "100.0%" and table["Chance"] == "25.0%"
    assert table["Control: permuted order"] == table["Control: redrawn images"] == DASH
    assert shown.page.locator("#evaluation-table").inner_text().count("No such control for this environment.") == 2
    said = shown.page.locator("main").inner_text().lower()
    assert "pick" not in said and "frame" not in said
    assert shown.complaints == []


def test_the_filter_offers_the_outcomes_of_the_environment(visit, click_run):
    shown = visit(write_report(click_run))
    offered = shown.page.locator("#outcomes input").evaluate_all("found => found.map((one) => one.value)")
    assert set(offered) == {"", "inside", "background", "unparsable"}
    shown.choose("background")
    assert shown.texts("#count") == ["6 of 6 groups shown"]


def test_a_count_has_a_table_by_choice(visit, counting_run):
    shown = visit(write_report(counting_run))
    assert [group["outcomes"] for group in shown.walk()] == [["exact", "far_off", "unparsable"]] * NUM_EPISODES
    counts = wanted_of(counting_run)
    assert shown.texts("#heat-map thead th") == ["", "1", "2", "3", "4", "none"]
    wanted = [
        str(counts.count(right)) if right == said else "0" for right in "1234" for said in ("1", "2", "3", "4", "none")
    ]
    assert shown.texts("#heat-map td") == wanted
    table = table_of(shown)
    assert (table["Greedy accuracy"], table["Chance"]) == ("100.0%", "25.0%")
    assert table["Control: swapped images"] == DASH
    assert shown.complaints == []


def test_turns_are_shown_with_what_a_tool_answered_between_them(visit, click_run):
    path = click_run / "rollouts.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    picture = groups[0]["images"][0]
    groups[0]["rollouts"][0]["turns"] = [
        {"completion": "<first>", "num_tokens": 3, "observation": "closer & <b>", "images": [picture, "gone.webp"]},
        {"completion": "second", "num_tokens": 2, "observation": None, "images": []},
    ]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    shown = visit(write_report(click_run))
    talked = shown.page.locator("#groups .group").first.locator(".rollout").first
    assert talked.locator("pre").all_inner_texts() == ["<first>", "second"]
    assert talked.locator(".answer span").first.inner_text() == "tool: closer & <b>"
    assert talked.locator(".answer img").evaluate("image => image.naturalWidth") == 56
    assert talked.locator(".answer .placeholder").inner_text() == "picture missing"
    assert shown.page.locator("#groups .answer").count() == 1
    assert shown.complaints == []
