"""The way from a completion to a verdict: what an environment may answer, and what is named as broken."""

import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from environment import Environment, PickImageTask, pick_image_messages
from fleet.controls import Control, Edited, checked_edit
from fleet.episodes import BrokenEpisode, Episode
from fleet.known_answers import answerable_episode, chance_of, choices_of, solution_of
from fleet.verdicts import (
    Observation,
    Verdict,
    answer_to,
    outcome_names,
    require_sound_task,
    verdict_on,
    verdict_on_call,
    verdicts_on,
)
from reward import RewardWeights, reward_of
from tests.conftest import call_text
from utils.tool_calls import ParseStatus, ToolCall, make_call_str

pytestmark = pytest.mark.fast

EPISODE = Episode((Path("a.png"),), answer={"x": 30, "y": 40})


class Outcome(StrEnum):
    HIT = "hit"
    MISS = "miss"


class Click(Environment):
    """Click at a point; the test says what is answered."""

    tools = (
        {
            "name": "click",
            "description": "Click a point.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                "required": ["x", "y"],
            },
        },
        {
            "name": "write",
            "description": "Write a text.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    )
    outcomes = Outcome

    def __init__(self, answered: Any = None, **given: Any):
        self.answered, self.given = answered, given

    def episode(self, index: int) -> Episode:
        return self.given.get("episode", EPISODE)

    def instruction(self, episode: Episode) -> str:
        return "Click."

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return self.answered(*turns) if callable(self.answered) else self.answered

    def solution(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        return self.given.get("solution", ToolCall("click", {"x": 30, "y": 40}))

    def choices(self, episode: Episode) -> Any:
        return self.given.get("choices", ())

    def chance(self, episode: Episode) -> Any:
        return self.given.get("chance", super().chance(episode))


CALL = ToolCall("click", {"x": 3, "y": 4})
SAID = make_call_str(CALL)


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*args: Any) -> Any:
        raise error

    return raises


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_call_that_fits_is_judged_by_the_environment() -> None:
    seen = []

    def answered(*turns: ToolCall) -> Verdict:
        seen.append(turns)
        return Verdict(Outcome.MISS, is_right=False, components={"closeness": 0.25})

    verdict = verdict_on(Click(answered), EPISODE, f" {SAID}\n")
    assert seen == [(CALL,)]
    assert verdict == Verdict("miss", False, {"closeness": 0.25}, ParseStatus.OK, CALL)
    assert type(verdict.outcome) is str, "so that it crosses to a process that has not run the environment's file"


@pytest.mark.parametrize(
    ("text", "status"), [("I click.", "no_call"), (f"Here: {SAID}", "extra_text"), ("", "no_call")]
)
def test_a_refused_call_is_not_shown_to_the_environment(text: str, status: str) -> None:
    verdict = verdict_on(Click(raising(AssertionError("was asked"))), EPISODE, text)
    assert verdict == Verdict("unparsable", False, {}, ParseStatus(status), None)
    assert reward_of(verdict) == 0.0 and not verdict.is_valid_call


def test_text_before_a_call_is_the_runs_to_allow() -> None:
    env = Click(Verdict("hit", True))
    assert verdict_on(env, EPISODE, f"Here: {SAID}", allow_reasoning=True).outcome == "hit"


# is_right and components as given, then components and the reward by the weights 2 and 0.5
COMPONENTS: dict[str, tuple[Any, Any, dict[str, float], float]] = {
    "none, right": (True, {}, {"correct": 1.0, "valid_call": 1.0}, 2.5),
    "none, wrong": (False, {}, {"correct": 0.0, "valid_call": 1.0}, 0.5),
    "its own": (True, {"closeness": 0.75, "cost": -3}, {"closeness": 0.75, "cost": -3.0}, -2.25),
    "beside the two": (False, {"correct": 0.5, "valid_call": 1, "near": 0.125},
                       {"correct": 0.5, "valid_call": 1.0, "near": 0.125}, 1.625),
    "numpy's": (np.True_, {"a": np.float32(0.5), "b": np.int64(3), "c": np.True_}, {"a": 0.5, "b": 3.0, "c": 1.0}, 4.5),
    "arrays of one": (np.bool_(False), {"a": np.array([0.5]), "b": np.array(2)}, {"a": 0.5, "b": 2.0}, 2.5),
    "true and false": (True, {"a": True, "b": False}, {"a": 1.0, "b": 0.0}, 1.0),
    "decimals": (True, {"a": Decimal("0.25")}, {"a": 0.25}, 0.25),
    "a million": (True, {"a": 1e6, "b": -1_000_000}, {"a": 1e6, "b": -1e6}, 0.0),
}  # fmt: skip


@pytest.mark.parametrize(("is_right", "given", "components", "reward"), COMPONENTS.values(), ids=COMPONENTS.keys())
def test_components_are_plain_numbers_and_make_the_reward(
    is_right: Any, given: Any, components: dict[str, float], reward: float
) -> None:
    verdict = verdict_on(Click(Verdict("hit", is_right, given)), EPISODE, SAID)
    assert verdict.components == components and {type(value) for value in verdict.components.values()} == {float}
    assert type(verdict.is_right) is bool and verdict.is_right is bool(is_right)
    assert reward_of(verdict, RewardWeights(2.0, 0.5)) == reward


def test_a_call_is_valid_unless_its_component_is_zero() -> None:
    valid = [Verdict("hit", True), Verdict("hit", True, {"near": 0}), Verdict("miss", False, {"valid_call": 0.5})]
    invalid = [Verdict("miss", False, {"valid_call": 0}), Verdict("unparsable", False, {}, ParseStatus.NO_CALL)]
    assert [verdict.is_valid_call for verdict in (*valid, *invalid)] == [True] * 3 + [False] * 2


class OtherOutcome(Enum):
    HIT = "hit"


BAD_COMPONENT = "its component near is {} but wanted a finite number within a million of 0; correct it"


def given(outcome: Any, is_right: Any, components: Any = None) -> Verdict:
    return Verdict(outcome, is_right, {} if components is None else components)


BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": (None, "respond() returned None (NoneType), but wanted a Verdict; return environment.Verdict(...)"),
    "a number": (1.0, "respond() returned 1.0 (float), but wanted a Verdict"),
    "a text": ("hit", "respond() returned 'hit' (str), but wanted a Verdict"),
    "a class": (lambda *turns: Verdict, "but wanted a Verdict"),
    "an observation": (
        Observation("It opened."),
        "respond() returned an Observation, but there is one turn; pass --max_turns 2 or more",
    ),
    "an outcome that is none": (given("near", False), "its outcome is 'near' (str), but wanted one of hit, miss"),
    "no outcome": (given(None, False), "its outcome is None (NoneType), but wanted one of hit, miss"),
    "another enum": (given(OtherOutcome.HIT, False), "but wanted one of hit, miss"),
    "unparsable, which is not its own": (given("unparsable", False), "wanted one of hit, miss; add it to outcomes"),
    "right as text": (given("hit", "yes"), "its is_right is 'yes' (str), but wanted True or False"),
    "right as number": (given("hit", 1), "its is_right is 1 (int), but wanted True or False"),
    "right as numpy's number": (given("hit", np.int64(1)), "its is_right is np.int64(1) (int64), but wanted"),
    "components in a list": (given("hit", True, [1.0]), "its components are [1.0] (list), but wanted a number by"),
    "a component without a name": (given("hit", True, {"": 1.0}), "a component is named '' (str), but wanted a word"),
    "a component of two words": (given("hit", True, {"a b": 1.0}), "a component is named 'a b' (str), but wanted"),
    "a numbered component": (given("hit", True, {1: 1.0}), "a component is named 1 (int), but wanted a word such"),
    **{
        f"a component that is {shown}": (given("hit", True, {"near": value}), BAD_COMPONENT.format(shown))
        for shown, value in (
            ("nan (float),", float("nan")), ("inf (float),", float("inf")), ("-inf (float),", float("-inf")),
            ("np.float32(nan) (float32),", np.float32("nan")), ("1000000.5 (float),", 1_000_000.5),
            ("-2000000 (int),", -2_000_000), ("1j (complex),", 1j),
            ("np.complex128(1j) (complex128),", np.complex128(1j)),
            ("None (NoneType),", None), ("'1' (str),", "1"), ("[1.0] (list),", [1.0]),
            ("array([1., 2.]) (ndarray),", np.array([1.0, 2.0])), ("Decimal('NaN') (Decimal),", Decimal("NaN")),
            ("Decimal('sNaN') (Decimal),", Decimal("sNaN")),
        )
    },
    "a huge component": (given("hit", True, {"near": 10**400}), "its component near is 1000"),
    "an error": (raising(KeyError("a\nb")), "failed with KeyError: 'a\\nb' (in respond(): "),
    "an error without words": (raising(AssertionError()), "failed with AssertionError (in respond(): "),
    "an exit": (raising(SystemExit(3)), "failed with SystemExit: 3 (in respond(): "),
    "a file that is gone": (raising(FileNotFoundError("gone.json")), "failed with FileNotFoundError: gone.json (in"),
}  # fmt: skip


