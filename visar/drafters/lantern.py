"""LANTERN's released drafters (Jang et al. 2024, arXiv:2410.03355), by tables of their keys.

They are EAGLE-1's: hidden states go into the target's head as they are. Those for LlamaGen have no norm before their
attention. The token embedding in the file is used, because it is not that of the target's input. No caption reaches
them but through the hidden states: its slots hold code 0, and all but the first are attended to, padding too.

Those for Anole (and Lumina-mGPT, as their trainer writes them) are a layer of Chameleon, whose token embedding is the
target's. It turns one half of a head against the other, and `EagleHead` pairs that lie next to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from visar.errors import VisarError

ATTENTION = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkv"]  # joined in one matrix here
KEYS = {
    "embed_tokens.weight": "embedding.weight",
    "fc.weight": "fc.weight",
    "fc.bias": "fc.bias",
    "layers.0.self_attn.o_proj.weight": "block.attention.wo.weight",
    "layers.0.mlp.gate_proj.weight": "block.feed_forward.w1.weight",
    "layers.0.mlp.up_proj.weight": "block.feed_forward.w3.weight",
    "layers.0.mlp.down_proj.weight": "block.feed_forward.w2.weight",
    "layers.0.post_attention_layernorm.weight": "block.ffn_norm.weight",
}
CHAMELEON = {"layers.0.input_layernorm.weight": "block.attention_norm.weight"}  # which it has besides
NORMS = [f"layers.0.self_attn.{part}_norm." for part in "qk"]


def is_published(state: Mapping[str, Tensor]) -> bool:
    return "fc.weight" in state and "embed_tokens.weight" in state


def converted(state: Mapping[str, Tensor], head_dim: int, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a released file by the keys of an `EagleHead`, and its arguments; heads are of `head_dim`.

    Raises `VisarError` for a tensor that is missing or of another shape.
    """
    chameleon = any(key.startswith(NORMS[0]) for key in state)
    more = [*CHAMELEON, *(norm + end for norm in NORMS for end in ("weight", "bias"))] if chameleon else []
    for key in (*KEYS, *ATTENTION, *more):
        if key not in state:
            raise VisarError(f"Tensor {key!r} is missing from {path}.")
    matrices = [*ATTENTION, *(key for key in KEYS if not key.endswith(("bias", "layernorm.weight")))]
    for key in matrices:
        if state[key].ndim != 2 or (state[key].shape[1] != state[ATTENTION[0]].shape[1] and key in ATTENTION):
            raise VisarError(
                f"Tensor {key!r} of {path} has shape {list(state[key].shape)}, which is none of a drafter."
            )
    codes, dim = state["embed_tokens.weight"].shape
    own = {KEYS.get(key, key): tensor for key, tensor in state.items() if key not in ATTENTION}
    own["block.attention.wqkv.weight"] = torch.cat([state[key] for key in ATTENTION])
    if dim % head_dim:
        raise VisarError(f"The drafter {path} is {dim} wide, which are no heads of {head_dim}, the target's.")
    ffn = len(state["layers.0.mlp.gate_proj.weight"])
    if chameleon:
        return _of_chameleon(own, dim // head_dim, head_dim, path), dict(
            dim=dim, num_heads=dim // head_dim, ffn=ffn, qk_norm=True
        )
    return own, dict(dim=dim, num_heads=dim // head_dim, ffn=ffn, codes=codes)


def _of_chameleon(own: dict[str, Tensor], heads: int, head_dim: int, path: str | Path) -> dict[str, Tensor]:
    """Without the embedding, and with pairs of queries and keys next to each other."""
    own = {CHAMELEON.get(key, key): value for key, value in own.items() if key != KEYS["embed_tokens.weight"]}
    qkv = own["block.attention.wqkv.weight"]
    if len(qkv) != 3 * heads * head_dim:
        raise VisarError(
            f"The drafter {path} has {len(qkv)} rows of queries, keys and values, not {3 * heads * head_dim}."
        )
    q, k, v = qkv.chunk(3)
    own["block.attention.wqkv.weight"] = torch.cat([_paired(q, heads), _paired(k, heads), v])
    for end in ("weight", "bias"):
        both = [own.pop(norm + end) for norm in NORMS]
        if any(part.shape != (heads, head_dim) for part in both):
            raise VisarError(
                f"Tensor {NORMS[0] + end!r} of {path} has shape {list(both[0].shape)}, not {[heads, head_dim]}."
            )
        own[f"qk_norm.{end}"] = torch.cat([_paired(part.flatten(), heads).view(heads, head_dim) for part in both])
    return own


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] with one of the first half of a head next to one of the second."""
    return rearrange(rows, "(h two d) ... -> (h d two) ...", h=heads, two=2)
