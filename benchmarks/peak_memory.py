"""How much more memory a piece of work holds at its peak than before it: of the GPU, or of this process."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak_growth_bytes(work: Callable[[], None]) -> int:
    """Runs `work` and returns the growth at its peak in bytes; on the CPU in whole pages of resident memory (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the peak (VmHWM) afresh
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory can be measured on Linux only")
