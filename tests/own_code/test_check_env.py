"""A check of an environment finds each kind of mistake, and none in a sound one."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from environment import Episode, Observation, PickImageEnv, ToolCall, Verdict, load_environment_class
from fleet.check_env import check_env, main, parse_check
from fleet.errors import UsageError
from fleet.own_code.chance_checks import exceeds
from fleet.own_code.environment_checks import examine
from fleet.own_code.findings import Kind
from tests.own_code.broken_environments import BROKEN, Broken
from tests.own_code.sound_environments import Box, Click, Count, Read, Several, Tags
from tests.turning_env import LookAgainEnv

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOY = {"data_root": REPOSITORY / "toy_images", "seed": 0}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.kind}: {broken.words[:30]}")
def test_a_broken_environment_yields_its_kind(broken: Broken) -> None:
    findings = examine(broken.make(), {"seed": 0}, num_episodes=16, num_pairs=broken.num_pairs).findings
    assert {finding.kind for finding in findings} == {broken.kind} | broken.also, "\n".join(map(str, findings))
    messages = [finding.message for finding in findings if finding.kind is broken.kind]
    assert any(broken.words in message for message in messages), messages
    assert all("\n" not in message for message in messages)


def test_every_kind_has_an_example() -> None:
    """OTHER_PROCESS needs a file, and is below."""
    assert {broken.kind for broken in BROKEN} == set(Kind) - {Kind.OTHER_PROCESS}
    assert len([kind for kind in Kind if kind.is_mistake]) >= 20


@pytest.mark.parametrize(
    "env_class", [Click, Read, Box, Count, Tags, Several], ids=lambda env_class: env_class.__name__
)
def test_a_sound_environment_yields_nothing(env_class: type[Click]) -> None:
    assert list(map(str, check_env(env_class, {"seed": 0}))) == []


def test_an_instance_is_checked_as_it_is() -> None:
    assert check_env(Click(seed=3), episodes=4) == []
    (finding,) = check_env(type("Mine", (Click,), {"drafts": lambda self, episode: ["x"]})(3), episodes=4)
    assert finding.kind is Kind.DRAFTS


FILES = {
    "odd one out": ("examples/odd_one_out.py:OddOneOutEnv", None),
    "most dots": ("examples/most_dots.py:MostDotsEnv", None),
    "one index": (None, 0),
    "named pictures": (None, None),
}


@pytest.mark.parametrize(("spec", "fixed_correct_index"), FILES.values(), ids=FILES.keys())
def test_a_task_that_picks_an_image_yields_no_mistake(spec: str | None, fixed_correct_index: int | None) -> None:
    spec = None if spec is None else f"{REPOSITORY}/{spec}"
    env_class = PickImageEnv if spec is None else load_environment_class(spec)
    done = examine(env_class, TOY | {"fixed_correct_index": fixed_correct_index})
    # with one index that is always right, not looking wins, which is the point of the toy
    assert [finding.kind for finding in done.findings] == ([Kind.SAME_ANSWER] if fixed_correct_index == 0 else [])
    assert done.sample.said == 0.25


def test_the_share_that_is_right_without_looking_is_measured() -> None:
    """Of two cells among 16 drawn evenly one in 16 are the same; 256 pairs give 6.25 % within 4 deviations of 1.5 %."""
    sample = examine(Click, {"seed": 0}).sample
    assert (sample.said, sample.num_pairs) == (0.0625, 256)
    assert sample.measured is not None and 0.002 <= sample.measured <= 0.123


def test_repeated_episodes_say_nothing_of_chance() -> None:
    """Four pairs that come again and again would seem to be 256."""

    class Repeating(Count):
        def episode(self, index: int) -> Any:
            return super().episode(index % 8)

    done = examine(Repeating, {"seed": 0}, num_episodes=2)
    assert (done.sample.num_distinct, done.sample.num_pairs) == (8, 4)
    assert [finding.kind for finding in done.findings] == [Kind.REPEATS]


@pytest.mark.parametrize(
    ("num_right", "num_pairs", "chance", "wanted"),
    [
        (20, 20, 0.5, True),  # 2 ** -20 is 9.5e-7
        (19, 19, 0.5, False),  # 2 ** -19 is 1.9e-6
        (0, 256, 0.0, False),
        (1, 256, 0.0, True),
        (256, 256, 1.0, False),
    ],
)
def test_a_share_is_improbable_below_one_in_a_million(
    num_right: int, num_pairs: int, chance: float, wanted: bool
) -> None:
    assert exceeds(num_right, num_pairs, chance) is wanted


def test_every_mistake_is_found_at_once() -> None:
    changed = {
        "edited": lambda self, episode, control, call, rng: 3,
        "chance": lambda self, episode: 2,
        "drafts": lambda self, episode: ["no call"],
    }
    findings = check_env(type("Mine", (Click,), changed), {"seed": 0}, episodes=4)
    assert {finding.kind for finding in findings} == {Kind.EDITED, Kind.DRAFTS, Kind.CHANCE}
    (drafts,) = [finding for finding in findings if finding.kind is Kind.DRAFTS]
    # 4 episodes and 2 far ones
    assert drafts.times == 6 and str(drafts).endswith("(and 5 times more)")


def write_env(folder: Path, body: str = "") -> str:
    path = folder / "mine.py"
    path.write_text(
        "from tests.own_code.sound_environments import Click\n\n\nclass Mine(Click):\n"
        f"    def __init__(self, seed=0, side=3):\n        self.seed, self.side = seed, side\n\n    {body}\n"
    )
    return f"{path}:Mine"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from fleet.check_env import main; from fleet.command import command_line; "
        "code = command_line.run(main); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


def test_the_command_says_what_it_saw(tmp_path: Path) -> None:
    spec = write_env(tmp_path, "pass")
    done = run(spec, "--env_args", '{"side": 5}', "--episodes", "4")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "tool click: Calls click."
    assert "chance: 6.2%; of 256 gold answers to other episodes" in done.stdout
    assert "controls: blank_images" in lines and "        [image]Click the black square." in lines
    assert lines[-3:] == ["constructor: seed=0, side=3", "", f"{spec} is sound"]
    gold = lines[lines.index("its gold answer:") :]
    assert gold[2].startswith('    {"name": "click", "arguments": {"x": ')


def test_the_command_lists_mistakes_and_ends_with_2(tmp_path: Path) -> None:
    spec = write_env(
        tmp_path,
        "def instruction(self, episode):\n        return f'{hash(\"a\")}'\n\n"
        "    def drafts(self, episode):\n        return ['x']",
    )
    done = run(spec, "--episodes", "4")
    assert done.returncode == 2
    assert done.stderr == f"error: env={spec} has 2 mistakes; correct, and check again\n"
    assert "mistake: drafts: episode 0: the drafts: 'x' (str) is refused as no_call" in " ".join(done.stdout.split())
    assert "mistake: other process: the messages of episode 0: not the same in another process" in " ".join(
        done.stdout.split()
    )


def test_a_constructor_that_wants_more_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_env(tmp_path, "def __init__(self, table, seed=0):\n        self.seed = seed")
    with pytest.raises(UsageError, match="has 1 mistake; correct, and check again"):
        main([spec, "--episodes", "4"])
    assert capsys.readouterr().out.startswith("mistake: constructor: the environment: its constructor needs table, but")
    main([spec, "--env_args", '{"table": 1}', "--episodes", "4"])
    assert capsys.readouterr().out.endswith("is sound\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "env is missing; pass the environment as path/to/file.py:ClassName"),
        (["--episodes", "0"], "episodes=0, but it must be at least 1"),
        (["a.py:A", "b.py:B"], "unknown flag b.py:B"),
    ],
)
def test_flags_that_make_no_check_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_check(words)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("env_args", "message"),
    [
        ("{side: 3}", "got '{side: 3}', which is no JSON"),
        ("[3]", "got a list, wanted an object"),
        ('{"sid": 3}', "env_args gives sid, but the constructor has side=3; did you mean side?"),
        ('{"zzzz": 3}', "env_args gives zzzz, but the constructor has side=3; correct env_args"),
        ('{"seed": 3}', "env_args gives seed, which has a flag of its own; pass --seed"),
        ('{"side": 3, "side": 4}', "'side' is given twice"),
    ],
)
def test_arguments_that_the_constructor_does_not_take_are_refused(env_args: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        main([write_env(tmp_path, "pass"), "--env_args", env_args])
    assert message in str(refusal.value)


def test_arguments_given_in_python_are_refused_alike() -> None:
    with pytest.raises(UsageError, match="arguments gives sed, but the constructor has seed=0; did you mean seed?"):
        check_env(Click, {"sed": 3})


def test_an_object_of_two_methods_says_what_it_lacks() -> None:
    class Bare:
        def episode(self, index: int) -> Any: ...
        def prompt_messages(self, episode: Any) -> Any: ...

    missing = ("respond", "solution", "choices", "drafts", "chance", "edited")
    findings = check_env(Bare())
    assert [finding.kind for finding in findings] == [Kind.SIGNATURE] * 6
    for name, finding in zip(missing, findings, strict=True):
        assert finding.message.startswith(f"Bare has no method {name}(episode")


def test_text_before_the_call_is_no_trick_where_it_is_allowed() -> None:
    arguments = TOY | {"fixed_correct_index": None, "allow_reasoning": True}
    assert list(map(str, check_env(PickImageEnv, arguments, episodes=4))) == []


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gone\.py is not a file"):
        main(["gone.py:Mine"])


class Endless(LookAgainEnv):
    """Answers every call."""

    num_looks = 99


class Spelling(LookAgainEnv):
    """Its answers hold a token of the model's."""

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        return Observation("<|image_pad|>") if len(turns) == 1 else super().respond(episode, turns)


