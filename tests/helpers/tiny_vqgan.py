"""Random weights of a small VQGAN by their published names, and a plain decoder of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def tiny_vqgan(codes: int = 16, widths: Sequence[int] = (32, 32, 64), attention: bool = True) -> dict[str, Tensor]:
    """The weights of a tokenizer by the published names, of which those of an encoder are few; with `attention` the
    smallest map has it."""
    seed, state = torch.Generator().manual_seed(11), dict[str, Tensor]()

    def put(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=seed) * torch.Size(shape[1:]).numel() ** -0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=seed) / 8

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=seed) / 4
        state[f"{name}.bias"] = torch.randn(width, generator=seed) / 8

    def block(name: str, before: int, width: int) -> None:
        norm(f"{name}.norm1", before)
        put(f"{name}.conv1", width, before, 3, 3)
        norm(f"{name}.norm2", width)
        put(f"{name}.conv2", width, width, 3, 3)
        if before != width:
            put(f"{name}.nin_shortcut", width, before, 1, 1)

    def attend(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", width, width, 1, 1)

    put("quant_conv", 8, 32, 1, 1)
    put("post_quant_conv", 32, 8, 1, 1)
    put("encoder.conv_in", 32, 3, 3, 3)
    state["quantize.embedding.weight"] = torch.randn(codes, 8, generator=seed)
    last = widths[-1]
    put("decoder.conv_in", last, 32, 3, 3)
    block("decoder.mid.block_1", last, last)
    attend("decoder.mid.attn_1", last)
    block("decoder.mid.block_2", last, last)
    before = last
    for level in reversed(range(len(widths))):
        for i in range(3):
            block(f"decoder.up.{level}.block.{i}", before, widths[level])
            before = widths[level]
            if attention and level == len(widths) - 1:
                attend(f"decoder.up.{level}.attn.{i}", before)
        if level:
            put(f"decoder.up.{level}.upsample.conv", before, before, 3, 3)
    norm("decoder.norm_out", before)
    put("decoder.conv_out", 3, before, 3, 3)
    return state


def plain_pixels(state: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """[B, 3, H, W] for codes [B, h, w], by the weights' names alone: no module of visar's, no norm or upsampling of
    torch's."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), 32, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        x = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attend(name: str, x: Tensor) -> Tensor:
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)  # [B, to, from]
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    x = conv("decoder.conv_in", conv("post_quant_conv", state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)))
    x = block("decoder.mid.block_2", attend("decoder.mid.attn_1", block("decoder.mid.block_1", x)))
    levels = {int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")}
    for level in sorted(levels, reverse=True):
        for i in range(3):
            x = block(f"decoder.up.{level}.block.{i}", x)
            if f"decoder.up.{level}.attn.{i}.q.weight" in state:
                x = attend(f"decoder.up.{level}.attn.{i}", x)
        if level:
            x = conv(f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("decoder.conv_out", swish(norm("decoder.norm_out", x)))
