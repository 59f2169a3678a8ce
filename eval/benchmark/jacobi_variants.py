"""What two variants of Jacobi windows give without training, on a model's own images.

Run as `python -m visar.eval.benchmark.jacobi_variants`. It prints two tables, one for each variant, with standard
errors over the images.

Forced commits bound the passes that a token may wait. A position's token is sampled by the first pass that reaches it,
and refined by every later one; after `refinements` of these it is committed as it stands, whether it is accepted or
not. That is no exact sampler, so the table also has -log p of the images' tokens, each given those before it, under the
model's guided distribution without top-k and top-p: a forced token may be one that these leave out.

Quantile coupling samples every draft of a position by inverse CDF with one uniform, which stays for all passes. Similar
distributions then give codes that are near to each other in the order of the CDF, or the same one. The token of a
position depends on its uniform and its prefix alone, so a draft is accepted while it is what the pass samples, and all
images are those of sequential sampling with these uniforms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from visar.engine.rng import Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.benchmark.lookups import target_probs
from visar.eval.prompts import conditions
from visar.families.base import DiscreteFamily
from visar.generation.model import ImageModel
from visar.params import DISCRETE, SamplingParams
from visar.samplers import SpeculativeJacobi
from visar.samplers.base import State
from visar.samplers.jacobi import Coupling
from visar.samplers.verification import StepNoise, Verified, leading, sample
from visar.tables import table

REFINEMENTS = (8, 5, 3, 2, 1)


def _predicted(state: State, window: int) -> Tensor:
    """The positions [B, W] that a pass predicts, as `Session.positions`, by what is committed before it."""
    return (state.commit_pass >= 0).sum(1, keepdim=True) + torch.arange(window, device=state.tokens.device)


@dataclass(frozen=True)
class ForcedCommits(SpeculativeJacobi):
    """`scd` that commits a token as it stands after `refinements` of it, accepted or not.

    Positions enter the window from the left to the right, so those that are due are its first ones. With R refinements
    no position waits for more than R + 1 passes, so N tokens take (R + 1) * ceil(N / W) passes at most.
    """

    coupling: Coupling = "maximal"
    refinements: int = 8
    exact: ClassVar[bool] = False

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        verified = super().verify(p, q, drafts, noise, state)
        # A position enters in the pass after the commit of the one that is a window before it.
        before = _predicted(state, self.window) - self.window
        entered = torch.where(before < 0, 0, state.commit_pass.gather(1, before.clamp_min(0)) + 1)
        due = (state.passes - entered >= self.refinements).sum(1)
        return Verified(verified.tokens, torch.maximum(verified.accepted, due - 1))


@dataclass(frozen=True)
class QuantileCoupling(SpeculativeJacobi):
    """Jacobi windows whose drafts are inverse CDFs at one uniform for each position, with the codes on a line.

    `codes` are all codes in their order on it, that of their numbers if none are given. The token at u is the first
    whose cumulative probability is above u.
    """

    codes: tuple[int, ...] = ()
    exact: ClassVar[bool] = True
    capturable: ClassVar[bool] = False  # the order of the codes comes from the host

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        tokens = self.at_quantiles(p, state, _predicted(state, self.window))
        return Verified(tokens, leading(tokens[:, :-1] == drafts))

    def fresh_drafts(
        self, session: Session, state: Any, positions: Tensor, known: Tensor, u: Tensor, last_probs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, probs = super().fresh_drafts(session, state, positions, known, u, last_probs)
        return self.at_quantiles(probs, state, positions), probs

    def at_quantiles(self, p: Tensor, state: State, positions: Tensor) -> Tensor:
        """The tokens [B, W] of p [B, W, V] at the uniforms of these positions [B, W]."""
        u = state.noise.uniforms(Purpose.SHARED, positions, 0)[0]
        codes = torch.tensor(self.codes or range(p.shape[-1]), device=p.device)
        return codes[sample(p[..., codes], u)]


def by_component(codebook: Tensor) -> list[int]:
    """The codes of a codebook [V, D] by their first principal component."""
    x = codebook.detach().double().cpu()
    x = x - x.mean(0)
    axis = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    return ((x @ axis) * axis[axis.abs().argmax()].sign()).argsort(stable=True).tolist()  # of either sign, the same


def by_neighbour(codebook: Tensor) -> list[int]:
    """A chain through the codes of a codebook [V, D]: from code 0 always on to the nearest one that is left."""
    x = codebook.detach().double().cpu()
    taken, chain = torch.zeros(len(x), dtype=torch.bool), [0]
    while len(chain) < len(x):
        taken[chain[-1]] = True
        apart = (x - x[chain[-1]]).square().sum(1)
        chain.append(int(apart.masked_fill(taken, torch.inf).argmin()))
    return chain


def surprise(model: ImageModel, condition: Any, tokens: Tensor, params: SamplingParams) -> float:
    """The mean of -log p of an image's tokens [N], in nats, without top-k and top-p; at most 87.3 for each token."""
    p = target_probs(model, condition, tokens, replace(params, top_k=0, top_p=1.0))
    of_tokens = p[torch.arange(len(tokens)), tokens]
    return -float(of_tokens.clamp_min(torch.finfo(torch.float32).tiny).double().log().mean())


