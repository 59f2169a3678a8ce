"""The session over a MAR, with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.graphs import RowGraphs
from visar.engine.masked_session import MaskedSession
from visar.errors import VisarError
from visar.families.mar.denoising import DiffusionDenoiser
from visar.families.mar.diffusion import Schedule
from visar.families.mar.transformer import MAR


class MARSession(MaskedSession):
    """A MAR with classifier-free guidance, whose scale rises with the known tokens ("linear") or not ("constant").

    Linear is the reference's: 1 + (scale - 1) * total / N. `condition` is that of `MAR.slots`.
    """

    def __init__(
        self,
        mar: MAR,
        condition: Tensor,
        order: Tensor,
        scale: float = 1.0,
        guidance: str = "linear",
        given: Tensor | None = None,
        graphs: RowGraphs | None = None,
    ):
        super().__init__(order.to(mar.device), mar.config.token_dim, given)
        if guidance not in ("linear", "constant"):
            raise VisarError(f"The guidance schedule must be linear or constant, not {guidance!r}.")
        self.graphs = graphs
        self.mar, self.scale, self.linear = mar, float(scale), guidance == "linear"
        with torch.no_grad():
            self.slots = mar.slots(condition.to(mar.device))
            self.null = mar.null_slots(1)

    def context(
        self, tokens: Tensor, rows: Tensor, known: Tensor, ask: Tensor, total: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        self.passes += 1
        slots = self.slots[rows]
        if self.scale == 1:
            return self._at(self.mar(tokens, known, slots, valid), ask)

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, x])

        slots = torch.cat([slots, self.null.expand_as(slots)])
        z = self.mar(twice(tokens), twice(known), slots, None if valid is None else twice(valid))
        cond, uncond = self._at(z, twice(ask)).chunk(2)
        share = total / self.length if self.linear else torch.ones_like(total)
        weight = (1 + (self.scale - 1) * share)[..., None].float()
        return torch.cat([cond, uncond, weight], dim=-1)

    @staticmethod
    def _at(z: Tensor, ask: Tensor) -> Tensor:
        return z.gather(1, ask[..., None].expand(-1, -1, z.shape[-1])).float()

    def make_denoiser(self, steps: int, temperature: float, latest: int, last_noise: bool) -> Denoiser:
        head = self.mar.diffloss.net
        return DiffusionDenoiser(
            head, Schedule(steps, latest or self.mar.config.latest), self.dim, temperature, last_noise, self.graphs
        )
