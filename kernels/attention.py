"""Decode attention: a few query rows per sequence against a static KV cache, which holds more slots than a query
attends to.

The Triton form is flash decoding: the slots are split among programs, each of which runs the online softmax of
FlashAttention (Dao 2023, arXiv:2307.08691) over its part, and a second, small kernel joins the parts. A program works
out what its queries attend to from the row's root slot and a tree's packed ancestor sets: no mask is ever written, and
the host never asks the device how far a row is. The torch form builds one mask per pass and calls PyTorch's own
attention. Where G heads of queries share one of keys and values (grouped-query attention, Ainslie et al. 2023,
arXiv:2305.13245), both forms take them as G * W queries of that head, so that a key is read once and never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.errors import VisarError
from visar.kernels.backend import jit, say_once, tl, use_triton
from visar.kernels.invariant import is_invariant

MOST_QUERIES = 128
MOST_DIM = 256
MOST_TRITON_DIM = 128
MOST_NODES = 63  # ancestor sets are the bits of one int64
# How many programs a launch aims at: two for each processor of an H100. It is not asked of the device, so that a split,
# and with it the rounding, is the same on every GPU.
PROGRAMS = 256
PART = 256  # slots of a split in the invariant mode, where their number must not change the order of sums


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Which slots of the cache the inputs of a pass attend to; one object serves all layers.

    `root` [R], int64, is the slot of each row's root, the first input of a chain or tree, of which the pass feeds the
    nodes `first`..`first` + W - 1; node j lies in slot root + j. Without `ancestors` an input attends to all slots up
    to its own. With them ([A, T], int64, bit i of node j set where i is j or above it, at most 63 nodes, row r having
    those of row r % A, as the unconditional batch comes after the conditional one) it attends to the slots before the
    root and the nodes of its bits. `bias` [R], fp32, makes slot 0 a pseudo-key, whose logit is shifted by it: log n for
    n keys that are all 0, whose mean value the slot holds, and -inf for none.
    """

    root: Tensor
    first: int = 0
    ancestors: Tensor | None = None
    bias: Tensor | None = None
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ancestors is not None and self.ancestors.shape[1] > MOST_NODES:
            raise VisarError(f"A draft tree has at most {MOST_NODES} nodes, not {self.ancestors.shape[1]}.")
        if self.ancestors is not None and len(self.root) % len(self.ancestors):
            raise VisarError(f"{len(self.root)} rows do not share {len(self.ancestors)} trees evenly.")

    def mask(self, queries: int, visible: int) -> Tensor | None:
        """Which of the first `visible` slots `queries` inputs attend to, [R, queries, visible], made once.

        It is bool, or with a bias fp32 to be added to the logits, and None where nothing is masked; on a GPU it is
        never None, because the host does not read `root` there.
        """
        key = queries, visible
        if key not in self._masks:
            self._masks[key] = None if self._all_visible(queries, visible) else self._mask(queries, visible)
        return self._masks[key]

    def _all_visible(self, queries: int, visible: int) -> bool:
        if queries > 1 or self.bias is not None or self.root.device.type != "cpu":
            return False
        to_root = self.ancestors is None or self.first == 0  # a root attends as an input of a chain does
        return to_root and int(self.root.min()) + self.first + 1 >= visible

    def _mask(self, queries: int, visible: int) -> Tensor:
        slot = torch.arange(visible, device=self.root.device)
        node = slot - self.root[:, None]  # [R, visible], negative before the root
        own = torch.arange(self.first, self.first + queries, device=slot.device)
        if self.ancestors is None:
            allowed = node[:, None] <= own[:, None]
        else:
            # Bit 63 is never set, so nothing attends to nodes after the last one.
            bits = self.ancestors[:, self.first : self.first + queries].repeat(len(node) // len(self.ancestors), 1)
            allowed = (bits[..., None] >> node.clamp(0, MOST_NODES)[:, None] & 1).bool() | (node < 0)[:, None]
        if self.bias is None:
            return allowed
        mask = torch.zeros(allowed.shape, device=slot.device).masked_fill_(~allowed, -torch.inf)
        mask[..., 0] += self.bias[:, None]
        return mask


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, visible: int, scale: float | None = None
) -> Tensor:
    """Attention [R, W, H, D] of queries q [R, W, H, D] to the first `visible` slots of keys and values [R, S, K, D].

    K divides H, and head h of the queries attends to head h // (H / K). `metadata` says which slots a query attends to;
    one that attends to none gives 0. `scale` is 1 / sqrt(D) unless given. The cache may have any strides as long as D
    is contiguous; [R, K, S, D] in memory is the fastest on a CPU. A `VisarError` for W over 128, D over 256 or a K that
    does not divide H; D over 128 runs in torch on a GPU too.
    """
    _, queries, heads, dim = q.shape
    if heads % keys.shape[2]:
        raise VisarError(f"{heads} heads of queries cannot share {keys.shape[2]} heads of keys evenly.")
    if queries > MOST_QUERIES:
        raise VisarError(f"A pass takes at most {MOST_QUERIES} tokens per row, not {queries}; choose a smaller window.")
    if dim > MOST_DIM:
        raise VisarError(f"Attention takes heads of at most {MOST_DIM} dimensions, not {dim}.")
    if metadata.ancestors is not None and metadata.first + queries > metadata.ancestors.shape[1]:
        raise VisarError(f"The tree has {metadata.ancestors.shape[1]} nodes, not {metadata.first + queries}.")
    form = decode_attention_torch
    if use_triton(q):
        if dim <= MOST_TRITON_DIM:
            form = decode_attention_triton
        else:
            say_once(f"No kernel takes heads of {dim} dimensions; attention runs in plain torch, which is slower.")
    return form(q, keys, values, metadata, visible, scale)


