"""The loop of all trainers: what it refuses to save, and the seeds of its steps."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor, nn

from visar.engine import memory
from visar.engine.memory import check_training
from visar.errors import VisarError
from visar.training.loop import Batches, TrainConfig, fit, step_seed


class Square(nn.Module):
    """The loss is the square of one weight, or no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).square().mean()


@pytest.mark.parametrize("scale, lr", [(float("nan"), 1e-3), (1.0, 1e39)])
def test_a_loss_that_is_no_number_is_not_saved(scale: float, lr: float, tmp_path: Path) -> None:
    config = TrainConfig(tmp_path, steps=2, lr=lr, warmup=1, compile=False)
    with pytest.raises(VisarError, match="no numbers after 2 steps; give a smaller --lr"):
        fit(Square(), lambda step, rank: (torch.full((2, 2), scale),), config, lambda ema: {})
    assert list(tmp_path.iterdir()) == []


def test_seeds_of_steps() -> None:
    assert step_seed(2, 3, 1) == (2 * 1_000_003 + 3) * 1_009 + 1
    torch.Generator().manual_seed(step_seed(2**63 - 1, 10**9, 7))


def test_a_network_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 4 * 5)
    before = torch.get_rng_state()
    assert check_training(Square, "cpu").weight.device.type == "cpu"
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 4 * 5 - 1)
    with pytest.raises(VisarError, match=r"of 0 million weights needs .* GiB to train, and .* are free"):
        check_training(Square, "cpu")
    check_training(Square, "cuda")  # the GPU has its own
    assert torch.equal(before, torch.get_rng_state())


def batch(step: int) -> list[Tensor]:
    if step == 6:
        raise VisarError("no such batch")
    return [torch.tensor(step)]


@pytest.mark.parametrize("ahead", [None, torch.device("cpu")])
def test_batches_come_in_order(ahead: torch.device | None) -> None:
    with Batches(batch, 3, ahead) as batches:
        assert [int(batches.next()[0]) for _ in range(3)] == [3, 4, 5]
        with pytest.raises(VisarError, match="no such batch"):
            batches.next()


def test_a_batch_is_made_while_the_one_before_is_in_use() -> None:
    begun, may_end = Event(), Event()

    def slow(step: int) -> list[Tensor]:
        if step == 4:
            begun.set()
            assert may_end.wait(10)
        return [torch.tensor(step)]

    with Batches(slow, 3, torch.device("cpu")) as batches:
        assert int(batches.next()[0]) == 3
        assert begun.wait(10) and batches.coming is not None and not batches.coming.done()
        may_end.set()
        batches.wait()
        assert batches.coming.done()
