"""Qwen2.5-VL as Fleet uses it: loading, LoRA and freezing, and one tool call from one episode.

Owns every decision about weights: dtype, attention, LoRA targets, freezing. Knows no trainer.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from environment import Episode, ImageSource, Message
from fleet.errors import one_line
from fleet.model_folder.files import is_adapter
from fleet.model_folder.generation_settings import describe_unused, tokens_alone
from fleet.model_folder.parts import LORA_TARGETS, PARTS, lora_pattern, part_of_weight, require_words
from fleet.model_folder.weights import require_every_weight, require_fitting_adapter
from fleet.qwen import vision_windows
from fleet.qwen.draws import named_uniforms
from fleet.qwen.group_passes import base_qwen, tree_prompts
from fleet.qwen.sampling_rules import SamplingRules
from fleet.qwen.tree_sampling import SamplingRequest, sample_on_trees
from utils.images import open_image

logger = logging.getLogger("fleet")


def load_qwen25_vl(
    model_id: str,
    use_lora: bool = False,
    *,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_targets: Collection[str] = ("language",),
    freeze: Collection[str] = (),
    load_in_4bit: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    vision_attn_implementation: str | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """(model, processor) of any Qwen2.5-VL: a hub id, a folder, or a folder with a LoRA adapter.

    use_lora: wrap the linear layers of lora_targets (of language, vision and merger) in new adapters, everything else
    frozen; an adapter folder is opened with its adapter either way. freeze: parts that get no gradient, of PARTS.
    load_in_4bit: NF4 base weights (QLoRA, arXiv 2305.14314), with use_lora only.
    Weights are read from safetensors alone, and no code that a model brings is run. The vision tower uses flash
    attention where it is installed and the dtype allows it, else attends all windows of one length together, unless
    vision_attn_implementation names another. Under DeepSpeed ZeRO-3 the weights are sharded while they
    load. Of the model's generation_config, only end and padding tokens are used. Its other settings are logged in a
    line, and saved with the model again.
    Raises ValueError if the model is another architecture, its files and its weights do not fit each other, nothing
    ends its answers, its processor does not pad left, or a part is unknown.
    """
    require_words(freeze, PARTS)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    vision = vision_attn_implementation or vision_attention(attn_implementation, dtype)
    # transformers looks for a "flash" that it does not know on the hub while it loads, and takes it afterwards
    loaded = attn_implementation if vision == vision_windows.NAME else vision
    model, processor, unused = open_base(
        model_id,
        revision,
        dtype=dtype,
        attn_implementation={"": attn_implementation, "text_config": attn_implementation, "vision_config": loaded},
        quantization_config=quantization if load_in_4bit else None,
    )
    if unused is not None:
        logger.info(f"generation_config.json of {model_id} asks for {unused}: not used, as Fleet's flags decide\n")
    if vision == vision_windows.NAME:
        model.set_attn_implementation({"vision_config": vision})
    for name, weight in model.named_parameters():
        if part_of_weight(name) in freeze:
            weight.requires_grad_(False)
    if read_adapter_config(model_id) is not None:
        model = PeftModel.from_pretrained(model, model_id, is_trainable=use_lora)
    elif use_lora:
        lora = make_lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
        # mixed dtypes break ZeRO-3's gather of small parameters
        model = get_peft_model(model, lora, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    return model, processor


def require_loadable(folder: str) -> None:
    """Raises ValueError or OSError if load_qwen25_vl would refuse this folder; reads no weight."""
    # must come before a DeepSpeed configuration is made, which excludes the meta device
    open_base(folder, device_map="meta", dtype="auto")


def open_base(
    model_id: str, revision: str | None = None, **loading_arguments: Any
) -> tuple[PreTrainedModel, Any, str | None]:
    """(base model, processor, unused generation settings) of a model or an adapter's base. Raises as load_qwen25_vl."""
    adapter = read_adapter_config(model_id)
    base_id = model_id if adapter is None else str(adapter.base_model_name_or_path)
    config = _read_config(base_id, revision)
    if adapter is not None:
        require_fitting_adapter(model_id, adapter, config)
    processor = load_processor(base_id, revision=revision)
    _require_fitting_processor(processor, config, base_id)
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        base_id,
        output_loading_info=True,
        # require_every_weight refuses another shape by name; transformers itself would name none
        ignore_mismatched_sizes=True,
        revision=revision,
        use_safetensors=True,
        **loading_arguments,
    )
    require_every_weight(loading)
    asked = model.generation_config
    model.generation_config = tokens_alone(asked, processor.tokenizer, config.get_text_config().vocab_size)
    return model, processor, describe_unused(asked)


