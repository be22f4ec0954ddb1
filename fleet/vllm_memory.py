"""The GPU memory of a vLLM beside training: what it takes, and what it needs. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VLLMBytes:
    """Bytes of each GPU that a colocated vLLM takes or needs."""

    while_generating: int  # its share of the GPU, which it fills with weights and cache
    while_training: int  # the same, or 0 asleep: sleep gives back weights and cache, and they are sent again to wake it
    least: int  # weights and the cache of one longest sequence, without which it does not start

    @property
    def fits(self) -> bool:
        """True if its share holds what it needs."""
        return self.least <= self.while_generating


def vllm_bytes(
    gpu_bytes: int,
    gpu_share: float,
    weight_bytes: int,
    cache_bytes_per_token: int,
    context_tokens: int,
    *,
    tensor_parallel_size: int = 1,
    sleeps: bool = False,
) -> VLLMBytes:
    """The memory of a colocated vLLM on each GPU.

    gpu_bytes: of one GPU. gpu_share: --vllm_gpu_memory_utilization, in (0, 1]. weight_bytes: of the whole model in
    vLLM's dtype, whatever shards the trainer has. cache_bytes_per_token: of the whole model, from cache_bytes.
    context_tokens: --vllm_max_model_length. sleeps: --vllm_enable_sleep_mode. Left out: activations and CUDA graphs,
    which vLLM takes from its share too, and CUDA's own context.

    A 7B in bfloat16 on 80 GB at a share of 0.3, for 4,096 tokens:

    >>> vllm_bytes(80 * 10**9, 0.3, 16_600_000_000, cache_bytes(28, 4, 128), 4096, sleeps=True)
    VLLMBytes(while_generating=24000000000, while_training=0, least=16834881024)
    """
    taken = int(gpu_share * gpu_bytes)
    needed = weight_bytes + cache_bytes_per_token * context_tokens
    return VLLMBytes(taken, 0 if sleeps else taken, -(-needed // tensor_parallel_size))


def cache_bytes(num_layers: int, num_kv_heads: int, head_size: int, bytes_per_number: int = 2) -> int:
    """The bytes of one token's keys and values in all layers.

    >>> cache_bytes(28, 4, 128)
    57344
    """
    return 2 * num_layers * num_kv_heads * head_size * bytes_per_number
