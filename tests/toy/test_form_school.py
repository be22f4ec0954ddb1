"""The school of an environment's toy shows the form of calls, and never an episode's own answer."""

import pytest

from environment import load_environment_class
from fleet.toy.form_school import NO_CALL, FormSchool
from fleet.toy.lessons import END
from fleet.toy.model import RECIPES, SCHOOL_SEED, TAUGHT, cached_path, make_toy_model, make_toy_processor
from tests.helpers import REPOSITORY
from utils.tool_calls import make_call_str


@pytest.mark.parametrize("call_share", [1.0, 0.0])
def test_an_answer_is_right_neither_for_the_pictures_nor_for_the_question(call_share: float) -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")(seed=7)
    processor = make_toy_processor(TAUGHT, env)
    recipe = RECIPES[TAUGHT] | {"questions_per_episode": 3, "call_share": call_share}
    school = FormSchool(make_toy_model(processor), processor, env, recipe)
    shown = school.branches([school.dataset[number] for number in range(8)])
    golds = [make_call_str(env.solution(env.episode(number), ())) + END for number in range(8)]
    assert [[branch.asked for branch in branches] for branches in shown] == [
        [place, (place + 1) % 8, (place + 2) % 8] for place in range(8)
    ]
    answers = [[golds[(place + number + 1) % 8] for number in range(3)] for place in range(8)]
    wanted = answers if call_share else [[NO_CALL + END] * 3] * 8
    assert [[branch.answer for branch in branches] for branches in shown] == wanted


def test_a_toy_is_not_taken_for_questions_whose_tokens_it_has_not_learnt() -> None:
    click = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")
    any_colour, more_shapes, red = (
        cached_path(TAUGHT, click(seed=SCHOOL_SEED, **arguments))
        for arguments in ({}, {"num_shapes": 4}, {"named": "red"})
    )
    assert any_colour != red
    # answers and pictures alone differ
    assert any_colour == more_shapes
