"""The school of an environment's toy shows the form of calls, and never an episode's own answer."""

from statistics import fmean

import pytest
import torch

from environment import load_environment_class
from fleet.toy.form_school import NO_CALL, FormSchool
from fleet.toy.lessons import END, TOY_DATA_ROOT
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


def test_the_loss_of_packed_rows_is_that_of_each_text_by_itself() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")(TOY_DATA_ROOT, 2, None, seed=5)
    torch.manual_seed(0)
    processor = make_toy_processor(TAUGHT, env)
    model, tokenizer = make_toy_model(processor).eval(), processor.tokenizer
    school = FormSchool(model, processor, env, RECIPES[TAUGHT] | {"questions_per_episode": 2, "sees": False})
    rows = [school.dataset[number] for number in range(3)]
    branches = school.branches(rows)
    prompts = [processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    cuts = [prompt.rindex("<|vision_end|>") + len("<|vision_end|>") for prompt in prompts]
    answers, questions, before = [], [], []
    for place, (row, of_episode) in enumerate(zip(rows, branches, strict=True)):
        for number, branch in enumerate(of_episode):
            seen, question = prompts[place][: cuts[place]], prompts[branch.asked][cuts[branch.asked] :]
            inputs = processor(text=[seen + question + branch.answer], images=[row["images"]], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, :-1]
            ids = inputs["input_ids"][0, 1:]
            losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none").tolist()
            num_answer = len(tokenizer(branch.answer)["input_ids"])
            num_question = len(tokenizer(question)["input_ids"])
            start = len(losses) - num_answer - num_question
            answers += losses[start + num_question :]
            if number == 0:
                questions += losses[start : start + num_question]
                is_text = (ids[:start] != model.config.image_token_id).tolist()
                before += [loss for loss, wanted in zip(losses, is_text, strict=False) if wanted]
    wanted = fmean(answers) + fmean(questions) + 0.3 * fmean(before)
    assert school.loss(rows, branches).item() == pytest.approx(wanted, rel=1e-4)


def test_a_toy_is_not_taken_for_questions_whose_tokens_it_has_not_learnt() -> None:
    click = load_environment_class(f"{REPOSITORY}/examples/click.py:ClickEnv")
    any_colour, more_shapes, red = (
        cached_path(TAUGHT, click(seed=SCHOOL_SEED, **arguments))
        for arguments in ({}, {"num_shapes": 4}, {"named": "red"})
    )
    assert any_colour != red
    # answers and pictures alone differ
    assert any_colour == more_shapes
