"""Pipelines of masked models: a MAR over continuous tokens and the autoencoder that turns them into pixels.

They stand behind the same two fronts as the GPT's: `TextToImagePipeline` and `ClassToImagePipeline`, whose loaders
return one of these where a folder or a file holds one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from typing_extensions import Self

from visar.engine.graphs import RowGraphs
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise, Purpose
from visar.errors import VisarError
from visar.families.llamagen.loading import load_part, quiet_conversion
from visar.families.mar.autoencoder import downsample, fingerprint, to_latents
from visar.families.mar.loading import load_mar
from visar.families.mar.session import MARSession
from visar.families.mar.transformer import MAR
from visar.families.specs import resolve_model
from visar.pipelines.base import ImageOutput, ImagePipeline, checked_output
from visar.pipelines.class_to_image import ClassToImagePipeline
from visar.pipelines.progress import StepCallback
from visar.pipelines.rows import noise_of
from visar.pipelines.text_to_image import TextToImagePipeline
from visar.samplers import DEFAULTS, AnySampler, ContinuousTarget, MaskedSampler, get_sampler, values_of
from visar.stats import MaskedStats
from visar.text_encoders.t5 import T5CaptionEncoder
from visar.text_encoders.words import WordEncoder


def load_draft(path: str | Path) -> MAR:
    """A MAR from a published checkpoint file, its own folder, or that of a pipeline. Raises `VisarError`."""
    file = Path(path).expanduser()
    if file.is_file():
        return load_mar(file)
    folder = resolve_model(path)
    if isinstance(folder, str):
        raise VisarError(f"There is no model folder {path}.")
    folder = folder / "mar" if (folder / "mar").is_dir() else folder
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise VisarError(f"{path} holds no MAR: it has no readable config.json.") from error
    if kind != "MAR":
        raise VisarError(f"{path} holds a {kind}, not a MAR.")
    return load_part(MAR, folder, "the draft model")


def _default_sampler(free: int) -> MaskedSampler:
    """The default of the table, with no more passes than there are tokens to draw."""
    made = get_sampler(DEFAULTS["continuous"])
    return get_sampler(made, steps=min(made.steps, free))


def decision_orders(noise: Noise, length: int, given: Tensor | None) -> Tensor:
    """The order [B, N] in which each image's places are decided: at random, those marked in `given` [N] first."""
    places = torch.arange(length, device=noise.images.device)
    chances = noise.uniforms(Purpose.ORDER, places.expand(len(noise.images), -1), 0)[0]
    return (chances if given is None else chances - given.double()).argsort(1)


def _caption_shape(encoder: Any) -> tuple[int, int]:
    """The slots and features of a text encoder's captions."""
    if isinstance(encoder, WordEncoder):
        return encoder.length, encoder.table.shape[1]
    return encoder.length, encoder.encoder.config.d_model


