"""LANTERN's released drafters (Jang et al. 2024, arXiv:2410.03355) for LlamaGen, by a table of their keys.

They are EAGLE-1's: a layer without a norm before its attention, and hidden states that go into the target's head as
they are. The token embedding in the file is used, because it is not that of the target's input. No caption reaches them
but through the hidden states: its slots hold code 0, and all but the first are attended to, padding too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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


def is_published(state: Mapping[str, Tensor]) -> bool:
    return "fc.weight" in state and "embed_tokens.weight" in state


def converted(state: Mapping[str, Tensor], head_dim: int, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a released file by the keys of an `EagleHead`, and its arguments; heads are of `head_dim`.

    Raises `VisarError` for a tensor that is missing or of another shape.
    """
    for key in (*KEYS, *ATTENTION):
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
    return own, dict(dim=dim, num_heads=dim // head_dim, ffn=ffn, codes=codes)
