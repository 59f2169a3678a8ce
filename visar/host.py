"""What the machine can do, and when it is done: asked by kernels, the engine and the command line alike."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_memory() -> int:
    """Bytes that the system could give a process, what files are cached in included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63  # a system that does not tell, such as Windows


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers (AVX512-BF16, and with it AMX), so that it is the faster type."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next to this means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
