"""visar against transformers' own loop: both give the same ids."""

from __future__ import annotations

from visar.eval.benchmark.stock import measure


def test_both_decode_the_same_ids() -> None:
    found = measure(
        "float32", side=3, repeats=1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    assert found.equal == 1 and found.tokens == 9 and found.ratio > 0 and "100%" in str(found)
