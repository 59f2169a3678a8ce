"""Parallel decoding of groups, against whole sequences without a cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.any_order import CELLS, CLASSES, FORCED, GRID, IDS, IMAGES, KINDS, LENGTH, ORDER, gpt, small
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.orders import group_sizes
from visar.engine.rng import Noise, Purpose
from visar.errors import VisarError
from visar.eval.exactness.joint import MUTANT_LIMIT, chi_square_z, values
from visar.eval.exactness.tabular import Settings, reference_probs
from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.lpd_session import LPDSession
from visar.families.llamagen.randar import RandAR
from visar.samplers import Parallel, Target, get_sampler
from visar.samplers.parallel import GroupState
from visar.samplers.verification import sample

of_every_kind = pytest.mark.parametrize("kind", KINDS)


def whole(model: Any, classes: Tensor, by_turn: Tensor, cells: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, N, V] by turn, each group from a sequence of its own: all that was sampled, and its queries.

    RandAR's has each token after its query, and is causal. In LPD's a group's tokens see each other, and so do queries.
    """
    out, done = [], 0
    table = model.rotary()
    for g, size in enumerate(sizes):
        known, asked = cells[:, :done], cells[:, done : done + size]
        first, read = model.cls_embedding(classes), model.tok_embeddings(by_turn[:, :done])
        if isinstance(model, LPD):
            zero = torch.zeros(len(classes), 1, dtype=torch.long)
            x = torch.cat([model.placed(torch.cat([first, read], 1), torch.cat([zero, 1 + known], 1)),
                           model.queries(1 + asked)], 1)  # fmt: skip
            group = torch.tensor([-1, *(n for n in range(g) for _ in range(sizes[n])), *[g] * size])
            mask = group <= group[:, None]

            def attend(_: int, qkv: Tensor, rows: Tensor, mask: Tensor = mask) -> Tensor:
                q, k, v = (t.transpose(1, 2) for t in qkv.chunk(3, dim=2))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

            hidden = model.run(x, table, attend)
        else:
            queries = model.queries(table[1 + cells[:, : done + size]])
            pairs = torch.stack([queries[:, :done], read], 2).flatten(1, 2)
            x = torch.cat([first, pairs, queries[:, done:]], 1)
            rows = torch.cat([known.repeat_interleave(2, 1), asked], 1)
            hidden = model.causal(x, torch.cat([table[:1].expand(len(x), -1, -1, -1), table[1 + rows]], 1))
        out.append(model.logits(hidden[:, -size:]))
        done += size
    return torch.cat(out, 1)


@of_every_kind
def test_groups_equal_whole_sequences(kind: type[Any]) -> None:
    """Rows at groups of their own, the passes of some repeated, with guidance that grows as each model's does."""
    sizes, model = group_sizes(LENGTH, 5), gpt(kind)
    starts = [0, *np.cumsum(sizes).tolist()]
    by_turn = IDS.gather(1, CELLS)
    null = model.cls_embedding.null_like(CLASSES)
    cond, uncond = (whole(model, c, by_turn, CELLS, sizes) for c in (CLASSES, null))
    at = [
        n if kind is LPD else start
        for start, size in zip(starts, sizes, strict=False)
        for n in range(start, start + size)
    ]
    wanted = uncond + (1 + 2 * torch.tensor(at)[:, None] / LENGTH) * (cond - uncond)
    width = max(sizes)
    made = KINDS[kind](
        model, CLASSES, CELLS, length=LENGTH, window=width, grid=GRID, guidance=Guidance(3.0, -1, True)
    )  # fmt: skip
    turn = [0, 0, 0]
    while min(turn) < len(sizes):
        own = [min(t, len(sizes) - 1) for t in turn]
        before = torch.tensor([sizes[t - 1] if t else 1 for t in own])
        fed = (torch.tensor([starts[t] for t in own]) - before)[:, None] + torch.arange(width)
        logits = made.forward_group(
            by_turn.gather(1, fed.clamp(0, LENGTH - 1)), before, torch.tensor([sizes[t] for t in own])
        )
        for b, t in enumerate(own):
            if turn[b] < len(sizes):
                expected = wanted[b, starts[t] : starts[t] + sizes[t]]
                torch.testing.assert_close(logits[b, : sizes[t]], expected, rtol=0, atol=1e-4)
        moves = [(t + b) % 3 != 1 and t < len(sizes) for b, t in enumerate(turn)] if len(set(turn)) < 3 else [True] * 3
        moves = [m and t < len(sizes) for m, t in zip(moves, turn, strict=True)]
        made.commit(torch.tensor([sizes[t] if m else 0 for m, t in zip(moves, own, strict=True)]))
        turn = [t + m for t, m in zip(turn, moves, strict=True)]


