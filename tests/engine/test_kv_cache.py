"""The KV cache where heads of queries share those of keys and values."""

from __future__ import annotations

import pytest
import torch

from visar.engine.kv_cache import KVCache
from visar.kernels.attention import AttentionMetadata
from visar.kernels.backend import backend, triton
from visar.kernels.invariant import invariant

FORMS = [("torch", False), ("torch", True), *([] if triton is None else [("triton", False)])]


@pytest.mark.parametrize(("name", "is_invariant"), FORMS)
def test_shared_heads_are_those_of_a_cache_that_repeats_them(name: str, is_invariant: bool) -> None:
    """By metadata and by a mask, after slots are moved and rows dropped."""
    g = torch.Generator().manual_seed(0)
    heads, shared, dim, rows = 4, 2, 8, 2
    with backend(name), invariant(is_invariant):  # type: ignore[arg-type]
        own = KVCache(2, rows, 9, shared, dim, torch.float32, torch.device("cpu"))
        whole = KVCache(2, rows, 9, heads, dim, torch.float32, torch.device("cpu"))
        assert own.bytes_per_slot * 2 == whole.bytes_per_slot
        for start, count in ((0, 4), (4, 3)):
            slots = torch.arange(start, start + count).expand(len(own.rows), -1)
            angle = torch.rand(len(own.rows), count, dim // 2, generator=g)
            table = torch.stack([angle.cos(), angle.sin()], -1)
            q = torch.randn(len(own.rows), count, heads, dim, generator=g)
            kv = torch.randn(len(own.rows), count, 2 * shared, dim, generator=g)
            k, v = kv.chunk(2, dim=2)
            repeated = torch.cat([q, *(t.repeat_interleave(heads // shared, 2) for t in (k, v))], dim=2)
            mask = torch.arange(start + count) <= slots[..., None]
            for how in (AttentionMetadata(torch.full((len(own.rows),), start)), mask):
                found = own.attend(slots, how, start + count)(1, torch.cat([q, kv], dim=2), table)
                wanted = whole.attend(slots, how, start + count)(1, repeated, table)
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
            for cache in (own, whole):
                cache.move(slots[:, [2, 0]], slots[:, [0, 1]])
                cache.select(torch.arange(1))


def test_rows_that_are_repeated_are_written_once_and_given_back_as_often() -> None:
    qkv, slots = torch.randn(2, 1, 6, 8), torch.tensor([[3], [3]])
    table, found = torch.randn(2, 1, 4, 2), []
    for times in (1, 2):
        cache = KVCache(1, 2, 5, 2, 8, torch.float32, torch.device("cpu"))
        attend = cache.attend(slots, AttentionMetadata(slots[:, 0]), 4)
        found.append((attend(0, qkv.repeat(times, 1, 1, 1), table), cache.keys))
    assert torch.equal(found[1][0], found[0][0].repeat(2, 1, 1, 1)) and torch.equal(found[1][1], found[0][1])
