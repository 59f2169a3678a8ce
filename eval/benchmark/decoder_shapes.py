"""Published decoders that run by transformers' own modules, beside the `generate` of transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from visar.engine.guidance import Guidance
from visar.engine.quantization import check
from visar.errors import VisarError
from visar.eval.benchmark.random_decoders import generate, prompt_of, random_decoder, unconditional
from visar.eval.benchmark.shape import Shape
from visar.families.hf.decoder import ImageDecoder
from visar.families.hf.session import TransformersSession
from visar.families.hf.sizes import SIZES, DecoderSize
from visar.host import synchronize

PROMPT = 64  # ids


@dataclass(frozen=True)
class DecoderShape(Shape):
    """A decoder of a `kind` of `random_decoders` and a size, whose layers are `stored` as `visar.engine.quantization`
    has it."""

    name: str
    kind: str
    size: DecoderSize
    guidance: float
    top_k: int
    top_p: float = 1.0
    stored: str = "native"

    stock_tokens: ClassVar[int] = 32

    @property
    def tokens(self) -> int:
        return self.size.tokens

    @property
    def passes(self) -> int:
        return self.size.tokens - self.size.line_ends

    @property
    def vocab(self) -> int:
        return self.size.codes + bool(self.size.line_ends)

    @property
    def weights(self) -> int:
        return self.size.weights

    @property
    def parameters(self) -> int:
        return self.size.parameters

    @property
    def rows(self) -> int:
        return 1 + self.size.guided

    def cache(self, rows: int, slots: int) -> int:
        return self.size.cache(rows, slots)

    def slots(self, window: int) -> int:
        return PROMPT + self.tokens + window

    def numbers(self, batch: int) -> int:
        return self.size.streamed(batch)

    def refused(self, device: torch.device) -> str:
        try:
            check(self.stored, device)
        except VisarError as error:
            return str(error)
        return ""

    def saved(self, dtype: torch.dtype) -> int:
        """Bytes that weights in 8 bits save, with their scales."""
        weights, rows = self.size.matrices
        return 0 if self.stored == "native" else weights * (dtype.itemsize - 1) - rows * 4

    def streamed(self, batch: int, dtype: torch.dtype) -> int:
        return super().streamed(batch, dtype) - self.saved(dtype)

    def needed(self, batch: int, window: int, dtype: torch.dtype, device: torch.device) -> int:
        """With one matrix in `dtype`: it is rounded when it is made, and converted when it is used."""
        copies = 2 if device.type == "cpu" else 1
        whole = 0 if self.stored == "native" else max(self.size.ffn, self.size.dim) * self.size.dim * dtype.itemsize
        return super().needed(batch, window, dtype, device) - copies * self.saved(dtype) + whole

    def make(self, dtype: torch.dtype, device: torch.device) -> ImageDecoder:
        return random_decoder(self.kind, self.size, dtype, device, self.stored)

    def session(self, model: ImageDecoder, batch: int, window: int, prompt: int | None = None) -> TransformersSession:
        ids = prompt_of(batch, prompt or PROMPT, model.device)
        lengths = torch.full((batch,), ids.shape[1])
        condition = (ids, lengths, unconditional(ids), lengths) if self.size.guided else (ids, lengths)
        return TransformersSession(
            model, *condition, length=self.tokens, window=window, guidance=Guidance(self.guidance)
        )  # fmt: skip

    def stock_ms(self, model: ImageDecoder, batch: int, tokens: int) -> float:
        """Of `generate` after the prompt, where its cache is short. The time of one token, with the prompt's, is taken
        off that of one more than `tokens`. Raises `VisarError` where `generate` fails, as Janus's of transformers 5.17.
        """
        ids = prompt_of(batch, PROMPT, model.device)

        def seconds(count: int) -> float:
            synchronize(model.device)
            start = time.perf_counter()
            try:
                generate(self.kind, model, self.size, ids, count, self.guidance, top_k=self.top_k, top_p=self.top_p)
            except (TypeError, ValueError, AttributeError) as error:
                said = f"{self.name}: transformers failed: {type(error).__name__}: {error}"
                raise VisarError(said[:200]) from error
            synchronize(model.device)
            return time.perf_counter() - start

        seconds(2)
        return 1e3 * max(seconds(tokens + 1) - seconds(1), 0.0) / tokens


# Janus-Pro's architecture in a size for a CPU; no such model is published.
SMALL_JANUS = DecoderSize(
    20, 768, 12, 12, 2048, vocab=1024, codes=16384, tokens=576, context=2048, head_dim=64, own_codes=True
)  # fmt: skip

DECODERS = {
    shape.name: shape
    for shape in (
        DecoderShape("Janus-0.15B", "janus", SMALL_JANUS, 5.0, 0),
        DecoderShape("Janus-Pro-1B", "janus", SIZES["janus-pro-1b"], 5.0, 0),
        DecoderShape("Janus-Pro-7B", "janus", SIZES["janus-pro-7b"], 5.0, 0),
        DecoderShape("GLM-Image-1024", "glm", SIZES["glm-image"], 1.0, 0, 0.75),
        DecoderShape("Emu3-720", "emu3", SIZES["emu3-gen"], 3.0, 2048),
        DecoderShape("Emu3.5-1024", "qwen3", SIZES["emu3.5-image"], 5.0, 5120),
        DecoderShape("Emu3.5-1024-int8", "qwen3", SIZES["emu3.5-image"], 5.0, 5120, stored="int8"),
        DecoderShape("Emu3.5-1024-fp8", "qwen3", SIZES["emu3.5-image"], 5.0, 5120, stored="fp8"),
        DecoderShape("Anole-512", "chameleon", SIZES["anole"], 3.0, 0, 0.9),
        DecoderShape("Lumina-7B-768", "chameleon", SIZES["lumina-mgpt-768"], 3.0, 2000),
        DecoderShape("Lumina-7B-1024", "chameleon", SIZES["lumina-mgpt-1024"], 3.0, 2000),
    )
}
