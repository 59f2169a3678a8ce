"""LlamaGen's models by name: sizes, published files and recommended settings. A table of data that imports no torch.

From Sun et al. 2024 (arXiv:2406.06525), Pang et al. 2024 (RandAR, arXiv:2412.01827), Zhang et al. 2025 (LPD,
arXiv:2507.01957), and the READMEs of their code. No weights of these are shipped. The loaders look up the number of
heads here, which no shape of a tensor has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from visar.families.catalogue import NOT_CHECKED, Listing, floor_ms

HUB_C2I = "FoundationVision/LlamaGen"
HUB_T2I = "peizesun/llamagen_t2i"
HUB_RANDAR = "ziqipang/RandAR"


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
    queries: bool = False  # RandAR's: a learnt vector, and one more slot of the cache for each token

    @property
    def weights(self) -> int:
        """Weights that every pass reads: layers, last norm and output head."""
        layer = 4 * self.dim**2 + 3 * self.dim * self.ffn + 2 * self.dim
        return self.layers * layer + self.dim + self.vocab * self.dim

    def parameters(self, condition: str) -> int:
        """All numbers of the model, those of its embeddings and buffers too."""
        taken = (self.classes + 1) * self.dim
        if condition == "text":
            taken = (self.caption_features + self.dim) * self.dim + self.condition_length * self.caption_features
        return self.weights + self.vocab * self.dim + taken + self.dim * self.queries

    @property
    def cache_slots(self) -> int:
        """Slots of a token."""
        return 1 + self.queries

    def cache(self, rows: int, slots: int) -> int:
        """Numbers of keys and values."""
        return 2 * self.layers * self.dim * rows * slots

    def streamed(self, batch: int, length: int) -> int:
        """Numbers that a pass must read halfway through images of `length` tokens, for both batches of guidance.

        A caption's slots have keys that are all zero, and so count as one, which is exact.
        """
        return self.weights + self.cache(2 * batch, 1 + length // 2 * self.cache_slots)


@dataclass(frozen=True)
class LPDShape(GPTShape):
    """Sizes of an LPD: biases, layer norms, and `cells` learnt positions in place of rotary ones."""

    cells: int = 256
    queries: bool = True

    @property
    def weights(self) -> int:
        layer = 4 * self.dim**2 + 2 * self.dim * self.ffn + 9 * self.dim + self.ffn
        return self.layers * layer + 2 * self.dim + self.vocab * self.dim

    def parameters(self, condition: str) -> int:
        """As above, with the positions of the class and of the cells, the mask token, and the norm of the inputs."""
        return self.weights + (self.vocab + self.classes + 1 + self.cells + 1 + 1 + 2) * self.dim


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

    `condition` is "class" or "text"; `pixels` are the image sizes it was trained at; `guidance` and `top_k` are the
    authors' recommendations for good-looking images (FID needs others).
    """

    name: str
    title: str
    condition: Literal["class", "text"]
    pixels: tuple[int, ...]
    downsample: int
    guidance: float
    top_k: int
    shape: GPTShape
    files: tuple[PublishedFile, ...]
    tokenizer: str
    licence: str = NOT_CHECKED

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


def _randar(size: str, guidance: float) -> ModelSpec:
    like, parameters = MODELS[f"llamagen-{size.lower()}"], {"L": "0.3b", "XL": "0.7b"}[size]
    file = PublishedFile(f"randar_{parameters}_llamagen_360k_bs_1024_lr_0.0004.safetensors", HUB_RANDAR, 16)
    return replace(
        like, name=f"randar-{size.lower()}", title=f"RandAR {size}, ImageNet classes", pixels=(256,), guidance=guidance,
        top_k=0, shape=replace(like.shape, queries=True), files=(file,), licence="MIT (code)",
    )  # fmt: skip


def _lpd(size: str, layers: int, dim: int, guidance: float, *pixels: int) -> ModelSpec:
    name = f"lpd_{size.lower()}"
    files = tuple(PublishedFile(f"{name}_{p}.pth", f"mit-han-lab/{name}_{p}", p // 16) for p in pixels)
    return ModelSpec(
        f"lpd-{size.lower()}", f"LPD {size}, ImageNet classes", "class", pixels, 16, guidance, 0,
        LPDShape(layers, dim, dim // 64, 4 * dim), files, "ds16", "MIT (code)",
    )  # fmt: skip


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
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
RANDARS = {spec.name: spec for spec in (_randar("L", 3.4), _randar("XL", 4.0))}
LPDS = {  # the guidance of the authors' slowest sampling at 256 pixels, of 32 steps, and of 20 for XXL
    spec.name: spec
    for spec in (
        _lpd("L", 24, 1024, 5.4, 256, 512), _lpd("XL", 36, 1280, 5.0, 256, 512), _lpd("XXL", 48, 1536, 5.9, 256),
    )
}  # fmt: skip
ALL = (*MODELS.values(), *RANDARS.values(), *LPDS.values())

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


def published_grid(file_name: str) -> int | None:
    """The grid side in tokens that a published GPT file was trained at, by its file name."""
    return next((f.grid for spec in ALL for f in spec.files if f.name == file_name), None)


NAR_M = GPTShape(18, 1024, 16, 2816)  # the trunk of NAR's M; its other trunks have LlamaGen's sizes


def match_heads(layers: int, dim: int, ffn: int) -> int | None:
    """The number of heads of the published GPT with these sizes, if there is one."""
    shapes = (*(spec.shape for spec in ALL), NAR_M)
    return next((s.heads for s in shapes if (s.layers, s.dim, s.ffn) == (layers, dim, ffn)), None)


def _needs(spec: ModelSpec) -> str:
    file, hub = TOKENIZERS[spec.tokenizer].files[0], spec.files[0].hub
    files = f"the published files {' or '.join(f.name for f in spec.files)}"
    return f"{files} {'' if hub == file.hub else f'of {hub} '}and {file.name} of the hub repository {file.hub}"


def listings() -> list[Listing]:
    """The entries of these models in `visar models`."""
    return [
        Listing(
            spec.name,
            spec.title,
            spec.condition,
            spec.pixels,
            weights=f"{spec.files[0].hub}: {', '.join(f.name for f in spec.files)}",
            needs=_needs(spec),
            parameters=spec.shape.parameters(spec.condition),
            licence=spec.licence,
            floor_ms=floor_ms(spec.shape.streamed(1, spec.grid**2)),
        )
        for spec in ALL
    ]
