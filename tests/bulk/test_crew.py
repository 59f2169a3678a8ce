"""Bulk sampling on Ray: the images of one process, also when workers die; and the dealing of ids."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bulk.test_run import PROMPTS, images, told
from visar.bulk import sample_images
from visar.bulk.crew import DEATHS, Crew, Ids
from visar.bulk.work import Made, Work
from visar.cli import main
from visar.errors import VisarError
from visar.eval.quality.metrics.frechet import load_moments
from visar.generation.model import ImageModel

RUN: dict[str, Any] = {"count": 9, "batch": 2, "seed": 5, "tokens": True}


def test_what_a_dead_worker_had_goes_to_others() -> None:
    ids = Ids([[0], [1], [2], [3]])
    assert [ids.take(7), ids.take(8), ids.take(7)] == [[0], [1], [2]]
    ids.lost(7, {0})
    assert [ids.take(9) for _ in range(3)] == [[2], [3], None]
    ids.lost(8, set())
    ids.lost(8, set())
    assert [ids.take(9), ids.take(9)] == [[1], None]


@pytest.mark.parametrize("given", [["--workers", "2"], ["--ray-address", "auto"]])
def test_options_of_no_launcher(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    assert main(["sample", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), *given]) == 2
    assert f"{given[0]} is of --launcher ray, which is not given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As Ray's workers have: another number rounds pixels otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.ray
class TestOnRay:
    @pytest.fixture(scope="class")
    def one(self, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The run of one process."""
        folder = tmp_path_factory.mktemp("runs") / "one"
        sample_images(_load(text_folder), PROMPTS, folder, **RUN)
        return folder

    @pytest.mark.parametrize("sampler", [None, "zipar"])
    def test_two_workers_make_the_images_of_one_process(
        self, cluster: Any, one: Path, text_folder: Path, tmp_path: Path, sampler: str | None
    ) -> None:
        if sampler:
            sample_images(_load(text_folder), PROMPTS, one := tmp_path / "one", sampler=sampler, **RUN)
        crew = Crew(partial(_load, text_folder), workers=2)
        sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=crew, sampler=sampler, **RUN)
        assert images(tmp_path / "two") == images(one) and told(tmp_path / "two") == told(one)

    def test_a_killed_worker_loses_nothing(self, cluster: Any, one: Path, text_folder: Path, tmp_path: Path) -> None:
        crew = _Killing(partial(_dying, text_folder, tmp_path / "pids"), workers=2, pids=tmp_path / "pids")
        (tmp_path / "pids").mkdir()
        with pytest.warns(UserWarning, match="A worker died; another one takes over its images"):
            sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=crew, **RUN)
        assert images(tmp_path / "two") == images(one) and told(tmp_path / "two") == told(one)

    def test_a_wait_is_told_and_few_images_wait_for_the_writer(
        self, cluster: Any, one: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("visar.bulk.crew.QUIET", 0.01)
        monkeypatch.setattr("visar.bulk.crew.AHEAD", 1)
        crew = Crew(partial(_load, text_folder), workers=1)
        with pytest.warns(UserWarning, match="or wait for room beside other applications") as told_once:
            sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=crew, **RUN)
        assert len(told_once) == 1 and images(tmp_path / "two") == images(one)

    def test_workers_that_keep_dying(self, cluster: Any, text_folder: Path, tmp_path: Path) -> None:
        with warnings.catch_warnings(), pytest.raises(VisarError, match=f"{DEATHS + 1} workers died one after another"):
            warnings.simplefilter("ignore")
            sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=Crew(_dead, workers=1), **RUN)
        assert not (tmp_path / "two").exists()

    def test_other_weights_are_refused(self, cluster: Any, text_folder: Path, tmp_path: Path) -> None:
        crew = Crew(partial(_changed, text_folder), workers=1)
        with pytest.raises(VisarError, match="has other weights"):
            sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=crew, **RUN)
        with pytest.raises(VisarError, match="room for 2 workers, not 99"):
            crew = Crew(partial(_load, text_folder), workers=99)
            sample_images(_load(text_folder), PROMPTS, tmp_path / "two", crew=crew, **RUN)

    @pytest.mark.usefixtures("one_thread")
    def test_commands(self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`visar sample` and `visar eval stats` with two workers, against one process."""
        monkeypatch.setattr("visar.eval.quality.measure._enough", lambda *_: None)  # four images, where 256 are least
        (tmp_path / "p.txt").write_text("a red heart\na cat\n")
        run = ["sample", "--prompts", str(tmp_path / "p.txt"), "--batch", "2", "-n", "4", "--dtype", "float32"]
        ray = ["--launcher", "ray", "--workers", "2"]
        assert main([*run, "-o", str(tmp_path / "one")]) == main([*run, *ray, "-o", str(tmp_path / "two")]) == 0
        assert images(tmp_path / "two") == images(tmp_path / "one")
        stats = ["eval", "stats", str(tmp_path / "one"), "--protocol", "icons-efflite0", "--batch", "1"]
        assert main([*stats, "-o", str(tmp_path / "a.npz")]) == 0
        assert main([*stats, *ray, "-o", str(tmp_path / "b.npz")]) == 0
        assert load_moments(tmp_path / "a.npz").fingerprint == load_moments(tmp_path / "b.npz").fingerprint


@dataclass(frozen=True)
class _Killing(Crew):
    """A crew one of whose workers is killed after the second image."""

    pids: Path = Path()

    def __call__(self, work: Work) -> Made:
        for i, made in enumerate(super().__call__(work)):
            if i == 1:
                os.kill(int(next(self.pids.iterdir()).name), signal.SIGKILL)
            yield made


def _load(folder: Path) -> ImageModel:
    model = ImageModel.load(folder)
    model.bar = {"disable": True}
    return model


def _dying(folder: Path, pids: Path) -> ImageModel:
    (pids / str(os.getpid())).touch()
    return _load(folder)


def _dead() -> ImageModel:
    os._exit(1)


def _changed(folder: Path) -> ImageModel:
    model = _load(folder)
    model.family.model.norm.weight.data += 1
    return model
