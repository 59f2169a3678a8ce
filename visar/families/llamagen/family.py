"""LlamaGen (Sun et al. 2024, arXiv:2406.06525): a GPT over the codes of a VQ tokenizer, from a class or a caption."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.memory import decoding_bytes, streamed_bytes
from visar.engine.quantization import NOT_SAVED, quantize_once, weights_of
from visar.errors import VisarError
from visar.families.base import DiscreteFamily, Encoded
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import class_of, load_gpt, load_vq
from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.lpd_session import LPDSession
from visar.families.llamagen.preview import CodePreview
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.randar_session import RandARSession
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.specs import LPDS, MODELS, RANDARS
from visar.families.llamagen.two_way import TwoWayLlamaGen
from visar.families.llamagen.two_way_session import TwoWaySession
from visar.families.llamagen.vq import VQModel
from visar.families.registry import register_family
from visar.families.source import Source, check_condition
from visar.families.weights import has_ema
from visar.families.wrapped import check_component
from visar.kernels.derived import Derived
from visar.params import SamplingParams
from visar.reading import Side
from visar.text_encoders.t5 import FLAN_T5_XL, T5CaptionEncoder

SESSIONS: dict[type[LlamaGen], type[LlamaGenSession]] = {
    TwoWayLlamaGen: TwoWaySession, RandAR: RandARSession, LPD: LPDSession, LlamaGen: LlamaGenSession,
}  # fmt: skip
SCANS = {kind.__name__: kind.scan for kind in SESSIONS}


@register_family
class LlamaGenFamily(DiscreteFamily):
    """`gpt` and `vq`, and with a text-conditional GPT a `text_encoder`. Its `gpt` may be any class of `SESSIONS`.

    `grid` is the number of tokens along one side of the square images, by default the GPT's own; `guidance_scale` and
    `top_k` are the defaults of sampling.
    """

    name = "llamagen"
    required = frozenset({"gpt", "vq"})
    optional = frozenset({"text_encoder"})
    setting_names = ("grid", "guidance_scale", "top_k")

    def __init__(
        self,
        gpt: LlamaGen,
        vq: VQModel,
        text_encoder: Any = None,
        grid: Side | None = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
    ):
        check_component("gpt", gpt, LlamaGen)
        check_component("vq", vq, VQModel)
        text = gpt.config.condition == "text"
        if text and text_encoder is None:
            raise VisarError("This GPT takes captions: it needs a text_encoder.")
        if not text and text_encoder is not None:
            raise VisarError("This GPT takes classes: it has no use for a text_encoder.")
        if text:
            own = (gpt.config.condition_length, gpt.config.caption_features)
            if (its := (text_encoder.length, text_encoder.width)) != own:
                raise VisarError(
                    f"The text encoder gives captions of {its[0]} slots of {its[1]} features, and the GPT takes "
                    f"{own[0]} of {own[1]}."
                )
        self.components = {"gpt": gpt, "vq": vq} | ({"text_encoder": text_encoder} if text else {})
        self.scan = gpt.scan
        lpd = isinstance(gpt, LPD)
        any_order = LPDS["lpd-l"] if lpd else RANDARS["randar-l"]
        usual = any_order if self.scan == "any" else MODELS["llamagen-t2i-xl" if text else "llamagen-l"]
        scale = usual.guidance if guidance_scale is None else guidance_scale
        top_k = usual.top_k if top_k is None else top_k
        self.defaults = d = SamplingParams(
            guidance_scale=scale,
            guidance_interval=-1,
            guidance_schedule="linear" if self.scan == "any" else "constant",
            temperature=1.0,
            top_k=top_k,
            top_p=1.0,
            order=("locality" if lpd else "random") if self.scan == "any" else None,
        )
        self.settings = {"grid": grid, "guidance_scale": d.guidance_scale, "top_k": d.top_k}
        self.condition = "prompt" if text else "class"
        self.classes = 0 if text else gpt.config.classes
        side = grid or gpt.config.grid
        self._colours: Derived[CodePreview] = Derived()
        self.layout = Layout(side, side)

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if source.files:
            return "vq" in source.files
        return "gpt" in source.index and "vq" in source.index

    @classmethod
    def scan_at(cls, source: Source) -> str:
        if source.files:
            return class_of(source.files["model"]).scan
        named = source.index.get("gpt")
        return SCANS.get(named[-1], "raster") if isinstance(named, list) and named else "raster"

    @classmethod
    def load(cls, source: Source) -> Self:
        if source.files:
            return cls._published(source)
        return cls.of_folder(source, {"gpt": LlamaGen, "vq": VQModel})

    @classmethod
    def _published(cls, source: Source) -> Self:
        file, ema = source.files["vq"], bool(source.ema)
        vq = load_vq(file, ema=ema and has_ema(file))
        side, pixels = vq.sizes.downsample, source.size and source.size[0]
        if pixels is not None and (pixels < side or pixels % side):
            raise VisarError(f"image_size must be a multiple of {side} pixels, not {pixels}.")
        file = source.files["model"]
        grid = None if pixels is None else pixels // side
        gpt = load_gpt(file, grid=grid, num_heads=source.num_heads, ema=ema)
        c = gpt.config
        check_condition(source.name, "class" if c.condition == "class" else "prompt", source.condition)
        if c.condition == "class":
            if source.text_encoder is not None:
                raise VisarError(f"{file} is a class-conditional model, which takes no text encoder.")
            return cls(gpt, vq)
        encoder = T5CaptionEncoder.from_pretrained(source.text_encoder or FLAN_T5_XL, length=c.condition_length)
        return cls(gpt, vq, encoder)

    @property
    def gpt(self) -> LlamaGen:
        found: LlamaGen = self.components["gpt"]
        return found

    @property
    def vq(self) -> VQModel:
        found: VQModel = self.components["vq"]
        return found

    def encode(self, conditions: Sequence[Any]) -> Encoded:
        """Caption features [B, T, C] and their mask [B, T], or class ids [B]; in any order with the raster's."""
        found = self._encoded(conditions)
        if self.scan != "any":
            return found
        return *found, torch.arange(self.layout.length).expand(len(found[0]), -1)

    def _encoded(self, conditions: Sequence[Any]) -> Encoded:
        if self.condition == "prompt":
            self.check_conditions(conditions)
            features, mask = self.components["text_encoder"].encode(list(conditions))
            return features, mask
        self.check_conditions(labels := [label if isinstance(label, str) else index(label) for label in conditions])
        return (torch.tensor(labels),)

    def session(
        self, encoded: Encoded, *, window: int, guidance: Guidance, aux_layers: Collection[int] | None = None
    ) -> LlamaGenSession:
        return self._session(
            self.gpt, *encoded, length=self.layout.length, window=window, grid=self.layout.rows, guidance=guidance,
            aux_layers=aux_layers,
        )  # fmt: skip

    @property
    def _session(self) -> type[LlamaGenSession]:
        return next(made for kind, made in SESSIONS.items() if isinstance(self.gpt, kind))

    @property
    def drafting(self) -> LlamaGenTarget | None:
        return LlamaGenTarget(self.gpt, self.layout.rows) if self.scan == "raster" else None

    @property
    def codebook(self) -> Tensor:
        return self.vq.quantize.codes

    @property
    def pixels(self) -> tuple[int, int]:
        side = self.layout.rows * self.vq.sizes.downsample
        return side, side

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        parts = [self.vq.decode(part.to(self.vq.device), self.layout.rows).float() for part in tokens.split(batch)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def preview(self, tokens: Tensor) -> Tensor:
        vq = self.vq
        colours = self._colours.of([*vq.parameters(), *vq.buffers()], lambda: CodePreview.fit(vq))
        return colours(tokens, self.layout.rows)

    @property
    def bytes_per_pass(self) -> int:
        # The condition is embedded only once.
        return streamed_bytes(*(part for name, part in self.gpt.named_children() if name != "cls_embedding"))

    def bytes_per_image(self, window: int, guided: bool) -> int:
        each = self._session.per_token
        slots = min(self.gpt.config.condition_length, 2) + each * (self.layout.length + window)
        return decoding_bytes(self.gpt, 2 if guided else 1, slots, window)

    @property
    def weights(self) -> str:
        return weights_of(self.gpt)

    def quantize(self, weights: str) -> None:
        quantize_once(self.gpt, weights)

    def check_saving(self) -> None:
        if self.weights != "native":
            raise VisarError(NOT_SAVED)
