"""Published models that run by transformers' own modules. A table of data that imports no torch."""

from __future__ import annotations

from visar.families.catalogue import Listing


def _listing(name: str, title: str, hub: str, pixels: int) -> Listing:
    return Listing(
        name, title, "prompt", (pixels,), weights=hub,
        needs=f"the hub id {hub}, or a folder with the files of that repository",
    )  # fmt: skip


def listings() -> list[Listing]:
    """The entries of these models in `visar models`."""
    return [
        _listing("janus-pro-1b", "Janus-Pro 1B, text", "deepseek-community/Janus-Pro-1B", 384),
        _listing("janus-pro-7b", "Janus-Pro 7B, text", "deepseek-community/Janus-Pro-7B", 384),
        _listing("glm-image", "GLM-Image 9B, text", "zai-org/GLM-Image", 1024),
    ]
