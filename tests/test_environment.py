"""The environment's contract: which episode a number stands for, what is asked, and what counts as right."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from environment import Episode, Judgement, Outcome, PickImageEnv, ToolCall, judge, load_environment_class
from tests.conftest import PICTURES, call_text, save_picture
from utils.tool_calls import ParseStatus

pytestmark = pytest.mark.fast

# worked out from the definition: random.Random(f"fleet/{seed}/{index}"), int(random() * n), repeats drawn again
EPISODES = {
    (0, 0): (("orange heart", "black cross", "blue square", "red circle"), 2),
    (0, 1): (("yellow star", "black cross", "green triangle", "red circle"), 0),
    (7, 12345): (("black cross", "green triangle", "orange heart", "red circle"), 1),
    (-1, 0): (("blue square", "orange heart", "black cross", "yellow star"), 3),
}


def instruction(episode: Episode) -> str:
    return episode.messages[-1]["content"][-1]["text"]


# --- episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "index"), EPISODES)
def test_episode_is_the_same_on_every_machine(picture_folder, seed, index):
    labels, drawn_index = EPISODES[seed, index]
    drawn = PickImageEnv(picture_folder, fixed_correct_index=None, seed=seed).episode(index)
    assert (drawn.labels, drawn.correct_index, drawn.target) == (labels, drawn_index, labels[drawn_index])
    fixed = PickImageEnv(picture_folder, fixed_correct_index=1, seed=seed).episode(index)
    assert (fixed.labels, fixed.correct_index, fixed.target) == (labels, 1, None)
    assert fixed.images == tuple(picture_folder / f"{label.replace(' ', '_')}.png" for label in labels)
    assert fixed.seed == seed


@pytest.mark.parametrize("fixed_correct_index", [0, None])
def test_episode_depends_on_nothing_but_seed_and_index(picture_folder, tmp_path, fixed_correct_index):
    env = PickImageEnv(picture_folder, fixed_correct_index=fixed_correct_index, seed=3)
    in_order = [env.episode(index) for index in range(20)]
    env.reset(seed=9)
    env.step("?")
    assert [env.episode(index) for index in reversed(range(20))] == in_order[::-1]
    assert PickImageEnv(picture_folder, fixed_correct_index=fixed_correct_index, seed=3).episode(19) == in_order[19]
    moved = shutil.copytree(picture_folder, tmp_path / "another place")
    elsewhere = PickImageEnv(moved, fixed_correct_index=fixed_correct_index, seed=3).episode(19)
    assert (elsewhere.labels, elsewhere.target) == (in_order[19].labels, in_order[19].target)


def test_seeds_and_indices_draw_different_episodes(picture_folder):
    env, other = PickImageEnv(picture_folder, seed=0), PickImageEnv(picture_folder, seed=1)
    assert len({env.episode(index).labels for index in range(50)}) > 40
    assert sum(env.episode(index).labels == other.episode(index).labels for index in range(50)) < 5
    # seed 1, episode 23 is not seed 12, episode 3
    assert other.episode(23).labels != PickImageEnv(picture_folder, seed=12).episode(3).labels


@pytest.mark.parametrize("fixed_correct_index", [0, 2, None])
def test_candidates_are_distinct_pictures(picture_folder, fixed_correct_index):
    env = PickImageEnv(picture_folder, 4, fixed_correct_index)
    for index in range(100):
        episode = env.episode(index)
        assert episode.num_candidates == len(episode.images) == len(set(episode.images)) == len(episode.labels) == 4


def test_drawn_candidates_have_distinct_labels_even_if_pictures_share_them(tmp_path):
    for label in ("red circle", "blue square", "grey arrow"):
        for number in range(4):
            save_picture(tmp_path / label / f"{number}.png")
    env = PickImageEnv(tmp_path, 3, fixed_correct_index=None)
    episodes = [env.episode(index) for index in range(100)]
    assert all(set(episode.labels) == {"red circle", "blue square", "grey arrow"} for episode in episodes)
    shown = {pair for episode in episodes for pair in zip(episode.images, episode.labels, strict=True)}
    assert all(label == Path(str(path)).parent.name for path, label in shown)
    assert len(shown) == 12  # every picture gets its turn


def test_drawn_index_is_uniform_and_every_label_gets_its_turn(picture_folder):
    env = PickImageEnv(picture_folder, 4, fixed_correct_index=None)
    episodes = [env.episode(index) for index in range(2000)]
    # five standard deviations of a binomial count are 97 and 83
    assert all(abs(count - 500) < 97 for count in Counter(ep.correct_index for ep in episodes).values())
    assert all(abs(count - 333) < 83 for count in Counter(ep.target for ep in episodes).values())
    assert {ep.target for ep in episodes} == {name.replace("_", " ") for name in PICTURES}


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_drawn_target_is_named_in_the_instruction(picture_folder):
    env = PickImageEnv(picture_folder, 4, fixed_correct_index=None)
    for index in range(30):
        episode = env.episode(index)
        assert episode.correct_index is not None and episode.labels[episode.correct_index] == episode.target
        assert instruction(episode) == f"Pick the {episode.target}. The index is from 0 to 3."


def test_fixed_index_is_not_given_away(picture_folder):
    episode = PickImageEnv(picture_folder, 4, fixed_correct_index=2).episode(0)
    assert instruction(episode) == "Pick the correct image. The index is from 0 to 3."
    assert not any(label in str(episode.messages) for label in episode.labels)


@pytest.mark.parametrize("num_candidates", [2, 5])
def test_messages_number_every_image_and_end_with_the_instruction(picture_folder, num_candidates):
    env = PickImageEnv(picture_folder, num_candidates)
    system, user = env.prompt_messages(env.episode(0))
    assert (system["role"], user["role"]) == ("system", "user")
    assert [part["type"] for part in user["content"]] == ["text", "image", "text"] * num_candidates + ["text"]
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert "".join(texts[:-1]) == "".join(f"Image {index}: \n" for index in range(num_candidates))
    assert tuple(env.prompt_messages(env.episode(0))) == env.episode(0).messages


@pytest.mark.parametrize(
    ("allow_reasoning", "rule"),
    [(False, "Reply with exactly one call and nothing else"), (True, "end your reply with exactly one call")],
)
def test_system_message_shows_the_tool_and_the_form(picture_folder, allow_reasoning, rule):
    env = PickImageEnv(picture_folder, allow_reasoning=allow_reasoning)
    text = env.episode(0).messages[0]["content"][0]["text"]
    assert rule in text
    assert '"name": "pick_image"' in text
    assert text.endswith('<tool_call>\n{"name": "pick_image", "arguments": {"index": NUMBER}}\n</tool_call>')


# --- what is right ----------------------------------------------------------------------------------------------------

JUDGED = {
    "right": (call_text(2), 2, 4, "correct", "ok", 2),
    "right, last": (call_text(3), 3, 4, "correct", "ok", 3),
    "wrong": (call_text(1), 2, 4, "wrong_index", "ok", 1),
    "N": (call_text(4), 2, 4, "index_out_of_range", "ok", 4),
    "negative": (call_text(-1), 3, 4, "index_out_of_range", "ok", -1),
    "prose": ("image 2", 2, 4, "unparsable", "no_call", None),
    "two calls": (call_text(2) * 2, 2, 4, "unparsable", "multiple_calls", None),
    "text before": (f"The third. {call_text(2)}", 2, 4, "unparsable", "extra_text", None),
    "truncated": (call_text(2)[:-1], 2, 4, "unparsable", "malformed_json", None),
    "another tool": (call_text(2).replace("pick", "take"), 2, 4, "unparsable", "wrong_name", None),
    "true for 1": (call_text("true"), 1, 4, "unparsable", "bad_arguments", None),
    "2.0 for 2": (call_text("2.0"), 2, 4, "unparsable", "bad_arguments", None),
    "too long": (call_text(2) + " " * 4096, 2, 4, "unparsable", "too_long", None),
}


@pytest.mark.parametrize(
    ("text", "correct_index", "num_candidates", "outcome", "status", "index"), JUDGED.values(), ids=JUDGED.keys()
)
def test_judge(text, correct_index, num_candidates, outcome, status, index):
    assert judge(text, correct_index, num_candidates) == Judgement(Outcome(outcome), ParseStatus(status), index)


def test_judge_allows_reasoning_when_told_to():
    verdict = judge(f"The third. {call_text(2)}", 2, 4, allow_reasoning=True)
    assert verdict == Judgement(Outcome.CORRECT, ParseStatus.OK, 2)


def test_the_correct_outcome_alone_is_right():
    verdicts = [Judgement(outcome, ParseStatus.OK, 0) for outcome in Outcome]
    assert [verdict.outcome for verdict in verdicts if verdict.is_right] == [Outcome.CORRECT]


@pytest.mark.parametrize("fixed_correct_index", [0, 3, None])
def test_gold_answer_earns_one_and_every_other_nothing(picture_folder, fixed_correct_index):
    env = PickImageEnv(picture_folder, 4, fixed_correct_index)
    for seed in range(10):
        for answer in (-1, 0, 1, 2, 3, 4):
            _, info = env.reset(seed=seed)
            correct_index = info["episode"].correct_index
            reward = env.step(call_text(answer))[1]
            assert reward == (1.0 if answer == correct_index else 0.0)


@pytest.mark.parametrize("text", ["", "2", call_text("true"), call_text(0) * 2, f"So: {call_text(0)}"])
def test_answer_that_is_no_call_earns_nothing(picture_folder, text):
    env = PickImageEnv(picture_folder, 4, 0)
    env.reset()
    assert env.step(text)[1] == 0.0


# --- reset and step ---------------------------------------------------------------------------------------------------


def test_reset_returns_observation_then_info(picture_folder):
    env = PickImageEnv(picture_folder, seed=5)
    observation, info = env.reset()
    assert info == {"episode": env.episode(0)}
    assert observation == {"images": env.episode(0).images, "messages": list(env.episode(0).messages)}


def test_reset_walks_through_the_episodes_and_a_seed_starts_again(picture_folder):
    env = PickImageEnv(picture_folder, fixed_correct_index=None, seed=5)
    of_seed_8 = PickImageEnv(picture_folder, fixed_correct_index=None, seed=8)
    seeds = [None, None, 8, None, 8, 5, None]
    expected = [env.episode(0), env.episode(1), of_seed_8.episode(0), of_seed_8.episode(1)]
    expected += [of_seed_8.episode(0), env.episode(0), env.episode(1)]
    assert [env.reset(seed=seed)[1]["episode"] for seed in seeds] == expected


def test_seed_0_is_a_seed(picture_folder):
    env = PickImageEnv(picture_folder, seed=5)
    assert env.reset(seed=0)[1]["episode"] == PickImageEnv(picture_folder, seed=0).episode(0)


def test_step_returns_what_gymnasium_says(picture_folder):
    env = PickImageEnv(picture_folder, 4, fixed_correct_index=2)
    env.reset()
    assert env.step(call_text(1)) == (
        None,
        0.0,
        True,
        False,
        {
            "outcome": Outcome.WRONG_INDEX,
            "is_right": False,
            "components": {"correct": 0.0, "valid_call": 1.0},
            "parse_status": ParseStatus.OK,
            "call": ToolCall("pick_image", {"index": 1}),
            "index": 1,
            "correct_index": 2,
        },
    )


def test_step_before_reset_is_refused(picture_folder):
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        PickImageEnv(picture_folder).step(call_text(0))


def test_second_step_is_refused(picture_folder):
    env = PickImageEnv(picture_folder)
    env.reset()
    env.step(call_text(1))
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(call_text(0))


def test_environment_that_asks_for_reasoning_accepts_it(picture_folder):
    env = PickImageEnv(picture_folder, allow_reasoning=True)
    env.reset()
    assert env.step(f"The first. {call_text(0)}")[1] == 1.0


# --- folders ----------------------------------------------------------------------------------------------------------

# files with their contents; None is a picture
LAYOUTS = {
    "file names": (
        {"red_circle.png": None, "Blue-square 2.jpg": None, "grey_arrow_013.WEBP": None, "42.png": None},
        ["42", "Blue square", "grey arrow", "red circle"],
    ),
    "a folder per class": (
        {"red_circle/1.png": None, "red_circle/deep/2.png": None, "blue-square/3.png": None},
        ["blue square", "red circle", "red circle"],
    ),
    "metadata.csv": (
        {"b.png": None, "a.png": None, "x.png": None, "metadata.csv": "file_name,label\nb.png,a bee\na.png, an ant \n"},
        ["an ant", "a bee"],
    ),
    "metadata.csv with a caption and further columns": (
        {
            "in/a.png": None,
            "b.png": None,
            "metadata.csv": 'id,caption,file_name\n1,"an ant, red",in/a.png\n2,bee,b.png',
        },
        ["bee", "an ant, red"],
    ),
    "metadata.jsonl": (
        {
            "a.png": None,
            "b.png": None,
            "metadata.jsonl": '{"file_name": "a.png", "text": "ant"}\n\n{"file_name": "b.png", "name": "bee"}\n',
        },
        ["ant", "bee"],
    ),
    "label wins over text": (
        {
            "a.png": None,
            "b.png": None,
            "metadata.csv": "file_name,text,label\na.png,no,ant\nb.png,no,bee\n",
        },
        ["ant", "bee"],
    ),
}


@pytest.mark.parametrize(("files", "labels"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_labels(tmp_path, files, labels):
    for name, text in files.items():
        if text is None:
            save_picture(tmp_path / name)
        else:
            (tmp_path / name).write_text(text, encoding="utf-8")
    assert [image.label for image in PickImageEnv(tmp_path, 2).images] == labels


REFUSED = {
    "too few images": ({"candidates_per_episode": 7}, "has 6 images, but candidates_per_episode=7"),
    "too few labels": ({"candidates_per_episode": 7, "fixed_correct_index": None}, "has 6 images"),
    "one candidate": ({"candidates_per_episode": 1}, "candidates_per_episode=1"),
    "no candidate": ({"candidates_per_episode": 0}, "candidates_per_episode=0"),
    "index N": ({"fixed_correct_index": 4}, "fixed_correct_index=4, but with candidates_per_episode=4"),
    "negative index": ({"fixed_correct_index": -1}, "fixed_correct_index=-1"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(picture_folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        PickImageEnv(picture_folder, **arguments)


def test_too_few_labels_are_refused_only_when_the_target_is_drawn(tmp_path):
    for number in range(4):
        save_picture(tmp_path / f"red_circle_{number}.png")
        save_picture(tmp_path / f"blue_square_{number}.png")
    assert PickImageEnv(tmp_path, 4, 0).episode(0).num_candidates == 4
    with pytest.raises(ValueError, match=r"has 2 different labels \(\['blue square', 'red circle'\]\)"):
        PickImageEnv(tmp_path, 4, None)


def test_negative_episode_is_refused(picture_folder):
    with pytest.raises(ValueError, match="episode index -1 is negative"):
        PickImageEnv(picture_folder).episode(-1)


# --- another environment ----------------------------------------------------------------------------------------------

ENV_FILE = """
class GoodEnv:
    def episode(self, index): ...
    def prompt_messages(self, episode): ...

