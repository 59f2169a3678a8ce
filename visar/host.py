"""The machine: memory, features of the processor, and the processes of a job."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from visar.errors import VisarError

UNKNOWN = 2**63  # bytes
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
STATUS = Path("/proc/self/status")


def available_memory() -> int:
    """Bytes of memory that this process could get, file caches included: of the machine, and of its limits."""
    return max(0, min(_of_machine(), _of_groups(), _of_address_space()))


def check_memory(what: object, needed: float) -> None:
    """Raise `VisarError` where so many bytes of memory are not free for what is to be read."""
    if needed > (free := available_memory()):
        raise VisarError(f"{what} needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free.")


def _of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN  # for example on Windows


def _of_groups() -> int:
    """What the control groups of a container or a job still allow: of the process's own group and all above it."""
    try:
        own = [line.split(":", 2) for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return UNKNOWN
    free = UNKNOWN
    for _, kinds, name in (line for line in own if len(line) == 3):
        if not kinds:  # version 2
            root, limit, used, cache = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = root / name.strip("/")
        # In a container the path may be that of the host, which is not there: then the root is the container's.
        for at in (group, *group.parents) if group.is_dir() else (root,):
            free = min(free, _of_group(at, limit, used, cache))
            if at == root:
                break
    return free


def _of_group(at: Path, limit: str, used: str, cache: str) -> int:
    """Bytes that a control group still allows; caches of files are given back when they are needed."""
    try:
        most = int((at / limit).read_text(encoding="utf-8"))  # a ValueError where it is "max"
        rows = (line.split() for line in (at / "memory.stat").read_text(encoding="utf-8").splitlines())
        return most - int((at / used).read_text(encoding="utf-8")) + int(dict(rows).get(cache, 0))
    except (OSError, ValueError):
        return UNKNOWN


def _of_address_space() -> int:
    """What `ulimit -v` still allows."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most == resource.RLIM_INFINITY:
            return UNKNOWN
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return most - next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
    except (ImportError, OSError, ValueError, StopIteration):
        return UNKNOWN


def resident_memory() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0


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


class Process(NamedTuple):
    """This process is number `rank` of `world`, and number `local` on its machine."""

    rank: int
    world: int
    local: int


def torchrun() -> Process | None:
    """This process of a job that torchrun started, by its environment; None for a process of its own.

    Raises `VisarError` where the environment says only half of it.
    """
    given = os.environ
    try:
        rank, world = int(given.get("RANK", "0")), int(given.get("WORLD_SIZE", "1"))
        local = int(given.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise VisarError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, as torchrun sets them.") from error
    if "RANK" not in given or (rank, world) == (0, 1):
        return None
    start = "start several processes with torchrun, or unset RANK for one"
    if not 0 <= rank < world or local < 0:
        raise VisarError(f"RANK is {rank}, LOCAL_RANK {local} and WORLD_SIZE {world}, which cannot be: {start}.")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not given.get(name):
            raise VisarError(f"RANK is set, and {name} is not: {start}.")
    return Process(rank, world, local)


def join(backend: str, **options: Any) -> None:
    """Join the process group of `torchrun`. Raises `VisarError` where the others cannot be reached."""
    try:
        dist.init_process_group(backend, **options)
    except (RuntimeError, ValueError, OSError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise VisarError(f"The processes of this job could not join at {at}: {str(error).splitlines()[0]}.") from error
