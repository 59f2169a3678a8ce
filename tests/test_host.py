"""Memory within the limits of containers, jobs and shells, and the processes of a job."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from visar import host
from visar.errors import VisarError, of_the_machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "_of_machine", lambda: 64 * GIB)
    monkeypatch.setattr(host, "_of_address_space", lambda: host.UNKNOWN)
    return tmp_path


def group(at: Path, version: int, limit: object, used: int, cache: int) -> None:
    at.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (at / name).write_text(f"{value}\n")
    (at / "memory.stat").write_text(f"{'inactive_file' if version == 2 else 'total_inactive_file'} {cache}\nanon 5\n")


def test_control_groups_of_version_2(groups: Path) -> None:
    (groups / "own").write_text("0::/job/step\n")
    group(groups / "cgroup" / "job", 2, 8 * GIB, 3 * GIB, GIB)  # that of the job above is the tighter one
    group(groups / "cgroup" / "job" / "step", 2, "max", GIB, 0)
    assert host.available_memory() == 6 * GIB
    (groups / "own").write_text("0::/gone/on/the/host\n")
    group(groups / "cgroup", 2, 2 * GIB, 3 * GIB, 0)
    assert host.available_memory() == 0
    (groups / "own").unlink()
    assert host.available_memory() == 64 * GIB


def test_control_groups_of_version_1(groups: Path) -> None:
    (groups / "own").write_text("11:cpu,cpuacct:/job\n5:memory:/job\n0::/\n")
    group(groups / "cgroup" / "memory" / "job", 1, 4 * GIB, GIB, GIB // 2)
    group(groups / "cgroup" / "memory", 1, 2**63 - 4096, 9 * GIB, 0)
    assert host.available_memory() == 3.5 * GIB


def test_the_limit_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmSize:\t1048576 kB\n")
    monkeypatch.setattr(host, "STATUS", tmp_path / "status")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (3 * GIB, 3 * GIB))
    assert host._of_address_space() == 2 * GIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert host._of_address_space() == host.UNKNOWN


@pytest.mark.parametrize("given, message", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"), ({"RANK": "1"}, "WORLD_SIZE 1, which cannot be"),
    ({"RANK": "x"}, "whole numbers"), ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"), ({"WORLD_SIZE": ""}, "whole"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"), ({}, ""), ({"WORLD_SIZE": "4"}, ""),
    ({"RANK": "0", "WORLD_SIZE": "1"}, ""), ({"RANK": "0"}, ""),
])  # fmt: skip
def test_half_a_job(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(VisarError, match=message):
            host.torchrun()
    else:
        assert host.torchrun() is None


def test_memory_that_ran_out_is_a_sentence() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        assert "Memory ran out" in (of_the_machine(error) or "")
    assert of_the_machine(OSError(28, "No space left on device", "a.png")) == "a.png: No space left on device."
    assert "package x is not" in (of_the_machine(ModuleNotFoundError(name="x.y")) or "")
    for mistake in (RuntimeError("a mistake"), ModuleNotFoundError(name="visar.x")):
        assert of_the_machine(mistake) is None
