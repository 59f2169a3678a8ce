"""Speculation inside a diffusion head: exact, with no second network.

A step of the head needs the network's guess of the clean token, and that guess hardly changes from one step to the
next. So the next steps are drafted with the guess frozen, the network evaluates all drafted states in one call, and
each step is accepted or replaced by the coupling of the two Gaussians. After De Bortoli et al. 2025 (arXiv:2501.05370)
and Hu et al. 2025 (arXiv:2505.03983), who do it to whole images; a token of 16 numbers has far closer Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.masked_session import MaskedSession
from visar.errors import VisarError
from visar.samplers.gaussian import Gaussian, accepts, replaced
from visar.samplers.masked import MaskedAutoregressive, NoiseBank, residual_trials
from visar.samplers.parameters import option
from visar.samplers.registry import register_sampler

TRIALS = 32  # sampled at once


@register_sampler("mar-headspec", paper="speculation in the head, after arXiv:2501.05370")
@dataclass(frozen=True)
class HeadSpeculation(MaskedAutoregressive):
    """`mar` with up to `draft` head steps in one call of the network.

    With `adaptive` a token's window doubles when all its drafts are accepted, and else shrinks to the accepted ones,
    from one call to the next; without, it always is `draft`.
    """

    draft: int = option(8, "head steps in one call of the network, at most", 1, 64)
    adaptive: bool = option(True, "let the number follow what was accepted")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.draft <= 1000:
            raise VisarError(f"draft must be from 1 to 1000 head steps, not {self.draft}.")

    def sample(self, session: MaskedSession, denoiser: Denoiser, condition: Tensor, bank: NoiseBank) -> Tensor:
        if denoiser.temperature == 0:
            # Without noise there are no densities to compare.
            return denoiser.denoise(condition, bank.start, bank.steps)
        device, total = bank.start.device, len(bank.start)
        uniforms = bank.uniforms()
        out = torch.empty_like(bank.start)
        # Tokens in progress: their number, state, step, the guess that drafts are made with, and the window.
        row = torch.arange(total, device=device)
        x, at, guess = bank.start, torch.zeros_like(row), None
        window = torch.ones_like(row)  # the first guess has to be made before anything can be drafted
        while len(row):
            size = window.minimum(denoiser.steps - at)
            width = int(size.max())
            states, drafts = self._drafted(denoiser, x, at, guess, row, bank, width)
            # One call for all states [r, width, d] that count.
            inside = torch.arange(width, device=device) < size[:, None]
            which, turn = inside.nonzero(as_tuple=True)
            steps = at[which] + turn
            found = denoiser.evaluate(states[which, turn], steps, condition[row[which]])
            kernel = Gaussian(*denoiser.kernel(states[which, turn], steps, found))
            # Every draft but the one after the last state, which is sampled from the target's own step.
            tested = turn < size[which] - 1
            is_accepted = self._tested(states, drafts, kernel, which, turn, steps, tested, uniforms[row])
            passed = inside.new_zeros(len(row), width)
            passed[which[tested], turn[tested]] = is_accepted
            run = passed.int().cumprod(1).sum(1)  # drafts before the first rejection
            session.tested += int((run + 1).minimum(size - 1).sum())
            session.accepted += int(run.sum())
            # Where it ends, in the list of states: `run` states further, and one step from there.
            start = size.cumsum(0) - size
            end = start + run
            own = kernel.at(end)
            fresh = own.sample(bank.steps[row, at + run])
            rejected = (run < size - 1).nonzero()[:, 0]
            if len(rejected):
                fresh[rejected] = self._replacement(states, drafts, own, run, at, bank, row, rejected)
            x, guess = fresh, found[end]
            at = at + run + 1
            window = self._next(window, run, size)
            done = at == denoiser.steps
            out[row[done]] = x[done]
            go = ~done
            row, x, at, guess, window = row[go], x[go], at[go], guess[go], window[go]
        return out

    @staticmethod
    def _drafted(
        denoiser: Denoiser, x: Tensor, at: Tensor, guess: Tensor | None, row: Tensor, bank: NoiseBank, width: int
    ) -> tuple[Tensor, Gaussian]:
        """States [r, width, d] from x on, and the distributions of those after the first, [r, width - 1, d]."""
        if guess is None or width == 1:
            none = x.new_empty(len(x), 0, x.shape[1])
            return x[:, None], Gaussian(none, none)
        # Steps past the end are not read.
        steps = (at[:, None] + torch.arange(width - 1, device=at.device)).clamp(max=denoiser.steps - 1)
        states, mean, std = denoiser.draft(x, steps, guess, bank.steps[row[:, None], steps])
        return torch.cat([x[:, None], states], 1), Gaussian(mean, std)

    def _tested(
        self, states: Tensor, drafts: Gaussian, kernel: Gaussian, which: Tensor, turn: Tensor, steps: Tensor,
        tested: Tensor, uniforms: Tensor,
    ) -> Tensor:  # fmt: skip
        """Whether each of the tested drafts is accepted."""
        rows, turns = which[tested], turn[tested]
        if not len(rows):
            return tested.new_zeros(0)
        gaussian = Gaussian(drafts.mean[rows, turns], drafts.std[rows, turns])
        return accepts(states[rows, turns + 1], kernel.at(tested), gaussian, uniforms[rows, steps[tested]])

    def _replacement(
        self, states: Tensor, drafts: Gaussian, own: Gaussian, run: Tensor, at: Tensor, bank: NoiseBank, row: Tensor,
        rejected: Tensor,
    ) -> Tensor:  # fmt: skip
        """The token that replaces the first rejected draft of these rows."""
        turn = run[rejected]
        gaussian = Gaussian(drafts.mean[rejected, turn], drafts.std[rejected, turn])
        tokens, steps = row[rejected], at[rejected] + turn

        trials = residual_trials(bank.noise.of(tokens), bank.positions[tokens, 0], steps, states.shape[-1], TRIALS)
        return replaced(states[rejected, turn + 1], own.at(rejected), gaussian, trials)

    def _next(self, window: Tensor, run: Tensor, size: Tensor) -> Tensor:
        if not self.adaptive:
            return torch.full_like(window, self.draft)
        return torch.where(run == size - 1, 2 * window, run + 1).clamp(1, self.draft)
