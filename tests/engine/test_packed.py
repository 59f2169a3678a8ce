"""Matrices in few bits within a file."""

from __future__ import annotations

import pytest
import torch

from visar.dtypes import INT6
from visar.engine.packed import packed, unpacked
from visar.errors import VisarError


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (INT6, 31)])
def test_whole_numbers_come_back_as_they_are(dtype: torch.dtype, most: int) -> None:
    """Every number that fits, in every place of its bytes; rows of nothing too."""
    numbers = torch.arange(-most, most + 1).float()
    rows = torch.stack(
        [numbers.roll(i)[: len(numbers) // 4 * 4] for i in range(4)] + [0 * numbers[1:][: len(numbers) // 4 * 4]]
    )
    rows[:, 0] = torch.tensor([most, most, -most, most, 0.0])
    given = {"m": rows * torch.tensor([[1.0], [2.0], [0.25], [2**-20], [1.0]]), "n": torch.tensor([3])}
    stored = packed(given, dtype)
    assert all(torch.equal(value, given[key]) for key, value in unpacked(stored, "f").items())
    bits = 8 * stored["m"].nbytes / rows.numel()
    assert bits == (6 if dtype == INT6 else 8)


@pytest.mark.parametrize("dtype", [torch.int8, INT6])
def test_what_is_too_large_for_the_memory_is_said(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = packed({"m": torch.ones(4, 8)}, dtype)
    monkeypatch.setattr("visar.host.available_memory", lambda: 4 * 32)
    assert unpacked(stored, "f")["m"].shape == (4, 8)
    monkeypatch.setattr("visar.host.available_memory", lambda: 4 * 32 - 1)
    with pytest.raises(VisarError, match=r"f needs 0\.0 GiB of memory, and 0\.0 GiB are free"):
        unpacked(stored, "f")


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 3), (0, 8), (4, 0), (4,)])
def test_other_shapes_have_eight_bits_or_stay(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eight, six = (packed({"m": value}, dtype) for dtype in (torch.int8, INT6))
    assert torch.equal(six["m"], eight["m"]) and six.keys() == eight.keys()
    assert (unpacked(eight, "f")["m"] - value).abs().sum() <= 0.01 * value.abs().sum()
    assert unpacked(six, "f")["m"].shape == shape


@pytest.mark.parametrize("shape", [(3, 64), (2, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.int8, INT6])
def test_signs_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also of what is rounded to nothing: by them a model knows its drafters, and a MAR its autoencoder."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 5
    value.view(-1)[:2] = torch.tensor([0.0, -0.0])
    found = unpacked(packed({"m": value}, dtype), "f")["m"]
    assert torch.equal(found.signbit(), value.signbit()) and (found == 0).sum() > 9


def test_a_scale_that_does_not_fit_is_refused() -> None:
    stored = packed({"m": torch.ones(4, 8)}, INT6)
    for changes in (
        {"m.scale": torch.ones(3, 1)}, {"m.scale": torch.ones(4)}, {"m.scale": torch.ones(4, 1, dtype=torch.int32)},
        {"m": torch.ones(4, 7, dtype=torch.uint8)}, {"m": torch.ones(4, dtype=torch.uint8)},
    ):  # fmt: skip
        with pytest.raises(VisarError, match=r"Tensor 'm\.scale' of f is no scale of 'm'"):
            unpacked(stored | changes, "f")
    with pytest.raises(VisarError, match="Tensor 'm' of f holds a NaN or an infinity"):
        unpacked(stored | {"m.scale": torch.full((4, 1), 3e38)}, "f")
    assert set(unpacked({"m.scale": torch.ones(2)}, "f")) == {"m.scale"}, "a tensor of this name, and no matrix"
