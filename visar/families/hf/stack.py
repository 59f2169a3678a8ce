"""The layers of decoders of transformers that visar knows, run by its kernels on the modules' own weights.

Between the products of a pass a decoder's own `forward` does so much that a small model spends most of its time there.
Here a layer is its norms, its products with what follows them, and attention, which rotates and writes the cache in one
kernel. Linear layers with adapters or hooks are called as they are. Where anything else of a layer has a hook or its
own `forward`, or is of a class that visar does not know, `Stack.of` gives None, and the decoder's `forward` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.decoder import Attend
from visar.engine.layers import is_plain, rms_norm, run_joined, run_linear
from visar.kernels.linear import repeats


@dataclass(frozen=True)
class Norms:
    """What transformers calls the norms of a layer; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


LAYERS = {
    **dict.fromkeys(
        ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Emu3DecoderLayer", "ChameleonDecoderLayer"),
        Norms(),
    ),
    "ChameleonSwinDecoderLayer": Norms(None, "input_layernorm", None, "post_attention_layernorm"),
    "GlmImageTextDecoderLayer": Norms(
        after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
    ),
}  # fmt: skip


class Stack:
    """The layers and the last norm of a `backbone`, whose layers have these `norms`."""

    def __init__(self, backbone: Any, norms: Norms):
        self.backbone, self.norms = backbone, norms
        self.head_dim = int(backbone.layers[0].self_attn.head_dim)

    @classmethod
    def of(cls, backbone: Any) -> Stack | None:
        """That of a decoder whose layers visar knows and nobody changed, else None."""
        layers = getattr(backbone, "layers", ())
        norms = {LAYERS.get(type(layer).__name__) for layer in layers}
        found = norms.pop() if len(norms) == 1 else None
        if found is None or not all(map(_is_own, _read(backbone))) or not all(map(_is_known, layers)):
            return None
        return cls(backbone, found)

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, int]:
        """The table [R, W, D / 2, 2] for `KVCache.attend`, and how many pairs of halves turn."""
        cos, sin = self.backbone.rotary_emb(position_ids.new_empty(0, dtype=torch.float32), position_ids)
        halves = cos.shape[-1] // 2
        cos, sin = cos[..., :halves], sin[..., :halves]
        if still := self.head_dim // 2 - halves:  # pairs that do not turn
            cos, sin = F.pad(cos, (0, still), value=1.0), F.pad(sin, (0, still))
        return torch.stack([cos, sin], dim=-1), halves

    def run(self, x: Tensor, table: Tensor, attend: Attend, aux_layers: Collection[int] = ()) -> Tensor:
        """Normed hidden states [R, W, dim] of embeddings x [R, W, dim] at the rotary rows `table`.

        The outputs of the layers `aux_layers`, if any, are appended, as by `visar.engine.decoder.Decoder`.
        """
        rows, layers, aux = len(x), self.backbone.layers, list[Tensor]()
        if (times := repeats(x, layers[0])) > 1:
            x = x.repeat(times, 1, 1)
        for n, layer in enumerate(layers):
            x = self._layer(layer, x, functools.partial(attend, n), table)
            if n in aux_layers:
                aux.append(x[:rows])
        normed = _normed(self.backbone.norm, x[:rows])
        return torch.cat([normed, *aux], dim=-1) if aux else normed

    def _layer(self, layer: Any, x: Tensor, attend: Any, table: Tensor) -> Tensor:
        names = self.norms

        def norm(name: str | None, x: Tensor) -> Tensor:
            return x if name is None else _normed(getattr(layer, name), x)

        # A sum is the end of the product before it, but where a norm comes between.
        inner = None if names.after_attention else x
        y = self._attention(layer.self_attn, norm(names.before_attention, x), inner, attend, table)
        x = x + norm(names.after_attention, y) if names.after_attention else y
        inner = None if names.after_mlp else x
        y = _mlp(layer.mlp, norm(names.before_mlp, x), inner)
        return x + norm(names.after_mlp, y) if names.after_mlp else y

    def _attention(self, a: Any, x: Tensor, plus: Tensor | None, attend: Any, table: Tensor) -> Tensor:
        qkv = run_joined((a.q_proj, a.k_proj, a.v_proj), x).unflatten(-1, (-1, self.head_dim))
        if hasattr(a, "q_norm"):
            shared = a.config.num_key_value_heads
            q, k, v = qkv.split([qkv.shape[2] - 2 * shared, shared, shared], dim=2)
            qkv = torch.cat([_normed(a.q_norm, q), _normed(a.k_norm, k), v], dim=2)
        return run_linear(a.o_proj, attend(qkv, table).flatten(-2), plus=plus)


def _mlp(m: Any, x: Tensor, plus: Tensor | None) -> Tensor:
    """SwiGLU."""
    if hasattr(m, "gate_up_proj"):
        gate, up = run_linear(m.gate_up_proj, x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = run_linear(m.up_proj, x, times=run_linear(m.gate_proj, x, silu=True))
    return run_linear(m.down_proj, hidden, plus=plus)


def _normed(norm: Any, x: Tensor) -> Tensor:
    eps = getattr(norm, "variance_epsilon", None)  # of the RMS norms of transformers; Chameleon has others too
    if eps is None or not is_plain(norm):
        found: Tensor = norm(x)
        return found
    return rms_norm(x, norm.weight, eps)


def _read(backbone: Any) -> Iterator[nn.Module]:
    """The modules whose own `forward` is passed by."""
    yield backbone
    for layer in backbone.layers:
        yield from (layer, layer.self_attn, layer.mlp)


def _is_own(module: nn.Module) -> bool:
    """Whether a module is one of transformers that nobody changed."""
    return type(module).__module__.startswith("transformers.models.") and is_plain(module)


def _is_known(layer: Any) -> bool:
    """Whether nothing in the configuration of a layer asks for what `Stack` does not do."""
    a = layer.self_attn
    usual = getattr(a, "sliding_window", None) is None and abs(a.scaling * a.head_dim**0.5 - 1) < 1e-6
    activation = getattr(layer.mlp, "act_fn", None) or getattr(layer.mlp, "activation_fn", None)
    return usual and type(activation).__name__ in ("SiLU", "SiLUActivation")
