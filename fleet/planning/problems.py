"""The problems of a planned run, each in a line with its remedy: what does not fit, and what is known to go wrong.

Facts in, words out. The checks of flags, files and images refuse theirs earlier (fleet/command).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from fleet.planning.machine import GIB
from fleet.planning.plan import Prediction

REAL_VISION_WIDTH = 1024
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
# two installed packages that do not go together, and what to do
BAD_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("trackio<0.44", "pillow>=13", "trackio 0.43 asks for pillow below 13; pip install 'pillow<13'"),
    ("vllm>=0.32", "trl<1.17", "TRL 1.16 reads a field that vLLM 0.32 renamed; pip install 'vllm>=0.22,<0.32'"),
    ("vllm<0.22", "trl>=1.16", "TRL 1.16 calls what vLLM has since 0.22; pip install 'vllm>=0.22,<0.32'"),
)  # fmt: skip


def problems_of(found: Prediction, versions: Callable[[str], str] = version) -> list[str]:
    """What does not work, in the order of importance; empty where all is sound."""
    return [*_of_memory(found), *_of_lengths(found), *_of_launch(found), *_of_vllm(found), *_of_versions(versions),
            *_of_schedule(found)]  # fmt: skip


def _of_memory(found: Prediction) -> Iterator[str]:
    options, memory, launch = found.options, found.memory, found.launch
    device = "GPU" if found.machine.has_gpu else "process"
    if not found.fits:
        yield (
            f"a {device} needs {memory.total / GIB:.1f} GiB in its {memory.largest_phase}, and has "
            f"{found.machine.device_bytes / GIB:.1f}, of which {found.limit / GIB:.1f} can be used; {_remedy(found)}"
        )
    host = found.memory.host_total
    there = found.machine.host_bytes
    if there is not None and found.machine.has_gpu and host > there:
        most = max(memory.host, key=memory.host.__getitem__)
        remedies = {
            "offloaded": "set offload_optimizer_device: none, or use more machines",
            "loading or saving": "launch under ZeRO-3 with zero3_init_flag: true, which reads one copy a machine",
            "image features": "lower --vision_cache_mib",
            "processes": "start fewer processes a machine",
        }
        yield (
            f"a machine needs {host / GIB:.0f} GiB of host memory, {memory.host[most] / GIB:.0f} of them for "
            f"{most}, and has {there / GIB:.0f}; {remedies[most]}"
        )
    kept = options.save_total_limit + 1 + int(options.keep_best)
    disk = kept * found.checkpoint_bytes
    if found.free_disk is not None and disk > found.free_disk:
        yield (
            f"{kept} checkpoints of {found.checkpoint_bytes / GIB:.1f} GiB (one more than --save_total_limit while one "
            f"is written) do not fit on the disk of --output_dir, which has {found.free_disk / GIB:.1f} GiB; pass "
            "--save_total_limit 1, or another --output_dir"
        )
    if launch.offloads_optimizer and found.fits and _fits_without_offload(found):
        yield (
            "the accelerate file offloads the optimizer to the CPU, and its states would fit on the GPUs "
            f"({_optimizer_gib(found):.1f} GiB each), where a step is faster; set offload_optimizer_device: none"
        )


def _remedy(found: Prediction) -> str:
    """What to change first, as the parts of memory say."""
    options, memory, launch = found.options, found.memory, found.launch
    remedies = []
    if found.largest_batch >= 1:
        samples = memory.largest_phase in ("generation", "evaluation")
        more = "" if samples else ", with more --gradient_accumulation_steps"
        remedies.append(f"lower --per_device_batch_size to {found.largest_batch}{more}")
    if not found.is_checkpointed and memory.largest_phase == "training pass" and found.largest_batch < 1:
        remedies.append("pass --gradient_checkpointing true")
    if memory.largest_phase == "generation" and options.gradient_accumulation_steps > 1:
        remedies.append("lower --gradient_accumulation_steps, as a generation holds the episodes of all of them")
    if memory.largest_phase == "evaluation":
        remedies.append("pass --eval_steps 0 --control_steps 0, and score the run with evaluate.py")
    if memory.parts["reference"]:
        remedies.append(f"pass --beta 0, which needs no reference model ({memory.parts['reference'] / GIB:.1f} GiB)")
    if memory.parts["vllm"] and found.vllm is not None and found.vllm.while_training:
        remedies.append("pass --vllm_enable_sleep_mode true, or a lower --vllm_gpu_memory_utilization")
    if launch.zero_stage >= 3 and options.ds3_gather_for_generation:
        remedies.append("pass --ds3_gather_for_generation false")
    states = memory.parts["weights"] + memory.parts["gradients"] + memory.parts["optimizer"]
    if states > found.limit / 2 and not options.use_lora:
        if launch.zero_stage < 3 and found.machine.has_gpu:
            word = "float32 weights, gradients and AdamW's states" if not launch.has_deepspeed else "them whole"
            remedies.append(
                f"launch with --config_file accelerate_config.yaml (ZeRO-3), as each GPU now holds {word} "
                f"({states / GIB:.0f} GiB)"
            )
        elif found.machine.has_gpu and not launch.offloads_optimizer:
            remedies.append("use more GPUs, or set offload_optimizer_device: cpu")
        remedies.append("pass --use_lora true")
    elif options.use_lora and not options.load_in_4bit and memory.parts["weights"] > found.limit / 2:
        remedies.append("pass --load_in_4bit true")
    if options.num_rollouts > 4:
        remedies.append("lower --num_rollouts")
    return ", or ".join(remedies) or "lower --max_completion_length or --image_max_pixels, or pass a smaller --model_id"


def _fits_without_offload(found: Prediction) -> bool:
    return found.memory.total + _optimizer_gib(found) * GIB <= found.limit


def _optimizer_gib(found: Prediction) -> float:
    # gradients in bfloat16, the float32 copy of weights and gradients, and the moments
    return found.counts.size.trainable * 18 / found.launch.num_processes / GIB


def _of_lengths(found: Prediction) -> Iterator[str]:
    options, lengths = found.options, found.lengths
    positions = found.config.get_text_config().max_position_embeddings
    assert options.max_completion_length is not None
    needed = lengths.longest_prompt + options.max_completion_length
    context = options.max_context_length or positions
    if context > positions:
        yield (f"max_context_length={context:,}, but the model has {positions:,} positions; lower it")
    elif needed > context:
        yield (
            f"the longest prompt has {lengths.longest_prompt:,} tokens, {lengths.num_images} pictures of up to "
            f"{lengths.image_tokens[2]:,} among them, and a completion up to {options.max_completion_length:,}: "
            f"{needed:,} in a context of {context:,}; lower --image_max_pixels, --candidates_per_episode or "
            "--max_completion_length"
        )
    if options.max_completion_length < lengths.answer and not options.allow_reasoning:
        yield (
            f"max_completion_length={options.max_completion_length}, but a right answer has up to {lengths.answer} "
            f"tokens, so none could be given; pass --max_completion_length {2 * lengths.answer}"
        )
    if options.allow_reasoning and options.max_completion_length < 4 * lengths.answer:
        yield (
            f"allow_reasoning=true with max_completion_length={options.max_completion_length}: a call alone has "
            f"{lengths.answer} tokens, which leaves no room to reason; pass --max_completion_length 512"
        )
    if lengths.image_tokens[2] <= 4 and _is_real(found):
        yield (
            f"a picture has {lengths.image_tokens[2]} tokens at --image_max_pixels {options.image_max_pixels}, in "
            "which a real model sees nothing; pass --image_max_pixels 200704"
        )


def _is_real(found: Prediction) -> bool:
    """True for a vision tower of the published models' width: a toy may be called by any name."""
    return found.config.vision_config.hidden_size >= REAL_VISION_WIDTH


