"""Arguments of the models of published sizes."""

from __future__ import annotations

from typing import Any

from visar.families.llamagen.specs import ModelSpec, TokenizerSpec
from visar.families.mar.specs import MARSpec


def gpt_arguments(spec: ModelSpec) -> dict[str, Any]:
    """The `LlamaGen(...)` arguments of a model."""
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


def vq_arguments(spec: TokenizerSpec) -> dict[str, Any]:
    """The `VQModel(...)` arguments of a published tokenizer; its other sizes are the defaults."""
    return {"channel_multipliers": spec.channel_multipliers}


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
