"""The built-in model: a real Qwen2.5-VL, tiny, made on this machine in well under a minute.

Owns its recipe (tokenizer, sizes, a short supervised warm-up) and its cache. The warm-up teaches the form of a call
and a uniform choice of index, so that training starts from well-formed answers that are right by chance alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dataset import RepeatableEpisodeDataset, VLMDataCollator
from environment import Episode, PickImageEnv
from utils.tool_calls import make_tool_call_str

TOY_IMAGE_PIXELS = 56 * 56
TOY_DATA_ROOT = Path(__file__).resolve().parent / "toy_images"

# Qwen2.5's special tokens. The tool-call wrapper is not special there either: decoding keeps it.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WRAPPER_TOKENS = ("<tool_call>", "</tool_call>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

RECIPE: dict[str, Any] = {
    "vocab_size": 400,
    "text": {
        "initializer_range": 0.06,  # at 0.02 a model this narrow starts too flat and needs twice the steps
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "mrope_section": [4, 4, 4],  # sums to half of a head's 24 dimensions
    "vision": {
        "initializer_range": 0.06,
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 96,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "seed": 20,
    "warm_up_steps": 250,
    "episodes_per_step": 8,
    "candidates": [2, 3, 4, 4, 4, 4, 5, 6],  # drawn per step, so that every index up to 5 has been seen
    "learning_rate": 6e-3,
    "instruction_words": (
        "pick the one that is correct red green blue yellow white black circle square star moon image images all but "
        "same differs other which of a an and not with left right big small find show choose as in on only every"
    ),
}


def toy_model_path(cache_root: Path | None = None) -> Path:
    """The folder of the built toy model; builds it if the cache has none for this recipe and these versions.

    cache_root: where it is kept; default `$FLEET_CACHE`, else `$XDG_CACHE_HOME/fleet`, else `~/.cache/fleet`. One
    process builds while others wait, and the folder appears whole or not at all. In a process that a launcher started,
    use build_in_own_process, because transformers saves on the first rank alone.
    """
    root = cache_root or default_cache_root()
    path = root / f"toy-{recipe_digest()}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "toy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
            unfinished = root / f"{path.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            build_toy_model(unfinished)
            os.replace(unfinished, path)
    return path


def build_in_own_process() -> Path:
    """`toy_model_path` run by a process that knows nothing of launcher, ranks and GPUs.

    Raises OSError if the cache cannot be written, subprocess.CalledProcessError if the build fails.
    """
    path = default_cache_root() / f"toy-{recipe_digest()}"
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    of_launcher = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_launcher)}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Path(done.stdout.splitlines()[-1])


def is_whole(path: Path) -> bool:
    """Whether a folder has all that `from_pretrained` opens."""
    return all((path / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def default_cache_root() -> Path:
    """Where built models are kept."""
    if "FLEET_CACHE" in os.environ:
        return Path(os.environ["FLEET_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleet"


def recipe_digest() -> str:
    """Twelve hex digits that change with this file, Fleet's prompts or the libraries that build the model."""
    made_from = {
        "recipe": Path(__file__).read_text(encoding="utf-8"),
        "prompts": _training_texts(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def build_toy_model(path: Path) -> None:
    """Builds the toy model into `path`, a new folder that `from_pretrained` opens. Shows a progress bar."""
    with _seeded(RECIPE["seed"]):
        processor = make_toy_processor()
        model = make_toy_model(processor)
        _warm_up(model, processor)
    model.save_pretrained(path)
    processor.save_pretrained(path)


def make_toy_processor() -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor with a small vocabulary of Fleet's own prompts, for pictures of 56 x 56 pixels."""
    # an empty Qwen2Tokenizer brings Qwen's own way of splitting text; only its merges are learnt here
    tokenizer = Qwen2Tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learnt = tokenizer.backend_tokenizer
    learnt.train_from_iterator(_training_texts(), trainer)
    bpe = json.loads(learnt.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
    )
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
    tokenizer = processor.tokenizer
    token_ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": RECIPE["mrope_section"]}
    config = Qwen2_5_VLConfig(
        text_config={**RECIPE["text"], **stops, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=RECIPE["vision"],
        tie_word_embeddings=False,  # as in 7B and larger
        **token_ids,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**stops)
    return model


class _AnyInstructionEnv(PickImageEnv):
    """Every other episode asks in words of no meaning, so that a call is the answer to any instruction."""

    def instruction(self, episode: Episode) -> str:
        rng = random.Random(f"{episode.labels}")
        if rng.random() < 0.5:
            return super().instruction(episode)
        words = [rng.choice(RECIPE["instruction_words"].split()) for _ in range(rng.randrange(3, 14))]
        return f"{' '.join(words).capitalize()}."


def _warm_up(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
    """Teaches to answer with one call whose index is uniform over the candidates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["learning_rate"], RECIPE["warm_up_steps"])
    collator = VLMDataCollator(processor, num_rollouts=1)
    datasets = {
        count: RepeatableEpisodeDataset(
            _AnyInstructionEnv(TOY_DATA_ROOT, count, fixed_correct_index=0), TOY_IMAGE_PIXELS
        )
        for count in set(RECIPE["candidates"])
    }
    model.train()
    steps = tqdm(range(RECIPE["warm_up_steps"]), desc="building the toy model, once", unit="step")
    for step in steps:
        count = RECIPE["candidates"][step % len(RECIPE["candidates"])]
        first = step * RECIPE["episodes_per_step"]
        batch = collator([datasets[count][first + offset] for offset in range(RECIPE["episodes_per_step"])])
        indices = [number % count for number in range(first, first + RECIPE["episodes_per_step"])]
        answers = [make_tool_call_str(index) + "<|im_end|>" for index in indices]
        loss = _text_loss(model, processor, batch, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _text_loss(model: Any, processor: Any, batch: Any, answers: list[str]) -> torch.Tensor:
    """Cross-entropy of prompt text and answer; the prompt teaches which tokens Fleet's texts never use."""
    # every answer has the same number of tokens: they differ in one digit
    answer_ids = processor.tokenizer(answers, return_tensors="pt")["input_ids"]
    input_ids = torch.cat([batch["input_ids"], answer_ids], dim=1)
    is_no_text = (batch["attention_mask"] == 0) | (batch["mm_token_type_ids"] == 1)
    labels = torch.cat([batch["input_ids"].masked_fill(is_no_text, -100), answer_ids], dim=1)
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([batch["attention_mask"], torch.ones_like(answer_ids)], dim=1),
        mm_token_type_ids=torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answer_ids)], dim=1),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        labels=labels,
    ).loss


def _training_texts() -> list[str]:
    """What the tokenizer learns its merges from: the prompts of both modes and every answer."""
    texts = [make_tool_call_str(index) for index in range(10)]
    for fixed_correct_index in (0, None):
        env = PickImageEnv(TOY_DATA_ROOT, 4, fixed_correct_index)
        for number in range(16):
            for message in env.prompt_messages(env.episode(number)):
                texts += [part["text"] for part in message["content"] if part["type"] == "text"]
    return texts


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs its body from a fixed torch seed, and gives the caller's generator back untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


if __name__ == "__main__":
    print(toy_model_path())
