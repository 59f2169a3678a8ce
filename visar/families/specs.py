"""The models by name: sizes, published files and recommended settings. A table of data that imports no torch.

LlamaGen's sizes and files: Sun et al. 2024 (arXiv:2406.06525) and the README of its code; MAR's: Li et al. 2024
(arXiv:2406.11838) likewise. A size that carries no weights here is still useful: the loaders find the number of heads
by it, the only size that shapes do not show.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from visar.errors import VisarError, unknown

HUB_C2I = "FoundationVision/LlamaGen"
HUB_T2I = "peizesun/llamagen_t2i"


@dataclass(frozen=True)
class PublishedFile:
    """A published weights file: its name, its hub repository, and the side of its grid in tokens (GPT files only)."""

    name: str
    hub: str
    grid: int = 0


@dataclass(frozen=True)
class GPTShape:
    """Sizes of a LlamaGen GPT. `condition_length` is the number of condition slots before the image tokens."""

    layers: int
    dim: int
    heads: int
    ffn: int
    condition_length: int = 1
    vocab: int = 16384
    classes: int = 1000
    caption_features: int = 2048


@dataclass(frozen=True)
class MARShape:
    """Sizes of a MAR for classes: `layers` of the encoder and as many of the decoder, then those of the head."""

    layers: int
    dim: int
    heads: int
    head_layers: int
    head_width: int
    token_dim: int = 16
    buffer: int = 64
    classes: int = 1000


@dataclass(frozen=True)
class MARSpec:
    """One MAR. `guidance`, by the `guidance_schedule`, is what the authors recommend; its tokens are KL-16 latents."""

    name: str
    title: str
    shape: MARShape
    guidance: float
    guidance_schedule: str = "linear"
    file: str = "checkpoint-last.pth"
    pixels: int = 256
    downsample: int = 16

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.pixels // self.downsample


@dataclass(frozen=True)
class TokenizerSpec:
    """A VQ tokenizer: pixels per token along one side, `VQConfig` sizes, and its published files."""

    name: str
    title: str
    downsample: int
    channel_multipliers: tuple[int, ...]
    files: tuple[PublishedFile, ...]


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    `condition` is "class" or "text"; `pixels` are the image sizes it was trained at; `guidance` and `top_k` are what
    the authors recommend for good-looking images (FID asks for others). `folder` is set for weights that are shipped
    inside `visar.assets`, whose sizes stand in that folder; `shape` for published ones.
    """

    name: str
    title: str
    condition: str
    pixels: tuple[int, ...]
    downsample: int
    guidance: float
    top_k: int
    shape: GPTShape | None = None
    files: tuple[PublishedFile, ...] = ()
    tokenizer: str = ""
    folder: str = ""

    @property
    def grid(self) -> int:
        """Tokens along one side of an image of the smallest size."""
        return self.pixels[0] // self.downsample


def _llamagen(size: str, layers: int, dim: int, heads: int, ffn: int, *pixels: int) -> ModelSpec:
    files = tuple(PublishedFile(f"c2i_{size}_{p}.pt", HUB_C2I, p // 16) for p in pixels)
    return ModelSpec(
        f"llamagen-{size.lower()}", f"LlamaGen GPT-{size}, ImageNet classes", "class", pixels, 16, 4.0, 2000,
        GPTShape(layers, dim, heads, ffn), files, "ds16",
    )  # fmt: skip


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("icons", "icons and emoji from a short text, embedded", "text", (64,), 4, 1.5, 10, folder="icons"),
        ModelSpec(
            "icons-mar", "the same from continuous tokens (MAR), embedded", "text", (64,), 4, 2.0, 0,
            folder="icons-mar",
        ),
        _llamagen("B", 12, 768, 12, 2048, 256, 384),
        _llamagen("L", 24, 1024, 16, 2816, 256, 384),
        _llamagen("XL", 36, 1280, 20, 3584, 384),
        _llamagen("XXL", 48, 1536, 24, 4096, 384),
        _llamagen("3B", 24, 3200, 32, 8704, 384),
        ModelSpec(
            "llamagen-t2i-xl", "LlamaGen GPT-XL, text", "text", (256, 512), 16, 7.5, 1000,
            GPTShape(36, 1280, 20, 3584, condition_length=120),
            (
                PublishedFile("t2i_XL_stage1_256.pt", HUB_T2I, 16),
                PublishedFile("t2i_XL_stage2_512.pt", HUB_T2I, 32),
            ),
            "ds16-t2i",
        ),
    )
}  # fmt: skip

MAR_MODELS: dict[str, MARSpec] = {
    spec.name: spec
    for spec in (
        MARSpec("mar-b", "MAR-B, ImageNet classes", MARShape(12, 768, 12, 6, 1024), 2.9),
        MARSpec("mar-l", "MAR-L, ImageNet classes", MARShape(16, 1024, 16, 8, 1280), 3.0),
        MARSpec("mar-h", "MAR-H, ImageNet classes", MARShape(20, 1280, 16, 12, 1536), 3.2),
    )
}

