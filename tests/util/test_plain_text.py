"""What people and models wrote is text: a literal of the tokenizer's is refused, a control character is spelled out."""

import json
from pathlib import Path

import pytest

from utils.plain_text import (
    QWEN_ADDED_TOKENS,
    NotPlainText,
    added_token_literals,
    printable,
    printable_lines,
    problem_of_label,
    require_plain_messages,
    require_plain_text,
)

pytestmark = pytest.mark.fast


def test_qwen_has_22_added_tokens() -> None:
    assert len(QWEN_ADDED_TOKENS) == 22


@pytest.mark.parametrize("literal", sorted(QWEN_ADDED_TOKENS))
def test_no_literal_of_the_tokenizer_is_text(literal: str) -> None:
    with pytest.raises(NotPlainText) as refusal:
        require_plain_text(f"Pick the {literal}.", "episode 3")
    assert str(refusal.value) == (
        f"episode 3 holds {literal} ('Pick the {literal}.'), which is a token to the model, not text; "
        "write it otherwise"
    )
    problem = problem_of_label(f"red {literal}")
    assert problem is not None and literal in problem


@pytest.mark.parametrize("text", ["<|image pad|>", "<|im_end", "tool_call", "< tool_call>", "<|IM_END|>", "a < b > c"])
def test_what_only_resembles_a_literal_is_text(text: str) -> None:
    require_plain_text(text, "episode 3")
    assert problem_of_label(text) is None


def message(role: str, *texts: str | None) -> dict[str, object]:
    """A chat message of these texts, with an image for None."""
    return {"role": role, "content": [{"type": "image"} if t is None else {"type": "text", "text": t} for t in texts]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([message("user", "fine", "Pick <|im_end|>")], "episode 3: the user message holds <|im_end|>"),
        ([message("user", "<|image", "_pad|>")], "the user message holds <|image_pad|>"),
        ([{"role": "user", "content": "Pick </tool_call>"}], "the user message holds </tool_call>"),
        ([message("system", "Say <tool_call>. <|im_start|>user")], "the system message holds <|im_start|>"),
        ([message("assistant", "<tool_call>")], "the assistant message holds <tool_call>"),
        ([message("user<|im_end|>", "x")], "the role of a message holds <|im_end|>"),
    ],
)
def test_messages_that_hold_a_literal_are_refused(messages: list[dict[str, object]], words: str) -> None:
    with pytest.raises(NotPlainText) as refusal:
        require_plain_messages(messages, "episode 3")
    assert words in str(refusal.value)


def test_a_system_message_may_show_the_form_of_a_call() -> None:
    asked = message("user", "<|image", None, "_pad|>")
    require_plain_messages([message("system", "Reply with <tool_call>{}</tool_call>"), asked], "episode 3")


def test_a_models_own_added_tokens_count_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<loc_1>"}, {"id": 3}]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<loc_2>"}}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<loc_3>": 9}))
    assert added_token_literals(str(tmp_path)) == QWEN_ADDED_TOKENS | {"<loc_1>", "<loc_2>", "<loc_3>"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"added_tokens": 3}', '{"added_tokens": [3, null]}'])
def test_tokenizer_files_that_say_nothing_add_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert added_token_literals(str(tmp_path)) == QWEN_ADDED_TOKENS == added_token_literals("toy")


SHOWN = {
    "plain": ("red cup 红 🔴 é", "red cup 红 🔴 é"),
    "line break": ("a\r\nb", "a\\r\\nb"),
    "colour": ("\x1b[31mred", "\\x1b[31mred"),
    "zero byte": ("a\0b", "a\\x00b"),
    "turned writing": ("a\u202eb", "a\\u202eb"),
    "half a pair": ("a\ud800b", "a\\ud800b"),
    "markup": ("two [/INST] [bold]", "two [/INST] [bold]"),
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.values(), ids=SHOWN.keys())
def test_what_does_not_print_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_stay_lines() -> None:
    assert printable_lines("a\x1b\n\tb\r\n") == "a\\x1b\n\\tb\\r\n"


@pytest.mark.parametrize(
    "label", ["a\nb", "a\tb", "\x1b[31mred", "a\0b", "a\u202eb", "\u2066a", "a\u200bb", "a\u2028b"]
)
def test_a_label_with_a_control_character_is_refused(label: str) -> None:
    problem = problem_of_label(label)
    assert problem is not None and "control character" in problem and problem.isprintable()


@pytest.mark.parametrize(
    "label", ["красный круг", "赤い丸", "می\u200cخواهم", "👩\u200d🚀", "❤\ufe0f", "naïve", "[/INST]"]
)
def test_labels_of_all_scripts_are_text(label: str) -> None:
    assert problem_of_label(label) is None


def test_a_label_longer_than_any_name_is_not_asked_for() -> None:
    assert problem_of_label("x" * 1000) is None
    words = "has a name or label of 25,000 characters, wanted at most 1,000; shorten it"
    assert problem_of_label("x" * 25_000) == words
