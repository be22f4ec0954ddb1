"""The school of an environment's toy shows the form of calls, and never an episode's own answer."""

from typing import Any

import pytest
import torch

from environment import load_environment_class
from fleet.toy.form_school import NO_CALL, FormSchool
from fleet.toy.lessons import END
from fleet.toy.model import RECIPES, SCHOOL_SEED, TAUGHT, cached_path, make_toy_model, make_toy_processor
from tests.helpers import REPOSITORY
from utils.tool_calls import make_call_str


class Recording(FormSchool):
    """Keeps the answers of each step in place of learning from them."""

    def _loss(self, batch: Any, answers: list[str]) -> Any:
        self.shown = [*getattr(self, "shown", []), *zip(batch["episodes"], answers, strict=True)]
        return torch.zeros(())


@pytest.mark.parametrize("call_share", [1.0, 0.0])
def test_an_episode_is_shown_the_answer_to_its_neighbour(call_share: float) -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")(seed=7)
    processor = make_toy_processor(TAUGHT, env)
    recipe = RECIPES[TAUGHT] | {"steps": 3, "call_share": call_share}
    school = Recording(make_toy_model(processor), processor, env, recipe)
    list(school.losses())
    golds = [make_call_str(env.solution(env.episode(number), ())) + END for number in range(24)]
    neighbours = [golds[step * 8 + (place + 1) % 8] for step in range(3) for place in range(8)]
    assert neighbours != golds
    wanted = neighbours if call_share else [NO_CALL + END] * 24
    assert [answer for _, answer in school.shown] == wanted


def test_a_toy_is_not_taken_for_questions_whose_tokens_it_has_not_learnt() -> None:
    click = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")
    any_colour, more_shapes, red = (
        cached_path(TAUGHT, click(seed=SCHOOL_SEED, **arguments))
        for arguments in ({}, {"num_shapes": 4}, {"named": "red"})
    )
    assert any_colour != red
    # answers and pictures alone differ
    assert any_colour == more_shapes
