"""Loading, freezing, adapters and one tool call, on the toy model's real files."""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import model_utils
from environment import ParseStatus, judge
from fleet.qwen.vision_windows import NAME
from model_utils import (
    count_parameters,
    decode_completion,
    end_token_ids,
    generate_tool_call,
    load_processor,
    load_qwen25_vl,
    require_loadable,
    vision_attention,
)
from tests.helpers import toy_dataset, toy_model, toy_path, toy_processor


def trainable_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_all_weights_train_by_default() -> None:
    model = toy_model()
    assert len(trainable_names(model)) == len(list(model.parameters()))
    assert model.dtype == torch.float32
    counts = count_parameters(model)
    assert all(size.trainable == size.total > 0 == size.adapters for size in counts.values())
    assert sum(size.total for size in counts.values()) == sum(parameter.numel() for parameter in model.parameters())


# the beginnings of the names of each part's weights
BEGINNINGS = {
    "tower": ("model.visual.patch_embed.", "model.visual.blocks."),
    "merger": ("model.visual.merger.",),
    "language_model": ("model.language_model.", "lm_head."),
}


@pytest.mark.parametrize("num_frozen", [1, 2, 3])
def test_each_set_of_parts_freezes_its_weights_and_no_other(num_frozen: int) -> None:
    for frozen in combinations(BEGINNINGS, num_frozen):
        model = toy_model(freeze=frozen)
        beginnings = tuple(beginning for part in frozen for beginning in BEGINNINGS[part])
        for name, weight in model.named_parameters():
            assert weight.requires_grad is not name.startswith(beginnings), (frozen, name)
        assert {part for part, size in count_parameters(model).items() if size.trainable == 0} == set(frozen)


@pytest.mark.parametrize("parts", [["Tower"], "tower", ["merger", "lm_head"]])
def test_an_unknown_part_is_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="wanted a collection of some of tower, merger, language_model; correct it"):
        toy_model(freeze=parts)
    with pytest.raises(ValueError, match="wanted a collection of some of language, vision, merger; correct it"):
        toy_model(use_lora=True, lora_targets=parts)


# layers of each kind in a block, in all blocks of the toy
ADAPTED = {"language": (3 * 7, "language_model"), "vision": (2 * 5, "tower"), "merger": (2, "merger")}


@pytest.mark.parametrize("targets", [subset for size in (1, 2, 3) for subset in combinations(ADAPTED, size)])
def test_adapters_are_on_every_linear_layer_of_their_targets_and_nowhere_else(targets: tuple[str, ...]) -> None:
    model = toy_model(use_lora=True, lora_rank=4, lora_targets=targets)
    base = toy_model()
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    wanted = {name for name in linear if any(name.startswith(BEGINNINGS[ADAPTED[target][1]]) for target in targets)}
    assert len(wanted) == sum(ADAPTED[target][0] for target in targets)
    found = trainable_names(model)
    assert len(found) == 2 * len(wanted)
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found} == wanted
    assert all(4 in parameter.shape for name, parameter in model.named_parameters() if "lora_" in name)
    sizes = count_parameters(model)
    assert {part for part, size in sizes.items() if size.trainable} == {ADAPTED[target][1] for target in targets}
    assert all(size.trainable == size.adapters for size in sizes.values())


def test_half_precision_is_as_asked() -> None:
    assert toy_model(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_as_asked_in_both_halves(implementation: str) -> None:
    model = toy_model(attn_implementation=implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    assert model.model.visual.config._attn_implementation == (NAME if implementation == "sdpa" else implementation)
    plain = toy_model(attn_implementation=implementation, vision_attn_implementation="eager")
    assert plain.model.visual.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("has_gpu", "is_installed", "dtype", "asked", "used"),
    [
        (True, True, torch.bfloat16, "sdpa", "flash_attention_2"),
        (True, False, torch.bfloat16, "sdpa", NAME),
        (True, True, torch.float32, "sdpa", NAME),
        (False, True, torch.bfloat16, "sdpa", NAME),
        (True, True, torch.bfloat16, "eager", "eager"),
    ],
)
def test_vision_tower_uses_flash_attention_where_it_can(
    has_gpu: bool, is_installed: bool, dtype: torch.dtype, asked: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(model_utils, "find_spec", lambda name: object() if is_installed else None)
    assert vision_attention(asked, dtype) == used


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a llama, but Fleet trains qwen2_5_vl"):
        load_qwen25_vl(str(tmp_path))


def test_processor_pads_left_even_if_its_file_says_right(tmp_path: Path) -> None:
    copy = shutil.copytree(toy_path(), tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
    assert load_processor(str(copy)).tokenizer.padding_side == "left"


TEMPLATES = {
    "no template": (None, "no chat template that can be used"),
    "broken template": ("{% for message in messages %}", "no chat template that can be used"),
    "a template that refuses a system turn": (
        "{{ raise_exception('only user and assistant') }}",
        "no chat template that can be used (only user and assistant)",
    ),
    "a template for text alone": (
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
        "{{ add_generation_prompt }}",
        "wanted each of them once",
    ),
    "a template that opens no answer": (
        "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<|image_pad|>' }}"
        "{% endfor %}{% endfor %}",
        "and the start of an answer",
    ),
}


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_does_not_fit_is_refused(template: str | None, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path(), folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        load_processor(str(folder))
    assert str(folder) in str(refusal.value) and "restore the chat_template.jinja" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 7}, "patch_size is 7, but its config.json wants 14"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1, but its config.json wants 2"),
        ({"merge_size": 1}, "merge_size is 1, but its config.json wants 2"),
    ],
)
def test_a_processor_that_cuts_pictures_for_another_model_is_refused(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path(), folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= changes
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(words)):
        require_loadable(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path(), folder)
    processor = load_processor(str(folder))
    num_tokens = len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"<extra_{number}>" for number in range(5000)])
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"number of tokens is {num_tokens + 5000}, but its config.json wants"):
        require_loadable(str(folder))


def test_one_tool_call_from_an_episode_or_from_messages() -> None:
    model, processor = toy_model(), toy_processor()
    episode = toy_dataset().env.episode(0)
    answer = generate_tool_call(model, processor, episode, max_pixels=56 * 56)
    assert judge(answer, 0, 4).parse_status is ParseStatus.OK
    again = generate_tool_call(model, processor, list(episode.messages), episode.images, max_pixels=56 * 56)
    assert again == answer, "greedy decoding has one answer"
    torch.manual_seed(0)
    sampled = {generate_tool_call(model, processor, episode, temperature=1.0) for _ in range(6)}
    assert len(sampled) > 1
    assert (
        len(processor.tokenizer(generate_tool_call(model, processor, episode, max_completion_length=3)).input_ids) <= 3
    )


def test_only_the_end_token_is_taken_off_a_completion() -> None:
    tokenizer, ends = toy_processor().tokenizer, end_token_ids(toy_model())
    ids = tokenizer("<|vision_start|>a<|im_end|><|im_end|>")["input_ids"]
    assert decode_completion(toy_processor(), ids, ends) == "<|vision_start|>a<|im_end|>"
    assert decode_completion(toy_processor(), [], ends) == ""
