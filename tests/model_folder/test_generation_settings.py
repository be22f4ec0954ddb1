"""A model's folder decides what ends an answer and what pads it; nothing else in it steers what is sampled."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from fleet.evaluation.answering import AnswerSettings, ModelPolicy
from fleet.model_folder.generation_settings import describe_unused, tokens_alone
from fleet.run.results import merge_adapter
from model_utils import end_token_ids, generate_tool_call, load_qwen25_vl
from tests.helpers import fleet_trainer, rloo_config, toy_dataset, toy_model, toy_path, toy_processor

END_OF_TURN, END_OF_TEXT = 2, 0
# each alone changes what the toy says, or stops it
HOSTILE = {
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 28,
    "typical_p": 0.2,
    "num_beams": 2,
    "stop_strings": ["pick"],
    "repetition_penalty": 1.5,
    "temperature": 0.01,
    "top_k": 1,
    "bad_words_ids": [[5]],
    "forced_eos_token_id": 7,
    "begin_suppress_tokens": [3],
    "use_cache": False,
}


def folder_with(path: Path, settings: dict[str, Any] | None) -> Path:
    """A copy of the toy's folder with these generation settings; without such a file for None."""
    shutil.copytree(toy_path(), path)
    (path / "generation_config.json").unlink()
    if settings is not None:
        (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, **HOSTILE}
    return folder_with(tmp_path_factory.mktemp("models") / "hostile", settings)


def sampled_in_training(model: Any, output_dir: Path, *, shared_prefix: bool) -> list[list[int]]:
    trainer = fleet_trainer(rloo_config(output_dir), model=model, shared_prefix=shared_prefix)
    batch = trainer.data_collator([trainer.train_dataset[episode] for episode in (0, 1) for _ in range(4)])
    torch.manual_seed(3)
    return trainer._draw(batch, None).completion_ids


def answers_in_evaluation(model: Any) -> Any:
    settings = AnswerSettings(episodes_per_batch=2, max_completion_length=32, max_pixels=3136)
    return ModelPolicy(model, toy_processor(), settings)([toy_dataset().env.episode(i) for i in (0, 1)], 2)


def one_tool_call(model: Any) -> list[str]:
    torch.manual_seed(3)
    episode = toy_dataset().env.episode(0)
    return [generate_tool_call(model, toy_processor(), episode, temperature=heat, max_pixels=3136) for heat in (0, 1)]


@pytest.mark.parametrize("path", ["training", "training on TRL's own path", "evaluation", "one tool call"])
def test_a_folders_generation_settings_change_nothing(path: str, hostile: Path, tmp_path: Path) -> None:
    def said(model: Any) -> Any:
        if path.startswith("training"):
            return sampled_in_training(model, tmp_path, shared_prefix=path == "training")
        return answers_in_evaluation(model) if path == "evaluation" else one_tool_call(model)

    assert said(load_qwen25_vl(str(hostile))[0]) == said(toy_model())


def test_a_loaded_model_holds_end_and_padding_tokens_and_no_setting_that_transformers_may_add(hostile: Path) -> None:
    config = load_qwen25_vl(str(hostile))[0].generation_config
    is_set = {name for name, value in config.to_dict().items() if value is not None and not name.startswith("_")}
    assert is_set == {"eos_token_id", "pad_token_id", "transformers_version"}


def test_what_the_folder_asks_for_is_said_in_one_line(hostile: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fleet"):
        load_qwen25_vl(str(hostile))
        load_qwen25_vl(toy_path())
    (line,) = [record.getMessage().rstrip() for record in caplog.records if record.name == "fleet"]
    assert line == (
        f"generation_config.json of {hostile} asks for bad_words_ids=[[5]], begin_suppress_tokens=[3], "
        "forced_eos_token_id=7, min_new_tokens=28, no_repeat_ngram_size=3, num_beams=2, repetition_penalty=1.5, "
        "stop_strings=['pick'], temperature=0.01, top_k=1, typical_p=0.2, use_cache=False: not used, as Fleet's flags "
        "decide"
    )


def test_values_that_do_nothing_are_not_worth_a_line() -> None:
    assert describe_unused(GenerationConfig(eos_token_id=2, temperature=1.0, do_sample=True, top_k=0)) is None
    assert describe_unused(GenerationConfig(top_k=50, do_sample=False)) == "do_sample=False, top_k=50"


def saved_settings(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.pop("transformers_version")
    return settings


def test_a_saved_model_has_the_folders_own_settings_again(hostile: Path, tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path / "run"), model=load_qwen25_vl(str(hostile))[0])
    trainer.save_model(str(tmp_path / "final"))
    lora, _ = load_qwen25_vl(str(hostile), use_lora=True)
    assert isinstance(lora, PeftModel)
    lora.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    wanted = {"eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, **HOSTILE}
    assert [saved_settings(tmp_path / name) for name in ("final", "merged")] == [wanted, wanted]
    served = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "final").generation_config
    assert (served.no_repeat_ngram_size, served.eos_token_id) == (3, END_OF_TEXT)


# --- what ends an answer ----------------------------------------------------------------------------------------------

ENDS = {
    "no file": (None, [2]),
    "none named": ({}, [2]),
    "null": ({"eos_token_id": None}, [2]),
    "another one alone": ({"eos_token_id": 0}, [2, 0]),
    "a list with the tokenizer's": ({"eos_token_id": [0, 2]}, [2, 0]),
    "a list without it": ({"eos_token_id": [7, 0]}, [2, 7, 0]),
}


@pytest.mark.parametrize(("settings", "ends"), ENDS.values(), ids=ENDS.keys())
def test_an_answer_ends_at_the_tokenizers_token_and_at_those_that_the_folder_names(
    settings: dict[str, Any] | None, ends: list[int], tmp_path: Path
) -> None:
    model, processor = load_qwen25_vl(str(folder_with(tmp_path / "model", settings)))
    assert processor.tokenizer.eos_token_id == END_OF_TURN
    assert end_token_ids(model) == ends
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id == END_OF_TEXT


def test_training_ends_answers_where_evaluation_does(hostile: Path, tmp_path: Path) -> None:
    model, _ = load_qwen25_vl(str(hostile))
    trainer = fleet_trainer(rloo_config(tmp_path), model=model)
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == end_token_ids(model) == [2, 0]


def tokens(eos: Any, pad: Any) -> Any:
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad)


def test_padding_is_the_tokenizers_else_the_folders_else_an_end_token() -> None:
    asked = GenerationConfig(pad_token_id=5)
    assert tokens_alone(asked, tokens(2, 0), 10).pad_token_id == 0
    assert tokens_alone(asked, tokens(2, None), 10).pad_token_id == 5
    assert tokens_alone(GenerationConfig(), tokens(2, None), 10).pad_token_id == 2


@pytest.mark.parametrize("named", [10, -1, True, "2", 2.5, [2, 10]])
def test_an_end_token_outside_the_vocabulary_is_refused(named: Any) -> None:
    with pytest.raises(ValueError, match=r"has eos_token_id .*, but its vocabulary is of ids from 0 to 9; correct"):
        tokens_alone(GenerationConfig(eos_token_id=named), tokens(2, 0), 10)


def test_padding_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="has pad_token_id 10, but its vocabulary is of ids from 0 to 9"):
        tokens_alone(GenerationConfig(), tokens(2, 10), 10)


def test_a_model_whose_answers_would_never_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer would end; set eos_token in tokenizer_config.json"):
        tokens_alone(GenerationConfig(), tokens(None, 0), 10)
