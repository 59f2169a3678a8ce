"""Load the published LlamaGen files (Sun et al. 2024, arXiv:2406.06525), GPT and VQ tokenizer, unchanged.

GPTs with two-way heads, of NAR and FlashAR, have LlamaGen's keys and some more (`two_way_config`), and RandAR's one.
LPD's keys are others (`visar.families.llamagen.lpd`).
Every size is read from the shapes of the tensors, so files of other sizes with the same keys load as well. Modules are
built on the meta device and take over the tensors that were read, so the weights are in memory once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.engine.component import fill, missing, unfilled
from visar.engine.weight_files import read_content
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.lpd import LPD, their_keys
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.specs import match_heads, published_grid
from visar.families.llamagen.two_way import TwoWayLlamaGen
from visar.families.llamagen.vq import VQConfig, VQModel
from visar.families.weights import count, expect, load_state, shape_of

DEFAULT_GRID = 16
HEAD = "medusa_output.weight"  # which only GPTs with two-way heads have
QUERY = "pos_instruct_embeddings"  # and this only a RandAR
TOKENS = "token_emb.weight"  # and this an LPD


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
    state = load_state(path, ema=ema, dtype=dtype)
    told = training_arguments(path) if HEAD in state else {}
    return gpt_of(state, path, grid or published_grid(path.name), num_heads, told)


def gpt_of(
    state: Mapping[str, Tensor],
    path: str | Path,
    grid: int | None = None,
    num_heads: int | None = None,
    told: Mapping[str, Any] | None = None,
) -> LlamaGen:
    """The GPT of a published file's tensors, without a copy; `told` are its `training_arguments`; as `load_gpt`."""
    if TOKENS in state:
        return _lpd_of(state, path, grid, num_heads)
    grid = grid or DEFAULT_GRID
    if HEAD not in state:
        arguments = gpt_config(state, path, num_heads=num_heads)
        with unfilled():
            gpt = (RandAR if QUERY in state else LlamaGen)(**arguments, grid=grid)
        return fill(gpt, state, path)
    arguments = two_way_config(state, path, told or {}, num_heads=num_heads)
    if arguments["mixing"] == "gate":
        state = {key: value for key, value in state.items() if key != "hv_mix_logit"}  # which the gate replaces
    with unfilled():
        gpt = TwoWayLlamaGen(**arguments, grid=grid)
    return fill(gpt, state, path)


def _lpd_of(state: Mapping[str, Tensor], path: str | Path, grid: int | None, num_heads: int | None) -> LPD:
    vocab, dim = shape_of(state, TOKENS, path)
    classes, cells = shape_of(state, "class_emb.weight", path)[0], shape_of(state, "pos_embed", path, 3)[1] - 1
    layers, ffn = count(state, "blocks."), shape_of(state, "blocks.0.mlp.fc1.weight", path)[0]
    if shape_of(state, "fake_latent", path) != (1, dim):
        raise VisarError(f"Tensor 'fake_latent' of {path} must be one vector of {dim} numbers.")
    own = math.isqrt(cells)
    if own**2 != cells or grid not in (None, own):
        raise VisarError(f"{path} has learnt the positions of {cells} cells, and not of {grid or own} x {grid or own}.")
    with unfilled():
        lpd = LPD(vocab, dim, layers, _heads(layers, dim, ffn, path, num_heads), ffn, classes=classes, grid=own)
    table = torch.cat([state["class_emb.weight"], state["fake_latent"]])
    known = {key: tensor for key, tensor in state.items() if key != "fake_latent"}
    return fill(lpd, known | {"class_emb.weight": table}, path, their_keys(lpd))


def _heads(layers: int, dim: int, ffn: int, path: str | Path, given: int | None) -> int:
    """The number of heads, which no shape has: by default that of the published model of the same size."""
    heads = given or match_heads(layers, dim, ffn)
    if heads is None:
        raise VisarError(
            f"{path} has {layers} layers of width {dim} and {ffn}, a size that was never published: "
            "give its number of heads (num_heads)."
        )
    return heads


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


