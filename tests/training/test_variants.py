"""Variants of images, their tokens, and prompts as people type them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import image_folder
from visar.errors import VisarError
from visar.families.llamagen.vq import VQModel
from visar.training.data import ImageSet, Record, spread
from visar.training.phrases import head, plural, typed
from visar.training.variants import VariantTokens, mirrors, vary


def wedge(side: int = 64) -> Tensor:
    """A red block whose upper right corner is cut out, on white: its mirror image is another."""
    x = torch.full((1, 3, side, side), 255, dtype=torch.uint8)
    x[:, 1:, side // 4 : side // 2, side // 4 : side // 2] = 0
    x[:, 1:, side // 2 : 3 * side // 4, side // 4 : 3 * side // 4] = 0
    return x


def chance(n: int, seed: int) -> Tensor:
    return torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))


def extent(x: Tensor) -> tuple[int, int, int, int]:
    rows, columns = ((x.amin(0) < 250).any(d).nonzero().flatten() for d in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def test_variants_are_zoomed_shifted_and_whole() -> None:
    many = vary(wedge().expand(200, -1, -1, -1), chance(200, 0), torch.zeros(200, dtype=torch.bool))
    boxes = torch.tensor([extent(x) for x in many])
    heights, middles = boxes[:, 1] - boxes[:, 0], (boxes[:, 0] + boxes[:, 1]) / 2
    assert 26 <= heights.min() < 29 and 33 < heights.max() <= 36  # of 32, and of 1.1 x 32 at most
    assert 28 <= middles.min() < 31 and 33 < middles.max() <= 36
    assert len({x.numpy().tobytes() for x in many}) > 150
    dark = (many.amin(1) < 128).sum(1)  # of each column; nothing is mirrored, so the left has more of it
    assert (dark[:, :32].sum(1) > dark[:, 32:].sum(1)).float().mean() > 0.9


def test_nothing_is_cut_off_and_white_stays_white() -> None:
    whole = torch.full((40, 3, 32, 32), 255, dtype=torch.uint8)
    whole[:, :, 0, :], whole[:, :, -1, :], whole[:, :, :, 0], whole[:, :, :, -1] = 0, 0, 0, 0
    for x in vary(whole, chance(40, 1)):
        top, bottom, left, right = extent(x)
        dark = x.amax(0) < 200
        assert dark[top, left + 2 : right - 2].all() and dark[bottom - 1, left + 2 : right - 2].all()
        assert dark[top + 2 : bottom - 2, left].all() and dark[top + 2 : bottom - 2, right - 1].all()
    blank = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(vary(blank, chance(3, 0)), blank)


def test_only_what_may_be_is_mirrored() -> None:
    x = wedge().expand(60, -1, -1, -1)
    may = torch.arange(60) < 30
    many = vary(x, chance(60, 2), may).amin(1) < 128
    turned = many[:, :, 32:].sum((1, 2)) > many[:, :, :32].sum((1, 2)) + 40
    assert 8 <= turned[:30].sum() <= 22 and not turned[30:].any()


@pytest.mark.parametrize(
    ("caption", "group", "mirrored"),
    [
        ("cat", "animals & nature", True),
        ("three o’clock", "travel & places", False),
        ("right arrow", "", False),
        ("heart", "symbols", False),
        ("red bus", "", False),
        ("starfish", "animals & nature", True),
    ],
)
def test_what_a_mirror_makes_wrong(caption: str, group: str, mirrored: bool) -> None:
    assert mirrors(Record("", caption, group=group)) is mirrored


def tokenizer(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(16, 4, 32, (1, 2), 1, 16).eval()


def test_tokens_of_variants_are_kept(tmp_path: Path) -> None:
    data, vq = ImageSet(image_folder(tmp_path / "set", 5, size=16)), tokenizer()
    file = tmp_path / "variants.safetensors"
    tokens = VariantTokens(vq, data, 16, 3, file)
    first = tokens([0, 1, 1, 4], [0, 1, 2, 1])
    assert first.shape == (4, 64) and first.dtype == torch.long
    assert torch.equal(first[0], vq.encode(data.pixels(16)[:1].float().div(127.5).sub(1))[0])
    assert int((tokens.tokens[:, :, 0] >= 0).sum()) == 4  # what was not asked for is not there
    tokens.save()
    again = VariantTokens(vq, data, 16, 3, file)
    again.vq = None  # type: ignore[assignment]  # it is not needed for what is kept
    assert torch.equal(again([0, 1, 1, 4], [0, 1, 2, 1]), first)
    alone = VariantTokens(vq, data, 16, 3)
    assert torch.equal(alone([4, 1], [1, 2]), first[[3, 2]])  # and depends on nothing but image, variant and seed
    other = VariantTokens(vq, data, 16, 3, seed=1)
    assert torch.equal(other([0], [0])[0], first[0])


def test_tokens_of_another_run_are_refused(tmp_path: Path) -> None:
    data, file = ImageSet(image_folder(tmp_path / "set", 3, size=16)), tmp_path / "variants.safetensors"
    VariantTokens(tokenizer(), data, 16, 2, file).save()
    for vq, count in ((tokenizer(1), 2), (tokenizer(), 3)):
        with pytest.raises(VisarError, match="another tokenizer, of other images"):
            VariantTokens(vq, data, 16, count, file)
    file.write_bytes(b"half")
    with pytest.raises(VisarError, match="is damaged; delete it"):
        VariantTokens(tokenizer(), data, 16, 2, file)


def test_heads_and_plurals() -> None:
    assert head("house with garden") == "house" and head("woman: red hair") == "woman"
    assert head("cat face", "animals & nature") == "cat" and head("sad face") == "sad face"
    assert [plural(w) for w in ("cat", "box", "berry", "toy", "bus")] == ["cats", "boxes", "berries", "toys", "buses"]


def test_prompts_as_people_type_them() -> None:
    rng = random.Random(0)
    record = Record("x", "house with garden", "noto", ("home", "plant"))
    seen = Counter(typed(record, rng) for _ in range(3000))
    assert {"house, noto", "house with garden", "home, noto", "plant home, noto"} <= seen.keys()
    assert {"house with garden plant, noto", "house with gardens, noto"} <= seen.keys()
    assert 0.45 < seen["house with garden, noto"] / 3000 < 0.55
    default = Record("x", "house", "3d")
    assert 0.4 < sum("3d" not in typed(default, rng) for _ in range(1000)) / 1000 < 0.6
    assert {typed(Record("x", "cat"), rng) for _ in range(100)} == {"cat", "cats"}


def test_rows_are_spread_over_all() -> None:
    assert spread(list(range(100)), 10) == list(range(0, 100, 10))
    assert spread([3, 5], 10) == [3, 5] and spread([], 10) == []
    assert len(spread(list(range(11)), 10)) <= 10
