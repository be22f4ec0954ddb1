"""The flags of training and evaluation, each declared once: name, type, default, meaning, bounds, TRL's name for it.

parser.py makes a parser of these classes. options.py puts them together and says which values exclude each other, and
idle_flags.py says which flag does nothing beside which others. training_flags.py has those of training alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fleet.command.parser import Bound, flag, index_or_none, json_object, user_path

TOY_MODEL_ID = "toy"


@dataclass(frozen=True)
class Case:
    """The facts on which defaults depend.

    options: as given. models: what model and task are called in `by_model`, the closest name first.
    """

    options: Any
    has_bf16_gpu: bool
    models: tuple[str, ...]


def by_model(**defaults: tuple[Any, str]) -> Callable[[Case], tuple[Any, str]]:
    """A default that depends on the model: on `toy` or `real`, and if given on `look`, `own` or `reasoning` first."""
    return lambda case: next(defaults[name] for name in case.models if name in defaults)


AT_LEAST_0 = Bound("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Bound("at least 1", lambda value: value >= 1)
ABOVE_0 = Bound("above 0", lambda value: value > 0)
BELOW_1 = Bound("below 1", lambda value: value < 1)
A_SHARE = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)
# numpy takes 32 bits, and every process adds its rank
A_SEED = Bound("below 2147483648", lambda value: value < 2**31)


# fmt: off
@dataclass(frozen=True)
class ModelFlags:
    """The model, and how it is held and computed."""

    model_id: str = flag(TOY_MODEL_ID, "hub id or folder of a Qwen2.5-VL", "the built-in tiny one", metavar="ID",
        parse=user_path)
    revision: str | None = flag(None, "branch, tag or commit of a hub model", "its main branch", metavar="REV")
    dtype: str | None = flag(None, "what is computed in", "bfloat16 on a GPU that has it, else float32",
        choices=("bfloat16", "float32"),
        default_of=lambda case: ("bfloat16", "the GPU or accelerate says so") if case.has_bf16_gpu
        else ("float32", "no GPU with bfloat16"))
    attn_implementation: str = flag("sdpa", "attention of the language model; flash_attention_2 cannot train on shared "
        "prefixes; the vision tower uses flash attention where it is installed", "which is everywhere",
        choices=("sdpa", "eager", "flash_attention_2"), needs={"flash_attention_2": ("flash_attn",
        "pip install flash-attn --no-build-isolation, or pass --attn_implementation sdpa")})
    load_in_4bit: bool = flag(False, "QLoRA: hold the base weights in 4 bits; needs bitsandbytes",
        needs={True: ("bitsandbytes", "pip install bitsandbytes")})


@dataclass(frozen=True)
class TaskFlags:
    """The task: what is shown and asked, and what counts as an answer."""

    data_root: str = flag("./toy_images", "folder of candidate images: named files, a folder per class, or "
        "metadata.csv/.jsonl; of folders train/, val/, test/ above those, train/ is drawn from; or a data set: what "
        "save_to_disk wrote, parquet, or hub:owner/name", metavar="DIR",
        parse=user_path, is_file=True)
    image_column: str | None = flag(None, "of a data set: the column of images", "the only one that holds images",
        metavar="NAME")
    label_column: str | None = flag(None, "of a data set: the column of labels, as text or as classes with names",
        "the only one of classes, else label, name, text or caption", metavar="NAME")
    split: str | None = flag(None, "of a data set: the split to draw from", "train, or the only one", metavar="NAME")
    bad_images: str = flag("stop", "what an image that cannot be used does: stop the run, or be left out, and where "
        "it goes bad during the run, have its episode replaced", "as nothing is left out unasked",
        choices=("stop", "skip"), may_change=True)
    env: str | None = flag(None, "another environment, as path/to/file.py:ClassName", "PickImageEnv",
        metavar="FILE:CLASS", parse=user_path, is_file=True)
    env_args: str | None = flag(None, "further arguments of its constructor by name, as a JSON object", "its defaults",
        metavar="JSON", parse=json_object)
    candidates_per_episode: int = flag(4, "images per episode")
    fixed_correct_index: int | None = flag(0, "the index that is always right, or none: drawn per episode and named "
        "in the instruction", metavar="INDEX|none", parse=index_or_none)
    allow_reasoning: bool = flag(False, "accept text before the call, and ask for it")
    max_turns: int = flag(1, "turns a rollout may have; from 2 on a tool may answer before the verdict",
        bounds=(AT_LEAST_1,))
    max_context_length: int | None = flag(None, "tokens a conversation may have, its prompt and the tools' answers "
        "with them", "as many as the model has positions", bounds=(AT_LEAST_1,))
    image_max_pixels: int | None = flag(None, "width times height an image is shrunk to, in pixels",
        "3136 = 56x56 for the toy, else 200704 = 448x448",
        bounds=(Bound("at least 784 (28x28 pixels)", lambda value: value >= 784),),
        default_of=by_model(toy=(56 * 56, "the toy model"), real=(448 * 448, "256 tokens an image at most")))


@dataclass(frozen=True)
class HeldOutFlags(TaskFlags):
    """The task's episodes that are held out from training."""

    eval_episodes: int = flag(256, "held-out episodes, the same each time", bounds=(AT_LEAST_1,))
    eval_seed: int = flag(10**9, "seed of the held-out episodes, which must not be the run's",
        bounds=(Bound("from 0 to 2147483647", lambda value: 0 <= value < 2**31),))


@dataclass(frozen=True)
class SamplingFlags:
    """The sampling of completions."""

    temperature: float = flag(1.0, "of sampling, above 0", "the policy itself", bounds=(ABOVE_0,), trl=True)
    top_p: float = flag(1.0, "nucleus of sampling, above 0 to 1", "all", metavar="P", bounds=(A_SHARE,), trl=True)
    top_k: int = flag(0, "sample from the likeliest so many tokens; 0 for all", "the policy itself", metavar="K",
        bounds=(AT_LEAST_0,), trl=True)
    min_p: float = flag(0.0, "sample no token of less than this share of the likeliest one's probability, 0 to 1",
        "the policy itself", metavar="P", bounds=(AT_LEAST_0, BELOW_1), trl=True)
    repetition_penalty: float = flag(1.0, "what the score of a token that was seen before, in the prompt too, is "
        "divided by; above 0, below 1 it is favoured", "none", bounds=(ABOVE_0,), trl=True)
    min_completion_length: int = flag(0, "tokens a completion has before it may end", "none", bounds=(AT_LEAST_0,))
    max_completion_length: int | None = flag(None, "tokens a completion may have",
        "32 for the toy, 64 with --env; else 64, or 512 with reasoning", bounds=(AT_LEAST_1,), trl=True,
        default_of=by_model(toy=(32, "a toy call has 20 tokens"),
                            own=(64, "calls of your own may be longer"), real=(64, "a call has about 25 tokens"),
                            reasoning=(512, "room to reason before the call")))
    ds3_gather_for_generation: bool = flag(False, "under ZeRO-3 alone: hold the whole model on every GPU while "
        "generating: faster if it fits, impossible for 32B in 80 GB", trl=True, may_change=True)
