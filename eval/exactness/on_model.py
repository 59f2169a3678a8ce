"""`visar verify --model`: whether exact samplers are exact on a loaded model, whose distributions nobody can enumerate.

The test is that of Rosenblatt (1952): u = F(x - 1) + v p(x), with p the distribution of a token given those before it
(in a model with two-way heads the diagonals before), F its cumulative sum and v uniform, is uniform and independent of
the other tokens' u if and only if the images have the joint distribution. p comes from passes over the sampled images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.engine.diagonals import Diagonals
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.exactness.joint import Row, alike, check_exact, exact_samplers, sampled
from visar.eval.exactness.ranks import rank_z
from visar.families.base import DiscreteFamily
from visar.generation.discrete import arranged, guidance_of, target_of
from visar.generation.model import ImageModel
from visar.generation.output import ImageOutput
from visar.generation.rows import noise_of
from visar.generation.sessions import Call
from visar.params import DISCRETE
from visar.samplers import Autoregressive, Target

CELLS = 10  # of the uniform interval
LEAST_IMAGES = 128  # about a dozen in a cell
BATCH = 256
ALONE = 4  # images that are decoded alone, too


def verify_model(
    model: ImageModel,
    condition: Any,
    names: Iterable[str] | None = None,
    tokens: int = 131072,
    seed: int = 0,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for each exact sampler that the model can use, from about so many sampled `tokens`.

    `condition` is a prompt or a class. Raises `VisarError` for samplers that are relaxed or need a drafter, and for
    models of continuous tokens.
    """
    if model.family.tokens != DISCRETE:
        raise VisarError(
            "--model is for models of discrete tokens; `visar verify --samplers mar-headspec` tests samplers of "
            "continuous ones."
        )
    if names is None:
        exact = exact_samplers(model.family.scan)
        names = [name for name in exact if name in model.usable_samplers() and name != "jacobi"]
    check_exact(names)
    rows = []
    for name in names:
        sampler = model.sampler_of(name)
        if not sampler.exact:
            raise VisarError(f"{name!r} does not sample from the model's distribution: there is nothing to prove.")
        rows.append(_row(model, condition, name, sampler, tokens, seed))
        report(rows[-1])
    return rows


def _row(model: ImageModel, condition: Any, name: str, sampler: Any, count: int, seed: int) -> Row:
    images = max(count // model.family.layout.length, LEAST_IMAGES)

    def decoding(indices: Tensor) -> ImageOutput:
        return model.generate(
            [condition] * len(indices), sampler=sampler, seed=seed, first_image=indices.tolist(), output_type="tokens"
        )

    tokens, speed = sampled(decoding, images, BATCH)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)  # one for all parts: where tokens are certain, u is the noise itself
    starts = range(0, images, BATCH)
    parts = zip(tokens.split(BATCH), starts, strict=True)
    uniforms = torch.cat([rosenblatt(model, condition, part, noise, seed, first) for part, first in parts])
    alone = alike(decoding, tokens, ALONE)  # type: ignore[arg-type]
    return Row(name, f"{images} images", "exact", images, rank_z((uniforms * CELLS).long(), CELLS), speed, alone)


@torch.inference_mode()
def rosenblatt(
    model: ImageModel, condition: Any, tokens: Tensor, noise: torch.Generator, seed: int = 0, first: int = 0
) -> Tensor:
    """u [B, F] in [0, 1), float64, of images' tokens [B, N], without those that are forced.

    They are the images `first`.. of the `seed`, which say in which order a model of any order sampled them.
    """
    family, params = cast(DiscreteFamily, model.family), model.params_of()
    target, guidance, every = target_of(family, params), guidance_of(params), [condition] * len(tokens)
    images = noise_of(every, list(range(first, first + len(tokens))), seed, family.device)
    encoded = arranged(family.encode(every), family, params, images)
    session = Call(family, None, encoded, Autoregressive(), target, guidance).session()
    target = target.on(session.device, session.length, session.vocab, session.cells)
    tokens = tokens.to(session.device)
    if session.cells is not None:
        tokens = tokens.gather(1, session.cells)
    out = torch.empty(tokens.shape, dtype=torch.double)
    for at, p in (by_diagonals if family.scan == "diagonal" else one_by_one)(session, target, tokens):
        own = tokens[:, at, None]
        below, each = p.cumsum(-1).gather(-1, own)[..., 0], p.gather(-1, own)[..., 0]
        v = torch.rand(own.shape[:2], generator=noise).double()
        out[:, at.cpu()] = (below - each).cpu() + v * each.cpu()
    free = target.forced_at(torch.arange(session.length, device=session.device).expand(len(tokens), -1)) < 0
    return out[free.cpu()].view(len(tokens), -1).clamp(0, 1 - 1e-12)


def one_by_one(session: Session, target: Target, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions [1] and their distributions [B, 1, V], float64, given the tokens before, by passes of one token."""
    for n in range(session.length):
        at = session.positions(1)
        yield at[0], target.probs(session.forward(tokens[:, max(n - 1, 0)][:, None]), at).double()
        session.commit(torch.ones_like(session.lengths))


def by_diagonals(session: Session, target: Target, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions [W] of each diagonal and their distributions [B, W, V], float64, given the diagonals before."""
    assert session.layout is not None
    table, padded = Diagonals.of(session.layout, session.device), F.pad(tokens, (0, 1))
    for d, count in enumerate(table.count[:-1].tolist()):
        logits = session.forward_diagonal(padded[:, table.cells[max(d - 1, 0)]])
        at = table.cells[d]
        yield at[:count], target.probs(logits, at.expand(len(tokens), -1))[:, :count].double()
        session.commit(torch.full_like(session.lengths, count))