@pytest.mark.parametrize(("answered", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_answer_is_told_with_the_call(answered: Any, words: str) -> None:
    for judged in (
        lambda: verdict_on(Click(answered), EPISODE, SAID),
        lambda: verdict_on_call(Click(answered), EPISODE, CALL),
    ):
        with pytest.raises(BrokenEpisode) as broken:
            judged()
        message = str(broken.value)
        assert message.startswith('the verdict on the call {"x": 3, "y": 4}') and words in message, message
        assert "\n" not in message


def test_a_long_call_is_told_by_its_beginning() -> None:
    call = ToolCall("write", {"text": "a" * 3000})
    with pytest.raises(BrokenEpisode, match=r"^the verdict on the call a{200}…: respond\(\) returned None"):
        verdict_on(Click(), EPISODE, make_call_str(call))


def test_an_async_answer_is_told_so() -> None:
    class Waiting(Click):
        async def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:  # type: ignore[override]
            return Verdict("hit", True)

    with pytest.raises(BrokenEpisode, match=r"respond\(\) is async, but wanted a plain method"):
        verdict_on(Waiting(), EPISODE, SAID)


def test_of_several_completions_those_before_the_broken_one_are_judged() -> None:
    env = Click(lambda call: Verdict("hit", True) if call.arguments["x"] < 5 else None)
    texts = [SAID, "none", make_call_str(ToolCall("click", {"x": 9, "y": 0})), SAID]
    verdicts, reason = verdicts_on(env, [EPISODE] * 4, texts)
    assert [verdict.outcome for verdict in verdicts] == ["hit", "unparsable"]
    assert reason is not None and reason.startswith('the verdict on the call {"x": 9, "y": 0}: respond() returned None')
    assert verdicts_on(env, [EPISODE] * 2, texts[:2])[1] is None


def test_names_of_outcomes_end_with_unparsable_which_a_task_may_have_itself() -> None:
    class Own(StrEnum):
        UNPARSABLE = "unparsable"
        HIT = "hit"

    class OwnClick(Click):
        outcomes = Own  # type: ignore[assignment]

    assert outcome_names(Click()) == ["hit", "miss", "unparsable"]
    assert outcome_names(OwnClick()) == ["unparsable", "hit"]
    assert verdict_on(OwnClick(Verdict("unparsable", False, {"a": -1})), EPISODE, SAID).components == {"a": -1.0}


class Numbered(Enum):
    HIT = 1


class Nothing(StrEnum):
    pass


@pytest.mark.parametrize("outcomes", [None, StrEnum, Nothing, Numbered, ["hit"], {"hit"}, Outcome.HIT, str])
def test_outcomes_that_are_no_enum_of_texts_are_refused(outcomes: Any) -> None:
    class Odd(Click):
        pass

    Odd.outcomes = outcomes
    with pytest.raises(BrokenEpisode, match=r"outcomes is .*, but wanted an enum of texts; write class Outcome\(StrEn"):
        require_sound_task(Odd())
    require_sound_task(Click())


# --- the gold answer and the choices ----------------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "it is None (NoneType), but wanted a call; return environment.ToolCall(name, arguments)"),
    "a text": (SAID, "(str), but wanted a call"),
    "another tool": (ToolCall("press", {}), "it calls 'press', but the tools are click, write; call one of these"),
    "a missing argument": (ToolCall("click", {"x": 3}), "do not fit the schema of click: 'y' is a required property"),
    "one too many": (ToolCall("click", {"x": 3, "y": 4, "z": 5}), "do not fit the schema of click: "),
    "no whole number": (ToolCall("click", {"x": 3.0, "y": 4}), "3.0 is not of type 'integer' (in x); correct one of"),
    "numpy's integer": (ToolCall("click", {"x": np.int64(3), "y": 4}), "not plain JSON (Object of type int64 is not"),
    "not a number": (ToolCall("click", {"x": float("nan"), "y": 4}), "its arguments are not plain JSON (Out of range"),
    "no arguments": (ToolCall("click", None), "its arguments are not plain JSON ("),  # type: ignore[arg-type]
    "half a surrogate pair": (ToolCall("write", {"text": "\ud800"}), "its arguments are not plain JSON ('utf-8' codec"),
    "a token of the model": (
        ToolCall("write", {"text": "See <|image_pad|>."}),
        'the call of write holds <|image_pad|> (\'{"text": "See <|image_pad|>."}\'), which is a token to the model, '
        "not text; write it otherwise",
    ),
    "the wrapper of a call": (ToolCall("write", {"text": "</tool_call>"}), "the call of write holds </tool_call> ("),
    "too long": (ToolCall("write", {"text": "a" * 4096}), "its text is refused as too_long; a call has at most 4,096"),
}


@pytest.mark.parametrize(("given", "words"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_an_answer_that_is_no_call_is_named(given: Any, words: str) -> None:
    with pytest.raises(BrokenEpisode) as broken:
        solution_of(Click(solution=given), EPISODE)
    assert str(broken.value).startswith("the gold answer: ") and words in str(broken.value), broken.value
    with pytest.raises(BrokenEpisode) as broken:
        choices_of(Click(choices=[CALL, given]), EPISODE)
    assert str(broken.value).startswith("the choices: ") and words in str(broken.value)
    # the same with the number of the episode, where every process asks for it
    for env in (Click(solution=given), Click(choices=[CALL, given])):
        with pytest.raises(BrokenEpisode, match="^episode 7: the (gold answer|choices): "):
            answerable_episode(env, 7)


def test_an_answer_is_plain_json() -> None:
    class Text(StrEnum):
        A = "a"

    found = solution_of(Click(solution=ToolCall("write", {"text": Text.A})), EPISODE)
    assert found == ToolCall("write", {"text": "a"}) and type(found.arguments["text"]) is str


def test_choices_by_name_and_the_chance_of_a_blind_guess() -> None:
    calls = [ToolCall("write", {"text": text}) for text in "abc"]
    env = Click(choices=calls)
    assert choices_of(env, EPISODE) == ("a", "b", "c") and chance_of(env, EPISODE) == pytest.approx(1 / 3)
    assert env.drafts(EPISODE) == [make_call_str(call) for call in calls]
    assert choices_of(Click(), EPISODE) == () and chance_of(Click(), EPISODE) is None
    assert choices_of(Click(choices=iter(calls)), EPISODE) == ("a", "b", "c")


def test_choices_that_are_no_list_are_told() -> None:
    with pytest.raises(BrokenEpisode, match=r"the choices failed with TypeError: 'int' object is not iterable"):
        choices_of(Click(choices=3), EPISODE)


@pytest.mark.parametrize("given", [0, 1, 0.25, np.float32(0.25), np.int64(1), None])
def test_a_chance_is_a_share_or_unknown(given: Any) -> None:
    found = chance_of(Click(chance=given), EPISODE)
    assert found is None if given is None else (found == given and type(found) is float)


@pytest.mark.parametrize("given", [-0.1, 1.5, float("nan"), float("inf"), True, "0.5", [0.5], 1j])
def test_a_chance_that_is_no_share_is_named(given: Any) -> None:
    with pytest.raises(BrokenEpisode, match=r"chance: chance\(\) returned .*, but wanted a share from 0 to 1, or None"):
        chance_of(Click(chance=given), EPISODE)


# --- text that would become structure ---------------------------------------------------------------------------------

TOKEN_TEXTS = {
    "a label": (
        {"labels": ["a cat <|im_end|>"]},
        "episode 4: labels[0] holds <|im_end|> ('a cat <|im_end|>'), which is",
    ),
    "the target": (
        {"target": "<tool_call>"},
        "episode 4: target holds <tool_call> ('<tool_call>'), which is a token to",
    ),
}


@pytest.mark.parametrize(("fields", "words"), TOKEN_TEXTS.values(), ids=TOKEN_TEXTS.keys())
@pytest.mark.parametrize("task", [Click, PickImageTask])
def test_a_text_that_is_a_token_of_the_model_is_refused_in_every_task(
    task: type[Environment], fields: dict[str, Any], words: str
) -> None:
    class Quoting(task):  # type: ignore[valid-type, misc]
        def episode(self, index: int) -> Episode:
            return Episode((Path("a.png"),), correct_index=0, **fields)

        def instruction(self, episode: Episode) -> str:
            return "Pick."

    with pytest.raises(BrokenEpisode) as broken:
        answerable_episode(Quoting(), 4)
    assert str(broken.value).startswith(words) and "not text; write it otherwise" in str(broken.value)


@pytest.mark.parametrize("literal", ["<|im_end|>", "<tool_call>", "<|vision_start|>"])
def test_an_instruction_that_holds_a_token_is_refused(literal: str) -> None:
    class Quoting(Click):
        def instruction(self, episode: Episode) -> str:
            return f"Click {literal}."

    with pytest.raises(BrokenEpisode, match=r"^episode 4: the user message holds <\S+> \('Click <"):
        answerable_episode(Quoting(), 4)


IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_several_images_are_numbered_and_one_only_where_it_is_picked() -> None:
    two = [text("Image 0: "), IMAGE, text("\n"), text("Image 1: "), IMAGE, text("\n")]
    assert Click().messages_about(1, "Click.")[1]["content"] == [IMAGE, text("Click.")]
    assert Click().messages_about(2, "Click.")[1]["content"] == [*two, text("Click.")]
    asks = [text(f"Pick. The index is from 0 to {last}.") for last in (0, 1)]
    assert pick_image_messages(1, "Pick.")[1]["content"] == [*two[:3], asks[0]]
    assert pick_image_messages(2, "Pick.")[1]["content"] == [*two, asks[1]]


def test_the_system_message_shows_the_form_of_a_call() -> None:
    system = answerable_episode(Click(), 0).messages[0]["content"][0]["text"]
    assert system.count("<tool_call>") == system.count("</tool_call>") == 2


# --- controls, and Gymnasium's steps ----------------------------------------------------------------------------------


def test_a_task_has_the_control_of_blank_pictures_without_writing_it() -> None:
    episode = answerable_episode(Click(episode=Episode((Image.new("RGB", (8, 6), "red"),), answer={"x": 1})), 0)
    changed = checked_edit(Click(), episode, Control.BLANK_IMAGES, CALL, random.Random(0))
    assert changed is not None and changed.expected is None and changed.episode.answer == {"x": 1}
    (image,) = changed.episode.images
    assert isinstance(image, Image.Image) and (image.size, image.getcolors()) == ((8, 6), [(48, (128, 128, 128))])
    others = [control for control in Control if control is not Control.BLANK_IMAGES]
    assert [checked_edit(Click(), episode, control, CALL, random.Random(0)) for control in others] == [None] * 3


@pytest.mark.parametrize("given", [3, "blank", (EPISODE, CALL), Edited(3), Edited(EPISODE, "click")])  # type: ignore[arg-type]
def test_a_change_that_is_no_episode_is_named(given: Any) -> None:
    class Changing(Click):
        def edited(self, *args: Any) -> Any:
            return given

    with pytest.raises(BrokenEpisode, match=r"the episode of control blank_images: edited\(\) returned "):
        checked_edit(Changing(), EPISODE, Control.BLANK_IMAGES, CALL, random.Random(0))


class Opening(Click):
    """Opens a menu at the first call, and judges the second."""

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Any:
        if len(turns) == 1:
            return Observation("A menu opened.", (Path("menu.png"),))
        return Verdict(Outcome.HIT if turns[1] == CALL else Outcome.MISS, is_right=turns[1] == CALL)


def test_a_step_may_end_in_an_observation_and_the_next_in_a_verdict() -> None:
    env = Opening()
    observation, info = env.reset()
    assert observation["images"] == (Path("a.png"),) and info["episode"].answer == {"x": 30, "y": 40}
    first = ToolCall("click", {"x": 0, "y": 0})
    seen = {"text": "A menu opened.", "images": (Path("menu.png"),)}
    assert env.step(make_call_str(first)) == (seen, 0.0, False, False, {"call": first})
    components = {"correct": 1.0, "valid_call": 1.0}
    wanted = {"outcome": "hit", "is_right": True, "components": components, "parse_status": "ok", "call": CALL}
    assert env.step(SAID) == (None, 1.0, True, False, wanted)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(SAID)
    env.reset()
    assert env.step(SAID)[2] is False, "a new episode begins with no calls"
    assert env.step("What menu?")[1:] == (0.0, True, False, {
        "outcome": "unparsable", "is_right": False, "components": {}, "parse_status": "no_call", "call": None,
    })  # fmt: skip


def test_a_seed_that_is_given_to_reset_is_the_episodes() -> None:
    class Seeded(Click):
        def episode(self, index: int) -> Episode:
            return Episode((Path("a.png"),), seed=self.seed, answer={"index": index})

    env = Seeded()
    drawn = [env.reset(seed)[1]["episode"] for seed in (None, 5, None, 5)]
    assert [(episode.seed, episode.answer["index"]) for episode in drawn] == [(0, 0), (5, 0), (5, 1), (5, 0)]
    assert env.seed == 0


# --- the task that picks an image -------------------------------------------------------------------------------------

PICKS = [
    (call_text(1), ("correct", True, {"correct": 1.0, "valid_call": 1.0}, "ok"), 1.0),
    (call_text(0), ("wrong_index", False, {"correct": 0.0, "valid_call": 1.0}, "ok"), 0.05),
    (call_text(2), ("index_out_of_range", False, {"correct": 0.0, "valid_call": 0.0}, "ok"), 0.0),
    (call_text(-1), ("index_out_of_range", False, {"correct": 0.0, "valid_call": 0.0}, "ok"), 0.0),
    # in its canonical text this call would be too long
    (
        f'<tool_call>{{"name":"pick_image","arguments":{{"index":{"9" * 4025}}}}}</tool_call>',
        ("index_out_of_range", False, {"correct": 0.0, "valid_call": 0.0}, "ok"),
        0.0,
    ),
    (call_text("1.0"), ("unparsable", False, {}, "bad_arguments"), 0.0),
    (call_text("true"), ("unparsable", False, {}, "bad_arguments"), 0.0),
    ("1", ("unparsable", False, {}, "no_call"), 0.0),
]


@pytest.mark.parametrize(("text", "wanted", "reward"), PICKS)
def test_the_verdicts_of_a_pick(text: str, wanted: tuple[Any, ...], reward: float) -> None:
    verdict = verdict_on(PickImageTask(), Episode((Path("a.png"), Path("b.png")), correct_index=1), text)
    assert (verdict.outcome, verdict.is_right, dict(verdict.components), verdict.parse_status.value) == wanted
    assert reward_of(verdict) == reward


def test_a_pick_without_a_right_one_is_told_as_the_episodes_fault() -> None:
    class Forgetting(PickImageTask):
        def episode(self, index: int) -> Episode:
            return Episode((Path("a.png"), Path("b.png")))

        def instruction(self, episode: Episode) -> str:
            return "Pick."

    with pytest.raises(
        BrokenEpisode, match="episode 2: the gold answer failed with ValueError: the episode has no corr"
    ):
        answerable_episode(Forgetting(), 2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Observation("\ud800"), "the text of its observation is '\\ud800', which is no UTF-8 text"),
        (Observation(7), "the text of its observation is 7 (int), but wanted text"),  # type: ignore[arg-type]
        (Observation("", 5), "images is 5 (int), but wanted a list or a tuple"),  # type: ignore[arg-type]
        ("hit", "respond() returned 'hit' (str), but wanted a Verdict or an Observation; return one"),
    ],
)
def test_an_observation_that_is_none_is_told(answer: Any, words: str) -> None:
    with pytest.raises(BrokenEpisode) as error:
        answer_to(Click(answer), EPISODE, [ToolCall("click", {"x": 1, "y": 2})], max_turns=2)
    assert words in str(error.value)