def _of_launch(found: Prediction) -> Iterator[str]:
    options, launch = found.options, found.launch
    if launch.zero_stage in (1, 2):
        yield (
            f"DeepSpeed's zero_stage is {launch.zero_stage}, with which Fleet was not tested; set zero_stage: 3, or "
            "launch without DeepSpeed"
        )
    if launch.zero_stage >= 3 and not launch.gathers_for_saving and not options.use_lora:
        yield "zero3_save_16bit_model is false, so final/ would hold shards, which only export.py opens; set it to true"
    if launch.zero_stage >= 3 and not launch.loads_shards:
        yield ("zero3_init_flag is false, so every process loads the whole model before it is sharded; set it to true")
    if launch.zero_stage >= 3 and options.load_in_4bit:
        yield "load_in_4bit=true does not shard under ZeRO-3; drop one of the two"
    if launch.num_processes % launch.num_machines:
        yield (
            f"{launch.num_processes} GPUs do not divide among num_machines: {launch.num_machines}; correct one of them"
        )
    if options.dtype == "float32" and found.machine.has_gpu and _is_real(found):
        yield "dtype=float32 on a GPU computes at a tenth of bfloat16's speed; pass --dtype bfloat16"


def _of_vllm(found: Prediction) -> Iterator[str]:
    options, vllm = found.options, found.vllm
    if vllm is None:
        return
    share, parallel = options.vllm_gpu_memory_utilization, options.vllm_tensor_parallel_size
    if not vllm.fits:
        least = vllm.least / found.machine.device_bytes
        yield (
            f"vllm_gpu_memory_utilization={share:g} gives vLLM {vllm.while_generating / GIB:.1f} GiB, but its weights "
            f"and the cache of one sequence take {vllm.least / GIB:.1f}; pass --vllm_gpu_memory_utilization "
            f"{min(0.95, round(least * 1.2 + 0.05, 2)):g}, or a larger --vllm_tensor_parallel_size"
        )
    heads = found.config.get_text_config().num_key_value_heads
    if found.launch.num_processes % parallel:
        yield (
            f"vllm_tensor_parallel_size={parallel} does not divide {found.launch.num_processes} processes; pass one "
            "that does"
        )
    elif heads % parallel and parallel % heads:
        yield f"vllm_tensor_parallel_size={parallel} does not divide {heads} key-value heads; pass one that does"
    length = options.vllm_max_model_length
    assert options.max_completion_length is not None
    if length is not None and length < found.lengths.longest_prompt + options.max_completion_length:
        yield (
            f"vllm_max_model_length={length:,}, but a prompt of {found.lengths.longest_prompt:,} tokens and its "
            f"completion of {options.max_completion_length:,} are longer; raise it or drop it"
        )


