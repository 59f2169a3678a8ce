"""Memory, features and synchronization of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_memory() -> int:
    """Bytes of memory that a process could get, file caches included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63  # unknown, for example on Windows


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers (AVX512-BF16, and with it AMX), so that it is the faster dtype."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
