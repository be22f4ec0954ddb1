"""Scripted policies with known answers get the figures that follow; nothing that was drawn is held out."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from environment import (
    Environment,
    Episode,
    Observation,
    PickImageEnv,
    ToolCall,
    Verdict,
    load_environment_class,
)
from fleet.episode_numbers import FURTHER_STRIDE
from fleet.errors import RunStopped
from fleet.evaluation.figures import Answers, Evaluation, EvaluationPlan, evaluate, headline_figures, with_baseline
from fleet.evaluation.held_out import RunEpisodes, draw_held_out, fingerprint
from tests.conftest import call_text
from utils.images import open_image
from utils.tool_calls import make_call_str

pytestmark = pytest.mark.fast

NUM_EPISODES = 200
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan(picture_folder: Path) -> EvaluationPlan:
    env = PickImageEnv(picture_folder, 4, None, seed=77)
    return EvaluationPlan(env, tuple(draw_held_out(env, NUM_EPISODES)[0]), seed=77, num_samples=4, ks=(1, 2, 4))


SCHEMA = REPOSITORY / "docs" / "evaluation.schema.json"


def policy_of(answer: Callable[[Episode, int], str]) -> Callable[[Sequence[Episode], int], list[Answers]]:
    """A policy whose n-th text for an episode is answer(episode, n)."""
    return lambda episodes, num_samples: [
        Answers(answer(episode, 0), tuple(answer(episode, 1 + number) for number in range(num_samples)))
        for episode in episodes
    ]


class LookAgain(PickImageEnv):
    """Answers the first pick in range with words, and judges the second."""

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        in_range = turns[-1].arguments["index"] < episode.num_candidates
        return Observation("sure?") if len(turns) == 1 and in_range else super().respond(episode, turns[-1:])


def test_rollouts_of_several_turns_are_judged_by_their_last(picture_folder: Path) -> None:
    env = LookAgain(picture_folder, 4, None, seed=77)
    episodes = tuple(draw_held_out(env, 40)[0])
    plan = EvaluationPlan(env, episodes, seed=77, max_turns=2)

    def kind_of(episode: Episode) -> int:
        return random.Random(f"{episode.labels} {episode.target}").randrange(5)

    def said(episode: Episode) -> tuple[str, ...]:
        right, wrong = call_text(episode.correct_index), call_text(((episode.correct_index or 0) + 1) % 4)
        kinds = [(wrong, right), (right, wrong), (right,), (right, "no call"), (call_text(9),)]
        return kinds[kind_of(episode)]

    document = evaluate(lambda asked, _: [Answers(said(episode)) for episode in asked], plan, "talker").document
    outcomes = {name: round(figure["value"] * 40) for name, figure in document["outcome"].items()}
    number = [kind_of(episode) for episode in episodes]
    assert outcomes == {
        "correct": number.count(0), "wrong_index": number.count(1), "index_out_of_range": number.count(4),
        "unparsable": number.count(3), "out_of_turns": 0, "out_of_context": number.count(2), "bad_observation": 0,
    }  # fmt: skip
    assert all(number.count(kind) for kind in range(5))
    assert document["chance"]["value"] == 0.25
    assert not list(Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(document))


COLOURS = {
    "black cross": (0, 0, 0),
    "blue square": (0, 0, 255),
    "green triangle": (0, 255, 0),
    "orange heart": (255, 165, 0),
    "red circle": (255, 0, 0),
    "yellow star": (255, 255, 0),
}


def what_is_shown(image: Path | Image.Image) -> str | None:
    """The label of the nearest colour; None for grey."""
    seen = open_image(image).getpixel((0, 0))
    assert isinstance(seen, tuple)
    if max(seen) - min(seen) < 20:
        return "black cross" if max(seen) < 60 else None
    # as bright as can be, whatever its shade
    seen = tuple(255 * value // max(seen) for value in seen)
    return min(COLOURS, key=lambda label: sum((a - b) ** 2 for a, b in zip(COLOURS[label], seen, strict=True)))


def looks(episode: Episode, number: int) -> str:
    """Finds the picture that the instruction names by its pixels alone; picks 0 where there is none."""
    wanted = episode.messages[-1]["content"][-1]["text"].removeprefix("Pick the ").split(".")[0]
    shown = [what_is_shown(image) for image in episode.images]
    return call_text(shown.index(wanted) if wanted in shown else 0)


def values(evaluation: Evaluation) -> dict[str, float | None]:
    document = evaluation.document
    return {name: document["controls"][name]["value"] for name in document["controls"]} | {
        "greedy": document["greedy_accuracy"]["value"],
        "sampled": document["sampled_accuracy"]["value"],
    }


def share_of_index(plan: EvaluationPlan, index: int) -> float:
    return sum(episode.correct_index == index for episode in plan.episodes) / NUM_EPISODES


def test_one_that_always_picks_1_has_a_habit_and_no_eyes(plan: EvaluationPlan) -> None:
    of_index_1 = share_of_index(plan, 1)
    assert 0.15 < of_index_1 < 0.35
    assert values(evaluate(policy_of(lambda episode, number: call_text(1)), plan, "always 1")) == {
        "greedy": of_index_1,
        "sampled": of_index_1,
        "blank_images": of_index_1,
        "redrawn_images": of_index_1,
        "swapped_images": 0.0,
        "permuted_order": 1.0,
    }


def test_one_that_looks_follows_the_picture_and_is_lost_without(plan: EvaluationPlan) -> None:
    assert values(evaluate(policy_of(looks), plan, "looks")) == {
        "greedy": 1.0,
        "sampled": 1.0,
        "blank_images": share_of_index(plan, 0),
        "redrawn_images": 1.0,
        "swapped_images": 1.0,
        "permuted_order": 0.0,
    }


def test_one_that_remembers_places_is_right_and_found_out(plan: EvaluationPlan) -> None:
    # it knows an episode by what is asked and which pictures are there, and never where they are
    episodes = {(episode.target, frozenset(episode.labels)): episode for episode in plan.episodes}
    assert len(episodes) > 30
    places = {key: episode.correct_index for key, episode in episodes.items()}
    remembers = policy_of(lambda episode, number: call_text(places[episode.target, frozenset(episode.labels)]))
    figures = values(evaluate(remembers, replace(plan, episodes=tuple(episodes.values())), "remembers"))
    assert figures == {
        "greedy": 1.0,
        "sampled": 1.0,
        "blank_images": 1.0,  # accuracy that survives blank pictures was never sight
        "redrawn_images": 1.0,
        "swapped_images": 0.0,
        "permuted_order": 1.0,
    }


def test_one_that_guesses_is_at_chance_everywhere(plan: EvaluationPlan) -> None:
    rng = random.Random(3)
    evaluation = evaluate(policy_of(lambda episode, number: call_text(rng.randrange(4))), plan, "random")
    for name, value in values(evaluation).items():
        assert value == pytest.approx(0.25, abs=0.11), name
    passes = evaluation.document["pass_at_k"]
    # 1 - 0.75 ** k
    assert [passes[k]["value"] for k in ("1", "2", "4")] == pytest.approx([0.25, 0.4375, 0.6836], abs=0.1)
    assert passes["1"]["value"] == pytest.approx(evaluation.document["sampled_accuracy"]["value"])


def test_one_that_calls_twice_is_never_right(plan: EvaluationPlan) -> None:
    evaluation = evaluate(policy_of(lambda episode, number: looks(episode, 0) + call_text(0)), plan, "twice")
    assert values(evaluation) == {
        "greedy": 0.0,
        "sampled": 0.0,
        "blank_images": 0.0,
        "redrawn_images": 0.0,
        "swapped_images": None,
        "permuted_order": None,
    }
    document = evaluation.document
    assert document["parse_status"]["multiple_calls"]["value"] == 1.0
    assert document["controls"]["swapped_images"] == {"value": None, "ci95": [0.0, 1.0], "n": 0}
    assert [row[4] for row in document["confusion"]] == [sum(row) for row in document["confusion"]]
    assert headline_figures(document) == {"greedy_accuracy": 0.0, "blank_images": 0.0, "redrawn_images": 0.0}


def test_a_mixed_policy_is_counted_by_hand(picture_folder: Path) -> None:
    env = PickImageEnv(picture_folder, 3, None, seed=1)
    drawn = [env.episode(number) for number in range(200)]
    # two episodes of each right index
    episodes = [next_of for index in range(3) for next_of in [e for e in drawn if e.correct_index == index][:2]]
    plan = EvaluationPlan(env, tuple(episodes), seed=1, num_samples=2, ks=(1, 2))
    texts = [call_text(0), call_text(2), call_text(1), "no call", call_text(7), call_text(2)]
    samples = [(call_text(0), call_text(0)), (call_text(0), "x"), ("x", "x"), ("x", "x"), ("x", "x"), ("x", "x")]

    def policy(asked: Sequence[Episode], num_samples: int) -> list[Answers]:
        if num_samples == 0:
            return [Answers("nothing") for _ in asked]
        return [Answers(text, pair) for text, pair in zip(texts, samples, strict=True)]

    document = evaluate(policy, plan, "mixed").document
    assert document["confusion"] == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert document["greedy_accuracy"]["value"] == 3 / 6
    assert {name: e["value"] for name, e in document["outcome"].items()} == pytest.approx(
        {"correct": 3 / 6, "wrong_index": 1 / 6, "index_out_of_range": 1 / 6, "unparsable": 1 / 6}
    )
    assert document["parse_status"]["ok"]["value"] == pytest.approx(5 / 6)
    assert {k: e["value"] for k, e in document["accuracy_by_choice"].items()} == {"0": 0.5, "1": 0.5, "2": 0.5}
    assert document["sampled_accuracy"]["value"] == pytest.approx(3 / 12)
    assert {k: e["value"] for k, e in document["pass_at_k"].items()} == pytest.approx({"1": 3 / 12, "2": 2 / 6})
    assert document["chance"] == {"value": pytest.approx(1 / 3), "ci95": [pytest.approx(1 / 3)] * 2, "n": 6}
    assert document["best_constant_choice"]["value"] == 2 / 6 and document["best_constant_choice"]["choice"] == "0"
    assert document["choices"] == ["0", "1", "2"]
    assert document["controls"]["swapped_images"]["n"] == 4, "only picks have a picture to follow"
    json.dumps(document, allow_nan=False)


def test_without_samples_nothing_is_said_of_them(plan: EvaluationPlan) -> None:
    document = evaluate(
        policy_of(lambda episode, number: call_text(1)), replace(plan, num_samples=0, ks=()), "x"
    ).document
    assert document["sampled_accuracy"] is None and document["pass_at_k"] == {}


def test_reasoning_counts_only_where_it_is_allowed(plan: EvaluationPlan) -> None:
    policy = policy_of(lambda episode, number: "I see it. " + looks(episode, 0))
    assert values(evaluate(policy, plan, "strict"))["greedy"] == 0.0
    assert values(evaluate(policy, replace(plan, allow_reasoning=True), "lenient"))["greedy"] == 1.0


def test_a_baseline_is_compared_episode_by_episode(plan: EvaluationPlan) -> None:
    sighted = evaluate(policy_of(looks), plan, "looks")
    habit = evaluate(policy_of(lambda episode, number: call_text(1)), plan, "habit")
    document = with_baseline(sighted, habit).document
    difference = document["baseline"]["difference"]
    of_index_1 = share_of_index(plan, 1)
    assert difference["value"] == pytest.approx(1 - of_index_1)
    assert difference["only_model_right"] == round((1 - of_index_1) * NUM_EPISODES)
    assert difference["only_baseline_right"] == 0
    assert difference["p_value"] < 1e-30 and difference["ci95"][0] > 0.6
    assert document["baseline"]["model"] == "habit" and sighted.document["baseline"] is None


def test_the_odd_one_out_can_be_swapped_and_permuted() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(
        REPOSITORY / "toy_images", 4, None, seed=3
    )
    plan = EvaluationPlan(env, tuple(draw_held_out(env, 50)[0]), seed=3)

    def odd(episode: Episode, number: int) -> str:
        shown = [image.tobytes() if isinstance(image, Image.Image) else str(image) for image in episode.images]
        counts = [shown.count(image) for image in shown]
        return call_text(counts.index(1)) if 1 in counts else call_text(0)

    document = evaluate(policy_of(odd), plan, "odd").document
    assert document["greedy_accuracy"]["value"] == 1.0
    assert document["controls"]["swapped_images"]["value"] == 1.0
    assert document["controls"]["permuted_order"]["value"] == 0.0


def test_no_episode_that_was_drawn_is_held_out(picture_folder: Path) -> None:
    env, own = PickImageEnv(picture_folder, 2, None, seed=10), PickImageEnv(picture_folder, 2, None, seed=0)
    # 6 pictures, 2 shown, 2 to ask for: 60 episodes in all
    drawn = [own.episode(number) for number in range(40)]
    held_out, num_passed_over = draw_held_out(env, 20, drawn)
    seen = {(episode.images, episode.target) for episode in drawn}
    asked = [(episode.images, episode.target) for episode in held_out]
    assert len(set(asked)) == len(held_out) == 20 and num_passed_over > 0
    assert not any(episode in seen for episode in asked)
    everything = draw_held_out(env, 60)[0]
    assert len({(episode.images, episode.target) for episode in everything}) == 60, "each once"


def test_further_episodes_of_a_run_are_its_own_too(picture_folder: Path) -> None:
    env = PickImageEnv(picture_folder, 2, None, seed=0)
    numbers = [0, 1, FURTHER_STRIDE, FURTHER_STRIDE + 1, 2 * FURTHER_STRIDE, 2 * FURTHER_STRIDE + 1]
    drawn = [fingerprint(episode) for episode in RunEpisodes(env, 2, num_attempts=2)]
    assert drawn == [fingerprint(env.episode(number)) for number in numbers]


def test_pictures_in_memory_are_alike_by_their_pixels() -> None:
    def episode(*colours: str, index: int = 0) -> Episode:
        return Episode(tuple(Image.new("RGB", (4, 4), c) for c in colours), (), index, ("x",) * len(colours), None, 0)

    assert fingerprint(episode("red", "blue")) == fingerprint(episode("red", "blue"))
    others = [
        episode("blue", "red"),
        episode("red", "blue", index=1),
        episode("red", "navy"),
        episode("red", "blue", "red"),
    ]
    assert len({fingerprint(other) for other in [episode("red", "blue"), *others]}) == 5


def test_a_folder_too_small_to_hold_anything_out_is_said(picture_folder: Path) -> None:
    own = PickImageEnv(picture_folder, 2, None, seed=0)
    drawn = [own.episode(number) for number in range(2000)]
    with pytest.raises(
        ValueError, match="200 draws gave 0 different episodes that training does not draw .60 that it draws or may"
    ):
        draw_held_out(PickImageEnv(picture_folder, 2, None, seed=10), 10, drawn)


class Click(Environment):
    """Pictures of one colour; a click is right in the half that the target names. No choices, no chance."""

    class Outcome(StrEnum):
        HIT = "hit"
        MISS = "miss"

    outcomes = Outcome
    tools = (
        {
            "name": "click",
            "description": "Click.",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
    )

    def episode(self, index: int) -> Episode:
        picture = Image.new("RGB", (56, 56), (index % 256, 0, 0))
        half = index % 2
        drawn = Episode((picture,), target=("left", "right")[half], seed=index, answer={"low": 28 * half})
        return self.with_messages(drawn)

    def instruction(self, episode: Episode) -> str:
        return f"Click the {episode.target} half."

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Verdict:
        is_right = 0 <= turns[-1].arguments["x"] - episode.answer["low"] < 28
        return Verdict(self.Outcome.HIT if is_right else self.Outcome.MISS, is_right, {"hit": 2.0 * is_right})

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> ToolCall:
        return ToolCall("click", {"x": episode.answer["low"] + 14})


def test_a_task_without_choices_and_chance_has_null_in_their_place() -> None:
    env = Click()
    plan = EvaluationPlan(env, tuple(env.episode(number) for number in range(10)), seed=1)
    left, odd = make_call_str(ToolCall("click", {"x": 3})), call_text(0)
    document = evaluate(policy_of(lambda episode, number: odd if episode.seed == 0 else left), plan, "left").document
    assert (document["greedy_accuracy"]["value"], document["chance"]) == (4 / 10, None)
    assert {name: found["value"] for name, found in document["outcome"].items()} == {
        "hit": 4 / 10, "miss": 5 / 10, "unparsable": 1 / 10,
    }  # fmt: skip
    assert document["parse_status"]["wrong_name"]["value"] == 1 / 10
    names = ("choices", "best_constant_choice", "accuracy_by_choice", "confusion")
    assert [document[name] for name in names] == [None] * 4
    controls = document["controls"]
    # blank pictures leave the words, which are enough
    assert controls["blank_images"]["value"] == 4 / 10
    assert [controls[name] for name in ("swapped_images", "permuted_order", "redrawn_images")] == [None] * 3
    assert Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).is_valid(document)
    assert headline_figures(document).keys() == {"greedy_accuracy", "blank_images"}


class Broken(Click):
    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Verdict:
        raise KeyError("x")


def test_an_environment_that_fails_stops_the_evaluation_by_name() -> None:
    plan = EvaluationPlan(Broken(), tuple(Broken().episode(number) for number in range(2)), seed=1)
    with pytest.raises(RunStopped, match=r"the environment is broken: the verdict on .* failed with KeyError: 'x'"):
        evaluate(policy_of(lambda episode, number: make_call_str(ToolCall("click", {"x": 3}))), plan, "any")
