"""Verification of a drafted window as one launch: the rules of `visar.samplers.verification`, which are its reference.

A program has one column of one row. It finds by itself which drafts are accepted before it, for that takes two numbers
of each draft, and then does what its column needs: it accepts the draft, samples from the residual (p - q)+, samples
from p, or uses the exponential noise that all drafts of a position share. So no program waits for another, and a column
that accepts its draft reads next to nothing: only p of the others is read, twice for a sample, q where there is a
residual.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visar.kernels.backend import jit, tl, triton
from visar.kernels.noise import ExponentialNoise, noise_counter
from visar.kernels.sample import gumbel_argmax, inverse_cdf, tiles

Rule = Literal["independent", "maximal", "gumbel"]
MOST = 128  # inputs in a window


def verify_triton(
    rule: Rule,
    p: Tensor,
    q: Tensor,
    drafts: Tensor,
    accept: Tensor,
    sample: Tensor,
    exponential: ExponentialNoise | None,
    equal: float,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, W] of the window after the test, and how many drafts were accepted [B].

    `p` [B, W, V], `q` [B, W-1, V], which may be expanded, `drafts` [B, W-1], uniforms `accept` and `sample` [B, W],
    float64. A residual with less mass than `equal` gives way to p. The rule "gumbel" needs `exponential`.
    """
    batch, window, size = p.shape
    tokens = torch.empty(batch, window, dtype=torch.long, device=p.device)
    accepted = torch.empty(batch, dtype=torch.long, device=p.device)
    if rule == "gumbel":
        assert exponential is not None
        noise, constants = exponential.arguments(), exponential.constants()
    else:  # never read
        noise, constants = (drafts,) * 5 + (0,) * 6, dict(purpose=0, turn_read=False)
    _verify[(batch * window,)](
        tokens, accepted, p, q, drafts, accept, sample, equal, size, window, *p.stride(), *q.stride(), *drafts.stride(),
        *accept.stride(), *sample.stride(), *noise, **constants, rule=rule,
        columns=triton.next_power_of_2(window), **tiles(size),
    )  # fmt: skip
    return tokens, accepted


@jit
def _verify(  # type: ignore[no-untyped-def]
    tokens, accepted, p, q, drafts, accept, sample, equal, size, window, p_row, p_column, p_step, q_row, q_column,
    q_step, draft_row, draft_column, accept_row, accept_column, sample_row, sample_column, key, images, keys, positions,
    passes, image_step, key_step, seed_step, noise_row, noise_column, turn_step, purpose: tl.constexpr, turn_read:
    tl.constexpr, rule: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, own = (program // window).to(tl.int64), (program % window).to(tl.int64)
    p += row * p_row
    q += row * q_row

    # Which drafts are accepted: u q(d) < p(d), as in `accepts`.
    column = tl.arange(0, columns).to(tl.int64)
    is_draft = column < window - 1
    d = tl.load(drafts + row * draft_row + column * draft_column, is_draft, 0)
    u = tl.load(accept + row * accept_row + column * accept_column, is_draft, 0.0)
    own_q = tl.load(q + column * q_column + d * q_step, is_draft, 0.0).to(tl.float64)
    own_p = tl.load(p + column * p_column + d * p_step, is_draft, 0.0).to(tl.float64)
    is_accepted = u * own_q < own_p
    first = tl.min(tl.where(is_draft & ~is_accepted, column, window - 1))  # the first rejected one
    if own == 0:
        tl.store(accepted + row, first)

    if rule == "maximal":
        accepts = tl.max(tl.where(column == own, (is_draft & is_accepted).to(tl.int32), 0)) > 0
        spare = own < window - 1
    else:
        accepts = own < first
        spare = (own == first) & (own < window - 1)
    if accepts:
        tl.store(tokens + program, tl.load(drafts + row * draft_row + own * draft_column))
    else:
        p += own * p_column
        if rule == "gumbel":
            if spare:
                goal = tl.load(sample + row * sample_row + own * sample_column)
                q += own * q_column
                tl.store(tokens + program, inverse_cdf(p, q, p_step, q_step, True, equal, goal, size, True, block))
            else:
                c1, c2, c3, k0, k1 = noise_counter(
                    key, images, keys, positions, passes, image_step, key_step, seed_step, noise_row, noise_column,
                    turn_step, row, own, purpose, turn_read,
                )  # fmt: skip
                tl.store(tokens + program, gumbel_argmax(p, p_step, size, c1, c2, c3, k0, k1, block))
        else:
            goal = tl.load(sample + row * sample_row + own * sample_column)
            q += own * q_column  # of the last column there is none, and none is read
            tl.store(tokens + program, inverse_cdf(p, q, p_step, q_step, spare, equal, goal, size, True, block))
