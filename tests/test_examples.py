"""The example environments do what their pages say, and a user writes little for one."""

import ast
import io
import random
import shutil
import tokenize
from pathlib import Path

import pytest

import training
from environment import Control, ToolCall, load_environment_class
from fleet.check_env import check_env
from fleet.run_folder import read_jsonl
from tests.helpers import REPOSITORY
from utils.tool_calls import make_tool_call_str


def test_odd_one_out_shows_one_other_picture_and_never_names_it() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(
        data_root=REPOSITORY / "toy_images", candidates_per_episode=4, fixed_correct_index=None, seed=0
    )
    places = set()
    for index in range(40):
        episode = env.episode(index)
        assert episode.correct_index is not None
        odd = episode.labels[episode.correct_index]
        assert episode.labels.count(odd) == 1 and len(set(episode.labels)) == 2
        assert odd not in str(episode.messages) and episode == env.episode(index)
        places.add(episode.correct_index)
    assert places == {0, 1, 2, 3}


def test_the_odd_one_differs_where_all_pictures_have_one_label(tmp_path: Path) -> None:
    for name in ("red_circle", "blue_square"):
        (tmp_path / "shapes").mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "toy_images" / f"{name}.png", tmp_path / "shapes")
    (tmp_path / "stars").mkdir()
    shutil.copy(REPOSITORY / "toy_images" / "yellow_star.png", tmp_path / "stars")
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(tmp_path, 2, None, seed=0)
    episodes = [env.episode(index) for index in range(20)]
    assert any(episode.labels == ("shapes", "shapes") for episode in episodes)
    assert all(episode.images[0].tobytes() != episode.images[1].tobytes() for episode in episodes)


def test_gold_answer_earns_the_most() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(REPOSITORY / "toy_images")
    _, info = env.reset(seed=4)
    assert env.step(make_tool_call_str(info["episode"].correct_index))[1] == 1.0


@pytest.mark.parametrize(("name", "limit"), [("click", 60), ("counting", 60), ("odd_one_out", 20), ("most_dots", 40)])
def test_a_user_writes_few_lines(name: str, limit: int) -> None:
    """Lines with code, without docstrings, comments and blanks; the whole file stays under 120."""
    source = (REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8")
    documented = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    docstrings = {
        line
        for node in documented
        if ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in nothing]
    written = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings
    assert len(written) <= limit
    assert len(source.splitlines()) < 120


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("click.py:ClickEnv", {}),
        ("click.py:ClickEnv", {"num_shapes": 4}),
        ("counting.py:CountingEnv", {}),
        ("counting.py:CountingEnv", {"most_dots": 2}),
        ("most_dots.py:MostDotsEnv", {}),
    ],
)
def test_an_example_is_sound_to_the_last_note(spec: str, arguments: dict[str, int]) -> None:
    assert check_env(load_environment_class(f"{REPOSITORY}/examples/{spec}"), arguments) == []


def test_a_click_is_right_inside_the_named_box_alone() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")(seed=3)
    for index in range(20):
        episode = env.episode(index)
        x0, y0, x1, y1 = episode.answer["boxes"][episode.target]
        colour = episode.images[0].getpixel(((x0 + x1) // 2, (y0 + y1) // 2))
        assert "#{:02x}{:02x}{:02x}".format(*colour) == env.episode.__globals__["COLOURS"][episode.target]
        for x, y, is_right in ((x0, y0, True), (x1, y1, True), (x0 - 1, y0, False), (x1, y1 + 1, False)):
            assert env.respond(episode, [ToolCall("click", {"x": x, "y": y})]).is_right == is_right
        swapped = env.edited(episode, Control.SWAPPED_IMAGES, env.solution(episode, ()), random.Random(0))
        assert swapped.target == episode.target and swapped.answer["boxes"] != episode.answer["boxes"]
        assert sorted(swapped.answer["boxes"].values()) == sorted(episode.answer["boxes"].values())


@pytest.mark.parametrize("arguments", [{"named": "purple"}, {"num_shapes": 1}, {"num_shapes": 5}])
def test_click_refuses_a_colour_or_a_number_that_it_does_not_draw(arguments: dict[str, object]) -> None:
    env_class = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")
    with pytest.raises(ValueError, match="but wanted 2 to 4, and None or one of red, green, blue, yellow"):
        env_class(**arguments)


def test_counting_tells_a_near_miss_from_a_far_one() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/counting.py:CountingEnv")()
    episode = next(drawn for drawn in map(env.episode, range(20)) if drawn.answer == {"count": 2})
    outcomes = [env.respond(episode, [ToolCall("count", {"n": n})]).outcome for n in (1, 2, 3, 4)]
    assert outcomes == ["off_by_one", "exact", "off_by_one", "far_off"]


def test_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    training.main([
        "--env", "examples/odd_one_out.py:OddOneOutEnv", "--fixed_correct_index", "0", "--train_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--sample_steps", "0",
    ])  # fmt: skip
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1
