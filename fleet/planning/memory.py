"""The memory of a run, by part: what each process holds all through training, and what its largest moments add.

Arithmetic on the counts of counted_pass.py and on how DDP, DeepSpeed and AdamW hold their states. Knows no flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet.planning.counted_pass import ModelSize, Peak
from fleet.planning.machine import Launch, Machine
from fleet.vllm_memory import VLLMBytes

FLOAT32, BFLOAT16 = 4, 2
ADAM_STATES = 2  # moments, in float32 or the dtype of what trains
# bytes of a weight in NF4 with doubly quantized scales: half, a byte per 64, 4 more per 64 * 256
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Python with the libraries: resident in each process of a GPU run beside what the run itself holds
PROCESS_BYTES, WORKER_BYTES = 3 * 2**30, 2**30


@dataclass(frozen=True)
class Policy:
    """The model as it is held. item: bytes of a weight that does not train. trained_item: of one that does.

    reference: parameters of a second model that a KL term reads; it is held in float32.
    """

    size: ModelSize
    item: int
    trained_item: int
    is_4bit: bool = False
    reference: int = 0


@dataclass(frozen=True)
class Sampling:
    """The largest moments of sampling, per process.

    first: of round 1. row_cache: bytes of keys and values of rows of their own, in which rollouts that grow apart go
    on. scale: how many times as many prompts as were counted.
    """

    first: Peak
    row_cache: int = 0
    scale: float = 1.0

    @property
    def bytes(self) -> int:
        """What sampling holds beside the weights."""
        return max(self.first.others(self.scale), self.row_cache)


@dataclass(frozen=True)
class Moments:
    """The largest moments of a step, per process. keeps_gradients: they accumulate over several passes.

    scale: how many times as many rows as were counted. generation: None where vLLM generates. evaluation: of held-out
    answers; None without any.
    """

    training: Peak
    generation: Sampling | None
    evaluation: Sampling | None
    keeps_gradients: bool
    gathers_for_sampling: bool
    scale: float = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device, by part, and what its phases hold in all."""

    parts: Mapping[str, int]
    phases: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The bytes of the largest phase."""
        return max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def host_total(self) -> int:
        """The bytes of one machine's host memory."""
        return sum(self.host.values())


def memory_of(
    policy: Policy, launch: Launch, machine: Machine, moments: Moments, vllm: VLLMBytes, *, cache: int
) -> Memory:
    """The memory of a run. cache: bytes of image features that a process keeps in host memory."""
    weights, gathered = weight_bytes(policy, launch), _gathered_bytes(policy, launch)
    resident, from_pass = _gradient_bytes(policy, launch, moments)
    optimizer = 0 if launch.offloads_optimizer else _optimizer_bytes(policy, launch)
    reference = policy.reference * FLOAT32 // launch.shards
    activations = moments.training.others(moments.scale)
    whole = policy.size.total * policy.item if moments.gathers_for_sampling else 0
    generation, evaluation = (
        0 if sampling is None else sampling.bytes + whole for sampling in (moments.generation, moments.evaluation)
    )
    if from_pass:
        # gradients begin where activations end: both are largest at different moments
        training = max(moments.training.total(moments.scale), policy.size.trainable * policy.trained_item)
    else:
        training = activations
    always = machine.base_bytes + weights + gathered + optimizer + reference + resident
    step = _step_bytes(policy, launch)
    phases = {
        "training pass": always + training + vllm.while_training,
        "generation": always + generation + vllm.while_generating,
        "evaluation": always + evaluation + vllm.while_training,
        "optimizer step": always + (policy.size.trainable * policy.trained_item if from_pass else 0) + step,
    }
    parts = {
        "weights": weights + gathered,
        "gradients": resident + (policy.size.trainable * policy.trained_item if from_pass else 0),
        "optimizer": optimizer,
        "activations": activations,
        "generation": generation,
        "evaluation": evaluation,
        "reference": reference,
        "vllm": vllm.while_generating,
        "process": machine.base_bytes,
    }
    host = {"processes": max(phases.values()) * launch.processes_per_machine}
    if machine.has_gpu:
        host = host_parts(policy, launch, cache)
    return Memory(parts, phases, host)


