"""The published MAR models (Li et al. 2024, arXiv:2406.11838): sizes and recommended settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from visar.families.catalogue import Listing


@dataclass(frozen=True)
class MARShape:
    """Sizes of a MAR for classes: `layers` of the encoder and of the decoder, then those of the head."""

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
    """One MAR of so many `parameters`, whose tokens are KL-16 latents.

    `guidance` and `guidance_schedule` are the authors' recommendations.
    """

    name: str
    title: str
    shape: MARShape
    parameters: int
    guidance: float
    guidance_schedule: str = "linear"
    file: str = "checkpoint-last.pth"
    pixels: int = 256
    downsample: int = 16

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.pixels // self.downsample


MAR_MODELS: dict[str, MARSpec] = {
    spec.name: spec
    for spec in (
        MARSpec("mar-b", "MAR-B, ImageNet classes", MARShape(12, 768, 12, 6, 1024), 207_924_768, 2.9),
        MARSpec("mar-l", "MAR-L, ImageNet classes", MARShape(16, 1024, 16, 8, 1280), 478_326_304, 3.0),
        MARSpec("mar-h", "MAR-H, ImageNet classes", MARShape(20, 1280, 16, 12, 1536), 942_403_104, 3.2),
    )
}


def match_mar(encoder_layers: int, decoder_layers: int, dim: int) -> MARSpec | None:
    """The published MAR with these sizes, if there is one."""
    sizes = (encoder_layers, decoder_layers, dim)
    return next((m for m in MAR_MODELS.values() if (m.shape.layers, m.shape.layers, m.shape.dim) == sizes), None)


def match_mar_heads(encoder_layers: int, decoder_layers: int, dim: int) -> int | None:
    """The number of heads of the published MAR with these sizes, if there is one."""
    found = match_mar(encoder_layers, decoder_layers, dim)
    return None if found is None else found.shape.heads


def listings() -> list[Listing]:
    """The entries of these models in `visar models`."""
    return [
        Listing(
            spec.name,
            spec.title,
            "class",
            (spec.pixels,),
            weights=f"published: {spec.file}, kl16.ckpt",
            needs=f"the published {spec.file} with its autoencoder kl16.ckpt",
            parameters=spec.parameters,
        )
        for spec in MAR_MODELS.values()
    ]
