"""MAR (Li et al. 2024, arXiv:2406.11838): continuous tokens, sampled in a random order by a diffusion head."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from visar.engine.graphs import RowGraphs
from visar.engine.layout import Layout
from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.families.base import ContinuousFamily, Encoded
from visar.families.mar.autoencoder import KLAutoencoder, downsample, fingerprint, to_latents
from visar.families.mar.drafting import MARTarget
from visar.families.mar.loading import load_kl16, load_mar
from visar.families.mar.session import MARSession
from visar.families.mar.specs import MAR_MODELS, match_mar
from visar.families.mar.transformer import MAR
from visar.families.registry import register_family
from visar.families.source import Source
from visar.families.wrapped import check_component
from visar.params import SamplingParams


@register_family
class MARFamily(ContinuousFamily):
    """`mar` and `vae`, and for a MAR of captions a `text_encoder`.

    `guidance_scale`, `guidance_schedule` ("linear" or "constant") and `temperature` are the defaults of sampling.
    """

    name = "mar"
    required = frozenset({"mar", "vae"})
    optional = frozenset({"text_encoder"})
    setting_names = ("guidance_scale", "guidance_schedule", "temperature")

    def __init__(
        self,
        mar: MAR,
        vae: Any,
        text_encoder: Any = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
    ):
        check_component("mar", mar, MAR)
        check_component("vae", vae, nn.Module)
        vae = KLAutoencoder.of(vae)
        c, text = mar.config, mar.config.condition == "text"
        if guidance_scale is None:
            guidance_scale = 3.0 if text else 2.9
        self.components = {"mar": mar, "vae": vae} | ({"text_encoder": text_encoder} if text else {})
        self.defaults = SamplingParams(
            guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, temperature=temperature
        )
        self.settings = {name: getattr(self.defaults, name) for name in self.setting_names}
        self.condition, self.classes = ("prompt", 0) if text else ("class", c.classes)
        self.layout, self.token_dim = Layout(c.grid, c.grid), c.token_dim
        self._check(text_encoder)

    def _check(self, text_encoder: Any) -> None:
        """Raise `VisarError` if the components do not fit together."""
        c, vae = self.mar.config, self.vae
        if c.token_dim != vae.config.latent_channels:
            raise VisarError(
                f"The model's tokens have {c.token_dim} numbers, but the autoencoder's have "
                f"{vae.config.latent_channels}."
            )
        if self.condition == "class" and text_encoder is not None:
            raise VisarError("This MAR takes classes: it has no use for a text_encoder.")
        if self.condition == "prompt":
            if text_encoder is None:
                raise VisarError("This MAR takes captions: it needs a text_encoder.")
            if (c.buffer, c.caption_features) != (its := (text_encoder.length, text_encoder.width)):
                raise VisarError(
                    f"The text encoder gives captions of {its[0]} slots of {its[1]} features, and the model takes "
                    f"{c.buffer} of {c.caption_features}."
                )
        if c.vae not in ("", fingerprint(vae)):
            raise VisarError("The model was trained on the latents of another autoencoder.")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if source.files:
            return "vae" in source.files
        return "mar" in source.index and "vae" in source.index

    @classmethod
    def load(cls, source: Source) -> Self:
        if source.files:
            found = load_mar(source.files["model"], num_heads=source.num_heads, ema=source.ema is not False)
            c = found.config
            spec = match_mar(c.encoder_layers, c.decoder_layers, c.dim) or MAR_MODELS["mar-b"]
            vae = load_kl16(source.files["vae"])
            return cls(found, vae, guidance_scale=spec.guidance, guidance_schedule=spec.guidance_schedule)
        return cls.of_folder(source, {"mar": MAR, "vae": KLAutoencoder})

    @property
    def mar(self) -> MAR:
        found: MAR = self.components["mar"]
        return found

    @property
    def vae(self) -> KLAutoencoder:
        found: KLAutoencoder = self.components["vae"]
        return found

    def encode(self, conditions: Sequence[Any]) -> Encoded:
        """Caption features [B, buffer, C], or class ids [B]."""
        if self.condition == "prompt":
            self.check_conditions(conditions)
            return (self.components["text_encoder"].encode(list(conditions))[0],)
        self.check_conditions(labels := [label if isinstance(label, str) else index(label) for label in conditions])
        return (torch.tensor(labels),)

    def session(
        self,
        encoded: Encoded,
        order: Tensor,
        *,
        scale: float,
        schedule: str,
        given: Tensor | None = None,
        graphs: RowGraphs | None = None,
        draft: MAR | None = None,
    ) -> MARSession:
        made = MARSession(self.mar, encoded[0], order, scale, schedule, given, graphs)
        made.layout = self.layout
        if draft is not None:
            made.draft = MARSession(draft, encoded[0], order, scale, schedule, given, graphs)
        return made

    @property
    def drafting(self) -> MARTarget:
        return MARTarget(self.mar)

    @property
    def pixels(self) -> tuple[int, int]:
        side = self.layout.rows * downsample(self.vae)
        return side, side

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 16) -> Tensor:
        latents = to_latents(tokens, self.layout.rows) / self.vae.config.scaling_factor
        latents = latents.to(self.vae.device, self.vae.dtype)
        parts = [self.vae.decode(part).float() for part in latents.split(batch)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def bytes_per_image(self, window: int, guided: bool) -> int:
        """A pass keeps some tensors of one block, and the head as many of a row for each token; nothing is cached."""
        c = self.mar.config
        wide = (c.buffer + self.layout.length) * c.dim + self.layout.length * c.head_width
        return (2 if guided else 1) * 16 * 4 * wide

    @property
    def fastest_dtype(self) -> torch.dtype:
        """On a CPU the diffusion head, which is in float32, takes most of the time."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all components; float16 is refused."""
        if torch.float16 in (*args, *kwargs.values()):
            raise VisarError(
                "float16 is refused for a diffusion head: its first steps multiply rounding by hundreds. Use float32, "
                "or bfloat16, with which the head stays in float32."
            )
        return super().to(*args, **kwargs)

    def quantize(self, weights: str) -> None:
        if weights != "native":
            raise VisarError("8-bit weights are for GPTs over image tokens, not for MARs.")

    def bytes_read(self, session: Any) -> int:
        """The transformer's weights for each pass, and the head's for each denoiser call.

        Captions are projected before the first pass, and the head's step embeddings made once for each denoiser.
        """
        total = 0
        for at in (session, session.draft):
            if at is not None:
                head, steps = streamed_bytes(at.mar.diffloss), streamed_bytes(at.mar.diffloss.net.time_embed)
                once = streamed_bytes(at.mar.caption_proj) if at.mar.config.condition == "text" else 0
                total += (streamed_bytes(at.mar) - head - once) * at.passes + steps * len(at.denoisers)
                total += (head - steps) * sum(d.calls for d in at.denoisers)
        return total
