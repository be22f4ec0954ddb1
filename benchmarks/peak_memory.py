"""What memory a piece of work holds at its peak, and how much more than before it: of the GPU, or of this process."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(work: Callable[[], None]) -> dict[str, int]:
    """Runs `work`; its peak in bytes, as `total_bytes`, and over what was held before, as `growth_bytes`.

    On the CPU in whole pages of resident memory (Linux).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the peak (VmHWM) afresh
        before = _status_bytes("VmRSS")
        work()
        peak = _status_bytes("VmHWM")
    return {"growth_bytes": peak - before, "total_bytes": peak}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory can be measured on Linux only")
