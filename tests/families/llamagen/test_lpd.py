"""LPD: the authors' keys, and the definition written out plainly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.any_order import CELLS, CLASSES, IDS, VOCAB, gpt
from visar.errors import VisarError
from visar.families.catalogue import catalogue
from visar.families.llamagen.loading import class_of, load_gpt
from visar.families.llamagen.lpd import LPD, their_keys


def published(grid: int = 4) -> dict[str, Tensor]:
    """The weights by the authors' names, of which the vector without a class is its own."""
    model = gpt(LPD, grid)
    names = their_keys(model)
    state = {names[key]: value.clone() for key, value in model.state_dict().items()}
    state["class_emb.weight"], state["fake_latent"] = state["class_emb.weight"].split([7, 1])
    return state


def test_published_keys_load_unchanged(tmp_path: Path) -> None:
    torch.save({"model": published(), "epoch": 449}, path := tmp_path / "lpd.pth")
    loaded, model = load_gpt(path, num_heads=2), gpt(LPD)
    assert type(loaded) is LPD is class_of(path) and loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    listed = {name: catalogue()[name].parameters for name in ("lpd-l", "lpd-xl", "lpd-xxl")}
    assert listed == {"lpd-l": 337_157_120, "lpd-xl": 751_947_520, "lpd-xxl": 1_412_184_576}  # as the authors count


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fake_latent", None, "Tensor 'fake_latent' is missing"),
        ("blocks.1.attn.proj.bias", None, "Tensor 'blocks.1.attn.proj.bias' is missing"),
        ("head.bias", torch.zeros(VOCAB), "has a tensor 'head.bias' that this model does not"),
        ("pos_embed", torch.zeros(1, 16, 32), "has learnt the positions of 15 cells, and not of 3 x 3"),
        ("mask_token", torch.zeros(1, 32), "Tensor 'mask_token' of"),
        ("fake_latent", torch.zeros(2, 32), "Tensor 'fake_latent' of .* must be one vector of 32 numbers"),
    ],
)
def test_other_keys_are_refused(tmp_path: Path, key: str, value: Tensor | None, message: str) -> None:
    state = published()
    if value is None:
        del state[key]
    else:
        state[key] = value
    torch.save({"model": state}, path := tmp_path / "lpd.pth")
    with pytest.raises(VisarError, match=message):
        load_gpt(path, num_heads=2)


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    torch.save({"model": published()}, path := tmp_path / "lpd.pth")
    with pytest.raises(VisarError, match="has learnt the positions of 16 cells, and not of 8 x 8"):
        load_gpt(path, num_heads=2, grid=8)
    with pytest.raises(VisarError, match="a size that was never published: give its number of heads"):
        load_gpt(path)
    with pytest.raises(VisarError, match="has learnt the positions of 4 x 4 cells, not of 3 x 3"):
        gpt(LPD).rotary(3)
    with pytest.raises(VisarError, match="An LPD takes classes, not 'text'"):
        LPD(condition="text", condition_length=4)


def norm(x: Tensor, part: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], 1e-6)


def plain(label: int, tokens: list[int], cells: list[int]) -> Tensor:
    """Logits [n + 1, V], float64, by the definition, for each cell from a sequence of its own: what was sampled, and
    the query."""
    w = {key: value.double() for key, value in published().items()}
    place, logits = w["pos_embed"][0], []
    for n, cell in enumerate(cells):
        read = [w["class_emb.weight"][label] + place[0]]
        read += [w["token_emb.weight"][t] + place[1 + c] for t, c in zip(tokens[:n], cells[:n], strict=True)]
        x = norm(torch.stack([*read, w["mask_token"][0, 0] + place[1 + cell]]), w, "z_proj_ln")
        for i in range(2):
            part = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items()}
            qkv = norm(x, part, "norm1") @ part["attn.qkv.weight"].T + part["attn.qkv.bias"]
            q, k, v = qkv.view(len(x), 3, 2, -1).permute(1, 2, 0, 3)
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            heads = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
            x = x + heads.transpose(0, 1).flatten(1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
            up = norm(x, part, "norm2") @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
            x = x + F.gelu(up) @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
        logits.append(w["head.weight"] @ norm(x[-1], w, "norm"))
    return torch.stack(logits)


@pytest.mark.parametrize("n", [0, 7, 15])
def test_logits_are_those_of_the_definition(n: int) -> None:
    found = gpt(LPD)(CLASSES, IDS[:, :n], None, CELLS).double()
    own = [plain(int(c), IDS[b, :n].tolist(), CELLS[b, : n + 1].tolist()) for b, c in enumerate(CLASSES)]
    torch.testing.assert_close(found, torch.stack(own), rtol=0, atol=1e-4)