class MaskedPipeline(ImagePipeline):
    """What the two share: `mar`, `vae`, and a smaller MAR for samplers that draft with one."""

    mar: MAR
    vae: AutoencoderKL
    token_kind = "continuous"
    _draft: MAR | None = None

    @property
    def model(self) -> MAR:
        return self.mar

    @property
    def grid(self) -> int:
        return self.mar.config.grid

    @property
    def pixels(self) -> int:
        return self.grid * downsample(self.vae)

    def check(self) -> None:
        """Raise `VisarError` where the model and the autoencoder do not belong together."""
        if self.mar.config.token_dim != self.vae.config.latent_channels:
            raise VisarError(
                f"The model draws tokens of {self.mar.config.token_dim} numbers, but the autoencoder's have "
                f"{self.vae.config.latent_channels}."
            )
        c = self.mar.config
        wanted = "class" if isinstance(self, ClassToImagePipeline) else "text"
        if c.condition != wanted:
            raise VisarError(f"The model draws from a {c.condition}, and this pipeline from a {wanted}.")
        if wanted == "text" and (c.buffer, c.caption_features) != (its := _caption_shape(self.text_encoder)):
            raise VisarError(
                f"The text encoder gives captions of {its[0]} slots of {its[1]} features, and the model takes "
                f"{c.buffer} of {c.caption_features}."
            )
        if self.mar.config.vae not in ("", fingerprint(self.vae)):
            raise VisarError("The model was trained on the latents of another autoencoder.")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all parts; float16 is refused."""
        if torch.float16 in (*args, *kwargs.values()):
            raise VisarError(
                "float16 is refused for a diffusion head: its first steps multiply rounding by hundreds. Use float32, "
                "or bfloat16, with which the head stays in float32."
            )
        super().to(*args, **kwargs)
        if self._draft is not None:
            with quiet_conversion():
                self._draft.to(self.mar.device, self.mar.dtype)
        return self

    @torch.inference_mode()
    def decode_tokens(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for tokens [B, grid**2, d]."""
        latents = to_latents(tokens, self.grid) / self.vae.config.scaling_factor
        latents = latents.to(self.vae.device, self.vae.dtype)
        parts = [self.vae.decode(part).sample.float() for part in latents.split(batch)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def load_drafter(self, path: str | Path) -> None:
        """Give the model a smaller one that drafts for it. Raises `VisarError` where the two do not belong together."""
        draft = load_draft(path)
        own, its = self.mar.config, draft.config
        for what, field in (("token grid", "grid"), ("token size", "token_dim"), ("kind of condition", "condition")):
            if own[field] != its[field]:
                raise VisarError(f"The draft model {path} has another {what}: {its[field]}, not {own[field]}.")
        if own.vae and its.vae and own.vae != its.vae:
            raise VisarError(f"The draft model {path} was trained on the latents of another autoencoder.")
        for field in ("classes",) if own.condition == "class" else ("buffer", "caption_features"):
            if own[field] != its[field]:
                raise VisarError(
                    f"The draft model {path} takes other conditions: {field} {its[field]}, not {own[field]}."
                )
        if own.latest != its.latest:
            raise VisarError(f"The head of the draft model {path} begins at step {its.latest}, not at {own.latest}.")
        with quiet_conversion():
            self._draft = draft.to(self.mar.device, self.mar.dtype).eval()

    @property
    def _row_graphs(self) -> RowGraphs | None:
        """Those of the diffusion head, kept between calls; elsewhere than on CUDA none."""
        if "_head_graphs" not in vars(self) and self.mar.device.type == "cuda":
            self._head_graphs = RowGraphs()
        return vars(self).get("_head_graphs")

    @property
    def fastest_dtype(self) -> torch.dtype:
        """As of other pipelines; on a CPU the diffusion head, which is in float32, takes most of the time."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def stored_parts(self) -> dict[str, Any]:
        self._find_draft()
        return super().stored_parts() | ({} if self._draft is None else {"draft": self._draft})

    def _find_draft(self) -> None:
        """Load the draft model that lies beside the model, if one does and none was loaded."""
        if self._draft is None and (folder := self._beside("draft")) is not None:
            self.load_drafter(folder)

    def _has_drafter(self, kind: str) -> bool:
        return self._draft is not None or self._beside(kind) is not None

    def _draft_for(self, name: str) -> MAR:
        self._find_draft()
        if self._draft is None:
            raise VisarError(f"Sampler {name!r} needs a smaller MAR; give it with load_drafter, or --drafter PATH.")
        return self._draft

    @torch.inference_mode()
    def _generate(
        self,
        condition: Tensor,
        mask: Tensor | None,
        keys: Sequence[Hashable],
        *,
        sampler: str | AnySampler | None,
        window: int | None,
        guidance_scale: float | None,
        guidance_interval: int,
        guidance_schedule: str | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float,
        seed: int,
        first_image: int | Sequence[int],
        forced_tokens: Tensor | None,
        output_type: str,
        callback: StepCallback | None,
    ) -> ImageOutput:
        """As `ImagePipeline._generate`; `forced_tokens` [grid**2, d] is NaN where tokens are to be drawn."""
        checked_output(output_type)
        others = (("top_k", bool(top_k)), ("top_p", top_p != 1), ("guidance_interval", guidance_interval >= 0))
        for name, is_set in others:
            if is_set:
                raise VisarError(f"{name} is for models of discrete tokens; this one's are continuous.")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise VisarError(f"guidance_scale must be a finite number, not {scale}.")
        schedule = guidance_schedule or self.config.guidance_schedule
        target = ContinuousTarget(self.config.temperature if temperature is None else temperature)
        device, length = self.mar.device, self.mar.length
        forced = None if forced_tokens is None else self._forced(forced_tokens)
        given = None if forced is None else forced.isfinite().all(-1)
        free = length if given is None else int((~given).sum())
        method = self.sampler_of(_default_sampler(free) if sampler is None else sampler, window)
        noise = noise_of(keys, first_image, seed, device)
        order = decision_orders(noise, length, given)
        fixed = None if forced is None else forced[order[:, : length - free]]

        def session_of(model: MAR) -> MARSession:
            return MARSession(model, condition, order, scale, schedule, fixed, self._row_graphs)

        session = session_of(self.mar)
        if getattr(method, "needs_draft", False):
            session.draft = session_of(self._draft_for(method.name))

        # Every pass makes the host wait, so the loop may look as well.
        result = self._decoded(session, method, target, noise, callback, given, every=1)
        if not bool(result.tokens.isfinite().all()):
            raise VisarError("Tokens are not finite; use another guidance scale or temperature.")
        images = self._images(result.tokens, output_type)
        drawn = length - session.given
        done = (result.commit_pass.amax(1) + 1).tolist()
        rounds, evaluations = (sum(getattr(c, n) for c in session.chains) for n in ("rounds", "evaluations"))
        stats = MaskedStats(
            sampler=method.name,
            parameters=values_of(method),
            exact=method.exact,
            law="exact" if method.exact else "relaxed",
            seed=seed,
            settings={
                "guidance_scale": scale,
                "guidance_schedule": schedule,
                "temperature": target.temperature,
                "dtype": str(self.mar.dtype).removeprefix("torch."),
                "device": str(device),
            },
            images=session.batch,
            tokens=length,
            nfe=result.passes,
            passes_per_image=done,
            commits_per_pass=sum(drawn / n for n in done) / len(done),
            seconds=result.seconds,
            draft_seconds=session.draft_seconds,
            ms_per_pass=1000 * result.seconds / result.passes,
            gigabytes=(_bytes_read(session) + (_bytes_read(session.draft) if session.draft else 0)) / 1e9,
            graph_passes=0,
            capture_seconds=0.0,
            head_steps=session.chains[0].steps,
            head_rounds=rounds,
            rounds_per_pass=rounds / result.passes,
            evaluations_per_token=evaluations / (drawn * session.batch),
            tested=session.tested,
            accepted=session.accepted,
        )
        return ImageOutput(images=images, tokens=result.tokens, commit_pass=result.commit_pass, stats=stats)

    def _forced(self, tokens: Tensor) -> Tensor:
        """The forced tokens [N, d] on the device, of which each is given whole or not at all."""
        shape = (self.mar.length, self.mar.config.token_dim)
        found = tokens.isfinite()
        if tuple(tokens.shape) != shape or not bool((found.all(-1) == found.any(-1)).all()):
            raise VisarError(f"forced_tokens must be {list(shape)}, each token given whole or NaN.")
        if bool(found.all()):
            raise VisarError("forced_tokens gives every token: there is nothing to draw.")
        return tokens.to(self.mar.device)

    def glimpse(self, tokens: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.decode_tokens(tokens), self.grid)


def _bytes_read(session: MaskedSession) -> int:
    """The weights, in bytes, as often as they were read: the transformer's in a pass, the head's in a round."""
    assert isinstance(session, MARSession)
    whole, head = (
        sum(p.numel() * p.element_size() for p in m.parameters()) for m in (session.mar, session.mar.diffloss)
    )
    return (whole - head) * session.passes + head * sum(c.rounds for c in session.chains)


class MaskedTextToImagePipeline(MaskedPipeline, TextToImagePipeline):
    """Text-conditional MAR, such as the embedded `icons-mar`."""

    component_classes: ClassVar[dict[str, Any]] = {
        "mar": MAR,
        "vae": AutoencoderKL,
        "text_encoder": {"WordEncoder": WordEncoder, "T5CaptionEncoder": T5CaptionEncoder},
    }

    def __init__(
        self,
        mar: MAR,
        vae: AutoencoderKL,
        text_encoder: WordEncoder | T5CaptionEncoder,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
    ):
        ImagePipeline.__init__(self)
        self.register_modules(mar=mar, vae=vae, text_encoder=text_encoder)
        self.register_to_config(
            guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, temperature=temperature
        )
        self.check()


class MaskedClassToImagePipeline(MaskedPipeline, ClassToImagePipeline):
    """MAR-B, MAR-L and MAR-H: Li et al. 2024, arXiv:2406.11838."""

    component_classes: ClassVar[dict[str, Any]] = {"mar": MAR, "vae": AutoencoderKL}

    def __init__(
        self,
        mar: MAR,
        vae: AutoencoderKL,
        guidance_scale: float = 2.9,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
    ):
        ImagePipeline.__init__(self)
        self.register_modules(mar=mar, vae=vae)
        self.register_to_config(
            guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, temperature=temperature
        )
        self.check()