def sampled(model: ImageModel, sampler: Any, count: int, params: SamplingParams) -> tuple[list[int], list[Tensor]]:
    """The passes of `count` images, and their tokens [N], one image at a time."""
    passes, tokens = [], []
    for i, condition in enumerate(conditions(model, count)):
        output = model.generate(condition, params, sampler=sampler, first_image=i, output_type="tokens")
        passes += output.stats.passes_per_image
        tokens.append(output.tokens[0].cpu())
    return passes, tokens


def _with_error(values: Sequence[float], digits: int) -> str:
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f} ± {x.std() / len(x) ** 0.5:.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=16, help="of all samplers but ar")
    parser.add_argument("--top-k", type=int, help="of the target (default: the model's own)")
    options = parser.parse_args(argv)
    count, window = options.images, options.window
    try:
        if count < 2:
            raise VisarError(f"--images must be 2 or more, not {count}: one has no standard error.")
        model = ImageModel.load(options.model)
        if model.family.tokens != DISCRETE:
            raise VisarError("Jacobi windows are for models of discrete tokens.")
        model.bar = {"disable": True}
        params = model.params_of(SamplingParams(seed=options.seed, top_k=options.top_k))
        scd = SpeculativeJacobi(window=window, coupling="maximal")
        gumbel = SpeculativeJacobi(window=window, coupling="gumbel")
        forced = [(f"at most {r}", ForcedCommits(window=window, refinements=r)) for r in REFINEMENTS]
        rows, passes_of = [], {}
        for name, sampler in (("ar", "ar"), ("scd", scd), *forced):
            passes, images = sampled(model, sampler, count, params)
            each = zip(conditions(model, count), images, strict=True)
            nats = [surprise(model, condition, tokens, params) for condition, tokens in each]
            rows.append((name, _with_error(passes, 1), _with_error(nats, 2)))
            passes_of[name] = passes
        orders = _orders(cast(DiscreteFamily, model.family).codebook)
        coupled = [(f"quantile, {n}", QuantileCoupling(window=window, codes=tuple(c))) for n, c in orders.items()]
        for name, sampler in (("scd-gumbel", gumbel), *coupled):
            passes_of[name] = sampled(model, sampler, count, params)[0]
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    print(table(("REFINEMENTS", "PASSES", "-LOG P PER TOKEN"), rows))
    shown = ("scd", "scd-gumbel", *(name for name, _ in coupled))
    print(table(("COUPLING", "PASSES"), [(name, _with_error(passes_of[name], 1)) for name in shown]))
    return 0


def _orders(codebook: Tensor | None) -> dict[str, list[int]]:
    """The orders of codes that are measured; without a codebook there is only one."""
    known = {"by principal component": by_component, "by nearest neighbour": by_neighbour}
    return {"by number": []} | ({} if codebook is None else {name: order(codebook) for name, order in known.items()})


if __name__ == "__main__":
    sys.exit(main())
