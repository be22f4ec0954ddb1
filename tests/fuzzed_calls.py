"""What the parser is fuzzed with, and a second recogniser to judge it: the parsing policy as a regular grammar.

Owns the strings and the verdict they deserve. The grammar is written from the policy, and shares no code and no JSON
reader with the parser.
"""

import random
import re
from collections.abc import Callable

from tests.conftest import call_text

MAX_CHARS = 4096
OPEN, CLOSE = "<tool_call>", "</tool_call>"
B = r"[ \t\r\n]*"  # blanks


def spelled(word: str) -> str:
    """The pattern of every JSON string that reads as `word`, each letter plain or as a \\u escape."""
    return '"' + "".join(rf"(?:{re.escape(letter)}|\\u00(?i:{ord(letter):02x}))" for letter in word) + '"'


NAME = rf"{spelled('name')}{B}:{B}{spelled('pick_image')}"
ARGUMENTS = (
    rf"{spelled('arguments')}{B}:{B}\{{{B}{spelled('index')}{B}:{B}(?P<index>-?(?:0|[1-9][0-9]*)){B}\}}"
)  # fmt: skip
# the call, then what follows it; either key may come first
CALLS = [
    re.compile(rf"{OPEN}{B}\{{{B}{first}{B},{B}{second}{B}\}}{B}{CLOSE}{B}(?P<fence>(?:```{B})?)")
    for first, second in ((NAME, ARGUMENTS), (ARGUMENTS, NAME))
]


def index_by_grammar(text: str, *, allow_reasoning: bool) -> int | None:
    """The index of the one call that `text` is by the parsing policy; None if it is anything else."""
    if text.count(OPEN) != 1:
        return None
    before, _, rest = text.partition(OPEN)
    found = CALLS[0].fullmatch(OPEN + rest) or CALLS[1].fullmatch(OPEN + rest)
    if found is None:
        return None
    has_fence = found["fence"] != ""
    if has_fence and re.search(rf"```json{B}\Z", before) is None:
        return None
    # a fence belongs to the call; all else before it is reasoning
    is_bare = re.fullmatch(rf"{B}```json{B}" if has_fence else B, before) is not None
    num_chars = len(OPEN + rest) + len("```json") * has_fence if allow_reasoning else len(text)
    return int(found["index"]) if (is_bare or allow_reasoning) and num_chars <= MAX_CHARS else None


def status_by_counting(text: str, *, allow_reasoning: bool) -> str | None:
    """The status that length and number of opening wrappers decide; None where they leave it open."""
    num_opened = text.count(OPEN)
    # a fence before the call may count or not
    num_chars = len(text) - max(text.find(OPEN), 0) if allow_reasoning and num_opened else len(text)
    if num_opened == 0 and allow_reasoning:
        return "no_call"
    if num_chars > MAX_CHARS:
        return "too_long"
    if allow_reasoning and num_chars + len("```json") > MAX_CHARS:
        return None
    return {0: "no_call", 1: None}.get(num_opened, "multiple_calls")


LOOK_ALIKES = {
    "<": "＜‹〈", ">": "＞›〉", '"': "“”＂'", "{": "｛", "}": "｝", ":": "：", ",": "，", "_": "＿-", "i": "іｉı",
    "a": "аａ", "e": "еｅ", "o": "оο", "c": "с", "2": "２²٢२", "0": "０٠O", "1": "１l١", "`": "´ˋ", " ": "\u00a0\u2003",
    "\n": "\u2028\v\x85",
}  # fmt: skip
FRAGMENTS = [
    OPEN, CLOSE, "```json", "```", "<|im_end|>", "<|image_pad|>", "<think>", '{"name": "pick_image", "arguments": ',
    '{"index": ', '"index": 1, ', '"name": "pick_image", ', '"', "{", "}", "[", "]", "\\", '\\"', "\\u", "\\u0069",
    "\\ud800", "0", "7", "-", "+", ".", "e5", "_", "true", "null", "NaN", "-Infinity", ",", ":", " ", "\n", "\t", "\0",
    "\ufeff", "\u200b", "\u202e", "/*", "//",
]  # fmt: skip
VALID = [
    lambda rng: call_text(rng.randrange(-2, 20)),
    lambda rng: f"```json\n{call_text(rng.randrange(4))}\n```",
    lambda rng: call_text(rng.randrange(4)).replace("\n", ""),
    lambda rng: f'{OPEN}{{"arguments":{{"index":{rng.randrange(4)}}},"name":"pick_image"}}{CLOSE}',
    lambda rng: call_text(rng.randrange(4)).replace("index", r"\u0069n\u0064ex"),
    lambda rng: f"The circle is image {rng.randrange(4)}.\n{call_text(rng.randrange(4))}",
    lambda rng: f"<think>{{1}} ```json</think>\n```json\n{call_text(rng.randrange(4))}\n```\n",
]


