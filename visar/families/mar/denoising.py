"""The denoising steps of MAR's diffusion head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.graphs import RowGraphs
from visar.errors import VisarError
from visar.families.mar.diffusion import HeadNet, Schedule
from visar.kernels.derived import fingerprint


class DiffusionDenoiser(Denoiser):
    """MAR's head (Li et al. 2024, arXiv:2406.11838). The guess is the clean token and the variance's interpolation.

    `temperature` multiplies the standard deviation of every step. The published sampler adds no noise in the last step;
    with `last_noise` it adds that of its schedule, which rules that compare densities of tokens need. Conditions are
    [R, C], or [R, 2 C + 1] with guidance: conditional vector, unconditional vector, scale. Guidance applies to the
    noise; the variance is that of the conditional batch.

    With `graphs`, `denoise` is one CUDA graph, and so is `evaluate`. Raises `VisarError` unless the net is in float32.
    """

    def __init__(
        self,
        net: HeadNet,
        schedule: Schedule,
        dim: int,
        temperature: float = 1.0,
        last_noise: bool = False,
        graphs: RowGraphs | None = None,
    ):
        super().__init__(schedule.steps, dim, temperature, last_noise)
        parameter = next(net.parameters())
        if parameter.dtype != torch.float32:
            name = str(parameter.dtype).removeprefix("torch.")
            raise VisarError(f"The diffusion head must be in float32, not {name}: its first steps multiply rounding.")
        device = parameter.device
        self.net, self.schedule, self.width = net, schedule, net.cond_embed.in_features
        s = schedule
        rows = (s.root.reciprocal(), s.spread, s.from_clean, s.from_noisy, s.log_least, s.log_most - s.log_least)
        self.table = torch.stack(rows).float().to(device)[..., None]
        # The log of a state's share that is left after the first k steps; the last step leaves nothing.
        left = s.from_noisy.clamp_min(1e-30).log().cumsum(0)
        self.left = torch.cat([torch.zeros(1, dtype=torch.float64), left]).to(device)
        self.times = s.times.to(device)
        with torch.no_grad():
            self.embedded = net.time_embed(self.times)
        self.factor = torch.full((s.steps, 1), float(temperature), device=device)
        if not last_noise:
            self.factor[-1] = 0
        self.graphs = graphs
        # Denoisers with equal settings and weights have equal tables, so they share graphs. Graphs read weights where
        # they were, and the embeddings that were made of them.
        places = tuple((p.data_ptr(), p.dtype, p.stride()) for p in net.parameters())
        embedded = None if graphs is None else fingerprint(self.embedded)
        self._key = (places, embedded, s.steps, int(s.times[0]), self.temperature, last_noise)

    def captured(self, what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function if self.graphs is None else self.graphs.of((what, *self._key), function)

    def guess(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        time, c = self.embedded[step], self.width
        if condition.shape[-1] == c:
            noise, interpolation = self.net.at(x, time, condition)
        else:
            both = torch.cat([condition[:, :c], condition[:, c : 2 * c]])
            noises, interpolations = self.net.at(x.repeat(2, 1), torch.cat([time, time]), both)
            cond, uncond = noises.chunk(2)
            noise, interpolation = uncond + condition[:, -1:] * (cond - uncond), interpolations[: len(x)]
        inverse_root, spread = self.table[:2, step]
        return torch.cat([x * inverse_root - noise * spread, interpolation], dim=-1)

    def kernel(self, x: Tensor, step: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
        clean, interpolation = guess.chunk(2, dim=-1)
        _, _, from_clean, from_noisy, least, range_ = self.table[:, step]
        std = (0.5 * (least + 0.5 * (interpolation + 1) * range_)).exp() * self.factor[step]
        return from_clean * clean + from_noisy * x, std

    def draft(self, x: Tensor, steps: Tensor, guess: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Denoiser.draft`, in closed form: under one guess the steps are affine in state and noise."""
        clean, interpolation = (g[:, None] for g in guess.chunk(2, dim=-1))
        _, _, from_clean, from_noisy, least, range_ = self.table[:, steps]
        std = (0.5 * (least + 0.5 * (interpolation + 1) * range_)).exp() * self.factor[steps]
        toward = from_clean * clean
        after = self.left[steps + 1]
        # [R, n, n]: the share that is left of an earlier state.
        later = (after[:, :, None] - after[:, None]).tril().exp().tril().to(x)
        first = (after - self.left[steps[:, :1]]).exp().to(x)[..., None]
        states = first * x[:, None] + later @ (toward + std * normals)
        before = torch.cat([x[:, None], states[:, :-1]], dim=1)
        return states, toward + from_noisy * before, std
