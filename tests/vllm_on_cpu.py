"""Lets a real vLLM run on a CPU beside a trainer; run by the tests of vLLM as a process of its own.

A GPU needs none of this. vLLM's linear layers for CPUs pack their weights and drop them, so that none can be sent
again; TRL names no dtype, and vLLM takes a float32 model down to 16 bits; and weights go to a server by NCCL alone.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
OVERLAY = REPOSITORY / ".vllm"
VARIABLES = {
    "PYTHONPATH": f"{OVERLAY}{os.pathsep}{REPOSITORY}",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def adapt_colocated(dtype: str = "float32") -> None:
    """Plain linear layers and this dtype for the vLLM of this process."""
    import torch
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    def use_plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    for module in (utils, linear, vocab_parallel_embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = use_plain_linear
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=dtype, enforce_eager=True)


def adapt_server_client() -> None:
    """No weights for the server: it has those of the model folder, and keeps them."""
    from trl.generation.vllm_client import VLLMClient

    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMClient.update_named_params = lambda self, metadata, named_params: [None for _ in named_params]


def run_training(argv: list[str], on_trainer: Callable[[Any], None] = lambda trainer: None) -> int:
    """The exit code of training.py with these flags. on_trainer: is given the trainer that was built."""
    import training
    from fleet.command import command_line
    from fleet.run.build import training as run_build

    build = run_build.build_trainer

    def build_and_show(*args: Any, **kwargs: Any) -> Any:
        trainer, checkpoint = build(*args, **kwargs)
        on_trainer(trainer)
        return trainer, checkpoint

    run_build.build_trainer = build_and_show
    return command_line.run(lambda: training.main(argv))


def reward_by_length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between completions that say nothing."""
    return [float(len(completion) % 7) for completion in completions]


if __name__ == "__main__":
    adapt_server_client()
    sys.exit(run_training(sys.argv[1:]))
