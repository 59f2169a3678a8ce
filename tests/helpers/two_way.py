"""Tiny random LlamaGens with two-way heads, and sessions over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visar.engine.diagonals import Diagonals
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.families.llamagen.two_way import TwoWayLlamaGen
from visar.families.llamagen.two_way_session import TwoWaySession

GRID = 4
SIZES: dict[str, Any] = dict(vocab_size=24, dim=32, num_layers=3, num_heads=2, ffn=48, grid=GRID)
BRANCH: dict[str, Any] = dict(vertical_layers=2, vertical_start=1, mixing="gate", gate_width=8)
KINDS: dict[str, Any] = {
    "text": dict(condition="text", condition_length=4, caption_features=6),
    "class": dict(condition="class", classes=7),
}
CAPTIONS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(7))
MASK = torch.arange(4) >= torch.tensor([[0], [2], [3]])  # 4, 2 and 1 valid slots
CLASSES = torch.tensor([0, 3, 6])


def gpt(kind: str, head: float = 0.2, **changes: Any) -> TwoWayLlamaGen:
    """Weights that are large enough for every token to matter, and a gate that does not stand still."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = TwoWayLlamaGen(**SIZES | KINDS[kind] | BRANCH | changes).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=head if "output" in name else 1.5 * p.shape[-1] ** -0.5)
            elif name == "hv_mix_logit":
                p.fill_(0.7)
        return model


def inputs(kind: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Conditions of three images, their mask, and tokens [3, N]."""
    tokens = torch.randint(SIZES["vocab_size"], (3, GRID**2), generator=torch.Generator().manual_seed(8))
    return (CAPTIONS, MASK, tokens) if kind == "text" else (CLASSES, None, tokens)


def session(
    model: TwoWayLlamaGen, kind: str, guidance: Guidance = Guidance(), made: type[TwoWaySession] = TwoWaySession,
) -> TwoWaySession:  # fmt: skip
    condition, mask, _ = inputs(kind)
    given = (condition,) if mask is None else (condition, mask)
    return made(model, *given, length=GRID**2, window=GRID, guidance=guidance)


def fed(tokens: Tensor, d: Tensor) -> Tensor:
    """The tokens [B, W] of the diagonals before `d` [B]."""
    cells = Diagonals.of(Layout(GRID, GRID)).cells[(d - 1).clamp_min(0)]
    return torch.nn.functional.pad(tokens, (0, 1)).gather(1, cells)
