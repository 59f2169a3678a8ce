"""Memory, features and synchronization of the machine."""

from __future__ import annotations

import functools
import os
import platform
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


@functools.cache
def processor() -> str:
    """The name of this CPU, with its family and model where the name of a virtual one says too little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers (AVX512-BF16, and with it AMX), so that it is the faster dtype."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
