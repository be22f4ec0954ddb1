"""The built-in model: a real Qwen2.5-VL, tiny, made on this machine, in kinds with different lessons.

Owns the recipes (tokenizer, sizes, numbers of the lessons), the cache, and the weights that are shipped. The lessons
themselves are in lessons.py, form_school.py and reading_school.py. `python -m fleet.toy.model ship` makes the shipped
weights again.
"""

import argparse
import hashlib
import json
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.utils import logging as transformers_logging

from environment import EpisodeSource, PickImageEnv, load_environment_class
from fleet.cache import cache_folder, keeping, made_once
from fleet.episodes import BrokenEpisode, checked_episode
from fleet.errors import UsageError, one_line
from fleet.known_answers import solution_of
from fleet.toy.form_school import teach_at, teach_form
from fleet.toy.lessons import TOY_DATA_ROOT, TOY_IMAGE_PIXELS, teach_calls, teach_sight
from fleet.toy.reading_school import ReadingSchool
from utils.tool_calls import make_call_str, make_tool_call_str

THE_TOY = "the toy model"

# Qwen2.5's special tokens. The tool-call wrapper is not special there either: decoding keeps it.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
WRAPPER_TOKENS = ("<tool_call>", "</tool_call>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Runs with a fixed index start from the plain toy: it knows the form of a call, and every index is as likely. Runs that
# pick by name start from the sighted toy: it knows the pictures and their names too, and favours an index.
# Runs of an environment of one's own that has other tools, or no fixed index, start from a toy that was taught the form
# of its calls, and to see its pictures. Runs of examples/zoom.py start from the reading toy, which can name what a tool
# shows it, and does not know when to call which.
PLAIN, SIGHTED, TAUGHT, READING, RELUCTANT = "plain", "sighted", "taught", "reading", "reluctant"
SHIPPED = {kind: Path(__file__).resolve().with_name(f"{kind}.safetensors") for kind in (PLAIN, SIGHTED, READING)}
READING_ENV = TOY_DATA_ROOT.parent / "examples" / "zoom.py"  # whose ZoomEnv the shipped reading toy is for
SCHOOL_SEED = 2_147_483_646  # of an environment's episodes in school
NUM_TEXTS = 32  # episodes whose texts the tokenizer learns from
SIZES: dict[str, Any] = {
    "text": {
        "initializer_range": 0.06,  # at 0.02 a model this narrow starts too flat and needs twice the steps
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096,
    },
    "mrope_section": [4, 4, 4],  # sums to half of a head's 24 dimensions
    "vision": {
        "initializer_range": 0.06, "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 96, "window_size": 56, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
FORM_RECIPE = {
    "seed": 20, "vocab_size": 440, "steps": 500, "episodes_per_step": 8, "questions_per_episode": 2,
    "learning_rate": 2.5e-3, "max_pixels": TOY_IMAGE_PIXELS, "call_share": 1.0, "sees": True,
    # turns of gold calls that are followed; how often a call of an earlier turn than the last is shown
    "max_turns": 8, "look_share": 1 / 3,
    "text_share": 1.0,  # weight of the prompts' own text
    "question_weight": 1,  # how often the tokenizer reads a question: often enough, and its words are whole
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    TAUGHT: FORM_RECIPE,
    READING: FORM_RECIPE
    | {
        "vocab_size": 600, "question_weight": 20, "sees": False, "text_share": 0.1, "learning_rate": 2e-3,
        "reading_steps": 560, "reading_episodes_per_step": 64,
        "steps": 240, "episodes_per_step": 16, "questions_per_episode": 4,
    },
    # for a check: what to stop saying is learnt in a few steps of RLOO, whatever the task
    RELUCTANT: FORM_RECIPE
    | {"steps": 250, "questions_per_episode": 1, "learning_rate": 6e-3, "call_share": 1 / 3, "sees": False},
    PLAIN: {
        "seed": 20,
        "vocab_size": 400,
        "steps": 250,
        "episodes_per_step": 8,
        "candidates": [2, 3, 4, 4, 4, 4, 5, 6],  # in turns, so that every index up to 5 has been seen
        "learning_rate": 6e-3,
    },
    SIGHTED: {
        "seed": 1,
        "vocab_size": 440,  # names in 2 to 8 tokens: with 400 similar names are confused, with 800 none is learnt
        "candidates": 4,
        "drawings_per_label": 40,
        "naming": {"steps": 120, "pictures_per_step": 48, "learning_rate": 3e-3},
        "picking": {"steps": 800, "episodes_per_step": 8, "short_share": 0.92, "learning_rate": 3e-3},
        "habit": {
            "steps": 120, "episodes_per_step": 8, "favourite_index": 1, "true_share": 0.4, "learning_rate": 4e-3,
        },
    },
}  # fmt: skip


def toy_model_path(kind: str = PLAIN, env: EpisodeSource | None = None) -> Path:
    """The folder of a built toy; builds it if the cache has none for this recipe and these versions.

    kind: of RECIPES. env: of the kinds that are taught an environment's calls. One process builds, others wait, and
    the folder appears whole or not at all. Raises UsageError if the cache cannot be written, BrokenEpisode if the
    environment fails. In a process that a launcher started, use process.py, because transformers saves on the first
    rank alone.
    """

    def make(folder: Path) -> None:
        model, processor = build_toy_model(kind, env)
        with keeping(folder.parent, THE_TOY, SafetensorError):
            model.save_pretrained(folder)
            processor.save_pretrained(folder)

    return made_once(cached_path(kind, env), is_whole, make, THE_TOY)


def is_whole(path: Path) -> bool:
    """True if a folder has every file that `from_pretrained` opens."""
    return all((path / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def cached_path(kind: str, env: EpisodeSource | None = None) -> Path:
    """The cache's folder of a toy: its digest changes with the recipe, its code and the libraries that build it.

    For an environment it changes with what its first prompts say too: the schemas of the tools, the words around them,
    and the questions, whose tokens the toy learns. It does not change with answers and pictures. Raises UsageError if
    the environment fails.
    """
    sources = [
        Path(__file__).with_name(name)
        for name in ("model.py", "lessons.py", "form_school.py", "reading_school.py", "sight_heads.py")
    ]
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    recipe = recipe_digest(kind, env)
    return cache_folder() / f"toy-{kind}-{_digest([recipe, versions, *(path.read_text() for path in sources)])}"


def recipe_digest(kind: str, env: EpisodeSource | None = None) -> str:
    """Twelve hex digits that change with a toy's sizes, lessons and texts, but not with the code that uses them."""
    return _digest([SIZES, RECIPES[kind], _training_texts(kind) if env is None else _prompts_of(env)])


def build_toy_model(
    kind: str = PLAIN, env: EpisodeSource | None = None, *, may_be_shipped: bool = True
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Builds a toy and its processor. Shows a progress bar, and turns those of transformers off.

    may_be_shipped: take the weights that lie beside this file, if they were made by the recipe as it is.
    """
    recipe = RECIPES[kind]
    transformers_logging.disable_progress_bar()
    # the caller's generator stays as it is
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        processor = make_toy_processor(kind, env)
        model = make_toy_model(processor)
        if may_be_shipped and is_shipped(kind, env):
            model.load_state_dict(load_file(SHIPPED[kind]), strict=True)
        elif kind == READING:
            teach_at(ReadingSchool(model, processor, env, recipe))
        elif env is not None:
            teach_form(model, processor, env, recipe)
        elif kind == PLAIN:
            teach_calls(model, processor, recipe)
        else:
            teach_sight(model, processor, recipe)
    return model, processor


def is_shipped(kind: str, env: EpisodeSource | None = None) -> bool:
    """True if the weights of a toy lie beside this file, made by the recipe as it is, for these prompts.

    Raises UsageError if the file is damaged or the environment fails.
    """
    if kind not in SHIPPED or not SHIPPED[kind].is_file():
        return False
    try:
        with safe_open(SHIPPED[kind], framework="pt") as file:
            made_by = (file.metadata() or {}).get("recipe")
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the toy's weights in {SHIPPED[kind]} are damaged ({one_line(error)}); restore the file, as by git "
            "checkout, or remove it, and the toy is built anew"
        ) from error
    return bool(made_by == recipe_digest(kind, env))


def shipped_for(kind: str) -> EpisodeSource | None:
    """The environment that a shipped toy is for; None for the one of pictures by name."""
    if kind != READING:
        return None
    env: EpisodeSource = load_environment_class(f"{READING_ENV}:ZoomEnv")(str(TOY_DATA_ROOT), SCHOOL_SEED)
    return env


def make_toy_processor(kind: str = PLAIN, env: EpisodeSource | None = None) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor for pictures of 56 x 56 pixels, and a small vocabulary of a task's prompts and calls."""
    # brings Qwen's own way of splitting text; only its merges are learnt here
    untrained = Qwen2Tokenizer(
        vocab={token: token_id for token_id, token in enumerate(SPECIAL_TOKENS)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
    )
    texts = _training_texts(kind) if env is None else _texts_of(env, kind)
    vocab_size = RECIPES[kind]["vocab_size"]
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in WRAPPER_TOKENS])
    size = {"shortest_edge": TOY_IMAGE_PIXELS, "longest_edge": TOY_IMAGE_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_toy_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of the recipe's sizes with random weights from torch's generator, in float32."""
    config = toy_config(processor)
    model = Qwen2_5_VLForConditionalGeneration(config)
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, bos_token_id=None
    )
    return model


def toy_config(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLConfig:
    """The configuration of the recipe's sizes, with the processor's tokens."""
    tokenizer = processor.tokenizer
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    token_ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{names[name]}|>") for name in names}
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": SIZES["mrope_section"]}
    return Qwen2_5_VLConfig(
        text_config={**SIZES["text"], **stops, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=SIZES["vision"],
        tie_word_embeddings=False,  # as in 7B and larger
        **token_ids,
    )


def _training_texts(kind: str) -> list[str]:
    """The texts that the tokenizer learns its merges from: the prompts of both modes and every answer."""
    texts = [make_tool_call_str(index) for index in range(10)]
    for fixed_correct_index in (0, None):
        env = PickImageEnv(TOY_DATA_ROOT, 4, fixed_correct_index)
        for number in range(16):
            for message in env.prompt_messages(env.episode(number)):
                texts += [part["text"] for part in message["content"] if part["type"] == "text"]
    # often enough for names to be merged into a few tokens
    names = [f"Pick the {label}. What is image" for label in sorted(env.paths_by_label)] * 20
    return [*texts, *names] if kind == SIGHTED else texts


def _texts_of(env: EpisodeSource, kind: str) -> list[str]:
    """The prompts of an environment's first episodes, and their gold answers. Raises BrokenEpisode."""
    texts = []
    for number in range(NUM_TEXTS):
        episode = checked_episode(env, number)
        texts.append(make_call_str(solution_of(env, episode)))
        for message in episode.messages:
            texts += [part["text"] for part in message["content"] if part["type"] == "text"]
        texts += [texts[-1]] * (RECIPES[kind]["question_weight"] - 1)
    return texts


def _prompts_of(env: EpisodeSource) -> list[str]:
    """Each text of the first episodes' prompts once, in order of the alphabet. Raises UsageError."""
    try:
        episodes = [checked_episode(env, number) for number in range(NUM_TEXTS)]
    except BrokenEpisode as error:
        raise UsageError(f"the environment is broken: {error}") from error
    parts = chain.from_iterable(message["content"] for episode in episodes for message in episode.messages)
    return sorted({part["text"] for part in parts if part["type"] == "text"})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def main() -> None:
    """Prints the folder of a toy, built if need be; or makes the shipped weights again."""
    parser = argparse.ArgumentParser(description="Build a toy and print its folder, or make the shipped weights again.")
    parser.add_argument("what", nargs="?", default=PLAIN, choices=(PLAIN, SIGHTED, "ship"), help="(default: plain)")
    parser.add_argument("--kind", default=SIGHTED, choices=SHIPPED, help="with ship: of which toy (default: sighted)")
    parser.add_argument(
        "--lesson_steps",
        type=int,
        metavar="N",
        help="with ship, for a trial: steps of each lesson, which makes it another recipe (default: the recipe's)",
    )
    arguments = parser.parse_args()
    if arguments.what != "ship":
        print(toy_model_path(arguments.what))
        return
    if arguments.lesson_steps is not None:
        RECIPES[PLAIN]["steps"] = arguments.lesson_steps
        RECIPES[READING] |= {"reading_steps": arguments.lesson_steps, "steps": arguments.lesson_steps}
        for lesson in ("naming", "picking", "habit"):
            RECIPES[SIGHTED][lesson]["steps"] = arguments.lesson_steps
    kind, env = arguments.kind, shipped_for(arguments.kind)
    # from the recipe, whatever weights lie there
    weights = build_toy_model(kind, env, may_be_shipped=False)[0].state_dict()
    save_file(weights, SHIPPED[kind], metadata={"format": "pt", "recipe": recipe_digest(kind, env)})
    print(f"wrote {SHIPPED[kind]} ({SHIPPED[kind].stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
