"""Runs of training: resumed, interrupted, damaged, and two at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny import image_folder
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.errors import VisarError
from visar.training.loop import TrainConfig, alone, fit, make_optimizers


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        self.head = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return (self.head(self.body["layers"][0](x).tanh()).float() - y).square().mean()


def toy_batch(step: int, rank: int) -> tuple[Tensor, ...]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True)


def no_figures(ema: nn.Module) -> dict[str, float]:
    return {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    def interrupted(step: int, rank: int) -> tuple[Tensor, ...]:
        if step == 2:
            raise KeyboardInterrupt
        return toy_batch(step, rank)

    whole, part = config(tmp_path / "a", optimizer=optimizer), config(tmp_path / "b", optimizer=optimizer)
    wanted = fit(Toy(), toy_batch, whole, no_figures)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(), interrupted, replace(part, save_minutes=0), no_figures)
    torch.manual_seed(1)
    got = fit(Toy(), toy_batch, part, no_figures)
    a, b = (torch.load(tmp_path / name / "state.pt") for name in "ab")
    assert a["step"] == b["step"] == 4
    for x, y in ((wanted.state_dict(), got.state_dict()), (a["model"], b["model"]), (a["ema"], b["ema"])):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert [r["step"] for r in log_of(tmp_path / "b")] == [1, 2, 4]
    assert b["model"]["calls"] == 4


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = fit(Toy(), toy_batch, config(tmp_path), no_figures)
    with pytest.warns(UserWarning, match=r"has trained 0\.00 minutes and 4 steps: it learns no more\."):
        again = fit(Toy(), toy_batch, config(tmp_path), no_figures)
    assert all(torch.equal(first.state_dict()[k], v) for k, v in again.state_dict().items())
    start = Toy().state_dict()
    assert not torch.equal(start["head.weight"], again.state_dict()["head.weight"])


def test_a_run_goes_on_as_the_same_only(tmp_path: Path) -> None:
    fit(Toy(), toy_batch, replace(config(tmp_path), steps=1), no_figures)  # of a visar that noted nothing
    for steps in (2, 3):
        fit(Toy(), toy_batch, replace(config(tmp_path), steps=steps, made_of={"heads": 2, "data": "a"}), no_figures)
    with pytest.raises(VisarError, match="a run with other settings: heads was 2, now 4; give another folder"):
        fit(Toy(), toy_batch, replace(config(tmp_path), made_of={"heads": 4, "data": "a"}), no_figures)


def test_the_average_of_the_weights(tmp_path: Path) -> None:
    """EMA by hand: the decay grows as (1 + n) / (10 + n) up to the limit given."""
    seen: list[Tensor] = []
    ema = fit(
        Toy(), toy_batch, config(tmp_path, ema=0.2), no_figures, lambda m, step: seen.append(m.head.weight.clone())
    )
    expected = Toy().head.weight.detach()
    for decay, weight in zip((2 / 11, 0.2, 0.2, 0.2), seen, strict=True):
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(ema.head.weight, expected)
    assert not ema.training and not any(p.requires_grad for p in ema.parameters()) and ema.calls == 4


def test_the_loss_falls_and_is_logged(tmp_path: Path) -> None:
    fit(Toy(), toy_batch, config(tmp_path, steps=60, lr=5e-2, save_minutes=0), lambda ema: {"figure": 7})
    *rows, end = log_of(tmp_path)
    assert end["step"] == 60 and end["loss"] is None  # no step since the last save
    assert [r["step"] for r in rows] == list(range(1, 61)) and {r["figure"] for r in rows} == {7}
    first, last = (sum(r["loss"] for r in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.5 * first and all(r["samples_per_second"] > 0 for r in rows)


def test_a_failed_save_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(Toy(), toy_batch, config(tmp_path, steps=2), no_figures)
    before = (tmp_path / "state.pt").read_bytes()

    def full(state: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        fit(Toy(), toy_batch, config(tmp_path), no_figures)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["model"].pop("head.weight"), lambda state: state.update(step="1"),
        lambda state: state.update(step=-1), lambda state: state.update(spent=math.nan), lambda state: state.clear(),
        None,
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_an_error(tmp_path: Path, damage: Callable[[Any], Any] | None) -> None:
    fit(Toy(), toy_batch, config(tmp_path, steps=1), no_figures)
    state = torch.load(tmp_path / "state.pt")
    if damage is None:
        (tmp_path / "state.pt").write_bytes(b"half")
    else:
        damage(state)
        torch.save(state, tmp_path / "state.pt")
    with pytest.raises(VisarError, match=r"state\.pt is damaged or of a run with other sizes; give an empty folder"):
        fit(Toy(), toy_batch, config(tmp_path), no_figures)


def test_two_runs_at_once(tmp_path: Path) -> None:
    """The second is refused and changes nothing; what a killed run left half saved goes."""

    def second(step: int, rank: int) -> tuple[Tensor, ...]:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(VisarError, match=r"Another run trains in .*; wait until it ends, or give another folder"):
            fit(Toy(), toy_batch, config(tmp_path), no_figures)
        assert sorted(tmp_path.iterdir()) == before
        return toy_batch(step, rank)

    (tmp_path / ".state.7-0.partial.pt").write_bytes(b"half")
    fit(Toy(), second, config(tmp_path, steps=1), no_figures)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_one_process_of_a_job_holds_the_folder_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with alone(tmp_path):
        with pytest.raises(VisarError, match="Another run trains"), alone(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with alone(tmp_path):
            pass


def test_a_command_holds_its_folder_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepares(data: object, size: int, config: TrainConfig, *_: object) -> None:
        with pytest.raises(VisarError, match="Another run trains"), alone(config.out):
            pass
        fit(Toy(), toy_batch, replace(config, steps=1, compile=False), no_figures)

    monkeypatch.setattr("visar.training.tokenizer.train_tokenizer", prepares)
    command = ["train", "tokenizer", "--data", str(image_folder(tmp_path / "set", 2)), "-o", str(tmp_path / "out")]
    assert main(command) == 0


def test_a_command_that_cannot_go_on_says_so_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "visar.training.tokenizer.train_tokenizer",
        lambda data, size, config, *_: fit(Toy(), toy_batch, replace(config, steps=1, compile=False), no_figures),
    )
    command = ["train", "tokenizer", "--data", str(image_folder(tmp_path / "set", 2)), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    monkeypatch.setattr("visar.training.tokenizer.train_tokenizer", lambda *_: pytest.fail("it went on"))
    assert main([*command, "--size", "32"]) == 2 and "size was 64, now 32" in capsys.readouterr().err
    (tmp_path / "out" / "state.pt").write_bytes(b"half")
    assert main(command) == 2 and "state.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl"])
def test_what_cannot_be_saved_is_said_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(VisarError, match=f"Cannot write .*{name}: Is a directory"):
        fit(Toy(), lambda step, rank: pytest.fail("a step was made"), config(tmp_path), no_figures)


def test_muon_takes_the_matrices_of_the_blocks_only() -> None:
    model = Toy()
    adamw, muon = make_optimizers(model, config(Path(), optimizer="muon"))
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(4, 4)]
    decayed, plain = adamw.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 4)] and plain["weight_decay"] == 0
    assert len(plain["params"]) == 2 and len(make_optimizers(model, config(Path()))) == 1
