"""Published models that run by transformers' own modules. A table of data that imports no torch."""

from __future__ import annotations

from visar.families.catalogue import NOT_CHECKED, Listing, floor_ms
from visar.families.hf.sizes import SIZES


def _listing(name: str, title: str, hub: str, pixels: int, needs: str = "", licence: str = NOT_CHECKED) -> Listing:
    needs = needs or f"the hub id {hub}, or a folder with the files of that repository"
    size = SIZES[name]
    return Listing(
        name, title, "prompt", (pixels,), weights=hub, needs=needs, parameters=size.parameters, licence=licence,
        floor_ms=floor_ms(size.streamed(1)),
    )  # fmt: skip


def _with_decoder(name: str, title: str, hub: str, pixels: int, licence: str = NOT_CHECKED) -> Listing:
    """Of a Chameleon, whose repositories have no decoder of pixels."""
    needs = f"a folder with the files of {hub} and Meta's tokenizer/vqgan.ckpt"
    return _listing(name, title, hub, pixels, needs, licence)


def listings() -> list[Listing]:
    """The entries of these models in `visar models`."""
    return [
        _listing("janus-pro-1b", "Janus-Pro 1B, text", "deepseek-community/Janus-Pro-1B", 384),
        _listing("janus-pro-7b", "Janus-Pro 7B, text", "deepseek-community/Janus-Pro-7B", 384),
        _listing("glm-image", "GLM-Image 9B, text", "zai-org/GLM-Image", 1024),
        _listing("emu3-gen", "Emu3-Gen 8B, text", "Emu3-community/Emu3-Gen-hf", 720),
        _listing(
            "emu3.5-image",
            "Emu3.5-Image 34B, text",
            "BAAI/Emu3.5-Image",
            1024,
            "a folder with the files of BAAI/Emu3.5-Image, the tokenizer files of a Qwen3, and in its folder "
            "'vision_tokenizer' those of BAAI/Emu3.5-VisionTokenizer",
            "Apache-2.0",
        ),
        _listing(
            "anole",
            "Anole 7B, text",
            "GAIR/Anole-7b-v0.1",
            512,
            "the hub id GAIR/Anole-7b-v0.1, a folder with its files, or one with those of leloy/Anole-7b-v0.1-hf and "
            "Meta's tokenizer/vqgan.ckpt",
            "Chameleon, research",
        ),
        _with_decoder("lumina-mgpt-512", "Lumina-mGPT 7B, text", "Alpha-VLLM/Lumina-mGPT-7B-512", 512),
        _with_decoder("lumina-mgpt-768", "Lumina-mGPT 7B, text", "Alpha-VLLM/Lumina-mGPT-7B-768", 768),
        _with_decoder("lumina-mgpt-1024", "Lumina-mGPT 7B, text", "Alpha-VLLM/Lumina-mGPT-7B-1024", 1024),
    ]