def decode_attention_torch(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, visible: int, scale: float | None = None
) -> Tensor:
    """`decode_attention` by PyTorch's own, which is also what runs on a CPU."""
    return masked_attention(q, keys[:, :visible], values[:, :visible], metadata.mask(q.shape[1], visible), scale)


def masked_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """PyTorch's attention [R, W, H, D] of q [R, W, H, D] to keys and values [R, S, K, D], K dividing H.

    `mask` [R, W, S] is bool, or added to the logits. In the invariant mode all sums are in float64: those of other
    shapes, and of a tree's nodes, which lie in other slots, differ in the 53rd bit, which rounding to bfloat16 hides.
    """
    shape, dtype, single = q.shape, q.dtype, q.shape[1] == 1
    if (group := q.shape[2] // keys.shape[2]) > 1:  # the queries of a head of keys become rows of it
        q = q.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)
        mask = mask if mask is None or single else mask.repeat_interleave(group, 1)
    q, k, v = (t.transpose(1, 2) for t in (q, keys, values))
    if is_invariant():
        q, k, v = q.double(), k.double(), v.double()  # a session's cache is float64 already, on a CPU
    elif single and not q.is_cuda:  # on a CPU a single row goes through bf16 three times as slowly as through fp32
        q, k, v = q.float(), k.float(), v.float()
    if mask is not None:
        mask = mask.unsqueeze(1)
        if mask.is_floating_point() and (q.is_cuda or is_invariant()):
            mask = mask.to(q.dtype)  # PyTorch's kernels for GPUs, and those of float64, ask for it
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).to(dtype)
    return out if group == 1 else out.unflatten(1, (-1, group)).transpose(2, 3).reshape(shape)


@jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, out, maxima, sums, root, ancestors, bias, scale, first, visible, part, queries, heads, trees,
    nodes, q_row, q_query, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head,
    dim: tl.constexpr, group: tl.constexpr, unit: tl.constexpr, splits: tl.constexpr, is_tree: tl.constexpr,
    has_bias: tl.constexpr, widened: tl.constexpr, block_q: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One split of the slots for one block of the queries of one row and head of keys, which `group` heads share.

    Query n is that of input n // `group`. Where there is one split `out` [R, W, H, D] is the result; else `out`
    [splits, R, W, H, D] (fp32) is a sum that is not divided yet, with the largest logit (base 2) in `maxima`
    [splits, R, W, H] and the sum of weights in `sums`.
    """
    shared = heads // group
    row, key_head = (tl.program_id(0) // shared).to(tl.int64), tl.program_id(0) % shared
    start = tl.program_id(2) * part
    n = tl.program_id(1) * block_q + tl.arange(0, block_q)
    w, head = n // group, key_head * group + n % group
    d = tl.arange(0, block_d)
    here, lanes = w < queries, d < dim
    at_root = tl.load(root + row).to(tl.int32)
    own = first + w  # the node of each query
    fed = ((tl.program_id(1) + 1) * block_q + group - 1) // group
    last = first + tl.minimum(fed, queries)  # no query here attends to node `last`
    end = tl.minimum(tl.minimum(start + part, visible), at_root + last)

    # Strides are passed in units, so that the compiler knows what divides them and loads several numbers at once.
    at = row * (q_row * unit) + w[:, None] * (q_query * unit) + head[:, None] * (q_head * unit) + d[None, :]
    x = tl.load(q + at, here[:, None] & lanes[None, :], 0.0)
    if widened:  # Triton's interpreter multiplies the bits of bf16 as integers
        x = x.to(tl.float32)
    k_base = keys + row * (k_row * unit) + key_head * (k_head * unit)
    v_base = values + row * (v_row * unit) + key_head * (v_head * unit)
    if is_tree:
        bits = tl.load(ancestors + (row % trees) * nodes + own, here, 0)
    shift = 0.0
    if has_bias:
        shift = tl.load(bias + row) * 1.4426950408889634

    top = tl.full([block_q], float("-inf"), tl.float32)
    total = tl.zeros([block_q], tl.float32)
    sum_v = tl.zeros([block_q, block_d], tl.float32)
    for begin in range(start, end, block_s):
        s = begin + tl.arange(0, block_s)
        inside = (s < end)[:, None] & lanes[None, :]
        k = tl.load(k_base + s.to(tl.int64)[:, None] * (k_slot * unit) + d[None, :], inside, 0.0)
        v = tl.load(v_base + s.to(tl.int64)[:, None] * (v_slot * unit) + d[None, :], inside, 0.0)
        if widened:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(x, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        if has_bias:
            logits += tl.where(s == 0, shift, 0.0)[None, :]
        node = s - at_root
        if is_tree:
            bit = tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)  # bit 63 is never set
            allowed = ((bits[:, None] >> bit[None, :]) & 1) == 1
            allowed = allowed | (node < 0)[None, :]
        else:
            allowed = node[None, :] <= own[:, None]
        logits = tl.where(allowed & (s < end)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        zero = tl.where(higher == float("-inf"), 0.0, higher)  # a query with all slots masked so far: no inf - inf
        old, weights = tl.exp2(top - zero), tl.exp2(logits - zero[:, None])
        total = total * old + tl.sum(weights, 1)
        sum_v = sum_v * old[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher

    rows = tl.num_programs(0) // shared
    line = ((tl.program_id(2) * rows + row) * queries + w) * heads + head
    if splits == 1:
        sum_v = sum_v / tl.where(total == 0, 1.0, total)[:, None]
    else:
        tl.store(maxima + line, top, here)
        tl.store(sums + line, total, here)
    if (splits == 1) | (start < end):  # what an empty split would add is never read
        tl.store(out + line[:, None] * dim + d[None, :], sum_v.to(out.dtype.element_ty), here[:, None] & lanes[None, :])


@jit
def _join(  # type: ignore[no-untyped-def]
    out, sums_v, maxima, sums, lines,
    dim: tl.constexpr, splits: tl.constexpr, block_n: tl.constexpr, block_p: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Join the splits of `block_n` of the `lines`, which are those of each row, query and head."""
    line = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    p, d = tl.arange(0, block_p), tl.arange(0, block_d)
    here = (line < lines)[:, None] & (p < splits)[None, :]
    lanes = (d < dim)[None, :]
    top = tl.load(maxima + p[None, :] * lines + line[:, None], here, float("-inf"))
    highest = tl.max(top, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([block_n], tl.float32)
    result = tl.zeros([block_n, block_d], tl.float32)
    for part in range(splits):
        at = part * lines + line
        weight = tl.exp2(tl.load(maxima + at, line < lines, float("-inf")) - highest)
        # A split whose slots are all masked has weight 0, and may have written nothing.
        v = tl.load(sums_v + at[:, None] * dim + d[None, :], (weight > 0)[:, None] & lanes, 0.0)
        total += tl.load(sums + at, line < lines, 0.0) * weight
        result += v * weight[:, None]
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    inside = (line < lines)[:, None] & lanes
    tl.store(out + line[:, None] * dim + d[None, :], result.to(out.dtype.element_ty), inside)


def decode_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    visible: int,
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """`decode_attention` as one or two Triton launches; the number of splits follows from the shapes unless given.

    A single query is padded to the 16 rows that tensor cores take: its pass is bound by reading the cache, which the
    padding does not touch, and one form serves all W.
    """
    rows, queries, heads, dim = q.shape
    shared = keys.shape[2]
    lines = queries * (heads // shared)  # queries of one head of keys
    if any(t.stride(-1) != 1 for t in (q, keys, values)):
        raise ValueError("Queries, keys and values need contiguous heads.")
    block_d, wide = max(16, _power_of_two(dim)), q.dtype == torch.float32
    block_q = min(max(16, _power_of_two(lines)), 32 if wide else 64)  # the largest that stay within registers
    if is_invariant():
        block_q = 32  # one kind of instruction for every W
    block_s = (32 if block_d <= 64 else 16) * (1 if wide else 2)
    blocks = -(-lines // block_q)
    programs = rows * shared * blocks
    if splits is None:  # a part is not worth a program where its partial sum is as large as what it reads
        splits = max(1, min(-(-PROGRAMS // programs), visible // max(64, lines)))
    part = PART if is_invariant() else -(-visible // (splits * block_s)) * block_s
    splits = -(-visible // part)

    strides = [n for t in (q, keys, values) for n in t.stride()[:3]]
    unit = next(u for u in (16, 8, 4, 2, 1) if all(n % u == 0 for n in (*strides, dim)))
    strides = [n // unit for n in strides]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = out if splits == 1 else torch.empty(splits, *q.shape, device=q.device)
    maxima, sums = torch.empty(2, *partial.shape[:-1], device=q.device) if splits > 1 else (partial, partial)
    tree = metadata.ancestors is not None
    ancestors = metadata.ancestors if metadata.ancestors is not None else metadata.root[None]  # not read without a tree
    bias = metadata.bias if metadata.bias is not None else metadata.root  # not read either
    scale = dim**-0.5 if scale is None else scale
    _attend[(rows * shared, blocks, splits)](
        q, keys, values, partial, maxima, sums, metadata.root, ancestors.contiguous(), bias, scale, metadata.first,
        visible, part, queries, heads, *ancestors.shape, *strides, dim=dim, group=heads // shared, unit=unit,
        splits=splits, is_tree=tree, has_bias=metadata.bias is not None, widened=not q.is_cuda, block_q=block_q,
        block_s=block_s, block_d=block_d, num_warps=8 if wide and block_d > 64 else 4,
    )  # fmt: skip
    if splits > 1:
        every = rows * queries * heads
        _join[(-(-every // 4),)](
            out, partial, maxima, sums, every,
            dim=dim, splits=splits, block_n=4, block_p=_power_of_two(splits), block_d=block_d,
        )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
