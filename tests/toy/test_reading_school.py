"""The school of the toy of two turns: to name what a tool shows, and the form of calls, not when to use which."""

from collections import Counter
from statistics import fmean
from typing import Any

import pytest
import torch

from environment import ToolCall, load_environment_class
from fleet.toy.form_school import FormSchool
from fleet.toy.lessons import END
from fleet.toy.model import READING, RECIPES, make_toy_model, make_toy_processor, shipped_for, toy_model_path
from fleet.toy.reading_school import ReadingSchool
from model_utils import load_qwen25_vl
from tests.helpers import REPOSITORY
from utils.images import open_image
from utils.tool_calls import make_call_str

NUM_ASKED = 40


def zoom(seed: int = 7) -> Any:
    return load_environment_class(f"{REPOSITORY}/examples/zoom.py:ZoomEnv")(str(REPOSITORY / "toy_images"), seed)


def school_of(env: Any, kind: type[FormSchool], **changes: Any) -> Any:
    torch.manual_seed(0)
    processor = make_toy_processor(READING, env)
    return kind(make_toy_model(processor).eval(), processor, env, RECIPES[READING] | changes)


def talk_of(look: ToolCall) -> str:
    """A look, and what the tool answers to it, as the model reads it."""
    return (
        f"{make_call_str(look)}<|im_end|>\n<|im_start|>user\n<tool_response>\nImage {look.arguments['index']}: "
        "<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_own_answers_stand_behind_the_look_alone() -> None:
    env = zoom()
    school = school_of(env, ReadingSchool)
    rows = [school.dataset[number] for number in range(48)]
    looks = [ToolCall("zoom", {"index": row["episode"].answer["asked"]}) for row in rows]
    golds = [ToolCall("answer", {"option": row["episode"].answer["option"]}) for row in rows]
    first_calls, num_followed = Counter[str](), 0
    for branches in school.branches(rows):
        for at_once, behind in zip(branches[::2], branches[1::2], strict=True):
            asked, other = at_once.asked, (at_once.asked + 1) % len(rows)
            # at once: a call of the next episode, of either turn
            assert not at_once.before and not at_once.is_own
            assert at_once.answer in (make_call_str(looks[other]) + END, make_call_str(golds[other]) + END)
            first_calls["look" if "zoom" in at_once.answer else "answer"] += 1
            num_followed += at_once.answer in (make_call_str(looks[asked]) + END, make_call_str(golds[asked]) + END)
            assert behind.asked == asked and behind.is_own and behind.pictures
            assert behind.answer == make_call_str(golds[asked]) + END
            given = school.tokenizer.decode([token.token for token in behind.before])
            assert given.startswith(f"{make_call_str(looks[asked])}<|im_end|>\n<|im_start|>user\n<tool_response>\n")
    total = sum(first_calls.values())
    # a third are looks: 64 of 192, give or take 4 standard deviations; by chance 3 in 8 of all are the own calls too
    assert abs(first_calls["look"] - total / 3) < 4 * (total * 2 / 9) ** 0.5
    assert num_followed < total / 2


def test_the_loss_of_packed_conversations_is_that_of_each_text_by_itself() -> None:
    env = zoom()
    school = school_of(env, FormSchool, questions_per_episode=2, text_share=1.0)
    processor, model = school.processor, school.model
    rows = [school.dataset[number] for number in range(3)]
    branches = school.branches(rows)
    assert [len(of_episode) for of_episode in branches] == [4, 4, 4], "two questions, two turns each"
    prompts = [processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    cuts = [prompt.rindex("<|vision_end|>") + len("<|vision_end|>") for prompt in prompts]
    answers, questions, before = [], [], []
    for place, (row, of_episode) in enumerate(zip(rows, branches, strict=True)):
        for number, branch in enumerate(of_episode):
            asked = rows[branch.asked]["episode"]
            index, talk, images = asked.answer["asked"], "", list(row["images"])
            if number % 2:
                (near,) = env.respond(asked, [ToolCall("zoom", {"index": index})]).images
                images.append(near)
                talk = talk_of(ToolCall("zoom", {"index": index}))
            question = prompts[branch.asked][cuts[branch.asked] :]
            text = prompts[place][: cuts[place]] + question + talk + branch.answer
            inputs = processor(
                text=[text],
                images=[[open_image(image, RECIPES[READING]["max_pixels"]) for image in images]],
                return_tensors="pt",
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, :-1]
            ids = inputs["input_ids"][0, 1:]
            losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none").tolist()
            num_answer = len(processor.tokenizer(branch.answer)["input_ids"])
            answers += losses[len(losses) - num_answer :]
            if number == 0:
                num_question = len(processor.tokenizer(question)["input_ids"])
                start = len(losses) - num_answer - num_question
                questions += losses[start : start + num_question]
                is_text = (ids[:start] != model.config.image_token_id).tolist()
                before += [loss for loss, wanted in zip(losses, is_text, strict=False) if wanted]
    wanted = fmean(answers) + fmean(questions) + 0.3 * fmean(before)
    assert school.loss(rows, branches).item() == pytest.approx(wanted, rel=1e-4)


def test_the_shipped_toy_names_what_it_is_shown_and_does_not_know_when_to_look() -> None:
    env = zoom(seed=99)
    model, processor = load_qwen25_vl(str(toy_model_path(READING, shipped_for(READING))))
    num_right = Counter[str]()
    for number in range(NUM_ASKED):
        episode = env.episode(number)
        messages = env.prompt_messages(episode)
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        look = ToolCall("zoom", {"index": episode.answer["asked"]})
        near = list(env.respond(episode, [look]).images)
        for kind, text, images in (
            ("at once", prompt, list(episode.images)),
            ("behind the look", prompt + talk_of(look), [*episode.images, *near]),
        ):
            opened = [open_image(image, RECIPES[READING]["max_pixels"]) for image in images]
            inputs = processor(text=[text], images=[opened], return_tensors="pt")
            (ids,) = model.generate(**inputs, do_sample=False, max_new_tokens=32)
            said = processor.tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
            gold = env.solution(episode, [] if kind == "at once" else [look])
            num_right[kind] += said == make_call_str(gold) + END
            num_right["guessed"] += kind == "at once" and said == make_call_str(env.solution(episode, [look])) + END
    assert num_right["behind the look"] >= 0.9 * NUM_ASKED
    # the best that it gets by itself: to look where it should, or to guess
    assert num_right["at once"] + num_right["guessed"] < 0.4 * NUM_ASKED