class HalfEnv:
    def episode(self, index): ...

class NotCallableEnv:
    episode = prompt_messages = None

def good_function(): ...
"""


def test_environment_class_is_loaded_from_its_file(tmp_path):
    path = tmp_path / "my env.py"
    path.write_text(ENV_FILE, encoding="utf-8")
    env_class = load_environment_class(f"{path}:GoodEnv")
    assert env_class.__name__ == "GoodEnv"
    assert env_class().episode(0) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("my_env.py:HalfEnv", "has no class HalfEnv that extends environment.Environment, or has methods episode and"),
        ("my_env.py:NotCallableEnv", "has no class NotCallableEnv that extends"),
        ("my_env.py:good_function", "has no class good_function"),
        ("my_env.py:Missing", r"it has \['GoodEnv', 'HalfEnv', 'NotCallableEnv'\]"),
        ("my_env.py", "wanted path/to/file.py:ClassName"),
        ("my_env.py:", "wanted path/to/file.py:ClassName"),
        (":GoodEnv", "wanted path/to/file.py:ClassName"),
        ("my_env.txt:GoodEnv", "wanted path/to/file.py:ClassName"),
        ("my_env:GoodEnv", "wanted path/to/file.py:ClassName"),
        ("", "wanted path/to/file.py:ClassName"),
        ("other.py:GoodEnv", "other.py is not a file"),
    ],
)
def test_environment_class_that_is_none_is_refused(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_env.py").write_text(ENV_FILE, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_environment_class(spec)


def test_episode_whose_right_answer_is_none_of_its_images_is_refused():
    with pytest.raises(ValueError, match="correct_index=2, but the episode has 2 images"):
        Episode((Path("a.png"), Path("b.png")), (), 2, ("a", "b"), None, 0)
