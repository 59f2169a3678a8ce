"""LlamaGen's published sizes, beside the eager loop that is published with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visar.engine.component import unfilled
from visar.engine.guidance import Guidance
from visar.eval.benchmark.eager_loop import EagerLoop, sample_tokens
from visar.eval.benchmark.shape import Shape
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.specs import MODELS, GPTShape
from visar.host import synchronize


@dataclass(frozen=True)
class LlamaGenShape(Shape):
    """A GPT and the side of its images in tokens."""

    name: str
    gpt: GPTShape
    condition: Literal["class", "text"]
    grid: int
    guidance: float
    top_k: int

    stock_tokens: ClassVar[int] = 8

    @property
    def rows(self) -> int:
        return 2

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def passes(self) -> int:
        return self.tokens

    @property
    def weights(self) -> int:
        return self.gpt.weights

    @property
    def parameters(self) -> int:
        return self.gpt.parameters(self.condition)

    @property
    def vocab(self) -> int:
        return self.gpt.vocab

    def cache(self, rows: int, slots: int) -> int:
        return self.gpt.cache(rows, slots)

    def slots(self, window: int) -> int:
        return self.gpt.condition_length + self.tokens + window

    def numbers(self, batch: int) -> int:
        return self.gpt.streamed(batch, self.tokens)

    def make(self, dtype: torch.dtype, device: torch.device) -> LlamaGen:
        return random_model(self, dtype, device)

    def session(self, model: LlamaGen, batch: int, window: int) -> LlamaGenSession:
        condition, mask = condition_of(self, batch)
        return LlamaGenSession(
            model, condition, mask, length=self.tokens, window=window, grid=self.grid, guidance=Guidance(self.guidance)
        )

    def stock_ms(self, model: LlamaGen, batch: int, tokens: int) -> float:
        """Of the published eager loop, in the middle of an image."""
        condition, mask = condition_of(self, batch)
        loop = EagerLoop(
            model, condition, mask, length=self.tokens, grid=self.grid, guidance=Guidance(self.guidance)
        )  # fmt: skip
        loop.skip_to(self.tokens // 2)
        last = torch.zeros(batch, dtype=torch.long, device=model.device)

        @torch.inference_mode()
        def run(count: int) -> None:
            nonlocal last
            for _ in range(count):
                last = sample_tokens(loop.step(last), 1.0, self.top_k)
            synchronize(model.device)

        run(2)
        start = time.perf_counter()
        run(tokens)
        return 1e3 * (time.perf_counter() - start) / tokens


def published() -> dict[str, LlamaGenShape]:
    """By names such as XL-384. XL-256 and XL-512 are the text model, all others take classes."""
    shapes = {}
    for spec in MODELS.values():
        size = spec.name.rsplit("-", 1)[1].upper()
        for pixels in spec.pixels:
            name, side = f"{size}-{pixels}", pixels // spec.downsample
            shapes[name] = LlamaGenShape(name, spec.shape, spec.condition, side, spec.guidance, spec.top_k)
    return shapes


def random_model(shape: LlamaGenShape, dtype: torch.dtype, device: torch.device) -> LlamaGen:
    """A model of random weights, made in its dtype on its device, without a copy in another."""
    g, before = shape.gpt, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with unfilled():
            model = LlamaGen(
                g.vocab, g.dim, g.layers, g.heads, g.ffn, shape.condition, g.condition_length, g.classes,
                g.caption_features, shape.grid,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for t in (*model.parameters(), *model.buffers()):
        # Spreads of trained models, so that nothing overflows and distributions are neither flat nor certain.
        t.fill_(1.0) if t.ndim == 1 else t.uniform_(-0.035, 0.035, generator=generator)
    return model


def condition_of(shape: LlamaGenShape, batch: int) -> tuple[Tensor, Tensor | None]:
    """Classes, or random caption features of which the last third is no padding, with their mask."""
    g = shape.gpt
    if shape.condition == "class":
        return torch.arange(batch) * 37 % g.classes, None
    mask = torch.zeros(batch, g.condition_length, dtype=torch.bool)
    mask[:, -(-g.condition_length * 2 // 3) :] = True
    features = torch.randn(batch, g.condition_length, g.caption_features, generator=torch.Generator().manual_seed(0))
    return features * mask[..., None], mask
