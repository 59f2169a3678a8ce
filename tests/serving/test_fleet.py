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
from visar.serving.jobs import Closed
from visar.serving.replica import Replica, Served
from visar.serving.wanted import Accepted, Made, Preview, Told, Wanted

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


class Dying:
    """A handle of engines, of which the first dies at work on all images."""

    def __init__(self) -> None:
        self.fleet = Fleet(self, SETTINGS)
        self.asked: list[int] = []
        self.ill: list[str] = []
        self.images = self

    def options(self, stream: bool) -> Dying:
        return self

    def remote(self, wanted: Wanted) -> Any:
        (image,) = wanted.images
        self.asked.append(image)
        return _Stream(self._told(image, self.asked.count(image)))

    async def _told(self, image: int, time: int) -> AsyncGenerator[Told, None]:
        self.ill.append(self.fleet.problem)
        yield Accepted(SamplingParams(seed=1), ())
        for n in range(time):
            yield Preview(image, bytes([time, n]))
        if time == 1:
            raise Closed("killed")
        yield Made(image, b"", 1, 1, 0.0, 1.0)


class _Stream:
    def __init__(self, told: AsyncGenerator[Told, None]):
        self.told = told

    def __aiter__(self) -> Any:
        return self.told

    def cancel(self) -> None:
        pass


def test_one_dead_engine_is_no_illness_and_no_preview_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images it had."""
    monkeypatch.setattr("visar.serving.fleet.PAUSE", 0.0)
    engines = Dying()

    async def go() -> list[Told]:
        wanted = Wanted("text", "scd", "cat", SamplingParams(seed=1), tuple(range(8)), previews=2)
        return [one async for one in engines.fleet.images(wanted)]

    told = asyncio.run(go())
    assert sum(isinstance(one, Made) for one in told) == engines.fleet.asked_again == 8
    assert set(engines.ill) == {""} and not engines.fleet.problem
    for image in range(8):
        previews = [one.file for one in told if isinstance(one, Preview) and one.image == image]
        assert previews == [bytes([1, 0]), bytes([2, 1])]


def test_keys_are_not_shown() -> None:
    assert "a-key-of-a-client" not in repr(Settings(keys=("a-key-of-a-client",)))


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