SIZES = [1, 3]


@functools.cache
def expected(kind: type[Any]) -> np.ndarray:
    """The probability of every image, [2 classes, V**N], in raster order: a cell, and then the three others at once."""
    images = torch.cartesian_prod(*[torch.arange(4)] * 4)
    settings = Settings(0.8, 0, 0.9, 2.0, forced=tuple(FORCED[cell] for cell in ORDER))
    cells = torch.tensor(ORDER).expand(len(images), -1)
    by_turn, out, model = images.gather(1, cells), np.ones((2, len(images))), small(kind)
    for c in range(2):
        given = torch.full((len(images),), c)
        null = model.cls_embedding.null_like(given)
        cond, uncond = (whole(model, x, by_turn, cells, SIZES).double().numpy() for x in (given, null))
        for i, image in enumerate(by_turn.tolist()):
            for n, token in enumerate(image):
                out[c, i] *= reference_probs(cond[i, n], uncond[i, n], n, settings)[token]
    return out


def worst_z(kind: type[Any], sampler: Parallel, wrong: type[Any] | None = None) -> float:
    """The chi-square z of the images of either class, in one batch; the two classes take turns."""
    images = torch.arange(IMAGES)
    made = (wrong or KINDS[kind])(
        small(kind), images % 2, torch.tensor(ORDER).expand(IMAGES, -1),
        length=4, window=max(sampler.window, 2), grid=2, guidance=Guidance(2.0),
    )  # fmt: skip
    made.layout = Layout(2, 2)
    tokens = decode(made, sampler, Target(0.8, 0, 0.9, torch.tensor(FORCED)), Noise(0, images)).tokens
    counts = [np.bincount(values(tokens[c::2], 4), minlength=256) for c in range(2)]
    return max(abs(chi_square_z(n, p)) for n, p in zip(counts, expected(kind), strict=True))


@of_every_kind
def test_joint_distribution(kind: type[Any]) -> None:
    sampler = Parallel(2, Layout(2, 2))
    assert sampler.sizes == SIZES and expected(kind).sum(1) == pytest.approx([1, 1], abs=1e-9)
    assert worst_z(kind, sampler) < 4


@dataclass(frozen=True)
class OneUniform(Parallel):
    """All cells of a group are sampled with the uniform of its first."""

    def sampled(self, p: Tensor, at: Tensor, state: GroupState) -> Tensor:
        first = at[:, :1].expand_as(at)
        return sample(p, state.noise.uniforms(Purpose.STEP, first, first)[1])


class Blind(LPDSession):
    """A query does not see those of its group."""

    def group_mask(self, slots: Tensor, root: Tensor, count: Tensor, visible: int) -> Tensor:
        own = (self._slot[:visible] <= root[..., None]) | (self._slot[:visible] == slots[..., None])
        return super().group_mask(slots, root, count, visible) & own


@pytest.mark.parametrize(
    ("kind", "sampler", "wrong"),
    [
        (RandAR, OneUniform, None),
        (LPD, Parallel, Blind),
        (LPD, Parallel, "sequential"),
        (RandAR, Parallel, "sequential"),
    ],
)
def test_mistakes_are_caught(kind: type[Any], sampler: type[Parallel], wrong: Any) -> None:
    """Plain decoding is one of them: the distribution of groups is another."""
    made = Parallel(4, Layout(2, 2)) if wrong == "sequential" else sampler(2, Layout(2, 2))
    assert worst_z(kind, made, None if wrong == "sequential" else wrong) > MUTANT_LIMIT


@pytest.mark.parametrize(
    ("number", "groups", "sizes"),
    [
        (256, 20, [1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20]),
        (256, 32, [1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, *[10] * 3, *[11] * 4, *[12] * 8]),
        (3, 9, [1, 1, 1]),
    ],
)
def test_sizes_are_those_published(number: int, groups: int, sizes: list[int]) -> None:
    assert group_sizes(number, groups) == sizes
    for n in range(1, 40):
        for g in range(1, 45):
            found = group_sizes(n, g)
            assert sum(found) == n and len(found) == min(g, n) and found[0] >= 1 and found == sorted(found)


def test_bad_input() -> None:
    with pytest.raises(VisarError, match="steps must be 1 or more, not 0"):
        get_sampler("parallel", steps=0)
    with pytest.raises(VisarError, match="needs layout"):
        Parallel().begin(KINDS[LPD](gpt(LPD), CLASSES, CELLS, length=LENGTH, window=2, grid=GRID), None, None)  # type: ignore[arg-type]
