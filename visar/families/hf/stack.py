"""The layers of decoders of transformers that visar knows, run by its kernels on the modules' own weights.

Between the products of a pass a decoder's own `forward` does so much that a small model spends most of its time there.
Here a layer is its norms, its products with what follows them, and attention, which rotates and writes the cache in one
kernel. Linear layers with adapters or hooks are called as they are. Where anything else of a layer has a hook or its
own `forward`, or is of a class that visar does not know, `Stack.of` gives None, and the decoder's `forward` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.decoder import Attend
from visar.engine.layers import bound_joined, bound_linear, is_plain, rms_norm
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
    """The layers and the last norm of a `backbone`, whose layers have these `norms`.

    It asks once what each module is and has, so it is for a time in which nothing of that changes.
    """

    def __init__(self, backbone: Any, norms: Norms):
        self.backbone = backbone
        self.head_dim = int(backbone.layers[0].self_attn.head_dim)
        self._layers = [_Layer(layer, norms, self.head_dim) for layer in backbone.layers]
        self._norm = _bound_norm(backbone.norm)

    @classmethod
    def of(cls, backbone: Any) -> Stack | None:
        """That of a decoder whose layers visar knows and nobody changed, else None."""
        layers = getattr(backbone, "layers", ())
        norms = {LAYERS.get(type(layer).__name__) for layer in layers}
        found = norms.pop() if len(norms) == 1 else None
        if found is None or not all(map(_is_own, _read(backbone))) or not all(map(_is_known, layers)):
            return None
        if len(layers) > backbone.config.num_hidden_layers:  # the last of which most decoders leave out
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
        rows, aux = len(x), list[Tensor]()
        if (times := repeats(x, self.backbone.layers[0])) > 1:
            x = x.repeat(times, 1, 1)
        for n, layer in enumerate(self._layers):
            x = layer(x, table, attend, n)
            if n in aux_layers:
                aux.append(x[:rows])
        normed = self._norm(x[:rows])
        return torch.cat([normed, *aux], dim=-1) if aux else normed


class _Layer:
    """What is run of a layer."""

    def __init__(self, layer: Any, norms: Norms, head_dim: int):
        a, m = layer.self_attn, layer.mlp
        self._norms = [None if name is None else _bound_norm(getattr(layer, name)) for name in astuple(norms)]
        self._qkv, self._o = bound_joined((a.q_proj, a.k_proj, a.v_proj)), bound_linear(a.o_proj)
        self._head_norms = (_bound_norm(a.q_norm), _bound_norm(a.k_norm)) if hasattr(a, "q_norm") else None
        self._head_dim, self._shared = head_dim, a.config.num_key_value_heads
        self._hidden = _bound_swiglu(m)
        self._down = bound_linear(m.down_proj)

    def __call__(self, x: Tensor, table: Tensor, attend: Attend, n: int) -> Tensor:
        before, after, before_mlp, after_mlp = self._norms
        # A sum is the end of the product before it, but where a norm comes between.
        y = x if before is None else before(x)
        out = attend(n, self._heads(y), table).flatten(-2)
        x = self._o(out, plus=x) if after is None else x + after(self._o(out))
        hidden = self._hidden(x if before_mlp is None else before_mlp(x))
        return self._down(hidden, plus=x) if after_mlp is None else x + after_mlp(self._down(hidden))

    def _heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values [R, W, heads, head_dim]."""
        qkv = self._qkv(x)
        qkv = qkv.view(*qkv.shape[:-1], -1, self._head_dim)
        if self._head_norms is None:
            return qkv
        q, k, v = qkv.split([qkv.shape[2] - 2 * self._shared, self._shared, self._shared], dim=2)
        q_norm, k_norm = self._head_norms
        return torch.cat([q_norm(q), k_norm(k), v], dim=2)


def _bound_swiglu(m: Any) -> Callable[[Tensor], Tensor]:
    """The hidden states of a SwiGLU."""
    if hasattr(m, "gate_up_proj"):
        both = bound_linear(m.gate_up_proj)

        def hidden(x: Tensor) -> Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return F.silu(gate) * up

        return hidden
    gate, up = bound_linear(m.gate_proj), bound_linear(m.up_proj)
    return lambda x: up(x, times=gate(x, silu=True))


def _bound_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    eps = getattr(norm, "variance_epsilon", None)  # of the RMS norms of transformers; Chameleon has others too
    if eps is None or not _is_own(norm):
        return norm  # type: ignore[no-any-return]
    return functools.partial(rms_norm, weight=norm.weight, eps=eps)


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
    activation: Any = getattr(layer.mlp, "act_fn", None) or getattr(layer.mlp, "activation_fn", None)
    return usual and type(activation).__name__ in ("SiLU", "SiLUActivation") and is_plain(activation)
