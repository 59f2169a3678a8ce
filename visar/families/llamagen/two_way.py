"""LlamaGen with two-way heads: NAR (He et al. 2025, arXiv:2503.10696), FlashAR (Zhou et al. 2026, arXiv:2605.09430).

The trunk predicts the token to the right of an input; a branch of further blocks predicts the token below it. A cell is
sampled from both predictions, that of its left and that of its upper neighbour, so all cells of a diagonal can be
sampled in one pass: 2n - 1 passes for n x n tokens. The module has the published keys. It is another model than its
trunk, with a distribution of its own: an input attends to all cells up to its diagonal, and the heads are mixed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.component import unfilled
from visar.engine.decoder import Attend
from visar.engine.diagonals import Neighbours, whole
from visar.engine.layers import Linear, RMSNorm
from visar.errors import VisarError
from visar.families.llamagen.gpt import Block, LlamaGen, attended
from visar.families.llamagen.rotary import turned
from visar.reading import Count, Side, Size

Mixing = Literal["mean", "scalar", "gate"]
MOST = 6.0  # of the gate's standardised inputs


class TwoWayLlamaGen(LlamaGen):
    """A LlamaGen whose `num_layers` blocks are the trunk, and `vertical_layers` more a branch.

    The branch begins with what the trunk's block `vertical_start` reads, or after the last one. `mixing` says how the
    two predictions of a cell are weighed: "mean" (NAR), one learnt number ("scalar"), or a network of the two
    predictions ("gate", FlashAR), `gate_width` wide.
    """

    scan: ClassVar[str] = "diagonal"

    def __init__(
        self,
        vocab_size: Size = 16384,
        dim: Size = 768,
        num_layers: Count = 12,
        num_heads: Size = 12,
        ffn: Size = 2048,
        condition: Literal["class", "text"] = "class",
        condition_length: Size = 1,
        classes: Size = 1000,
        caption_features: Size = 2048,
        grid: Side = 16,
        vertical_layers: Count = 1,
        vertical_start: Count = 12,
        mixing: Mixing = "mean",
        gate_width: Size = 32,
    ):
        super().__init__(
            vocab_size, dim, num_layers, num_heads, ffn, condition, condition_length, classes, caption_features, grid
        )
        if not 0 <= vertical_start <= num_layers:
            raise VisarError(f"A branch starts at a layer from 0 to {num_layers}, not {vertical_start}.")
        self.layers.extend(Block(dim, num_heads, ffn) for _ in range(vertical_layers))
        self.medusa_norm = RMSNorm(dim)
        self.medusa_output = Linear(dim, vocab_size, bias=False)
        self.hv_mix_logit = nn.Parameter(torch.zeros(())) if mixing == "scalar" else None
        self.hv_gate_mlp = None
        if mixing == "gate":
            first, last = Linear(2 * vocab_size, gate_width, bias=False), Linear(gate_width, 1)
            nn.init.normal_(first.weight, std=(2 * vocab_size) ** -0.5)
            nn.init.zeros_(last.weight)  # the mean, at first
            nn.init.zeros_(last.bias)
            self.hv_gate_mlp = nn.Sequential(first, nn.SiLU(), last)

    def run(self, x: Tensor, table: Tensor, attend: Attend, aux_layers: Collection[int] = ()) -> Tensor:
        """As `LlamaGen.run`, but [B, W, 2 * dim]: what the head to the right reads, then what the one below reads."""
        right = below = x
        for i in range(self.config.num_layers):
            if i == self.config.vertical_start:
                below = right
            right = self.layers[i](right, table, attend, i)
        if self.config.vertical_start == self.config.num_layers:
            below = right
        for i in range(self.config.num_layers, len(self.layers)):
            below = self.layers[i](below, table, attend, i)
        return torch.cat([self.norm(right), self.medusa_norm(below)], dim=-1)

    def predicted(self, hidden: Tensor, at: Neighbours) -> Tensor:
        """Logits [B, W, vocab_size], fp32, of cells with the neighbours `at` [B, W] or [W] among the inputs, of which
        `hidden` [B, inputs, 2 * dim] is what `run` gave."""
        right, below = (
            part.gather(1, index.expand(len(part), -1)[..., None].expand(-1, -1, part.shape[-1]))
            for part, index in zip(hidden.chunk(2, dim=-1), (at.left, at.above), strict=True)
        )
        return self.mixed(self.output(right).float(), self.medusa_output(below).float(), at)

    def mixed(self, right: Tensor, below: Tensor, at: Neighbours) -> Tensor:
        """The logits of cells from those of either head, [B, W, V]; one at the edge has one neighbour's alone."""
        both = at.has_left & at.has_above
        share = torch.where(both, self.share(right, below), at.has_left.to(right.dtype))
        return torch.lerp(below, right, share[..., None])

    def share(self, right: Tensor, below: Tensor) -> Tensor:
        """The weight [B, W], in (0, 1), of the head to the right, for the logits of both, [B, W, V]."""
        if self.hv_gate_mlp is not None:
            with torch.no_grad():  # standardised, in place: these are the largest tensors of a pass
                x = torch.cat([right, below], dim=-1)
                x.sub_(x.mean(-1, keepdim=True))
                scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
                x.div_(scale.clamp_min(1e-3)).clamp_(-MOST, MOST)
            gate = self.hv_gate_mlp(x.to(self.medusa_norm.weight.dtype))
            return gate[..., 0].float().sigmoid()
        half = right.new_zeros(()) if self.hv_mix_logit is None else self.hv_mix_logit.float()
        return half.sigmoid().expand(right.shape[:-1])

    def when(self, grid: int | None = None) -> Tensor:
        """When each slot is there, [T + grid**2]: its diagonal, and below 0, one after the other, for the condition."""
        side = grid or self.config.grid
        cell = torch.arange(side * side, device=self.output.weight.device)
        condition = torch.arange(-self.config.condition_length, 0, device=cell.device)
        return torch.cat([condition, cell // side + cell % side])

    def forward(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Logits [B, N, vocab_size] of all N = grid**2 tokens at full length, without a cache.

        As `LlamaGen.forward`, but `tokens` [B, N - 1] are all but the last, in raster order: a cell depends on those of
        the diagonals before its own.
        """
        prefix, length = self.config.condition_length, self.config.condition_length + self.config.grid**2 - 1
        x = torch.cat([self.cls_embedding(condition), self.tok_embeddings(tokens)], dim=1)
        if x.shape[1] != length:
            raise VisarError(f"A two-way model reads {length - prefix} tokens of an image, not {tokens.shape[1]}.")
        when = self.when()[:length]
        mask = (when <= when[:, None]).expand(len(x), 1, -1, -1)
        if condition_mask is not None:
            valid = F.pad(condition_mask.bool(), (0, length - prefix), value=True)
            mask = mask & (valid[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=x.device))
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -torch.inf)

        def attend(_: int, qkv: Tensor, turns: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in turned(qkv, turns))
            return attended(q, k, v, bias.to(q.dtype)).transpose(1, 2)

        hidden = self.run(x, self.rotary()[:length].expand(len(x), -1, -1, -1), attend)[:, prefix - 1 :]
        return self.predicted(hidden, whole(self.config.grid, x.device))

    @property
    def trunk(self) -> LlamaGen:
        """The trunk as a LlamaGen, which shares the weights; it is the model that the branch was trained for only as
        long as they were not trained with it."""
        own = ("vertical_layers", "vertical_start", "mixing", "gate_width")
        with unfilled():
            view = LlamaGen(**{k: v for k, v in self.config.items() if k not in own} | {"num_layers": 0})
        for shared in ("tok_embeddings", "cls_embedding", "norm", "output"):
            setattr(view, shared, getattr(self, shared))
        view.config = view.config.replace(num_layers=self.config.num_layers)
        view.layers = nn.ModuleList(list(self.layers)[: self.config.num_layers])
        return view.train(self.training)


BRANCH = ("medusa_", "hv_")  # of the keys that a trunk does not have, next to further layers


def is_branch(key: str, num_layers: int) -> bool:
    """Whether a parameter of a two-way model with a trunk of so many layers is no part of the trunk."""
    part, _, rest = key.partition(".")
    return key.startswith(BRANCH) or (part == "layers" and int(rest.partition(".")[0]) >= num_layers)


def two_way(trunk: LlamaGen, vertical_layers: int = 1, mixing: Mixing = "gate") -> TwoWayLlamaGen:
    """A two-way model to train, around a copy of a trunk: the branch runs next to the trunk's last layers.

    As FlashAR does, the branch starts with the weights of these layers, of the last norm and of the output head.
    Raises `VisarError` for more layers than the trunk has.
    """
    c = trunk.config
    if not 1 <= vertical_layers <= c.num_layers:
        raise VisarError(f"The branch has 1 to {c.num_layers} layers, as the trunk, not {vertical_layers}.")
    start, width = c.num_layers - vertical_layers, max(32, c.vocab_size // 512)
    made = TwoWayLlamaGen(
        **c, vertical_layers=vertical_layers, vertical_start=start, mixing=mixing, gate_width=width
    ).to(trunk.device)
    state = {key: value.float() for key, value in trunk.state_dict().items()}
    for key, value in list(state.items()):
        part, _, rest = key.partition(".")
        if part == "layers" and int(rest.partition(".")[0]) >= start:
            number, _, name = rest.partition(".")
            state[f"layers.{int(number) + vertical_layers}.{name}"] = value
    state |= {"medusa_norm.weight": state["norm.weight"], "medusa_output.weight": state["output.weight"]}
    made.load_state_dict(state, strict=False)  # all but the gate
    return made
