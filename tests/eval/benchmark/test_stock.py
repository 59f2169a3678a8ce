"""visar against transformers' own loop: both give the same ids."""

from __future__ import annotations

from dataclasses import replace

import torch

from visar.eval.benchmark.stock import SHAPE, measure


def test_all_decode_the_same_ids() -> None:
    small = replace(SHAPE.size, layers=2, dim=32, heads=4, kv_heads=4, ffn=48, vocab=90, head_dim=8)
    found = measure(torch.float32, side=3, repeats=1, window=4, shape=replace(SHAPE, size=small))
    assert [(r.name, r.equal) for r in found.rows] == [("generate", 1.0), ("ar", 1.0), ("scd", 1.0)]
    assert found.tokens == found.rows[1].passes == 9 >= found.rows[2].passes and found.rows[0].ratio == 1.0
    assert min(r.ms_per_token for r in found.rows) > 0 and "100%" in str(found)
