"""Engines behind a front on Ray Serve: images of one process, also when an engine is killed, and a line that ends."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.params import SamplingParams
from visar.serving.engine import Engine
from visar.serving.fleet import Fleet, Settings, application
from visar.serving.replica import Replica, Served
from visar.serving.wanted import Made, Told, Wanted

PORT = 8765
SETTINGS = Settings(rows=2, waiting=4, replicas=(2, 2), drain=5)
WANTED = Wanted("text", "scd", "red heart", SamplingParams(seed=3), tuple(range(6)), previews=2)


def served(folder: Path, slow: float = 0.0) -> list[Served]:
    model = ImageModel.load(folder)
    model.bar = {"disable": True}
    if slow:
        step = Engine._turn

        def turn(engine: Engine) -> None:
            time.sleep(slow)
            step(engine)

        Engine._turn = turn  # type: ignore[method-assign]
    return [Served("text", model, {"scd": model.sampler_of("scd"), "zipar": model.sampler_of("zipar")})]


async def files(told: AsyncGenerator[Told, None]) -> dict[int, bytes]:
    return {one.image: one.file async for one in told if isinstance(one, Made)}


@pytest.fixture(scope="module")
def expected(text_folder: Path) -> dict[int, bytes]:
    replica = Replica(served(text_folder), Engine(rows=3))

    async def make() -> dict[int, bytes]:
        return await files(replica.images(WANTED))

    found = asyncio.run(make())
    assert replica.close(60)
    return found


@pytest.mark.ray
class TestOnRay:
    @pytest.fixture(scope="class")
    def engines(self, cluster: Any, text_folder: Path) -> Iterator[Any]:
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(partial(served, text_folder, 0.05), SETTINGS), name="visar")
        yield serve.get_deployment_handle("Engine", "visar")
        serve.shutdown()

    def test_a_killed_engine_loses_nothing(self, engines: Any, expected: dict[int, bytes]) -> None:
        async def go() -> None:
            fleet = Fleet(engines, SETTINGS)
            await fleet.look()
            assert fleet.cards["text"].samplers["scd"].exactness == "exact" and fleet.ready
            assert await files(fleet.images(WANTED)) == expected
            victim = await engines.process.remote()
            found: dict[int, bytes] = {}
            async for one in fleet.images(WANTED):
                if victim and not isinstance(one, Made):
                    os.kill(victim, signal.SIGKILL)
                    victim = 0
                if isinstance(one, Made):
                    found[one.image] = one.file
            assert found == expected and fleet.asked_again >= 1 and not fleet.problem
            assert await files(fleet.images(WANTED)) == expected

        asyncio.run(go())

    def test_a_killed_front_is_an_error_and_not_a_wait(self, engines: Any, expected: dict[int, bytes]) -> None:
        """Over HTTP: an image, the death of the front at the next one, and an image of the front after it."""
        import httpx
        import ray
        from ray import serve

        where = f"http://127.0.0.1:{PORT}/v1/images/generations"
        asked = {"prompt": "red heart", "seed": 3, "n": 2}

        def ask() -> httpx.Response:
            return httpx.post(where, json=asked, timeout=120)

        before = ask()
        assert before.status_code == 200, before.text
        made = [base64.b64decode(one["b64_json"]) for one in before.json()["data"]]
        assert made == [expected[0], expected[1]]
        (front,) = [
            actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#Front#" in actor["name"]
        ]
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(ask)
            time.sleep(0.3)
            ray.kill(ray.get_actor(front, namespace="serve"))
            with suppress(httpx.TransportError):
                assert waiting.result(timeout=120).status_code in (200, 500, 503)
        deadline = time.monotonic() + 120
        while (again := ask()).status_code != 200:
            assert time.monotonic() < deadline, again.text
            time.sleep(1)
        assert again.json()["data"] == before.json()["data"]
        assert serve.status().applications["visar"].deployments["Engine"].replica_states["RUNNING"] == 2

    def test_errors_and_a_full_line(self, engines: Any) -> None:
        async def go() -> None:
            fleet = Fleet(engines, SETTINGS)
            await fleet.look()
            with pytest.raises(VisarError, match="empty"):
                await files(fleet.images(Wanted("text", "scd", " ", SamplingParams(seed=1))))
            with pytest.raises(VisarError, match="not ready in time"):
                await files(fleet.images(Wanted("text", "scd", "cat", SamplingParams(seed=1), seconds=0.01)))
            full = Wanted("text", "scd", "cat", SamplingParams(seed=1), tuple(range(9)))
            with pytest.raises(VisarError, match="Too many requests are waiting"):
                await files(fleet.images(full))
            assert fleet.retry_after == 1 and fleet._at_work == 0

        asyncio.run(go())
