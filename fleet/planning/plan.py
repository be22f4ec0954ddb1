"""The plan of a run: what it will hold, compute and write, and whether that fits, from flags and configurations alone.

`plan_run` puts together what the other files of this folder know. It loads no weight and asks no GPU for memory.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from environment import EpisodeSource
from fleet.command.flags import TOY_MODEL_ID, ModelFlags, TaskFlags
from fleet.command.options import Options
from fleet.model_folder.files import base_of
from fleet.model_folder.parts import LANGUAGE_MODEL, VISION_PARTS
from fleet.planning.counted_pass import CountedModel, PassShape, Peak
from fleet.planning.counts import Counts, counts_of
from fleet.planning.lengths import Grid, Lengths, lengths_of
from fleet.planning.machine import Launch, Machine
from fleet.planning.memory import BFLOAT16, FLOAT32, Memory, Moments, Policy, Sampling, checkpoint_bytes, memory_of
from fleet.planning.published import PIXELS_OF_PROCESSOR, published_config
from fleet.planning.shapes import RunShapes, with_rows
from fleet.planning.work import PassesOfStep, seconds_at, step_flops
from fleet.qwen.flops import WorkComparison, compare_work
from fleet.qwen.group_passes import MAX_MASK_PAIRS, why_not_to_pack
from fleet.toy.model import cached_path, is_whole, make_toy_processor, toy_config
from fleet.toy.process import kind_for
from fleet.vllm_memory import VLLMBytes, cache_bytes, vllm_bytes
from model_utils import make_lora_config, read_adapter_config

# of a device's memory: the rest is what an allocator loses between blocks
USABLE_SHARE = 0.95
MAX_BATCH = 4096


@dataclass(frozen=True)
class Prediction:
    """What a run needs, per process unless it says otherwise, for the longest prompt and completions.

    is_checkpointed: activations are computed again. is_packed: a group is one row. largest_batch: episodes per device
    and micro-batch that fit; 0 if none does. step_flops: operations of an optimizer step. step_s: (least, likely)
    seconds of those; None for an unknown chip. free_disk: bytes where the run writes; None for an assumed machine.
    """

    options: Options
    launch: Launch
    machine: Machine
    config: Any
    counts: Counts
    lengths: Lengths
    memory: Memory
    vllm: VLLMBytes | None
    work: WorkComparison
    is_checkpointed: bool
    is_packed: bool
    largest_batch: int
    checkpoint_bytes: int
    free_disk: int | None
    step_flops: int
    step_s: tuple[float, float] | None

    @property
    def limit(self) -> int:
        """Bytes of its device that a process can use."""
        return round(self.machine.device_bytes * USABLE_SHARE)

    @property
    def fits(self) -> bool:
        """True if the largest phase fits on the device."""
        return self.memory.total <= self.limit


class Planner:
    """Plans a run under one launch, with and without gradient checkpointing."""

    def __init__(
        self, options: Options, env: EpisodeSource, launch: Launch, machine: Machine, config: Any, processor: Any
    ):
        """options: resolved. config, processor: of `known_model`. Raises ValueError if no episode can be shown."""
        self.options, self.launch, self.machine, self.config = options, launch, machine, config
        pixels = PIXELS_OF_PROCESSOR
        if processor is not None:
            size = processor.image_processor.size
            pixels = size["shortest_edge"], size["longest_edge"]
        self.grid = Grid(config.vision_config, options.image_max_pixels, pixels)
        lengths = lengths_of(env, self.grid, processor)
        if lengths is None:
            raise ValueError("none of the first episodes can be shown")
        self.lengths = lengths
        assert options.per_device_batch_size
        self.groups, self.shapes = options.per_device_batch_size, RunShapes(options, launch, config, lengths)
        side = round((lengths.image_tokens[2] * self.grid.merged) ** 0.5)
        self.picture = 1, side, side
        self.work = self._work()
        attention = options.attn_implementation
        self.is_packed = options.shared_prefix and why_not_to_pack(attention, self.work) is None

    def prediction(self, is_checkpointed: bool) -> Prediction:
        """The prediction for a run with or without checkpointing."""
        options, launch = self.options, self.launch
        model = self._model(is_checkpointed)
        shapes, groups = self.shapes, self.groups
        training, generation = shapes.training(groups, is_packed=self.is_packed), shapes.generation(groups)
        evaluation = shapes.evaluation(groups)
        if evaluation is not None and with_rows(generation, evaluation.num_rows) == evaluation:
            # counted already, but for its number of rows
            evaluation = None
        counts = counts_of(model, training, shapes.piece(generation), evaluation and shapes.piece(evaluation))
        policy = self._policy(counts, model)
        vllm = self._vllm(policy)
        nothing = VLLMBytes(0, 0, 0)
        cache = (options.vision_cache_mib or 0) * 2**20

        def memory_at(groups: int) -> Memory:
            moments = self._moments(counts, model, groups)
            return memory_of(policy, launch, self.machine, moments, vllm or nothing, cache=cache)

        flops = step_flops(self.config, training, generation, self.picture, self._passes(is_checkpointed))
        found = Prediction(
            options,
            launch,
            self.machine,
            self.config,
            counts,
            self.lengths,
            memory_at(self.groups),
            vllm,
            self.work,
            is_checkpointed,
            self.is_packed,
            0,
            checkpoint_bytes(policy, launch, is_lora=options.use_lora),
            None if options.assume_gpus else _free_disk(options.output_dir or "runs"),
            flops,
            seconds_at(flops, self.machine.peak_flops),
        )
        return replace(found, largest_batch=self._largest(memory_at, found.limit))

    def _largest(self, memory_at: Any, limit: int) -> int:
        """The most groups of a micro-batch that fit, by halving."""
        pairs = self.shapes.training(self.groups, is_packed=self.is_packed).num_slots ** 2
        most = MAX_BATCH
        if self.is_packed:
            most = min(most, MAX_MASK_PAIRS[self.options.attn_implementation] // pairs)
        fitting, beyond = 0, most + 1
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            if memory_at(middle).total <= limit:
                fitting = middle
            else:
                beyond = middle
        return fitting

    def _model(self, is_checkpointed: bool) -> CountedModel:
        options, launch = self.options, self.launch
        is_half = options.dtype == "bfloat16"
        can_be_half = launch.has_deepspeed or options.use_lora
        lora = None
        if options.use_lora:
            lora = read_adapter_config(options.model_id)
            if lora is None:
                lora = make_lora_config(
                    options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets.split(",")
                )
            # a saved adapter says that it is for answering
            lora.inference_mode = False
        return CountedModel(
            self.config,
            torch.bfloat16 if is_half and can_be_half else torch.float32,
            is_autocast=is_half and not launch.has_deepspeed,
            frozen=options.frozen_parts,
            lora=lora,
            is_checkpointed=is_checkpointed,
            attention=options.attn_implementation if options.attn_implementation in MAX_MASK_PAIRS else "sdpa",
        )

    def _policy(self, counts: Counts, model: CountedModel) -> Policy:
        options, launch = self.options, self.launch
        item = BFLOAT16 if model.dtype is torch.bfloat16 else FLOAT32
        # PEFT holds adapters in float32, but for ZeRO-3, which gathers weights of one dtype
        trained = FLOAT32 if options.use_lora and launch.zero_stage < 3 else item
        has_reference = bool(options.beta) and not options.use_lora
        return Policy(
            counts.size,
            item,
            trained,
            is_4bit=options.load_in_4bit,
            reference=counts.size.total if has_reference else 0,
        )

    def _vllm(self, policy: Policy) -> VLLMBytes | None:
        options, text = self.options, self.config.get_text_config()
        if not options.use_vllm or options.vllm_mode != "colocate":
            return None
        item = BFLOAT16 if options.dtype == "bfloat16" else FLOAT32
        head = text.hidden_size // text.num_attention_heads
        return vllm_bytes(
            self.machine.total_bytes or self.machine.device_bytes,
            options.vllm_gpu_memory_utilization,
            policy.size.total * item,
            cache_bytes(text.num_hidden_layers, text.num_key_value_heads, head, item),
            options.vllm_max_model_length or self.lengths.longest_prompt + self.shapes.completion,
            tensor_parallel_size=options.vllm_tensor_parallel_size,
            sleeps=options.vllm_enable_sleep_mode,
        )

    def _work(self) -> WorkComparison:
        options, length = self.options, self.lengths.longest_prompt
        per_image = self.picture
        images = [per_image] * (self.lengths.num_images * self.groups)
        return compare_work(
            self.config,
            [length] * self.groups,
            [self.shapes.tree()] * self.groups,
            group_size=options.num_rollouts,
            padded_lengths=(length, self.shapes.completion),
            grids_thw=images,
            are_features_known=self.shapes.is_vision_known,
            groups_per_step=self.groups,
        )

    def _moments(self, counts: Counts, model: CountedModel, groups: int) -> Moments:
        """The largest moments of a run with micro-batches of so many groups."""
        options, launch, shapes = self.options, self.launch, self.shapes
        counted, evaluated = shapes.generation(self.groups), shapes.evaluation(groups)
        generation, evaluation = None, None
        if not options.use_vllm:
            generation = self._sampling(
                model, counts.generation, counted, shapes.generation(groups), options.num_rollouts
            )
        if evaluated is not None:
            own = None if counts.evaluation is None else shapes.evaluation(self.groups)
            evaluation = self._sampling(model, counts.evaluation or counts.generation, own or counted, evaluated, 1)
        return Moments(
            counts.training,
            generation,
            evaluation,
            keeps_gradients=options.gradient_accumulation_steps > 1,
            gathers_for_sampling=launch.zero_stage >= 3 and options.ds3_gather_for_generation,
            scale=groups / self.groups,
        )

    def _sampling(
        self, model: CountedModel, peak: Peak, counted: PassShape, shape: PassShape, num_rollouts: int
    ) -> Sampling:
        """Sampling so many rollouts of each prompt of a first pass. peak: of the shape that was counted."""
        num_rows, num_counted = (self.shapes.piece(whole).num_rows for whole in (shape, counted))
        text = self.config.get_text_config()
        head = text.hidden_size // text.num_attention_heads
        item = BFLOAT16 if model.is_autocast or model.dtype is torch.bfloat16 else FLOAT32
        per_token = cache_bytes(text.num_hidden_layers, text.num_key_value_heads, head, item)
        tokens = num_rollouts * (self.lengths.longest_prompt + self.shapes.completion)
        # each rollout in a row of its own, beside the trees
        row_cache = per_token * num_rows * (tokens + shape.num_slots)
        return Sampling(peak, row_cache, num_rows / num_counted)

    def _passes(self, is_checkpointed: bool) -> PassesOfStep:
        options = self.options
        needs_scores = options.optimizer_steps_per_generation > 1
        return PassesOfStep(
            options.gradient_accumulation_steps,
            1 / options.optimizer_steps_per_generation,
            is_recomputed=is_checkpointed,
            trains_weights=not options.use_lora and LANGUAGE_MODEL in options.trained_parts,
            trains_vision=bool(options.trained_parts & VISION_PARTS),
            is_vision_known=self.shapes.is_vision_known,
            num_scores=int(bool(options.beta)) + int(needs_scores),
        )


def _free_disk(folder: str) -> int:
    """Bytes that are free where a folder is, or will be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def known_model(model: ModelFlags, task: TaskFlags) -> tuple[Any, Any]:
    """(configuration, processor) of the run's model, each None where it is not known on this machine.

    The hub is asked for a model of which nothing is in its cache, unless its dimensions are published ones.
    """
    if model.model_id == TOY_MODEL_ID:
        kind, env = kind_for(task)
        folder = cached_path(kind, env)
        if not is_whole(folder):
            processor = make_toy_processor(kind, env)
            return toy_config(processor), processor
        return AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    base = base_of(model.model_id)
    is_here = Path(base).is_dir()
    found = []
    for kind in (AutoConfig, AutoProcessor):
        try:
            found.append(kind.from_pretrained(base, revision=model.revision, local_files_only=True))
        # the libraries' words for files that are not there; broken ones are refused by the checks of models
        except (OSError, ValueError):
            found.append(None)
    config, processor = found
    if config is None and not is_here:
        config = published_config(base)
    if config is None and not is_here and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        config = _asked_of_hub(base, model.revision)
    return config, processor


def _asked_of_hub(model_id: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    # without an answer nothing is predicted; it is asked again as the model loads
    except (OSError, ValueError):
        return None