def _read_config(base_id: str, revision: str | None) -> PreTrainedConfig:
    # transformers opens an adapter with its base, without a word
    if find_adapter_config_file(base_id, revision=revision) is not None:
        raise ValueError(
            f"{base_id} is an adapter on the hub, but wanted a Qwen2.5-VL or an adapter in a folder; download it (hf "
            f"download {base_id} --local-dir DIR) and pass the folder"
        )
    config = AutoConfig.from_pretrained(base_id, revision=revision, trust_remote_code=False)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"model {base_id} is a {config.model_type}, but Fleet trains qwen2_5_vl; pass a Qwen2.5-VL")
    return config


def load_processor(model_id: str, *, revision: str | None = None) -> Any:
    """The model's processor, padding on the left. Raises ValueError if it is not Qwen2.5-VL's."""
    processor = AutoProcessor.from_pretrained(model_id, revision=revision, padding_side="left", trust_remote_code=False)
    if type(processor).__name__ != "Qwen2_5_VLProcessor" or processor.tokenizer.padding_side != "left":
        raise ValueError(
            f"model {model_id} has a {type(processor).__name__}, but wanted a Qwen2_5_VLProcessor that pads left; "
            "restore preprocessor_config.json and tokenizer_config.json beside its weights"
        )
    _require_chat_template(processor, model_id)
    return processor


def _require_fitting_processor(processor: Any, config: PreTrainedConfig, model_id: str) -> None:
    """Raises ValueError unless processor and model agree on patches and on tokens."""
    images, vision = processor.image_processor, config.vision_config
    tokenizer, num_embedded = processor.tokenizer, config.get_text_config().vocab_size
    for what, found, wanted in (
        ("patch_size", images.patch_size, vision.patch_size),
        ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        ("image token", tokenizer.convert_tokens_to_ids(processor.image_token), config.image_token_id),
        ("number of tokens", max(len(tokenizer), num_embedded), num_embedded),
    ):
        if found != wanted:
            raise ValueError(
                f"model {model_id} has a processor whose {what} is {found}, but its config.json wants {wanted}; "
                "restore the preprocessor_config.json and the tokenizer's files that the model came with"
            )


def _require_chat_template(processor: Any, model_id: str) -> None:
    """Raises ValueError unless the chat template renders a system turn, a text and an image, and opens an answer."""
    remedy = "restore the chat_template.jinja (in older folders chat_template.json) that the model came with"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "SYSTEM-TEXT"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "USER-TEXT"}]},
    ]
    try:
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        question = processor.apply_chat_template(messages, tokenize=False)
    except (ValueError, TypeError, TemplateError) as error:
        words = f"model {model_id} has no chat template that can be used ({one_line(error)}); {remedy}"
        raise ValueError(words) from error
    counts = {word: prompt.count(word) for word in ("SYSTEM-TEXT", processor.image_token, "USER-TEXT")}
    if set(counts.values()) != {1} or len(prompt) <= len(question):
        raise ValueError(
            f"model {model_id} has a chat template that makes {prompt[:200]!r} of a system text, an image and a user's "
            f"text, but wanted each of them once and the start of an answer; {remedy}"
        )


def read_adapter_config(model_id: str) -> LoraConfig | None:
    """The LoRA configuration of an adapter folder; None for anything else. Raises ValueError if it is not LoRA's."""
    if not is_adapter(model_id):
        return None
    config = PeftConfig.from_pretrained(model_id)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {model_id} is of type {config.peft_type}, but Fleet takes LORA; pass a LoRA adapter")
    return config


def vision_attention(attn_implementation: str, dtype: torch.dtype) -> str:
    """The vision tower's attention: in place of sdpa, flash if it is installed and can run, else windows together."""
    if attn_implementation != "sdpa":
        return attn_implementation
    can_run_flash = torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if can_run_flash and find_spec("flash_attn") is not None else vision_windows.NAME


