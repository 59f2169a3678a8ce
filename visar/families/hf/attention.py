"""Passes through modules of transformers with visar's KV cache and attention; the modules stay as they are.

Attention functions are registered with transformers by name, and a module looks up the name in its configuration in
every call. Within `at_work`, and only there, the configurations of a decoder have visar's name. A name that has no
function for masks makes transformers build none. What a pass attends to is in a variable of the thread, so nothing
has to travel through a model's arguments.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visar.engine.kv_cache import KVCache
from visar.engine.layers import run_product
from visar.errors import VisarError
from visar.kernels.attention import AttentionMetadata, decode_attention, masked_attention

NAME = "visar"
# What attention functions are asked for and visar's attention does not do.
NOT_DONE = {"softcap": "caps its logits", "s_aux": "has sinks", "position_bias": "has position biases"}


@dataclass
class Pass:
    """One pass over a `cache`: its inputs are written at `slots` [rows, W] and attend by `mask`.

    It is what an attention layer asks of a cache of transformers: `update`. `written` are the layers that did.
    """

    cache: KVCache
    slots: Tensor
    mask: AttentionMetadata | Tensor
    visible: int
    written: set[int] = field(default_factory=set)

    is_compileable = True

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [rows, heads, W, D] of a layer, and give all of its cache [rows, heads, slots, D]."""
        self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2), self.slots)
        self.written.add(layer)
        return self.cache.keys[layer].transpose(1, 2), self.cache.values[layer].transpose(1, 2)

    def get_seq_length(self, *_: Any) -> int:
        return 0


_pass: ContextVar[Pass | None] = ContextVar("visar_pass", default=None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **more: Any
) -> tuple[Tensor, None]:
    """Attention [rows, W, heads, D] of queries [rows, heads, W, D], as transformers calls it."""
    now = _pass.get()
    if now is None:
        raise VisarError("This model is at work in visar, in another thread; let that end before you run it yourself.")
    for name, what in NOT_DONE.items():
        if more.get(name) is not None:
            raise VisarError(f"visar does not run {type(module).__name__}: its attention {what}.")
    if (window := more.get("sliding_window")) is not None and window < key.shape[2]:
        raise VisarError(f"visar does not run {type(module).__name__}: it sees the last {window} tokens only.")
    if key.shape[2] != now.cache.keys.shape[2]:
        raise _past_the_cache(module)
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    q = query.transpose(1, 2).to(keys.dtype)
    if isinstance(now.mask, AttentionMetadata):
        out = decode_attention(q, keys, values, now.mask, now.visible, scaling)
    else:
        out = masked_attention(q, keys[:, : now.visible], values[:, : now.visible], now.mask, scaling)
    return out.to(query.dtype), None


def run(decoder: nn.Module, configs: Sequence[Any], cache: str, x: Tensor, position_ids: Tensor, now: Pass) -> Tensor:
    """Hidden states [rows, W, dim] of embeddings x [rows, W, dim] by the decoder's own `forward`.

    `configs` are its `configurations`, and `cache` is the name of that argument of its `forward`. Raises `VisarError`
    where a layer passed by the cache: its tokens would have attended to themselves alone.
    """
    token = _pass.set(now)
    try:
        with at_work(configs):
            out = decoder(inputs_embeds=x, position_ids=position_ids, use_cache=True, **{cache: now})
    finally:
        _pass.reset(token)
    if len(now.written) != len(now.cache.keys):
        raise _past_the_cache(decoder)
    hidden: Tensor = out[0]
    return hidden


def _past_the_cache(module: nn.Module) -> VisarError:
    from transformers import __version__

    return VisarError(
        f"{type(module).__name__} of transformers {__version__} keeps its keys and values elsewhere than in the cache "
        "that it was given, so visar cannot decode with it."
    )


def configurations(decoder: nn.Module) -> list[Any]:
    """The configurations in which the modules of a decoder look up the name of their attention function.

    Those within another come after it: a name that is given to that one is theirs too.
    """
    found: dict[int, Any] = {}
    left = [c for m in decoder.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")]
    for c in left:  # which grows
        found.pop(id(c), None)
        found[id(c)] = c
        inner = [getattr(c, name, None) for name in getattr(c, "sub_configs", ())]
        left += [one for one in inner if hasattr(one, "_attn_implementation")]
    return list(found.values())


_lock = threading.Lock()
_held: dict[int, list[Any]] = {}  # by configuration: how many passes are at work, and the name before


@contextmanager
def at_work(configs: Sequence[Any]) -> Iterator[None]:
    """Within it the configurations name visar's attention; the last pass of any thread restores what they named."""
    register()
    with _lock:
        for c in configs:  # all are read before one is set
            _held.setdefault(id(c), [0, c._attn_implementation])[0] += 1
        for c in configs:
            c._attn_implementation = NAME
    try:
        yield
    finally:
        with _lock:
            for c in configs:
                _held[id(c)][0] -= 1
                if not _held[id(c)][0]:
                    c._attn_implementation = _held.pop(id(c))[1]


@functools.cache
def register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


class Products(TorchFunctionMode):
    """Within it linear layers of plain tensors run on visar's kernels, as `visar.engine.layers.Linear` does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and type(args[1]) in (Tensor, nn.Parameter):
            return run_product(*args)
        return func(*args, **(kwargs or {}))
