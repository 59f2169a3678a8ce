"""Load the published MAR files (Li et al. 2024, arXiv:2406.11838) and the KL-16 autoencoder of its tokens, unchanged.

Every size is read from the shapes of the tensors, so files of other sizes with the same keys load as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from visar.engine.component import fill, unfilled
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, published_name
from visar.families.mar.specs import match_mar_heads
from visar.families.mar.transformer import MAR
from visar.families.weights import count, expect, load_state, shape_of


def load_mar(path: str | Path, *, ema: bool = True, num_heads: int | None = None) -> MAR:
    """The MAR of a published file, in fp32, in evaluation mode and without gradients, on the CPU.

    A checkpoint has the weights twice; `ema` takes the averaged ones, which gave the published results. A file of
    weights only is read as such. `num_heads` is needed only for sizes that were never published.

    Raises `VisarError` for a checkpoint without averaged weights, as `load_state` does, and for a tensor that is
    missing, unexpected or of another shape.
    """
    return mar_of(read_mar(path, ema=ema), path, num_heads)


def read_mar(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a published file; otherwise as `load_mar`."""
    return load_state(path, ema=ema, bare=True)


def mar_of(state: Mapping[str, Tensor], path: str | Path, num_heads: int | None = None) -> MAR:
    """The MAR of a published file's tensors, without a copy; otherwise as `load_mar`."""
    arguments = mar_config(state, path, num_heads=num_heads)
    with unfilled():
        mar = MAR(**arguments)
    return fill(mar, state, path)


def mar_config(state: Mapping[str, Tensor], path: str | Path, *, num_heads: int | None = None) -> dict[str, Any]:
    """The `MAR(...)` arguments from the shapes of a state dict; `path` is for messages.

    No shape has the number of heads: by default it is that of the published model of the same size.
    """
    expect(state, "a MAR", path)
    dim, token_dim = shape_of(state, "z_proj.weight", path)
    _, n, _ = shape_of(state, "diffusion_pos_embed_learned", path, 3)
    _, slots, _ = shape_of(state, "encoder_pos_embed_learned", path, 3)
    classes, _ = shape_of(state, "class_emb.weight", path)
    head_width, _ = shape_of(state, "diffloss.net.input_proj.weight", path)
    if math.isqrt(n) ** 2 != n:
        raise VisarError(f"{path} has positions for {n} tokens, which is not a square.")
    if slots <= n:
        raise VisarError(f"{path} has {slots} positions in its encoder, too few for {n} tokens and a class.")
    encoder, decoder = count(state, "encoder_blocks."), count(state, "decoder_blocks.")
    heads = match_mar_heads(encoder, decoder, dim) if num_heads is None else num_heads
    if heads is None:
        raise VisarError(
            f"{path} has {encoder} and {decoder} layers of width {dim}, a size that was never published: "
            "give its number of heads (num_heads)."
        )
    return {
        "token_dim": token_dim,
        "grid": math.isqrt(n),
        "dim": dim,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "num_heads": heads,
        "head_width": head_width,
        "head_layers": count(state, "diffloss.net.res_blocks."),
        "condition": "class",
        "classes": classes,
        "buffer": slots - n,
    }


def load_kl16(path: str | Path) -> KLAutoencoder:
    """The autoencoder of a published file (`kl16.ckpt`), in fp32, in evaluation mode and without gradients, on the CPU.

    Raises `VisarError` as `load_mar` does.
    """
    state = load_state(path)
    arguments = kl_config(state, path)
    with unfilled():
        vae = KLAutoencoder(**arguments)
    levels = len(arguments["channels"])
    return fill(vae, state, path, {key: published_name(key, levels) for key in vae.state_dict()})


def kl_config(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The `KLAutoencoder(...)` arguments from the shapes of a published state dict; `path` is for messages.

    No shape has the number of groups: it is 32, or the largest power of two that divides all widths if that is less.
    """
    expect(state, "a KL autoencoder", path)
    shape_of(state, "encoder.down.0.block.0.conv1.weight", path, 4)
    levels = count(state, "encoder.down.")
    channels = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels)]
    latent_channels, *_ = shape_of(state, "post_quant_conv.weight", path, 4)
    common = math.gcd(*channels)
    return {
        "channels": tuple(channels),
        "blocks": count(state, "encoder.down.0.block."),
        "latent_channels": latent_channels,
        "groups": min(32, common & -common),
        "attention": any(key.startswith(f"encoder.down.{levels - 1}.attn.") for key in state),
    }