def weight_bytes(policy: Policy, launch: Launch) -> int:
    """Bytes of the weights that a process holds."""
    size = policy.size
    if policy.is_4bit:
        rest = size.total - size.adapters - size.quantizable
        return round(size.quantizable * NF4) + rest * policy.item + size.adapters * policy.trained_item
    whole = (size.total - size.trainable) * policy.item + size.trainable * policy.trained_item
    return 0 if launch.offloads_weights else whole // launch.shards


def _gathered_bytes(policy: Policy, launch: Launch) -> int:
    """ZeRO-3: what DeepSpeed keeps gathered at a time."""
    if launch.zero_stage < 3 or (launch.shards == 1 and not launch.offloads_weights):
        return 0
    return min(launch.max_live_parameters, policy.size.total) * policy.item


def _gradient_bytes(policy: Policy, launch: Launch, moments: Moments) -> tuple[int, bool]:
    """(bytes held all through, whether those of a pass come on top as it goes on)."""
    whole = policy.size.trainable * policy.trained_item
    if not launch.has_deepspeed:
        # DDP's buckets are a copy
        copies = int(launch.num_processes > 1) + int(moments.keeps_gradients)
        return copies * whole, not moments.keeps_gradients
    bucket = min(launch.reduce_bucket_size, policy.size.trainable) * policy.trained_item
    if launch.zero_stage < 2:
        return whole + bucket, False
    partition = 0 if launch.offloads_optimizer else whole // launch.num_processes
    return partition + bucket, False


def _optimizer_bytes(policy: Policy, launch: Launch) -> int:
    """AdamW's moments; with DeepSpeed a float32 copy of the weights besides."""
    trainable = policy.size.trainable
    if not launch.has_deepspeed:
        return ADAM_STATES * policy.trained_item * trainable
    whole = (ADAM_STATES + 1) * FLOAT32 * trainable
    return whole // (launch.num_processes if launch.zero_stage >= 1 else 1)


def _step_bytes(policy: Policy, launch: Launch) -> int:
    """What the optimizer's step makes for a while: DeepSpeed's float32 gradients of a group of weights."""
    if not launch.has_deepspeed or launch.offloads_optimizer:
        return 0
    own = policy.size.trainable // (launch.num_processes if launch.zero_stage >= 1 else 1)
    return min(launch.sub_group_size, own) * FLOAT32


def host_parts(policy: Policy, launch: Launch, cache: int) -> dict[str, int]:
    """Bytes of one machine's host memory: the processes, what is offloaded, and the larger of loading and saving."""
    size, local = policy.size, launch.processes_per_machine
    loaded = (size.total - size.adapters) * policy.item
    # each process reads the whole model before it goes to its GPU, unless DeepSpeed shards it as it loads
    loading = loaded if launch.zero_stage >= 3 and launch.loads_shards else loaded * local
    saving = size.total * policy.item if launch.gathers_for_saving and launch.zero_stage >= 3 else 0
    offloaded = 0
    if launch.offloads_optimizer:
        # gradients in both dtypes, the float32 copy of the weights, the moments
        per_weight = policy.trained_item + FLOAT32 + (1 + ADAM_STATES) * FLOAT32
        offloaded = size.trainable * per_weight // launch.num_machines
    if launch.offloads_weights:
        offloaded += size.total * policy.item // launch.num_machines
    return {
        "processes": local * PROCESS_BYTES,
        "image features": local * cache,
        "offloaded": offloaded,
        "loading or saving": max(loading, saving),
    }


def checkpoint_bytes(policy: Policy, launch: Launch, *, is_lora: bool) -> int:
    """Bytes of one checkpoint on disk."""
    size = policy.size
    saved = size.adapters if is_lora else size.total
    if not launch.has_deepspeed:
        return saved * policy.trained_item + ADAM_STATES * size.trainable * policy.trained_item
    shards = size.total * policy.item + (1 + ADAM_STATES) * FLOAT32 * size.trainable
    return shards + (saved * policy.item if launch.gathers_for_saving or is_lora else 0)
