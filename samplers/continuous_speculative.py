"""Continuous speculative decoding (CSpD, Wang et al. 2024, arXiv:2411.11925): a smaller MAR drafts tokens for a larger.

Both denoise with the same noise, and a draft is judged by the last step alone: P and Q are the two models'
distributions of the token given their own second-last states. `cspd-exact` is that idea done exactly: given the shared
noise, accepting y from Q with probability min(1, P(y) / Q(y)) gives P, whatever the states were, and P averaged over
the noise is the target's distribution. It needs a last step with noise, a target that is given the drafts before the
one it judges, and an end at the first rejection. `cspd` is the published rule, which multiplies the ratio by the
quotient of the other steps' standard deviations, with the released code's one pass that judges all drafts and is given
none of them; either moves the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise, Purpose
from visar.errors import VisarError
from visar.samplers.gaussian import Gaussian, accepts, replaced, residual
from visar.samplers.masked import ContinuousTarget, MaskedState, NoiseBank, checked_latest, residual_trials
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler

TRIALS = 64


def last_step(denoiser: Denoiser, condition: Tensor, start: Tensor, normals: Tensor) -> tuple[Gaussian, Tensor]:
    """The distribution of the last step [R, d] after the others, and the log of those others' standard deviations'
    product [R].

    `start` [R, d]; `normals` [R, T, d], of which the last are not used.
    """
    x, spread = start, start.new_zeros(len(start), dtype=torch.float64)
    for i in range(denoiser.steps):
        step = torch.full((len(x),), i, device=x.device)
        gaussian = Gaussian(*denoiser.kernel(x, step, denoiser.evaluate(x, step, condition)))
        if i < denoiser.steps - 1:
            x = gaussian.sample(normals[:, i])
            spread = spread + gaussian.std.double().log().sum(-1)
    return gaussian, spread


@register_sampler("cspd-exact", paper="CSpD made exact", drafter="draft", factor=False, nested=True, prefill=0.0)
@register_sampler("cspd", paper="CSpD, Wang et al. 2024, arXiv:2411.11925", exact=False, drafter="draft")
@dataclass(frozen=True)
class ContinuousSpeculative(Registered):
    """Drafts of `gamma` tokens, one token in each pass of the draft model, after a share `prefill` by the target alone.

    `factor` multiplies ratios as published; `nested` judges each draft given those before it, in `gamma` rows
    of one pass; `truncate` ends at the first rejection. Exact with nested and truncate and without factor: then the
    distribution is that of `mar` with as many passes as tokens and `last_noise`.
    """

    gamma: int = option(8, "tokens that the draft model samples before a test", 1, 64)
    head_steps: int = option(100, "steps of the diffusion head", 2, 1000)
    latest: int = option(0, "the noisiest training step that is used; 0 for the model's own", 0, 999)
    prefill: float = option(0.05, "the share of tokens that the target samples alone first", 0, 1)
    factor: bool = True
    nested: bool = False
    truncate: bool = True
    tokens: ClassVar[str] = "continuous"
    window: ClassVar[int] = 2**16
    needs_draft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 1:
            raise VisarError(f"gamma must be 1 or more, not {self.gamma}.")
        if not 0 <= self.prefill <= 1:
            raise VisarError(f"prefill must be a share from 0 to 1, not {self.prefill}.")
        if not 2 <= self.head_steps <= 1000:
            raise VisarError(f"head_steps must be from 2 to 1000, not {self.head_steps}.")
        checked_latest(self.latest)

    @property
    def exact(self) -> bool:
        return self.nested and self.truncate and not self.factor

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState:
        if session.draft is None:
            raise VisarError(f"Sampler {self.name!r} needs a draft model.")
        if target.temperature == 0:
            raise VisarError(f"Sampler {self.name!r} compares densities, and at temperature 0 there are none.")
        shape = (session.batch, session.length)
        denoiser = session.denoiser(self.head_steps, target.temperature, self.latest, last_noise=True)
        if not denoiser.last_noise:
            raise VisarError(f"Sampler {self.name!r} compares densities, and this head's last step has no noise.")
        return MaskedState(
            target,
            noise,
            session.start.clone(),
            torch.full(shape, -1, dtype=torch.long, device=session.device),
            denoiser,
            session.draft.denoiser(self.head_steps, target.temperature, self.latest, last_noise=True),
        )

    def step(self, session: MaskedSession, state: MaskedState) -> None:
        free = session.length - session.given
        if state.passes < round(self.prefill * free):
            self._alone(session, state)
        else:
            self._speculate(session, state)
        state.passes += 1

    def _alone(self, session: MaskedSession, state: MaskedState) -> None:
        """One token of every row from the target."""
        ask = session.order.gather(1, session.lengths[:, None])
        rows = torch.arange(session.batch, device=session.device)
        condition = session.after(state.tokens, rows, session.lengths, ask, 1 + session.lengths[:, None])
        bank = NoiseBank.sample(state.noise, rows, ask.flatten(), state.denoiser)
        state.write(ask, state.denoiser.denoise(condition[:, 0], bank.start, bank.steps)[:, None])
        session.commit(1)

    def _speculate(self, session: MaskedSession, state: MaskedState) -> None:
        assert session.draft is not None and state.draft_denoiser is not None
        b, n, gamma = session.batch, session.length, self.gamma
        device, turn = session.device, state.passes
        rows = torch.arange(b, device=device)
        at = session.lengths[:, None] + torch.arange(gamma, device=device)
        inside = at < n
        ask = session.order.gather(1, at.clamp(max=n - 1))
        bank = NoiseBank.sample(state.noise, rows.repeat_interleave(gamma), ask.flatten(), state.denoiser)
        start, normals = (t.unflatten(0, (b, gamma)) for t in (bank.start, bank.steps))
        fresh = state.noise.normals(Purpose.DRAFT, ask, turn, session.dim)
        # The draft model, token by token.
        canvas, canvases, gaussians, spreads = state.tokens, [], [], []
        with session.drafting():
            for j in range(gamma):
                canvases.append(canvas)
                have = (session.lengths + j).clamp(max=n - 1)
                position = ask[:, j : j + 1]
                told = session.draft.after(canvas, rows, have, position, 1 + have[:, None])
                gaussian, spread = last_step(state.draft_denoiser, told[:, 0], start[:, j], normals[:, j])
                gaussians.append(gaussian)
                spreads.append(spread)
                sampled = gaussian.sample(fresh[:, j])[:, None]
                written = canvas.scatter(1, position[..., None].expand_as(sampled), sampled)
                canvas = torch.where(inside[:, j, None, None], written, canvas)
        drafts = canvas.gather(1, ask[..., None].expand(-1, -1, session.dim))
        q = Gaussian(*(torch.stack([gaussian[i] for gaussian in gaussians], 1) for i in (0, 1)))
        # The target, in one pass.
        have = at.clamp(max=n - 1)
        if self.nested:
            told = session.after(
                torch.stack(canvases, 1).flatten(0, 1),
                rows.repeat_interleave(gamma),
                have.flatten(),
                ask.flatten()[:, None],
                1 + have.flatten()[:, None],
            ).flatten(0, 1)
        else:
            told = session.after(state.tokens, rows, session.lengths, ask, 1 + have).flatten(0, 1)
        flat, spread = last_step(state.denoiser, told, bank.start, bank.steps)
        p = Gaussian(*(t.unflatten(0, (b, gamma)) for t in flat))
        log_factor = torch.stack(spreads, 1) - spread.unflatten(0, (b, gamma)) if self.factor else None
        uniforms = state.noise.uniforms(Purpose.STEP, ask, turn)[0]
        is_accepted = self._accepts(drafts, p, q, log_factor, uniforms) & inside
        run = is_accepted.int().cumprod(1).sum(1)
        room = inside.sum(1)
        first = torch.arange(gamma, device=device) == run[:, None]
        wrong = (first if self.truncate else ~is_accepted) & inside
        if bool(wrong.any()):
            drafts[wrong] = self._replacement(drafts, p, q, log_factor, wrong, ask, state, turn)
        count = (run + 1).minimum(room) if self.truncate else room
        session.tested += int(count.sum())
        session.accepted += int((run if self.truncate else is_accepted.sum(1)).sum())
        now = torch.arange(gamma, device=device) < count[:, None]
        old = state.tokens.gather(1, ask[..., None].expand_as(drafts))
        for j in range(gamma):  # one by one: positions past the end repeat the last
            position, committed = ask[:, j : j + 1], now[:, j : j + 1]
            token = torch.where(committed[..., None], drafts[:, j : j + 1], old[:, j : j + 1])
            state.tokens = torch.where(
                committed[..., None], state.tokens.scatter(1, position[..., None].expand_as(token), token), state.tokens
            )
            state.commit_pass = torch.where(committed, state.commit_pass.scatter(1, position, turn), state.commit_pass)
        session.commit(count)

    def _accepts(self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, uniforms: Tensor) -> Tensor:
        """Which drafts [B, gamma] are accepted."""
        return accepts(drafts, p, q, uniforms, 0.0 if log_factor is None else log_factor)

    def _replacement(
        self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, wrong: Tensor, ask: Tensor,
        state: MaskedState, turn: int,
    ) -> Tensor:  # fmt: skip
        """The tokens [R, d] that replace the rejected drafts, which `wrong` [B, gamma] marks."""
        which = wrong.nonzero()[:, 0]

        positions = ask[wrong]
        turns = torch.full_like(positions, turn)
        trials = residual_trials(state.noise.of(which), positions, turns, drafts.shape[-1], TRIALS)
        one, other = p.at(wrong), q.at(wrong)  # type: ignore[arg-type]
        if log_factor is None:
            return replaced(drafts[wrong], one, other, trials)
        return residual(one, other, trials, log_factor[wrong])
