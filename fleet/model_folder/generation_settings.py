"""Only the end and padding tokens of a model folder's generation settings decide how the model answers.

`generate` takes each setting that its caller leaves unset from the model's generation_config. So a loaded model gets
one of these tokens alone, and no setting leaks. The folder's own settings are written wherever the model is saved.
"""

from os import PathLike
from typing import Any

from transformers import GenerationConfig

# A folder may name these and still ask for nothing that Fleet does not do: tokens, and values without effect.
TOKEN_SETTINGS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
NEUTRAL_VALUES = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "use_cache": True,
}


class TokensAlone(GenerationConfig):
    """A generation config of end and padding tokens; in its place the folder's own is saved."""

    _replaced: GenerationConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings.pop("_replaced", None)
        return settings

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes the settings of the folder that the model is from."""
        save = super().save_pretrained if self._replaced is None else self._replaced.save_pretrained
        save(save_directory, *args, **kwargs)


def tokens_alone(asked: GenerationConfig, tokenizer: Any, vocabulary_size: int) -> TokensAlone:
    """The generation config of a loaded model, in place of `asked`, its folder's.

    A completion ends at the tokenizer's end-of-turn token and at each that `asked` names. Padding is the tokenizer's,
    which pads prompts, else `asked`'s, else the first end token.
    Raises ValueError if nothing ends a completion, or a token is not in the vocabulary.
    """
    named = asked.eos_token_id if isinstance(asked.eos_token_id, list) else [asked.eos_token_id]
    end_ids = list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *named) if token is not None))
    if not end_ids:
        raise ValueError(
            "neither its tokenizer nor its generation_config.json names an end token, so no answer would end; set "
            "eos_token in tokenizer_config.json"
        )
    padding = next(token for token in (tokenizer.pad_token_id, asked.pad_token_id, end_ids[0]) if token is not None)
    for setting, token in (*(("eos_token_id", token) for token in end_ids), ("pad_token_id", padding)):
        if type(token) is not int or not 0 <= token < vocabulary_size:
            raise ValueError(
                f"its generation_config.json or tokenizer has {setting} {token!r}, but its vocabulary is of ids from 0 "
                f"to {vocabulary_size - 1}; correct generation_config.json"
            )
    config = TokensAlone(eos_token_id=end_ids, pad_token_id=padding)
    config._replaced = asked
    return config


def describe_unused(asked: GenerationConfig) -> str | None:
    """The settings, with their values, that a folder asks for and Fleet does not take; None without any."""
    unused = [
        f"{name}={value}"
        for name, value in sorted(asked.to_diff_dict().items())
        if not (name.startswith("_") or name in TOKEN_SETTINGS or name == "transformers_version")
        and value is not None
        and value != NEUTRAL_VALUES.get(name)
    ]
    return ", ".join(unused) or None
