"""The three parts of a Qwen2.5-VL: whose each weight is, and where adapters go. By names alone: imports no torch."""

import re
from collections.abc import Collection, Mapping
from typing import Any

TOWER, MERGER, LANGUAGE_MODEL = "tower", "merger", "language_model"
PARTS = (TOWER, MERGER, LANGUAGE_MODEL)
VISION_PARTS = frozenset({TOWER, MERGER})

# By the word that asks for it: the part, and the pattern of its linear layers. A pattern holds the part's own name, as
# the tower has layers of the language model's names, such as `gate_proj`.
LORA_TARGETS = {
    "language": (LANGUAGE_MODEL, r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"),
    "vision": (TOWER, r".*visual\.blocks\..*\.(qkv|proj|gate_proj|up_proj|down_proj)"),
    "merger": (MERGER, r".*visual\.merger\.mlp\.[02]"),
}

# Every layer that an adapter may be in, of the first block of each stack.
LAYERS = {
    TOWER: (
        "model.visual.patch_embed.proj",
        *(f"model.visual.blocks.0.attn.{name}" for name in ("qkv", "proj")),
        *(f"model.visual.blocks.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ),
    MERGER: ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    LANGUAGE_MODEL: (
        "lm_head",
        "model.language_model.embed_tokens",
        *(f"model.language_model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"model.language_model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ),
}


def part_of_weight(name: str) -> str:
    """The part that a weight belongs to, by its name in the model; an adapter's belongs to the layer's part.

    >>> part_of_weight("model.visual.merger.mlp.0.weight"), part_of_weight("lm_head.weight")
    ('merger', 'language_model')
    """
    if "visual." not in name:
        return LANGUAGE_MODEL
    return MERGER if "visual.merger." in name else TOWER


def require_words(given: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for a word that is not known, and for text in place of a collection."""
    unknown = [given] if isinstance(given, str) else sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"got {unknown[0]!r}, wanted a collection of some of {', '.join(known)}; correct it")


def lora_pattern(targets: Collection[str]) -> str:
    """The pattern of the layers that take adapters, as PEFT compares it with a whole name. targets: of LORA_TARGETS."""
    return "|".join(pattern for word, (_, pattern) in LORA_TARGETS.items() if word in targets)


def parts_of_adapter(config: Mapping[str, Any]) -> frozenset[str]:
    """The parts that an adapter trains. config: its adapter_config.json."""
    targets, saved = config.get("target_modules") or (), config.get("modules_to_save") or ()
    return frozenset(
        part
        for part, layers in LAYERS.items()
        if any(_is_target(layer, targets) or _is_inside(layer, saved) for layer in layers)
    )


def _is_target(layer: str, targets: str | Collection[str]) -> bool:
    """True if PEFT puts an adapter there: by a pattern of the whole name, or by one of several endings."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(f".{layer}".endswith(f".{target}") for target in targets)


def _is_inside(layer: str, modules: Collection[str]) -> bool:
    return any(f".{module}." in f".{layer}." for module in modules)