def _of_versions(versions: Callable[[str], str]) -> Iterator[str]:
    for words in _requirements():
        if not _is_installed(words, versions, default=True):
            name = Requirement(words).name
            yield f"{name} {versions(name)} is installed, but Fleet was tested with {words}; pip install '{words}'"
    for first, second, words in BAD_PAIRS:
        if _is_installed(first, versions, default=False) and _is_installed(second, versions, default=False):
            yield words


def _requirements() -> Iterator[str]:
    """The requirements of requirements.txt; none where it is not there, and no line that is something else."""
    with contextlib.suppress(OSError):
        for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(InvalidRequirement):
                words = line.partition("#")[0].strip()
                Requirement(words)
                yield words


def _is_installed(requirement: str, versions: Callable[[str], str], *, default: bool) -> bool:
    """True if a package is installed in a version that the requirement takes. default: where it is not installed."""
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(versions(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return default


def _of_schedule(found: Prediction) -> Iterator[str]:
    options = found.options
    assert options.train_steps is not None
    if options.warmup_steps >= options.train_steps:
        yield (
            f"warmup_steps={options.warmup_steps} of train_steps={options.train_steps}: the learning rate would never "
            "be reached; lower --warmup_steps"
        )
    if options.eval_steps > options.train_steps:
        yield (
            f"eval_steps={options.eval_steps} is beyond train_steps={options.train_steps}, so only the start and the "
            "end are evaluated; lower --eval_steps"
        )


def as_gib(parts: Mapping[str, int]) -> dict[str, float]:
    """Bytes by part in GiB, to three places."""
    return {name: round(num_bytes / GIB, 3) for name, num_bytes in parts.items()}