class Fickle(LookAgainEnv):
    """Its answers change."""

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        return Observation(str(random.random())) if len(turns) == 1 else super().respond(episode, turns)


def test_turns_are_followed_to_the_last_one() -> None:
    arguments = TOY | {"candidates_per_episode": 4, "fixed_correct_index": None}
    assert not [finding for finding in check_env(LookAgainEnv, arguments, max_turns=2) if finding.kind.is_mistake]
    (one,) = [finding for finding in check_env(LookAgainEnv, arguments) if finding.kind.is_mistake]
    assert one.kind is Kind.OBSERVATION and "pass --max_turns 2 or more" in str(one)
    endless = [str(finding) for finding in check_env(Endless, arguments, max_turns=3) if finding.kind.is_mistake]
    assert len(endless) == 1 and "there is no verdict after 3 gold answers" in endless[0]
    fickle = [str(finding) for finding in check_env(Fickle, arguments, max_turns=2) if finding.kind.is_mistake]
    assert any("was another one when asked again" in finding for finding in fickle)
    spelling = [str(finding) for finding in check_env(Spelling, arguments, max_turns=2) if finding.kind.is_mistake]
    assert len(spelling) == 1 and "cannot be shown: an observation's text holds <|image_pad|>" in spelling[0]


def test_the_zoom_example_is_sound_and_tells_nothing_without_the_look() -> None:
    zoom = load_environment_class(f"{REPOSITORY}/examples/zoom.py:ZoomEnv")
    assert check_env(zoom, TOY, max_turns=2) == []
    env = zoom(**TOY)
    rng, right = random.Random(0), Counter[str]()
    for episode in map(env.episode, range(2_000)):
        asked, options = episode.answer["asked"], episode.answer["options"]
        near = {index: env.respond(episode, [ToolCall("zoom", {"index": index})]).images[0].stem for index in (0, 1)}
        names = {index: stem.replace("_", " ") for index, stem in near.items()}
        # one that never looks, one that looks at the other picture and takes its label if it is there, one that looks
        guess = rng.randrange(4)
        other = options.index(names[1 - asked]) if names[1 - asked] in options else guess
        for policy, option in (("blind", guess), ("other", other), ("looking", options.index(names[asked]))):
            right[policy] += env.respond(episode, [ToolCall("answer", {"option": option})]).is_right
    assert right["looking"] == 2_000
    # four deviations around a quarter
    assert all(abs(right[policy] - 500) < 4 * (2_000 * 0.25 * 0.75) ** 0.5 for policy in ("blind", "other"))
