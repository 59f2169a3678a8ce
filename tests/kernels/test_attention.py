"""Decode attention in both forms against a reference in fp64, which walks each tree from its nodes to the root."""

from __future__ import annotations

import logging
import math
import zlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.errors import VisarError
from visar.kernels.attention import (
    AttentionMetadata,
    _attend,
    _join,
    decode_attention,
    decode_attention_torch,
    decode_attention_triton,
)
from visar.kernels.backend import backend, triton

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")


class Case(NamedTuple):
    queries: int
    dim: int
    slots: int
    roots: tuple[int, ...]  # one row each
    heads: int = 2  # of keys
    group: int = 1  # heads of queries for each of them
    trees: int = 0  # how many different ones; 0 for a chain
    first: int = 0
    bias: tuple[float, ...] | None = None
    splits: int | None = None
    largest: float = 0.0  # logits up to this, or those of random vectors
    rows_first: bool = True  # whether the keys are [R, S, H, D] in memory, as the values, or [R, H, S, D]


LOGS = (math.log(120), 0.0, -math.inf, math.log(3))
SEVERAL_BLOCKS = dict(queries=1, dim=16, slots=157, roots=(0, 7, 63, 155))
CASES = (
    Case(1, 64, 39, (0, 5, 38, 20)),
    Case(1, 100, 150, (149, 149), splits=2),
    Case(1, 16, 37, (1, 9, 14, 36), bias=LOGS),
    Case(1, 16, 37, (1, 1, 20, 0), bias=LOGS),  # the last sees nothing but the pseudo-key
    Case(1, 16, 20, (0, 0), bias=(-math.inf, 0.0), splits=1),  # the first sees nothing at all
    Case(1, 16, 140, (0, 130), bias=(-math.inf, -math.inf), splits=3),
    Case(3, 100, 131, (0, 10, 77, 128), splits=3, rows_first=False),
    Case(3, 64, 70, (3, 0, 60, 31), first=5, bias=LOGS),
    Case(17, 64, 150, (0, 133), heads=3, splits=2, rows_first=False),
    Case(17, 16, 99, (1, 30, 77, 82), trees=1, splits=2),
    Case(17, 16, 103, (0, 30, 77, 66), trees=2, first=9, bias=LOGS),
    Case(5, 16, 77, (0, 3, 14, 66), trees=4, first=2),
    Case(1, 16, 90, (5, 20, 77, 60), trees=2, first=6, splits=2),
    Case(1, 16, 40, (5, 20), trees=1),
    Case(64, 100, 161, (0, 97), heads=1, splits=2),
    Case(63, 64, 190, (0, 127), heads=1, trees=2, splits=3),
    Case(128, 16, 260, (0, 131), heads=1, bias=(math.log(7), -math.inf)),
    Case(3, 16, 100, (0, 10, 40, 97), largest=1e4, splits=2),
    Case(17, 64, 150, (30, 133), largest=1e4, bias=(math.log(120), -math.inf), rows_first=False),
    *(Case(**SEVERAL_BLOCKS, splits=n) for n in (1, 2, 3, 5)),
    Case(1, 64, 150, (30, 133), group=16, splits=2),  # GLM-Image's 32 heads of queries and 2 of keys
    Case(1, 16, 37, (1, 9, 14, 36), group=3, bias=LOGS, rows_first=False),
    Case(5, 16, 77, (0, 3, 14, 66), heads=3, group=4, trees=4, first=2),
    Case(17, 64, 99, (30, 82), heads=1, group=8, trees=1, rows_first=False),  # several blocks of queries
    Case(7, 16, 40, (5, 20), heads=1, group=5, splits=1),  # blocks end within the heads of one input
    Case(33, 16, 70, (0, 37), heads=1, group=16, splits=2),
)


def name(case: Case) -> str:
    return f"W{case.queries}-D{case.dim}-trees{case.trees}-group{case.group}"


def random_parents(trees: int, nodes: int, seed: torch.Generator) -> list[list[int]]:
    samples = torch.rand(trees, nodes, generator=seed, dtype=torch.float64)
    return [[-1] + [int(samples[t, j] * j) for j in range(1, nodes)] for t in range(trees)]


def packed(parents: list[list[int]]) -> Tensor:
    """Ancestor sets [trees, nodes]: those of the parent, and the node itself."""
    sets: list[list[int]] = []
    for tree in parents:
        own: list[int] = []
        for j, parent in enumerate(tree):
            own.append(1 << j | (own[parent] if parent >= 0 else 0))
        sets.append(own)
    return torch.tensor(sets)


