"""RandAR: the published layout, and the definition written out plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.any_order import CELLS, CLASSES, GRID, IDS, LENGTH, SIZES, gpt
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.catalogue import catalogue
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import class_of, load_gpt
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.randar_session import RandARSession


def test_published_keys_load_unchanged(tmp_path: Path) -> None:
    model = gpt()
    assert set(model.state_dict()) - set(LlamaGen(**SIZES).state_dict()) == {"pos_instruct_embeddings"}
    save_file(model.state_dict(), path := tmp_path / "randar.safetensors")
    loaded = load_gpt(path, num_heads=2)
    assert type(loaded) is RandAR is class_of(path) and loaded.config.grid == 16
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    listing = catalogue()["randar-l"]
    assert (listing.parameters, listing.licence) == (342_910_976 + 1024, "MIT (code)")
    save_file(model.state_dict() | {"pos_instruct_embeddings": torch.zeros(2, 32)}, path)
    with pytest.raises(VisarError, match="pos_instruct_embeddings"):
        load_gpt(path, num_heads=2)


def turned(x: Tensor, cell: int) -> Tensor:
    """Vectors [..., d], whose neighbouring pairs are turned: the first half by the row, the rest by the column."""
    quarter = x.shape[-1] // 4
    rates = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    angles = torch.cat([cell // GRID * rates, cell % GRID * rates])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt() * weight


def plain(model: RandAR, label: int, tokens: list[int], cells: list[int]) -> Tensor:
    """Logits [n + 1, V], float64, by the definition, one input after the other, without visar's layers.

    The inputs are the class, whose queries and keys are 0, and then a query and a token of each cell.
    """
    w = {key: value.double() for key, value in model.state_dict().items()}
    inputs, at = [w["cls_embedding.embedding_table.weight"][label]], [-1]
    for token, cell in zip([*tokens, -1], cells, strict=True):
        query = turned(w["pos_instruct_embeddings"].view(2, -1), cell).flatten()
        inputs, at = [*inputs, query, w["tok_embeddings.weight"][token]], [*at, cell, cell]
    for i in range(2):
        part = {key.removeprefix(f"layers.{i}."): value for key, value in w.items()}
        keys, read, out = [], [], []
        for x, cell in zip(inputs, at, strict=True):
            qkv = (part["attention.wqkv.weight"] @ normed(x, part["attention_norm.weight"])).view(3, 2, -1)
            q, k = (turned(one, cell) if cell >= 0 else one * 0 for one in qkv[:2])
            keys.append(k)
            read.append(qkv[2])
            scores = torch.einsum("hd,nhd->hn", q, torch.stack(keys)) * q.shape[-1] ** -0.5
            heads = torch.einsum("hn,nhd->hd", scores.softmax(-1), torch.stack(read))
            x = x + part["attention.wo.weight"] @ heads.flatten()
            y = normed(x, part["ffn_norm.weight"])
            gate = part["feed_forward.w1.weight"] @ y
            up = gate * gate.sigmoid() * (part["feed_forward.w3.weight"] @ y)
            out.append(x + part["feed_forward.w2.weight"] @ up)
        inputs = out
    return torch.stack([w["output.weight"] @ normed(x, w["norm.weight"]) for x in inputs[1::2]])


@pytest.mark.parametrize("n", [0, 7, 15])
def test_logits_are_those_of_the_definition(n: int) -> None:
    found = gpt()(CLASSES, IDS[:, :n], None, CELLS).double()
    own = [plain(gpt(), int(c), IDS[b, :n].tolist(), CELLS[b, : n + 1].tolist()) for b, c in enumerate(CLASSES)]
    torch.testing.assert_close(found, torch.stack(own), rtol=0, atol=2e-5)


def test_captions_and_guidance_that_grows() -> None:
    model = gpt(condition="text", condition_length=4, caption_features=6)
    captions, mask = torch.randn(3, 4, 6), torch.arange(4) >= torch.tensor([[0], [2], [3]])
    null = model.cls_embedding.null_like(captions)
    cond, uncond = (model(c, IDS[:, :-1], mask, CELLS) for c in (captions, null))
    for grows, scale in ((False, 3), (True, 1 + 2 * torch.arange(LENGTH)[:, None] / LENGTH)):
        named: Any = dict(length=LENGTH, window=5, grid=GRID, guidance=Guidance(3.0, -1, grows))
        s = RandARSession(model, captions, mask, CELLS, **named)
        s.forward(IDS[:, [0, 0, 1, 2, 3]])
        s.commit(torch.full((3,), 4))
        wanted = uncond + scale * (cond - uncond)
        torch.testing.assert_close(s.forward(IDS[:, 3:8]), wanted[:, 4:9], rtol=0, atol=1e-4)
