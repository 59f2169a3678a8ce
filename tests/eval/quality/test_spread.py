"""Features on a cluster, where they go wrong; `tests/bulk/test_crew.py` has them on Ray."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visar.cli import cluster
from visar.errors import VisarError
from visar.eval.quality.extractors import spread


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception):
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RayError("The actor died.\nValueError: no such file"),
            "^A worker of the Ray cluster died: ValueError: no such",
        ),
        (RayTaskError(VisarError("A worker has other weights.")), "^A worker has other weights.$"),
    ],
)
def test_a_worker_that_fails_is_a_sentence(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: Any) -> Any:
        raise error

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError))
    monkeypatch.setattr(spread, "ray_module", lambda: ray)
    made = object.__new__(spread.Spread)
    made._workers = [SimpleNamespace(features=SimpleNamespace(remote=lambda images: images))]
    with pytest.raises(VisarError, match=said):
        list(made.each([torch.zeros(1)]))


def test_more_workers_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be waited for without end."""

    def made(*_: Any) -> None:
        raise AssertionError("They were started all the same.")

    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr("visar.cluster.connected", lambda _: nullcontext(ray))
    monkeypatch.setattr(spread, "Spread", made)
    options = Namespace(
        launcher="ray", workers=3, ray_address=None, device="auto", weights=None, protocol="icons-efflite0"
    )
    with ExitStack() as stack, pytest.raises(VisarError, match="room for 2 workers, not 3"):
        cluster.spread(options, stack)
