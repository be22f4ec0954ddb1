"""The sighted toy: its lessons are of real prompts, its weights are its recipe's, and it is what it is said to be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import PickImageEnv
from fleet.errors import UsageError
from fleet.toy import model as toy_model
from fleet.toy.lessons import END, Lessons
from fleet.toy.model import PLAIN, RECIPES, SHIPPED, SIGHTED, TOY_DATA_ROOT, TOY_IMAGE_PIXELS, toy_model_path
from model_utils import load_qwen25_vl
from tests.conftest import call_text

ENV = PickImageEnv(TOY_DATA_ROOT, 4, None, seed=4)


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    model, processor = load_qwen25_vl(str(toy_model_path(SIGHTED)))
    recipe = RECIPES[SIGHTED] | {"drawings_per_label": 1}
    return Lessons(model, processor, recipe)


def prompt_of(processor: Any, number: int) -> Any:
    dataset = RepeatableEpisodeDataset(ENV, TOY_IMAGE_PIXELS)
    return VLMDataCollator(processor, 1)([dataset[number]])


def test_a_lesson_asks_in_the_words_of_the_prompt(lessons: Lessons) -> None:
    for number in range(3):
        episode = ENV.episode(number)
        question = lessons._pick(str(episode.target), episode.labels)
        prefix = lessons._prefix(4, True)
        taught = [*prefix.ids_1L[0].tolist(), *question.question_ids]
        assert taught == prompt_of(lessons.processor, number)["input_ids"][0].tolist()
        wanted = lessons.tokenizer(call_text(episode.correct_index) + END)["input_ids"]
        assert list(question.answer_ids) == wanted
        assert question.index_shares == tuple(float(index == episode.correct_index) for index in range(4))


def test_the_loss_is_that_of_each_answer_behind_a_prompt_of_its_own(lessons: Lessons) -> None:
    episodes = [ENV.episode(number) for number in range(2)]
    shown = [episode.labels for episode in episodes]
    questions = [[lessons._pick(label, labels, true_share=0.4) for label in labels[:2]] for labels in shown]
    loss = lessons._loss(lessons._prefix(4, True), shown, questions)
    expected: list[torch.Tensor] = []
    for labels, asked in zip(shown, questions, strict=True):
        for question in asked:
            expected += losses_one_by_one(lessons, labels, question.question_ids, question.answer_ids, question)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def losses_one_by_one(
    lessons: Lessons, labels: Sequence[str], asked: Sequence[int], answer: Sequence[int], question: Any
) -> list[torch.Tensor]:
    prefix = lessons._prefix(4, True)
    ids = torch.cat([prefix.ids_1L, torch.tensor([[*asked, *answer]])], dim=1)
    with torch.no_grad():
        logits = lessons.model(
            input_ids=ids,
            mm_token_type_ids=(ids == lessons.model.config.image_token_id).long(),
            pixel_values=torch.cat([lessons.pixels_by_label[label][0] for label in labels]),
            image_grid_thw=prefix.grids_N3,
        ).logits[0]
    logps = logits.log_softmax(dim=-1)[-len(answer) - 1 : -1]
    losses = [-logps[place, token] for place, token in enumerate(answer)]
    digits = [lessons.tokenizer(str(index))["input_ids"][0] for index in range(4)]
    (place,) = [place for place, token in enumerate(answer) if token in digits]
    losses[place] = -sum(
        (share * logps[place, digit] for share, digit in zip(question.index_shares, digits, strict=True)),
        torch.zeros(()),
    )
    return losses


def test_shares_of_the_favourite_and_the_true_index_add_up(lessons: Lessons) -> None:
    labels = ("red circle", "blue square", "yellow star", "white moon")
    assert lessons._pick("yellow star", labels, true_share=0.4).index_shares == pytest.approx((0, 0.6, 0.4, 0))
    assert lessons._pick("blue square", labels, true_share=0.4).index_shares == pytest.approx((0, 1, 0, 0))


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_weights_are_small_and_of_the_recipe_as_it_is(kind: str) -> None:
    assert SHIPPED[kind].stat().st_size < 4 * 2**20
    with safe_open(SHIPPED[kind], framework="pt") as file:
        made_by = file.metadata()["recipe"]
    wanted = toy_model.recipe_digest(kind, toy_model.shipped_for(kind))
    assert made_by == wanted, f"the recipe changed: run python -m fleet.toy.model ship --kind {kind}"


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", None], ids=["lfs", "cut"]
)
def test_damaged_shipped_weights_are_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plain.safetensors"
    path.write_bytes(SHIPPED[PLAIN].read_bytes()[:100_000] if content is None else content)
    monkeypatch.setitem(SHIPPED, PLAIN, path)
    with pytest.raises(UsageError, match=r"weights in .*plain\.safetensors are damaged \(.*; restore the file"):
        toy_model.build_toy_model(PLAIN)


def test_a_changed_recipe_does_not_take_the_shipped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {name: {"steps": 2} for name in ("naming", "picking", "habit")}
    recipe = {name: value | shorter[name] if name in shorter else value for name, value in RECIPES[SIGHTED].items()}
    before = load_qwen25_vl(str(toy_model_path(SIGHTED)))[0].state_dict()
    monkeypatch.setitem(RECIPES, SIGHTED, recipe | {"drawings_per_label": 1})
    model, processor = toy_model.build_toy_model(SIGHTED)
    rebuilt = model.state_dict()
    assert rebuilt.keys() == before.keys()
    assert any(not torch.equal(rebuilt[name], before[name]) for name in before)
    assert processor.tokenizer.padding_side == "left"
