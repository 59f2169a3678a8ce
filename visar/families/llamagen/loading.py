"""Load the published LlamaGen files (Sun et al. 2024, arXiv:2406.06525), GPT and VQ tokenizer, unchanged.

Every size is read from the shapes of the tensors, so files of other sizes with the same keys load as well. Modules are
built on the meta device and take over the tensors that were read, so the weights are in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.engine.component import fill, missing, unfilled
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.specs import match_heads, published_grid
from visar.families.llamagen.vq import VQConfig, VQModel
from visar.families.weights import count, expect, load_state, shape_of

DEFAULT_GRID = 16


def load_gpt(
    path: str | Path,
    *,
    grid: int | None = None,
    num_heads: int | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlamaGen:
    """The GPT of a published file, in evaluation mode and without gradients, on the CPU.

    `grid` is the number of tokens along one side, by default that of the published file of this name, else 16. The
    weights do not depend on it. `num_heads` is needed only for sizes that were never published.

    Raises `VisarError` as `load_state` does, and for a tensor that is missing, unexpected or of another shape.
    """
    path = Path(path)
    return gpt_of(load_state(path, ema=ema, dtype=dtype), path, grid or published_grid(path.name), num_heads)


def gpt_of(
    state: Mapping[str, Tensor], path: str | Path, grid: int | None = None, num_heads: int | None = None
) -> LlamaGen:
    """The GPT of a published file's tensors, without a copy; otherwise as `load_gpt`."""
    arguments = gpt_config(state, path, num_heads=num_heads)
    with unfilled():
        gpt = LlamaGen(**arguments, grid=grid or DEFAULT_GRID)
    return fill(gpt, state, path)


def load_vq(path: str | Path, *, ema: bool = False, dtype: torch.dtype = torch.float32) -> VQModel:
    """The VQ tokenizer of a published file, in evaluation mode and without gradients, on the CPU.

    Raises `VisarError` as `load_gpt` does.
    """
    state = load_state(path, ema=ema, dtype=dtype)
    expect(state, "a VQ tokenizer of LlamaGen", path)
    try:
        sizes = VQConfig.infer(state)
        with unfilled():
            vq = VQModel(**asdict(sizes))
    except KeyError as error:
        raise missing(error.args[0], path) from error
    except (ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise VisarError(f"{path} is not a LlamaGen VQ tokenizer: its keys or shapes do not match.") from error
    return fill(vq, state, path)


def gpt_config(state: Mapping[str, Tensor], path: str | Path, *, num_heads: int | None = None) -> dict[str, Any]:
    """The `LlamaGen(...)` arguments except the grid, from the shapes of a state dict; `path` is for messages.

    No shape has the number of heads: by default it is that of the published model of the same size.
    """
    expect(state, "a GPT of LlamaGen", path)
    vocab, dim = shape_of(state, "tok_embeddings.weight", path)
    ffn, _ = shape_of(state, "layers.0.feed_forward.w1.weight", path)
    layers = count(state, "layers.")
    heads = num_heads or match_heads(layers, dim, ffn)
    if heads is None:
        raise VisarError(
            f"{path} has {layers} layers of width {dim} and {ffn}, a size that was never published: "
            "give its number of heads (num_heads)."
        )
    arguments = {"vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": heads, "ffn": ffn}
    if any(k.startswith("cls_embedding.cap_proj.") for k in state):
        length, features = shape_of(state, "cls_embedding.uncond_embedding", path)
        return arguments | {"condition": "text", "condition_length": length, "caption_features": features}
    rows, _ = shape_of(state, "cls_embedding.embedding_table.weight", path)
    return arguments | {"condition": "class", "condition_length": 1, "classes": rows - 1}
