"""Ray: the cluster that bulk runs, features and servers work on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from visar.errors import VisarError

STARTS = 3  # of a cluster of this machine: its processes give up early where it is busy


def ray_module() -> Any:
    """The module `ray`. Raises `VisarError` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise make the environment of `uv run` anew for each of its workers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise VisarError("This needs Ray: pip install 'visar[cluster]'.") from error
    return ray


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """Ray's module, connected to the cluster at `address` ("auto" for one that runs on this machine).

    Without one, a cluster of this machine alone is started, which ends with the block; one that this process is
    already connected to is left as it is. Raises `VisarError` where there is none.
    """
    ray = ray_module()
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    options: dict[str, Any] = {"address": address or "local", **({} if address else own)}
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(log_to_driver=False, logging_level="WARNING", **options)
            break
        except Exception as error:
            ray.shutdown()
            if address:
                raise VisarError(f"There is no Ray cluster at {address!r}: {str(error).rstrip('.')}.") from error
            if attempt == STARTS:
                raise VisarError(f"Ray could not be started on this machine: {str(error).rstrip('.')}.") from error
            time.sleep(5)
    try:
        yield ray
    finally:
        ray.shutdown()


def workers_of(ray: Any, count: int | None, device: str) -> int:
    """How many workers with a model on `device` there are: `count`, or one for each GPU, or one.

    Raises `VisarError` where the cluster has no room for them: they would be waited for without end.
    """
    own = ray.cluster_resources()
    found = count or max(1, int(own.get("GPU", 0)))
    if found > (room := int(own.get("GPU" if devices(ray, device)["num_gpus"] else "CPU", 0))):
        raise VisarError(f"The Ray cluster has room for {room} workers, not {found}.")
    return found


def devices(ray: Any, device: str) -> dict[str, int]:
    """What an actor with a model on `device` takes of the cluster: a GPU if there are any and they may be used."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device.startswith("cuda") and not gpus:
        raise VisarError("No machine of the Ray cluster has a GPU.")
    return {"num_cpus": 1, "num_gpus": 1 if gpus and device != "cpu" else 0}
