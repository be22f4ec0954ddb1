"""A table of runs that will not work, and what --dry_run says of each: flags, machine, launch, words."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from fleet.planning.machine import GIB
from fleet.planning.problems import problems_of
from tests.helpers import REPOSITORY
from tests.planning.plans import planned

ZERO3 = (REPOSITORY / "recipes" / "zero3.yaml").read_text()
OFFLOADED = ZERO3.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")

# a two-layer 3B: 0.55 billion parameters, most of them in its embeddings
MISCONFIGURED: dict[str, tuple[str, str, str | None, str]] = {
    "float32 states": ("", "1x6", None, "launch with --config_file accelerate_config.yaml .ZeRO-3., as each GPU now "
                       "holds float32 weights, gradients and AdamW's states"),
    "too large a batch": ("--per_device_batch_size 64", "1x16", None, r"lower --per_device_batch_size to \d+"),
    "no checkpointing": ("--gradient_checkpointing false --num_rollouts 64 --max_completion_length 128", "1x12", None,
                         "pass --gradient_checkpointing true"),
    "a reference model": ("--beta 0.1", "1x8", None, "pass --beta 0, which needs no reference model"),
    "adapters on whole weights": ("--use_lora", "1x1.2", None, "pass --load_in_4bit true"),
    "many micro-batches": ("--gradient_accumulation_steps 64", "1x10", None, "lower --gradient_accumulation_steps"),
    "gathered for generation": ("--ds3_gather_for_generation", "8x2", ZERO3, "pass --ds3_gather_for_generation false"),
    "few GPUs": ("", "2x4", ZERO3, "use more GPUs, or set offload_optimizer_device: cpu"),
    "vLLM beside training": ("--use_vllm --vllm_gpu_memory_utilization 0.8", "1x12", None,
                             "pass --vllm_enable_sleep_mode true, or a lower --vllm_gpu_memory_utilization"),
    "too little for vLLM": ("--use_vllm --vllm_gpu_memory_utilization 0.02", "1x40", None, "its weights"),
    "vLLM's parallel size": ("--use_vllm --vllm_tensor_parallel_size 3", "4x40", None, "does not divide 4 processes"),
    "vLLM's heads": ("--use_vllm --vllm_tensor_parallel_size 3", "3x40", None, "does not divide 2 key-value heads"),
    "vLLM's room": ("--use_vllm --vllm_max_model_length 100", "1x40", None, "and its completion of 64 are longer"),
    "no room for a call": ("--max_completion_length 8", "1x40", None, "so none could be given"),
    "no room to reason": ("--allow_reasoning --max_completion_length 64", "1x40", None, "leaves no room to reason"),
    "too long for the model": ("--max_completion_length 130000 --num_rollouts 2", "1x4000", None, "context of 128,000"),
    "more context than positions": ("--max_turns 2 --max_context_length 200000", "1x40", None, "128,000 positions"),
    "blind": ("--image_max_pixels 784", "1x40", None, "sees nothing"),
    "needless offload": ("", "8x80", OFFLOADED, "its states would fit on the GPUs"),
    "stage 2": ("", "8x80", ZERO3.replace("zero_stage: 3", "zero_stage: 2"), "set zero_stage: 3"),
    "nothing gathered to save": ("", "8x80", ZERO3.replace("16bit_model: true", "16bit_model: false"), "final/"),
    "whole model in each process": ("", "8x80", ZERO3.replace("flag: true", "flag: false"), "zero3_init_flag"),
    "4 bits in shards": ("--use_lora --load_in_4bit", "8x80", ZERO3, "does not shard under ZeRO-3"),
    "machines of unequal size": ("", "8x80", ZERO3.replace("machines: 1", "machines: 3"), "do not divide among"),
    "float32 on a GPU": ("--dtype float32", "1x80", None, "a tenth of bfloat16's speed"),
    "warm-up without end": ("--warmup_steps 500 --lr_scheduler_type linear", "1x80", None, "would never be reached"),
    "many held-out answers": ("--eval_steps 5 --num_rollouts 64 --max_completion_length 16 --use_lora", "1x3", None,
                              "pass --eval_steps 0 --control_steps 0"),
    "evaluated too late": ("--eval_steps 500", "1x80", None, "only the start and the end are evaluated"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISCONFIGURED)
def test_what_will_not_work_is_said_with_its_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.command.preflight.find_spec", lambda package: object())
    line, gpus, launch, words = MISCONFIGURED[name]
    accelerate = None
    if launch is not None:
        accelerate = tmp_path / "accelerate.yaml"
        accelerate.write_text(launch)
    found = problems_of(planned(line, gpus, accelerate))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(found))


def test_at_least_twenty_misconfigurations_are_caught() -> None:
    assert len(MISCONFIGURED) >= 20


def test_a_sound_run_has_no_problem() -> None:
    assert problems_of(planned("", "1x80")) == []


def test_a_host_with_too_little_memory_is_said() -> None:
    found = planned("", "1x80")
    small = replace(found, machine=replace(found.machine, host_bytes=2 * GIB))
    assert [problem.partition(";")[0] for problem in problems_of(small)] == [
        "a machine needs 5 GiB of host memory, 3 of them for processes, and has 2"
    ]


def test_a_small_disk_is_said() -> None:
    found = replace(planned("", "1x80"), free_disk=GIB)
    (problem,) = problems_of(found)
    assert problem.startswith("3 checkpoints of 6.1 GiB (one more than --save_total_limit while one is written)")


def installed(**others: str) -> Callable[[str], str]:
    def version_of(package: str) -> str:
        if package in others:
            return others[package]
        if package in ("trackio", "vllm", "flash-attn"):
            raise PackageNotFoundError(package)
        return version(package)

    return version_of


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"transformers": "5.30.0"}, "transformers 5.30.0 is installed, but Fleet was tested with transformers>=5.21,"),
        ({"trl": "1.17.0"}, "trl 1.17.0 is installed, but Fleet was tested with trl>=1.16,<1.17; pip install"),
        ({"trackio": "0.43.0", "pillow": "13.0"}, "trackio 0.43 asks for pillow below 13"),
        ({"vllm": "0.32.1"}, "TRL 1.16 reads a field that vLLM 0.32 renamed"),
        ({"vllm": "0.20.0"}, "TRL 1.16 calls what vLLM has since 0.22"),
    ],
)
def test_versions_that_do_not_go_together_are_said(versions: dict[str, str], words: str) -> None:
    (problem,) = problems_of(planned("", "1x80"), installed(**versions))
    assert problem.startswith(words)