def class_of(path: str | Path) -> type[LlamaGen]:
    """The class of the GPT in a published file, by the names of its tensors."""

    def has(name: str, content: Any) -> bool:
        own = content.items() if isinstance(content, Mapping) else ()
        return any(str(key).endswith(name) or has(name, value) for key, value in own)

    content = read_content(path)
    marks: dict[str, type[LlamaGen]] = {HEAD: TwoWayLlamaGen, QUERY: RandAR, TOKENS: LPD}
    return next((kind for mark, kind in marks.items() if has(mark, content)), LlamaGen)


def training_arguments(path: str | Path) -> dict[str, Any]:
    """The arguments of training that a published file holds next to its weights; none where it holds none."""
    content = read_content(path)
    found = content.get("args") if isinstance(content, Mapping) else None
    return dict(vars(found) if isinstance(found, argparse.Namespace) else found if isinstance(found, Mapping) else {})


def two_way_config(
    state: Mapping[str, Tensor], path: str | Path, told: Mapping[str, Any], *, num_heads: int | None = None
) -> dict[str, Any]:
    """The `TwoWayLlamaGen(...)` arguments except the grid, as `gpt_config`; `told` are the arguments of training.

    No tensor says how many of the layers are the branch's, nor where it starts. NAR's is one layer after the trunk's
    last; for FlashAR's the arguments must say it. Raises `VisarError` where they do not.
    """
    mixing = "gate" if "hv_gate_mlp.0.weight" in state else "scalar" if "hv_mix_logit" in state else "mean"
    if mixing != "mean" and "vertical_start_layer" not in told:
        raise VisarError(
            f"{path} does not say where its branch starts, which no tensor does: save the file with the arguments of "
            "training, such as {'model': ..., 'args': {'vertical_start_layer': 11, 'medusa_attention_num': 1}}."
        )
    depth, start = told.get("medusa_attention_num", 1), told.get("vertical_start_layer", -1)
    if not all(isinstance(number, int) for number in (depth, start)) or not 0 <= depth < count(state, "layers."):
        raise VisarError(f"{path} has {count(state, 'layers.')} layers, and its arguments say a branch of {depth}.")
    arguments = gpt_config(state, path, num_heads=num_heads, branch=depth)
    layers = arguments["num_layers"]
    if told.get("vertical_start_last_minus_depth"):
        start = layers - depth
    width = shape_of(state, "hv_gate_mlp.0.weight", path)[0] if mixing == "gate" else 32
    return arguments | {
        "vertical_layers": depth, "vertical_start": layers if start < 0 else min(start, layers), "mixing": mixing,
        "gate_width": width,
    }  # fmt: skip


def gpt_config(
    state: Mapping[str, Tensor], path: str | Path, *, num_heads: int | None = None, branch: int = 0
) -> dict[str, Any]:
    """The `LlamaGen(...)` arguments except the grid, from the shapes of a state dict; `path` is for messages.

    No shape has the number of heads: by default it is that of the published model of the same size. The last layers may
    be those of a `branch`.
    """
    expect(state, "a GPT of LlamaGen", path)
    vocab, dim = shape_of(state, "tok_embeddings.weight", path)
    ffn, _ = shape_of(state, "layers.0.feed_forward.w1.weight", path)
    layers = count(state, "layers.") - branch
    heads = _heads(layers, dim, ffn, path, num_heads)
    arguments = {"vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": heads, "ffn": ffn}
    if any(k.startswith("cls_embedding.cap_proj.") for k in state):
        length, features = shape_of(state, "cls_embedding.uncond_embedding", path)
        return arguments | {"condition": "text", "condition_length": length, "caption_features": features}
    rows, _ = shape_of(state, "cls_embedding.embedding_table.weight", path)
    return arguments | {"condition": "class", "condition_length": 1, "classes": rows - 1}