def sees(case: Case, parents: list[list[int]], row: int, query: int, slot: int) -> bool:
    """Whether a query sees a slot, as the papers sample it."""
    node = case.first + query
    if not case.trees:
        return slot <= case.roots[row] + node
    tree = parents[row % case.trees]
    seen = set()
    while node >= 0:
        seen.add(case.roots[row] + node)
        node = tree[node]
    return slot < case.roots[row] or slot in seen


def reference(case: Case, parents: list[list[int]], q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One softmax in fp64 for each row, query and head, over the slots that are seen."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, root in enumerate(case.roots):
        for w in range(case.queries):
            seen = [s for s in range(root + case.first + w + 1) if sees(case, parents, row, w, s)]
            own, others = (t[row, seen].double().repeat_interleave(case.group, 1) for t in (keys, values))
            logits = scale * torch.einsum("hd,shd->hs", q[row, w].double(), own)
            if case.bias is not None and 0 in seen:
                logits[:, 0] += case.bias[row]
            if bool((logits > -math.inf).any()):
                out[row, w] = torch.einsum("hs,shd->hd", logits.softmax(-1), others)
    return out


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    seed = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    rows, visible = len(case.roots), max(case.roots) + case.first + case.queries
    assert visible <= case.slots
    shape, heads = (rows, case.slots, case.heads, case.dim), case.heads * case.group
    keys, scale = torch.randn(shape, generator=seed).to(dtype), case.dim**-0.5
    wide = torch.randn(rows, case.queries, heads + 2 * case.heads, case.dim, generator=seed).to(dtype)
    q = wide[:, :, :heads]  # a part of a larger tensor, as in the model
    if case.largest:  # whole numbers, so that products of fp32 are exact and the closest logits stay apart
        size = int((case.largest / case.dim) ** 0.5) + 1
        large, keys = (torch.randint(-size, size + 1, shape, generator=seed).to(dtype) for _ in range(2))
        keys[:, 1::3], scale = large[:, 1:2].sign() * size, 1.0
        large[:, :, 0] = keys[:, 1:2, 0]  # the largest product that there is, of both signs, and ties
        keys[:, 4::6] *= -1
        q.copy_(large[:, : case.queries])
    values = torch.randn(shape, generator=seed).to(dtype)
    parents = random_parents(case.trees, case.first + case.queries, seed)
    expected = reference(case, parents, q, keys, values, scale)
    keys[:, visible:], values[:, visible:] = math.nan, math.nan  # what is behind is not read

    metadata = AttentionMetadata(
        torch.tensor(case.roots, device=device),
        case.first,
        packed(parents).to(device) if case.trees else None,
        None if case.bias is None else torch.tensor(case.bias, device=device),
    )
    k, v = keys.to(device), values.to(device)
    if not case.rows_first:
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    tolerance = {torch.float32: 2e-3 if case.largest else 4e-6, torch.bfloat16: 0.02, torch.float16: 4e-3}[dtype]
    forms = {"torch": decode_attention_torch(wide.to(device)[:, :, :heads], k, v, metadata, visible, scale)}
    if triton is not None:
        forms["triton"] = decode_attention_triton(
            wide.to(device)[:, :, :heads], k, v, metadata, visible, scale, case.splits
        )
    for form, out in forms.items():
        assert out.dtype == dtype and out.shape == q.shape
        wrong = (out.cpu().double() - expected).abs().max()
        assert wrong <= tolerance, (form, float(wrong))  # a NaN is caught too


@pytest.mark.parametrize("case", CASES, ids=name)
def test_fp32(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_bf16(case: Case) -> None:
    check(case, torch.bfloat16, "cpu")


def test_fp16() -> None:
    check(CASES[7], torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


def inputs(queries: int, dim: int, rows: int = 2, slots: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, queries, 1, dim), torch.randn(rows, slots, 1, dim), torch.randn(rows, slots, 1, dim)


@needs_triton
def test_dispatch(caplog: pytest.LogCaptureFixture) -> None:
    metadata = AttentionMetadata(torch.tensor([3, 20]))
    small, large = inputs(2, 32), inputs(2, 200)
    with backend("triton"):
        assert torch.equal(decode_attention(*small, metadata, 30), decode_attention_triton(*small, metadata, 30))
        with caplog.at_level(logging.WARNING, "visar"):
            outs = [decode_attention(*large, metadata, 30) for _ in range(2)]
    assert torch.equal(outs[0], decode_attention_torch(*large, metadata, 30)) and torch.equal(*outs)
    assert [r.message for r in caplog.records if "200 dimensions" in r.message] == [caplog.records[0].message]
    assert torch.equal(decode_attention(*small, metadata, 30), decode_attention_torch(*small, metadata, 30))


def test_what_no_kernel_takes() -> None:
    metadata = AttentionMetadata(torch.tensor([0, 1]))
    with pytest.raises(VisarError, match="at most 128 tokens per row, not 129"):
        decode_attention(*inputs(129, 16), metadata, 140)
    with pytest.raises(VisarError, match="at most 256 dimensions, not 260"):
        decode_attention(*inputs(1, 260), metadata, 20)
    with pytest.raises(VisarError, match="3 heads of queries cannot share 2 heads of keys"):
        decode_attention(torch.randn(2, 1, 3, 16), *torch.randn(2, 2, 20, 2, 16), metadata, 20)
    with pytest.raises(VisarError, match="at most 63 nodes, not 64"):
        AttentionMetadata(metadata.root, ancestors=torch.ones(1, 64, dtype=torch.long))
    with pytest.raises(VisarError, match="2 rows do not share 3 trees"):
        AttentionMetadata(metadata.root, ancestors=torch.ones(3, 5, dtype=torch.long))
    with pytest.raises(VisarError, match="tree has 5 nodes, not 6"):
        decode_attention(*inputs(2, 16), AttentionMetadata(metadata.root, 4, torch.ones(1, 5, dtype=torch.long)), 20)


def test_mask_is_made_once_and_only_where_something_is_hidden() -> None:
    level, ragged = torch.tensor([7, 7]), torch.tensor([7, 5])
    assert AttentionMetadata(level).mask(1, 8) is None and AttentionMetadata(level, first=2).mask(1, 10) is None
    assert AttentionMetadata(level, ancestors=torch.ones(1, 3, dtype=torch.long)).mask(1, 8) is None
    assert AttentionMetadata(ragged).mask(1, 8) is not None and AttentionMetadata(level).mask(1, 9) is not None
    assert AttentionMetadata(level, bias=torch.zeros(2)).mask(1, 8) is not None
    metadata = AttentionMetadata(ragged)
    first = metadata.mask(4, 11)
    assert first is metadata.mask(4, 11) and first is not None and first.shape == (2, 4, 11)
    assert first.sum(-1).tolist() == [[8, 9, 10, 11], [6, 7, 8, 9]]


@needs_triton
@pytest.mark.slow
def test_kernels_compile() -> None:
    in_a_process(__file__)


def compile_some() -> None:
    """Both dtypes and heads of 64 and 100, one query and many, with and without tree, bias and splits."""
    for dtype, dim, rich in (("bf16", 64, False), ("bf16", 100, True), ("fp32", 64, True), ("fp32", 100, False)):
        wide, block_d = dtype == "fp32", 64 if dim == 64 else 128
        types = dict.fromkeys(_attend.arg_names, "i32") | dict.fromkeys(("q", "keys", "values"), "*" + dtype)
        types |= dict.fromkeys(("maxima", "sums", "bias"), "*fp32") | dict.fromkeys(("root", "ancestors"), "*i64")
        types |= {"out": "*fp32" if rich else "*" + dtype, "scale": "fp32"}
        constants = {
            "dim": dim, "group": 16 if rich else 1, "unit": 16 if dim == 64 else 4, "splits": 3 if rich else 1,
            "is_tree": rich, "has_bias": rich, "widened": False, "block_q": (32 if wide else 64) if rich else 16,
            "block_d": block_d, "block_s": (32 if block_d == 64 else 16) * (1 if wide else 2),
        }  # fmt: skip
        constants |= {} if rich else {"queries": 1}  # Triton makes a constant of an argument that is 1
        compiled(_attend, types, constants, warps=8 if wide and block_d == 128 else 4)
    types = {"out": "*bf16", "sums_v": "*fp32", "maxima": "*fp32", "sums": "*fp32", "lines": "i32"}
    compiled(_join, types, {"dim": 100, "splits": 7, "block_n": 4, "block_p": 8, "block_d": 128})


if __name__ == "__main__":
    compile_some()
