"""Tuning a GPT for Jacobi decoding: it learns to predict through the wrong drafts of a window.

This is CLLM (Kou et al. 2024, arXiv:2403.00835) and Jacobi Forcing (Hu et al. 2025, arXiv:2512.14681) for sampling,
where there is no fixed point: a window that `scd` had while it decoded an image is given, and the model learns the
distribution that its teacher, the GPT as it was, has after the tokens that were committed in the end. Where all drafts
are right so far, and right after the first wrong one, only the second term counts, which holds the model on clean
tokens to its teacher: a draft is a sample, so that nothing says yet that it is wrong. The result is another model than
its teacher, with a distribution of its own.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.drafters import fingerprint
from visar.drafters.base import DrafterTarget
from visar.engine.guidance import Guidance
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.gpt import LlamaGen, attended
from visar.families.llamagen.rotary import turned
from visar.samplers.distribution import Target
from visar.training.drafter import Conditions, Images, same_run
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed
from visar.training.self_generated import Generated

WINDOWS = 16  # of an image in a step, which share a pass over its tokens


class Seen(NamedTuple):
    """Logits of the tokens of images, the conditional rows first: `clean` [rows, N, V] after the tokens before, and
    `drafted` [rows, K, W - 1, V] of the tokens after each draft."""

    clean: Tensor
    drafted: Tensor


def see(target: DrafterTarget, given: tuple[Tensor, ...], guided: bool) -> Seen:
    """One pass of the target's model over images, and over windows of theirs.

    `given` are conditions and their mask [B, T], tokens [B, N], and where there are windows, their starts [B, K] and
    their drafts [B, K, W - 1] (see `Generated`). A window sees the tokens before its start, and itself up to each
    draft, as in a session.
    """
    condition, mask, tokens, *windows = given
    model, prefix, (batch, length) = target.model, mask.shape[1], tokens.shape
    slots = torch.arange(prefix + length - 1, device=tokens.device).expand(batch, -1)
    starts, drafts = windows or (tokens[:, :0], tokens[:, :0, None])
    count, ahead = drafts.shape[1:]
    own = (prefix + starts[..., None] + torch.arange(ahead, device=tokens.device)).flatten(1)
    number = 1 + torch.arange(count, device=tokens.device).repeat_interleave(ahead).expand(batch, -1)
    block = torch.cat([torch.zeros_like(slots), number], 1)  # 0 is no window
    last = torch.cat([slots, (prefix + starts).repeat_interleave(ahead, 1) - 1], 1)  # that is seen of the image
    slots = torch.cat([slots, own], 1)
    inputs = torch.cat([tokens[:, :-1], drafts.flatten(1).clamp_min(0)], 1)
    x = target.embedded(model, condition, F.pad(inputs, (0, 1)), guided)
    q, k = slots[:, :, None], slots[:, None]
    clean = (block == 0)[:, None] & (k <= last[:, :, None])
    seen = clean | (block[:, :, None] == block[:, None]) & (block > 0)[:, None] & (k <= q)
    valid = F.pad(mask.bool(), (0, slots.shape[1] - prefix), value=True)[:, None]
    seen &= valid | torch.eye(slots.shape[1], dtype=torch.bool, device=tokens.device)
    bias = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, -torch.inf)
    halves = len(x) // batch
    bias = bias[:, None].repeat(halves, 1, 1, 1)
    every = target.table(model, prefix)
    table = every[slots.clamp_max(len(every) - 1)].repeat(halves, *[1] * (every.ndim - 1), 1)

    def attend(_: int, qkv: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in turned(qkv, turns))
        return attended(q, k, v, bias.to(q.dtype)).transpose(1, 2)

    logits = model.logits(model.run(x, table, attend)[:, prefix - 1 :])
    return Seen(logits[:, :length], logits[:, length:].unflatten(1, (count, ahead)))


class JacobiLoss(nn.Module):
    """How far a GPT that sees windows is from its teacher, which sees the tokens that they became.

    The loss is KL(p || q) + TV(p, q) of the guided distributions two and more tokens after the first wrong draft, the
    divergence without top-k and the variation with it, for that is 1 minus the rate at which a draft stays; and `hold`
    times KL(p || q) of each half of the guidance on clean tokens. The teacher is frozen and no part of it is saved.
    """

    def __init__(
        self, gpt: LlamaGen, teacher: LlamaGenTarget, guidance: Guidance, sampling: Target, hold: float = 10.0
    ):
        super().__init__()
        self.gpt = gpt
        self.guidance, self.sampling, self.hold = guidance, sampling, hold
        teacher.model.eval().requires_grad_(False)
        self._teacher = lambda: teacher  # no submodule: neither saved nor copied with the GPT

    def forward(self, condition: Tensor, mask: Tensor, tokens: Tensor, starts: Tensor, drafts: Tensor) -> Tensor:
        """`starts` [B, K] of windows of the images, and their `drafts` [B, K, W - 1]."""
        own, teacher, behind, at = self._both(condition, mask, tokens, starts, drafts)
        moved = self.hold * kl(teacher.clean, own.clean).mean()
        if not behind.any():
            return moved + own.drafted.sum() * 0
        q, p = self._rows(own, teacher, behind, at)
        warm = self.sampling.temperature
        far = kl(p / warm, q / warm) + 1 - self._overlap(p, q)
        return far.mean() + moved

    @torch.no_grad()
    def figures(self, *given: Tensor) -> dict[str, tuple[float, float]]:
        """Sums and counts: the `overlap` 1 - TV with the teacher, as sampled, where the first term counts, the same on
        clean tokens, and by how much the cross-entropy of the tokens, in nats, changes."""
        own, teacher, behind, at = self._both(*given)
        q, p = self._rows(own, teacher, behind, at)
        positions = torch.arange(given[2].shape[1], device=q.device).expand(len(given[2]), -1)
        clean = self._overlap(self._guided(teacher.clean, positions), self._guided(own.clean, positions))
        nats = [
            F.cross_entropy(s.clean[: len(given[2])].flatten(0, 1), given[2].flatten(), reduction="sum").item()
            for s in (own, teacher)
        ]
        found = {"overlap": self._overlap(p, q), "clean-overlap": clean}
        each = {name: (float(x.sum()), float(x.numel())) for name, x in found.items()}
        return each | {"cross-entropy-change": (nats[0] - nats[1], float(given[2].numel()))}

    def _both(
        self, condition: Tensor, mask: Tensor, tokens: Tensor, starts: Tensor, drafts: Tensor
    ) -> tuple[Seen, Seen, Tensor, Tensor]:
        """What the GPT sees, what the teacher sees; behind which drafts [B, K, W - 1] the first term counts, and which
        positions [B, K, W - 1] these predict."""
        given, guided = (condition, mask, tokens), self.guidance.active
        teacher = self._teacher()
        with torch.no_grad():
            theirs = see(teacher, given, guided)
        own = see(replace(teacher, model=self.gpt), (*given, starts, drafts), guided)
        length = tokens.shape[1]
        at = starts[..., None] + torch.arange(drafts.shape[-1], device=drafts.device)
        became = tokens.gather(1, at.clamp_max(length - 1).flatten(1)).view_as(drafts)
        wrong = (drafts != became).cumsum(-1).cumsum(-1) > 1  # above 1 from the second draft on that is behind
        return own, theirs, wrong & (drafts >= 0) & (at + 1 < length), at + 1

    def _rows(self, own: Seen, teacher: Seen, behind: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Guided logits [1, n, V] of the GPT and of the teacher behind the drafts `behind`."""
        image, position = behind.nonzero()[:, 0], at[behind]
        halves = [
            [half[behind] for half in own.drafted.chunk(2 if self.guidance.active else 1)],
            [half[image, position] for half in teacher.clean.chunk(2 if self.guidance.active else 1)],
        ]
        q, p = (torch.cat([half[None] for half in both]) for both in halves)
        return self._guided(q, position[None]), self._guided(p, position[None])

    def _guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        if not self.guidance.active:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, positions)

    def _overlap(self, p: Tensor, q: Tensor) -> Tensor:
        """1 - TV of the distributions sampled from, for guided logits of both, [B, n]."""
        at = torch.zeros(p.shape[:2], dtype=torch.long, device=p.device)
        return torch.minimum(self.sampling.probs(p, at), self.sampling.probs(q, at)).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) in nats, for logits [..., V]."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def some_windows(drafts: Tensor, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The starts [B, K] and drafts [B, K, W - 1] of up to `count` random windows of each image; -1 where it has fewer.

    `drafts` [B, N, W - 1] are those of `Generated`.
    """
    there = drafts[..., 0] >= 0
    starts = (torch.rand(there.shape, generator=g) + there).topk(min(count, there.shape[1]), 1).indices
    return starts, drafts[torch.arange(len(drafts))[:, None], starts]


def tune_jacobi(
    teacher: LlamaGenTarget,
    conditions: Conditions,
    images: Generated,
    config: TrainConfig,
    guidance: Guidance,
    sampling: Target,
    *,
    start: LlamaGen | None = None,
    hold: float = 10.0,
    held: float = 0.05,
) -> LlamaGen:
    """Tune a copy of the teacher, or `start`, on windows of images; saves `gpt/` in `config.out`; returns the EMA.

    `hold` is the weight of clean tokens, by default that of CLLM and Jacobi Forcing.
    The last `held` of the images are held out; the log has the `figures` of `JacobiLoss` on them, and as
    "overlap-before" what the windows were worth to the model that began. Raises `VisarError` for fewer than two images.
    """
    check_parts(config.out, STATE, "gpt")
    made = Images(conditions, images.tokens, config, held)
    rank, _, device = distributed(config.device)
    own = copy.deepcopy(teacher.model if start is None else start).float().train()
    if rank == 0:
        marks = {"teacher": fingerprint(teacher.model), "start": fingerprint(own)}
        same_run(marks | {"window": images.drafts.shape[-1] + 1, "hold": hold}, config.out, "jacobi.json")
    teacher.model.to(device)
    loss = JacobiLoss(own.requires_grad_(True), teacher, guidance, sampling, hold).to(device)

    def rows_of(rows: list[int], seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return *made.of(rows), *some_windows(images.drafts[rows], WINDOWS, g)

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        seed = step_seed(config.seed, step, rank)
        rng = random.Random(seed)
        return rows_of([rng.randrange(made.split) for _ in range(config.batch)], seed)

    def figures(ema: JacobiLoss) -> dict[str, float]:
        rows, sums = list(range(made.split, len(images.tokens)))[:64], dict[str, list[float]]()
        for first in range(0, len(rows), config.batch):
            part = [t.to(device) for t in rows_of(rows[first : first + config.batch], first)]
            for name, pair in ema.figures(*part).items():
                sums[name] = [a + b for a, b in zip(sums.get(name, [0.0, 0.0]), pair, strict=True)]
        return {name: round(total / max(n, 1), 4) for name, (total, n) in sums.items()}

    before = {"overlap-before": figures(loss)["overlap"]}

    def evaluate(ema: JacobiLoss) -> dict[str, float]:
        if rank == 0:
            ema.gpt.save_pretrained(config.out / "gpt")
        return figures(ema) | before

    return fit(loss, batch_at, config, evaluate).gpt