TOKENIZERS: dict[str, TokenizerSpec] = {
    spec.name: spec
    for spec in (
        TokenizerSpec(
            "ds16", "LlamaGen VQ, 16 x 16 pixels per token", 16, (1, 1, 2, 2, 4),
            (PublishedFile("vq_ds16_c2i.pt", HUB_C2I),),
        ),
        TokenizerSpec(
            "ds16-t2i", "ds16 tuned further for the text model", 16, (1, 1, 2, 2, 4),
            (PublishedFile("vq_ds16_t2i.pt", HUB_T2I),),
        ),
        TokenizerSpec(
            "ds8", "LlamaGen VQ, 8 x 8 pixels per token", 8, (1, 2, 2, 4),
            (PublishedFile("vq_ds8_c2i.pt", HUB_C2I),),
        ),
    )
}  # fmt: skip


def gpt_arguments(spec: ModelSpec) -> dict[str, Any]:
    """The `LlamaGen(...)` arguments of a model; those of an embedded one are read from its folder.

    Raises `VisarError` where the folder of an embedded model is missing.
    """
    if spec.shape is None:
        return _embedded_arguments(spec)
    s = spec.shape
    return {
        "vocab_size": s.vocab,
        "dim": s.dim,
        "num_layers": s.layers,
        "num_heads": s.heads,
        "ffn": s.ffn,
        "condition": spec.condition,
        "condition_length": s.condition_length,
        "classes": s.classes,
        "caption_features": s.caption_features,
        "grid": spec.grid,
    }


def mar_arguments(spec: MARSpec) -> dict[str, Any]:
    """The `MAR(...)` arguments of a published model."""
    s = spec.shape
    return {
        "token_dim": s.token_dim,
        "grid": spec.grid,
        "dim": s.dim,
        "encoder_layers": s.layers,
        "decoder_layers": s.layers,
        "num_heads": s.heads,
        "head_width": s.head_width,
        "head_layers": s.head_layers,
        "condition": "class",
        "classes": s.classes,
        "buffer": s.buffer,
    }


def vq_arguments(spec: TokenizerSpec) -> dict[str, Any]:
    """The `VQModel(...)` arguments of a published tokenizer; its other sizes are the defaults."""
    return {"channel_multipliers": spec.channel_multipliers}


def _embedded_arguments(spec: ModelSpec) -> dict[str, Any]:
    path = _embedded_folder(spec) / "gpt" / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise VisarError(f"The embedded model {spec.name!r} has no readable {path}.") from error
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _embedded_folder(spec: ModelSpec) -> Path:
    folder = Path(str(resources.files("visar.assets"))) / spec.folder
    if not folder.is_dir():
        raise VisarError(f"The embedded model {spec.name!r} is missing from this installation ({folder}).")
    return folder


def published_grid(file_name: str) -> int | None:
    """The grid side in tokens that a published GPT file was trained at, by its file name."""
    return next((f.grid for spec in MODELS.values() for f in spec.files if f.name == file_name), None)


def match_heads(layers: int, dim: int, ffn: int) -> int | None:
    """The number of heads of the published GPT with these sizes, if there is one."""
    shapes = (spec.shape for spec in MODELS.values() if spec.shape)
    return next((s.heads for s in shapes if (s.layers, s.dim, s.ffn) == (layers, dim, ffn)), None)


def match_mar(encoder_layers: int, decoder_layers: int, dim: int) -> MARSpec | None:
    """The published MAR with these sizes, if there is one."""
    sizes = (encoder_layers, decoder_layers, dim)
    return next((m for m in MAR_MODELS.values() if (m.shape.layers, m.shape.layers, m.shape.dim) == sizes), None)


def match_mar_heads(encoder_layers: int, decoder_layers: int, dim: int) -> int | None:
    """The number of heads of the published MAR with these sizes, if there is one."""
    found = match_mar(encoder_layers, decoder_layers, dim)
    return None if found is None else found.shape.heads


def resolve_model(name_or_path: str | Path) -> Path | str:
    """A folder for an embedded name or an existing folder, or the hub id "owner/name" as it was given.

    Names of the table go before folders of the same name: write "./icons" for a folder. Raises `VisarError` for a
    published model whose weights are not shipped, for a file, and for a name that is nothing of all this.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if isinstance(name_or_path, str) and (spec := MODELS.get(name)):
        if spec.folder:
            return _embedded_folder(spec)
        gpt = " or ".join(f.name for f in spec.files)
        vq = TOKENIZERS[spec.tokenizer].files[0].name
        raise VisarError(
            f"The weights of {name!r} are not shipped with visar: give the published files {gpt} and {vq} "
            f"of the hub repository {spec.files[0].hub}."
        )
    if isinstance(name_or_path, str) and (published := MAR_MODELS.get(name)):
        raise VisarError(
            f"The weights of {name!r} are not shipped with visar: give the published {published.file} with its "
            "autoencoder kl16.ckpt."
        )
    if path.is_dir():
        return path
    if path.exists():
        raise VisarError(f"{name} is a file, not a model folder: give a GPT file together with its tokenizer file.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name
    if isinstance(name_or_path, Path) or re.search(r"[/\\]|^[.~]", name):
        raise VisarError(f"There is no model folder {name}.")
    raise unknown("model", name, [*MODELS, *MAR_MODELS])
