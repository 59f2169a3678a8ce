"""Tiny random Chameleons in Meta's own layout, written of models of transformers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny_chameleon import WIDTHS, chameleon_tokenizer, tiny_chameleon
from tests.helpers.tiny_vqgan import tiny_vqgan

HEADS = 4
PLACES = {  # in a layer
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "self_attn.q_norm": "attention.q_normalization",
    "self_attn.k_norm": "attention.k_normalization", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def model_of(parts: int = 1, **config: Any) -> Any:
    """A model whose norms of queries and keys are one for all heads of a part, as Meta's are."""
    model = tiny_chameleon(max_position_embeddings=4096, vocab_size=72, **config)
    for name, weight in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            weight.data = weight.data[:parts].repeat_interleave(len(weight) // parts, 0)
        elif name.endswith("norm.weight"):  # those of the whole width
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    return model


def paired(rows: Tensor, heads: int) -> Tensor:
    """Halves of each head's rows, one of the first next to one of the second."""
    first, second = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack([first, second], 2).flatten(0, 2)


def meta_parts(model: Any, parts: int = 1) -> list[dict[str, Tensor]]:
    """The weights in Meta's layout, one dictionary for each part."""
    out: list[dict[str, Tensor]] = [{"rope.freqs": torch.arange(4.0)} for _ in range(parts)]

    def put(name: str, value: Tensor, dim: int | None) -> None:
        pieces = [value] * parts if dim is None else value.chunk(parts, dim)
        for part, piece in zip(out, pieces, strict=True):
            part[name] = piece.clone()

    top = {"model.embed_tokens": ("tok_embeddings", 1), "model.norm": ("norm", None), "lm_head": ("output", 0)}
    for key, value in model.state_dict().items():
        if key.startswith("model.vqmodel."):
            continue
        name, kind = key.rsplit(".", 1)
        if name in top:
            put(f"{top[name][0]}.{kind}", value, top[name][1])
            continue
        _, _, layer, own = name.split(".", 3)
        place = PLACES[own]
        if place.endswith("_normalization"):
            for n, part in enumerate(out):
                part[f"layers.{layer}.{place}.{kind}"] = paired(value[n * len(value) // parts], 1)
            continue
        if place in ("attention.wq", "attention.wk"):
            value = paired(value, HEADS if place.endswith("q") else model.config.num_key_value_heads)
        columns = place in ("attention.wo", "feed_forward.w2")
        put(f"layers.{layer}.{place}.{kind}", value, None if place.endswith("_norm") else int(columns))
    return out


def pixels_of(model: Any) -> dict[str, Tensor]:
    """The image tokenizer's weights: what transformers has of them, and a decoder."""
    own = {key.removeprefix("model.vqmodel."): value for key, value in model.state_dict().items() if "vqmodel" in key}
    return {key: value for key, value in tiny_vqgan(16, WIDTHS, False).items() if key.startswith("decoder.")} | own


def write(path: Path, model: Any, parts: list[dict[str, Tensor]], name: str = "7b", **params: Any) -> Path:
    weights, tokenizer = path / "models" / name, path / "tokenizer"
    weights.mkdir(parents=True)
    tokenizer.mkdir(exist_ok=True)
    for n, part in enumerate(parts):
        torch.save(part, weights / ("consolidated.pth" if len(parts) == 1 else f"consolidated.{n:02d}.pth"))
    c = model.config
    own = dict(
        dim=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=HEADS, n_kv_heads=c.num_key_value_heads,
        norm_eps=c.rms_norm_eps, rope_theta=c.rope_parameters["rope_theta"], swin_norm=c.swin_norm, multiple_of=256,
        qk_normalization=True, vocab_size=c.vocab_size,
    )  # fmt: skip
    (weights / "params.json").write_text(json.dumps({"seed": 1, "model_parallel_size": 8, "model": own | params}))
    (weights / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(parts)}))
    (weights / "checklist.chk").write_text("")
    chameleon_tokenizer().backend_tokenizer.save(str(tokenizer / "text_tokenizer.json"))
    torch.save({"state_dict": pixels_of(model)}, tokenizer / "vqgan.ckpt")
    (tokenizer / "vqgan.yaml").write_text(
        "model:\n  params:\n    embed_dim: 8\n    ddconfig:\n      resolution: 48\n      ch_mult: [1, 1, 1, 1, 1]\n"
    )
    return path
