"""RandAR's definition written out plainly, one head and one input at a time: nothing of visar's model or session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def turned(x: Tensor, cell: int, grid: int) -> Tensor:
    """A head's vector [d], whose pairs of neighbours are turned: the first half by the row, the rest by the column."""
    out, pairs = torch.empty_like(x), len(x) // 2
    for pair in range(pairs):
        half = pairs // 2
        number, rate = (cell // grid, pair) if pair < half else (cell % grid, pair - half)
        angle = torch.tensor(number * 10000.0 ** (-2 * rate / pairs), dtype=x.dtype)
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair], out[2 * pair + 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt() * weight


def logits(
    state: Mapping[str, Tensor], heads: int, grid: int, label: int, tokens: Sequence[int], cells: Sequence[int]
) -> Tensor:
    """Logits [n + 1, V], float64, of the first n + 1 `cells` of an order, whose first n have these `tokens`.

    The inputs are the class, and then a query and a token for each cell; the class's queries and keys are 0.
    """
    w = {key: value.double() for key, value in state.items()}
    layers = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("layers."))
    query = w["pos_instruct_embeddings"].view(heads, -1)
    inputs, at = [w["cls_embedding.embedding_table.weight"][label]], [-1]
    for n, cell in enumerate(cells[: len(tokens) + 1]):
        inputs.append(torch.cat([turned(head, cell, grid) for head in query]))
        at.append(cell)
        if n < len(tokens):
            inputs.append(w["tok_embeddings.weight"][tokens[n]])
            at.append(cell)
    for i in range(layers):
        part = {key.removeprefix(f"layers.{i}."): value for key, value in w.items() if key.startswith(f"layers.{i}.")}
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        out = []
        for x, cell in zip(inputs, at, strict=True):
            qkv = (part["attention.wqkv.weight"] @ normed(x, part["attention_norm.weight"])).view(3, heads, -1)
            q, k = ([turned(h, cell, grid) if cell >= 0 else h * 0 for h in one] for one in qkv[:2])
            keys.append(k)
            values.append(list(qkv[2]))
            read = []
            for h in range(heads):
                scores = torch.stack([q[h] @ key[h] for key in keys]) * len(q[h]) ** -0.5
                read.append(scores.softmax(0) @ torch.stack([value[h] for value in values]))
            x = x + part["attention.wo.weight"] @ torch.cat(read)
            y = normed(x, part["ffn_norm.weight"])
            gate = part["feed_forward.w1.weight"] @ y
            up = gate * gate.sigmoid() * (part["feed_forward.w3.weight"] @ y)
            out.append(x + part["feed_forward.w2.weight"] @ up)
        inputs = out
    return torch.stack([w["output.weight"] @ normed(x, w["norm.weight"]) for x in inputs[1::2]])