def make_lora_config(
    rank: int = 16, alpha: int = 32, dropout: float = 0.0, targets: Collection[str] = ("language",)
) -> LoraConfig:
    """LoRA (arXiv 2106.09685) on every linear layer of some of language, vision (the tower's blocks) and merger."""
    require_words(targets, LORA_TARGETS)
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_pattern(targets), task_type="CAUSAL_LM"
    )


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of a model. total: adapters included."""

    trainable: int = 0
    total: int = 0
    adapters: int = 0


def count_parameters(model: torch.nn.Module) -> dict[str, PartSize]:
    """The parameters of the tower, the merger and the language model."""
    sizes = dict.fromkeys(PARTS, PartSize())
    for name, parameter in model.named_parameters():
        before = sizes[part := part_of_weight(name)]
        # a ZeRO-3 shard has no elements of its own; DeepSpeed keeps the full count beside it
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        sizes[part] = PartSize(
            before.trainable + size * parameter.requires_grad,
            before.total + size,
            before.adapters + size * ("lora_" in name),
        )
    return sizes


@torch.no_grad()
def generate_tool_call(
    model: PreTrainedModel | PeftModel,
    processor: Any,
    episode_or_messages: Episode | Sequence[Message],
    images: Sequence[ImageSource] | None = None,
    *,
    max_completion_length: int = 64,
    temperature: float = 0.0,
    max_pixels: int | None = None,
) -> str:
    """The model's answer to one episode, as text without its end-of-turn token, ready for `judge`.

    model: from load_qwen25_vl, which keeps the folder's generation_config from deciding how it samples.
    episode_or_messages: an Episode, or chat messages with an image placeholder for each of `images`.
    max_completion_length: tokens. temperature: 0 is greedy; above, it samples. max_pixels: budget of one image.
    """
    if isinstance(episode_or_messages, Episode):
        images, episode_or_messages = episode_or_messages.images, episode_or_messages.messages
    text = processor.apply_chat_template(list(episode_or_messages), tokenize=False, add_generation_prompt=True)
    pictures = [open_image(image, max_pixels) for image in images or ()]
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt").to(model.device)
    rules = SamplingRules(answer_config(model, max_completion_length, temperature))
    seed = int(torch.randint(2**62, ())) if temperature > 0 else 0
    request = SamplingRequest(
        rules,
        named_uniforms(seed, 0, [0], 1, rules.max_tokens),
        drafts=[[]],
        padding_id=rules.config.pad_token_id,
        num_greedy=int(temperature == 0),
    )
    images_seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    attention = base_qwen(model).config.get_text_config()._attn_implementation
    with torch.no_grad():
        samples = sample_on_trees(model, tree_prompts(model, inputs), images_seen, attention, request)
    completion_ids = samples.completion_ids[0]
    return decode_completion(processor, completion_ids, end_token_ids(model))


def answer_config(
    model: Any,
    max_completion_length: int,
    temperature: float,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_completion_length: int = 0,
) -> GenerationConfig:
    """Draws from the policy itself, without media tokens; greedy at temperature 0. model: as loaded, for its ends.

    The others mean what the flags of their names do.
    """
    # transformers samples from the likeliest 50 unless it is told otherwise
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    sampling = drawn if temperature > 0 else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_completion_length,
        eos_token_id=end_token_ids(model),
        pad_token_id=model.generation_config.pad_token_id,
        suppress_tokens=media_token_ids(model.config),
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_completion_length or None,
        **sampling,
    )


def media_token_ids(config: Any) -> list[int]:
    """Tokens that stand for pixels. They are never sampled: without features, one would stop the run."""
    return [config.image_token_id, config.video_token_id]


def end_token_ids(model: Any) -> list[int]:
    """Every token that ends a completion, from the generation_config that load_qwen25_vl set and TRL reads too."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or [])


def up_to_end(completion_ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The completion up to and with its first end token."""
    stop = next((place + 1 for place, token in enumerate(completion_ids) if token in end_ids), len(completion_ids))
    return completion_ids[:stop]


def decode_completion(processor: Any, completion_ids: Sequence[int], end_ids: Sequence[int]) -> str:
    """A completion's text without its one end token. Other special tokens stay, so that the parser sees them."""
    ids = list(completion_ids[:-1] if completion_ids and completion_ids[-1] in end_ids else completion_ids)
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
