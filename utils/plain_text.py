"""Text that people and models wrote stays text: names, questions and lines on a terminal never become structure.

Owns the literals that are tokens to a model, the refusal of text that holds one, and the form of text in a line.
Imports no torch, so that both come before a weight loads.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
# The added tokens of every Qwen2.5-VL. A tokenizer reads their literals as one token wherever they stand in a text.
QWEN_ADDED_TOKENS = frozenset(
    {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
     "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
     "<|image_pad|>", "<|video_pad|>", CALL_OPEN, CALL_CLOSE, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
     "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}
)  # fmt: skip
# A system prompt shows the form of a call, which is written with these.
FORM_OF_A_CALL = frozenset({CALL_OPEN, CALL_CLOSE})

# Unicode's categories of characters that show nothing and do something: break a line, turn the writing, hide.
CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Invisible characters that letters of some scripts and emoji are joined by.
JOINERS = frozenset("\u200c\u200d")
MAX_LABEL_LENGTH = 1000  # characters; a prompt asks for one label, and the report's tables show it
SPACES = re.compile(r"[^\S\t-\r\x1c-\x1f\x85\u2028\u2029]+")  # of any width, but none that breaks a line
PLACEHOLDER = "\0"  # stands for an image between texts, and is in no literal


class NotPlainText(ValueError):
    """A text that would become structure. The message is one line: the place, the literal, the remedy."""


def printable(text: object) -> str:
    """A text, a path or an error in one line: every character that does not print is spelled out.

    >>> printable("a\\tb")
    'a\\\\tb'
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


def printable_lines(text: str) -> str:
    """A text of several lines, each made `printable`."""
    return "\n".join(printable(line) for line in text.split("\n"))


def normalized(text: str) -> str:
    """The text in Unicode's form NFC, as the tokenizer has it, with plain single spaces.

    >>> normalized("cafe\\u0301\\u00a0 au lait ") == "caf\\u00e9 au lait"
    True
    """
    return SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def problem_of_label(label: str, literals: Collection[str] = QWEN_ADDED_TOKENS) -> str | None:
    """The reason why a prompt cannot name a label, in words that follow the file's name; None if it can.

    Refused are labels that are too long, that hold one of the model's literals, or a character that is no text: a
    control, one that turns the direction of writing, half of a pair.
    """
    if len(label) > MAX_LABEL_LENGTH:
        return f"has a name or label of {len(label):,} characters, wanted at most {MAX_LABEL_LENGTH:,}; shorten it"
    odd = next((char for char in label if unicodedata.category(char) in CONTROLS and char not in JOINERS), "")
    if unicodedata.category(odd or " ") == "Cs":
        return "has a name or label with half a surrogate pair, which is not text; write it in UTF-8"
    if odd:
        return f"has a name or label with a control character, {printable(odd)} in '{printable(label)}'; take it out"
    literal = first_literal(label, literals)
    if literal is None:
        return None
    return f"has a name or label that is no text to the model, which reads {literal} as one token; write it otherwise"


def first_literal(text: str, literals: Collection[str]) -> str | None:
    """The literal that comes first in the text as a tokenizer reads it, or None."""
    composed = unicodedata.normalize("NFC", text)
    found = [(composed.index(literal), literal) for literal in literals if literal in composed]
    return min(found)[1] if found else None


def require_plain_text(text: str, where: str, literals: Collection[str] = QWEN_ADDED_TOKENS) -> None:
    """Raises NotPlainText if the text holds a literal that is a token to the model.

    where: names the text, as "episode 3: the user message".
    """
    literal = first_literal(text, literals)
    if literal is not None:
        # a question may be long: the text around the literal shows where it came from
        before, _, after = unicodedata.normalize("NFC", text).partition(literal)
        around = f"{before[-20:]}{literal}{after[:20]}".strip()
        raise NotPlainText(
            f"{printable(where)} holds {literal} ('{printable(around)}'), which is a token to the model, not text; "
            "write it otherwise"
        )


def require_plain_messages(
    messages: Sequence[Mapping[str, Any]], where: str, literals: Collection[str] = QWEN_ADDED_TOKENS
) -> None:
    """Raises NotPlainText if a text or a role of chat messages holds a literal that is a token to the model.

    messages: with `role`, and `content` that is a text or a list of parts. A chat template joins neighbouring texts, so
    a literal that they make together counts. A system message may hold <tool_call> and its end, because it shows the
    form of a call. where: names the messages, as "episode 3".
    """
    for message in messages:
        role, content = str(message["role"]), message["content"]
        require_plain_text(role, f"{where}: the role of a message", literals)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = "".join(str(part["text"]) if part.get("type") == "text" else PLACEHOLDER for part in parts)
        allowed = FORM_OF_A_CALL if role == "system" else frozenset()
        for between_images in said.split(PLACEHOLDER):
            require_plain_text(between_images, f"{where}: the {role} message", set(literals) - allowed)


def added_token_literals(model_id: str) -> frozenset[str]:
    """The literals that are tokens to this model, as far as they are known before it loads.

    Those of every Qwen2.5-VL, and for a model's folder those that its tokenizer's files add. A broken file adds none:
    loading the model tells what is wrong with it.
    """
    folder = Path(model_id)
    literals = {
        *QWEN_ADDED_TOKENS,
        *_contents(_json_object(folder / "tokenizer.json").get("added_tokens")),
        *_contents(_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder")),
        *_json_object(folder / "added_tokens.json"),
    }
    return frozenset(literal for literal in literals if literal)


def _contents(tokens: Any) -> list[str]:
    """The texts of added tokens, which a file lists or has in an object's values, as texts or with `content`."""
    items = tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    texts = [item.get("content") if isinstance(item, dict) else item for item in items]
    return [text for text in texts if isinstance(text, str)]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