def _span(text: str, rng: random.Random) -> tuple[int, int]:
    """A start and an end within the text, mostly close together."""
    start = rng.randrange(len(text) + 1)
    return start, min(len(text), start + int(rng.expovariate(0.2)))


def insert_fragment(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    return text[:start] + rng.choice(FRAGMENTS) + text[start:]


def insert_character(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    return text[:start] + chr(rng.randrange(rng.choice([0x80, 0x3000, 0x110000]))) + text[start:]


def insert_surrogate(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    return text[:start] + chr(rng.randrange(0xD800, 0xE000)) + text[start:]


def delete(text: str, rng: random.Random) -> str:
    start, end = _span(text, rng)
    return text[:start] + text[end:]


def swap(text: str, rng: random.Random) -> str:
    (start, end), (_, last) = sorted((_span(text, rng), _span(text, rng)))
    return text[:start] + text[end:last] + text[start:end] + text[max(end, last) :]


def repeat(text: str, rng: random.Random) -> str:
    start, end = _span(text, rng)
    return text[:start] + text[start:end] * rng.choice([2, 3, 10, 100]) + text[end:]


def truncate(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    return text[:start] if rng.random() < 0.7 else text[start:]


def swap_for_look_alike(text: str, rng: random.Random) -> str:
    places = [place for place, letter in enumerate(text[:500]) if letter in LOOK_ALIKES]
    if not places:
        return text
    place = rng.choice(places)
    return text[:place] + rng.choice(LOOK_ALIKES[text[place]]) + text[place + 1 :]


def escape(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    written = "".join(f"\\u{ord(letter):04x}" for letter in text[start : start + 1])
    return text[:start] + (written.upper().replace("U", "u") if rng.random() < 0.3 else written) + text[start + 1 :]


def change_case(text: str, rng: random.Random) -> str:
    start, end = _span(text, rng)
    return text[:start] + text[start:end].swapcase() + text[end:]


def change_byte(text: str, rng: random.Random) -> str:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if content:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return content.decode("utf-8", rng.choice(["replace", "surrogateescape"]))


def change_index(text: str, rng: random.Random) -> str:
    literals = ["-0", "00", "1.0", "1e2", "[1]", '"1"', "true", "9" * rng.choice([20, 400, 3900]), "-1", "0x1", "1_0"]
    return re.sub(r"-?[0-9]", lambda found: rng.choice(literals), text, count=1)


def insert_member(text: str, rng: random.Random) -> str:
    place = rng.choice([start.end() for start in re.finditer("[{]", text[:500])] or [0])
    key = rng.choice(["index", "name", "arguments", "reason", "", r"\u0069ndex"])
    value = rng.choice(["2", '"pick_image"', '{"index": 2}', "null", "[0, 1, 2, 3]"])
    return text[:place] + f'"{key}": {value}, ' + text[place:]


def nest(text: str, rng: random.Random) -> str:
    start, end = _span(text, rng)
    depth = rng.choice([1, 2, 7, 8, 9, 50, 2000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), (OPEN, CLOSE), ("{", "")])
    return text[:start] + opened * depth + text[start:end] + closed * depth + text[end:]


def pad(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    length = rng.choice([MAX_CHARS - 7, MAX_CHARS - 1, MAX_CHARS, MAX_CHARS + 1, 10_000])
    unit = rng.choice([" ", "\n", " ", "{", '"', "\\", "<", "`", "é", "[]", '\\"', "9"])
    padding = (unit * length)[: max(length - len(text), 0)]
    return rng.choice([padding + text, text + padding, text[:start] + padding + text[start:]])


MUTATIONS: list[Callable[[str, random.Random], str]] = [
    insert_fragment, insert_character, insert_surrogate, delete, swap, repeat, truncate, swap_for_look_alike, escape,
    change_case, change_byte, change_index, insert_member, nest, pad,
]  # fmt: skip


def fuzzed_text(seed: int, number: int) -> str:
    """String `number` of a corpus: a valid call, mutated 0 to 3 times. The same for the same seed and number."""
    rng = random.Random(f"fuzz/{seed}/{number}")
    text = rng.choice(VALID)(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
        text = rng.choice(MUTATIONS)(text, rng)
    return text
