"""The machine and the launch that a run is planned for: those that are there, or those that flags assume."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fleet.errors import UsageError
from fleet.model_folder.files import read_json

GIB = 2**30
# dense bfloat16 operations a second, by the vendors' data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
MOST_GPUS_OF_MACHINE = 8
SLOWER_KINDS = ("PCIE", "NVL")  # of the same names
# what a process holds on a GPU before any tensor: CUDA's context, its libraries, NCCL's buffers
CONTEXT_BYTES, NCCL_BYTES = round(0.6 * GIB), round(1.0 * GIB)


@dataclass(frozen=True)
class Machine:
    """What a process has: a GPU of `device_bytes`, or without one its share of the host's memory.

    host_bytes: of one machine; None where it is not known. gpu_name: None where it is not known, or there is none.
    base_bytes: held before any tensor is made. total_bytes: of the GPU, of which device_bytes are free; 0 for the same.
    """

    has_gpu: bool
    device_bytes: int
    host_bytes: int | None
    base_bytes: int
    gpu_name: str | None = None
    total_bytes: int = 0

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 operations a second of one GPU, by its data sheet; None where it is not known."""
        given = (self.gpu_name or "").upper()
        if any(other in given for other in SLOWER_KINDS):
            return None
        return next((flops for name, flops in PEAK_FLOPS.items() if name in given), None)


@dataclass(frozen=True)
class Launch:
    """How a run is launched.

    zero_stage: 0 without DeepSpeed; deepspeed: its own settings, "auto" where they follow the flags.
    """

    num_processes: int = 1
    num_machines: int = 1
    zero_stage: int = 0
    has_deepspeed: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    loads_shards: bool = True  # each process gets its shard of the weights while they load
    gathers_for_saving: bool = True
    max_live_parameters: int = 10**9
    sub_group_size: int = 10**9
    reduce_bucket_size: int = 5 * 10**8

    @property
    def processes_per_machine(self) -> int:
        """Processes of one machine."""
        return max(1, self.num_processes // self.num_machines)

    @property
    def shards(self) -> int:
        """Processes among which ZeRO-3 shards each weight."""
        return self.num_processes if self.zero_stage >= 3 else 1


def machine_here(num_local_processes: int, *, has_gpu: bool) -> Machine:
    """The machine that this process runs on."""
    host = host_bytes()
    if not has_gpu:
        return Machine(False, host // num_local_processes, host, resident_bytes())
    # TRL's arguments have chosen it
    device = torch.cuda.current_device()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # this process has its context already, but may not have talked to others yet
    nccl = NCCL_BYTES if num_local_processes > 1 else 0
    return Machine(True, free_bytes, host, nccl, torch.cuda.get_device_name(device), total_bytes)


def assumed_machine(assumed: str) -> tuple[int, Machine]:
    """(number of GPUs, each of them) of `--assume_gpus`, as parser.assumed_gpus takes it."""
    sizes, _, name = assumed.partition(":")
    count, gib = sizes.split("x")
    base = CONTEXT_BYTES + (NCCL_BYTES if int(count) > 1 else 0)
    return int(count), Machine(True, round(float(gib) * GIB), None, base, name or None)


def launch_of(args: Any, launch_variables: Mapping[str, str] = os.environ) -> Launch:
    """The launch of these TRL arguments."""
    plugin = getattr(args, "deepspeed_plugin", None)
    local = int(launch_variables.get("LOCAL_WORLD_SIZE", "1"))
    machines = max(1, args.world_size // local)
    if plugin is None:
        return Launch(args.world_size, machines)
    return _with_deepspeed(args.world_size, machines, plugin.deepspeed_config)


def launch_without_file(num_gpus: int) -> Launch:
    """DDP on so many GPUs, on machines of at most eight."""
    return Launch(num_gpus, -(-num_gpus // MOST_GPUS_OF_MACHINE))


def launch_of_file(path: str, num_gpus: int) -> Launch:
    """The launch of an accelerate file, on `num_gpus` GPUs. Raises UsageError if it cannot be read."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"assume_accelerate={path} cannot be read ({error}); pass an accelerate file") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UsageError(f"assume_accelerate={path} has no distributed_type; pass an accelerate file")
    kind = str(settings["distributed_type"])
    if kind not in ("DEEPSPEED", "MULTI_GPU", "NO"):
        raise UsageError(
            f"assume_accelerate={path} has distributed_type: {kind}, but Fleet runs under DEEPSPEED or DDP"
        )
    try:
        machines = int(settings.get("num_machines") or 1)
        return Launch(num_gpus, machines) if kind != "DEEPSPEED" else _launch_of(settings, num_gpus, machines)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"assume_accelerate={path} cannot be read ({error}); correct it") from error


def _launch_of(settings: Mapping[str, Any], num_gpus: int, machines: int) -> Launch:
    given = settings.get("deepspeed_config") or {}
    if given.get("deepspeed_config_file"):
        loads_shards = bool(given.get("zero3_init_flag", False))
        launch = _with_deepspeed(num_gpus, machines, read_json(Path(given["deepspeed_config_file"])))
        return replace(launch, loads_shards=launch.zero_stage < 3 or loads_shards)
    zero = {
        "stage": given.get("zero_stage", 2),
        "offload_optimizer": {"device": given.get("offload_optimizer_device", "none")},
        "offload_param": {"device": given.get("offload_param_device", "none")},
        "stage3_gather_16bit_weights_on_model_save": given.get("zero3_save_16bit_model", False),
    }
    launch = _with_deepspeed(num_gpus, machines, {"zero_optimization": zero})
    return replace(launch, loads_shards=launch.zero_stage < 3 or bool(given.get("zero3_init_flag", False)))


def _with_deepspeed(num_processes: int, num_machines: int, config: Mapping[str, Any]) -> Launch:
    zero = config.get("zero_optimization", {})

    def number(name: str, default: int) -> int:
        value = zero.get(name, "auto")
        return default if value == "auto" else int(float(value))

    def is_offloaded(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") not in ("none", None)

    return Launch(
        num_processes,
        num_machines,
        zero_stage=int(zero.get("stage", 0)),
        has_deepspeed=True,
        offloads_optimizer=is_offloaded("offload_optimizer"),
        offloads_weights=is_offloaded("offload_param"),
        gathers_for_saving=bool(zero.get("stage3_gather_16bit_weights_on_model_save", True)),
        max_live_parameters=number("stage3_max_live_parameters", 10**9),
        sub_group_size=number("sub_group_size", 10**9),
        reduce_bucket_size=number("reduce_bucket_size", 5 * 10**8),
    )


def host_bytes() -> int:
    """Memory that this machine's processes may have: the control group's limit, else all of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process; its peak with VmHWM. 0 where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
