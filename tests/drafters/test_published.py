"""LANTERN's released drafters: made-up files of their layout, against a dense pass written from the description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.tiny import class_gpt, text_gpt
from visar.drafters import DRAFTERS, EagleHead
from visar.drafters.loading import load_drafter
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.rotary import rotate
from visar.families.llamagen.session import LlamaGenSession
from visar.samplers import Target

CAPTIONS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(7))
MASK = torch.arange(4) >= torch.tensor([[0], [2], [3]])  # 4, 2 and 1 valid slots
GUIDANCE = Guidance(2.0)


def released(gpt: LlamaGen) -> dict[str, Tensor]:
    """A file's tensors, with the published keys."""
    g = torch.Generator().manual_seed(1)
    dim, ffn, codes = gpt.config.dim, 40, gpt.config.vocab_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    attention = {f"layers.0.self_attn.{x}_proj.weight": random(dim, dim) for x in "qkvo"}
    mlp = {f"layers.0.mlp.{x}_proj.weight": random(ffn, dim) for x in ("gate", "up")}
    return {
        "embed_tokens.weight": torch.randn(codes, dim, generator=g),
        "fc.weight": random(dim, 2 * dim),
        "fc.bias": random(dim),
        "layers.0.mlp.down_proj.weight": random(dim, ffn),
        "layers.0.post_attention_layernorm.weight": 1 + random(dim),
        **attention,
        **mlp,
    }


def dense(w: dict[str, Tensor], gpt: LlamaGen, features: Tensor, tokens: Tensor) -> Tensor:
    """Predicted features [rows, S, dim]: slot t reads feature t and token t + 1, which is 0 for captions."""
    x = F.linear(torch.cat([w["embed_tokens.weight"][tokens], features], -1), w["fc.weight"], w["fc.bias"])
    q, k, v = (F.linear(x, w[f"layers.0.self_attn.{p}_proj.weight"]).unflatten(-1, (2, -1)) for p in "qkv")
    table = gpt.rotary()[1 : 1 + x.shape[1]].expand(len(x), -1, -1, -1)  # of the token, so one slot further
    q, k = rotate(q, table), rotate(k, table)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    x = x + F.linear(seen, w["layers.0.self_attn.o_proj.weight"])
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w["layers.0.post_attention_layernorm.weight"]
    y = F.silu(F.linear(y, w["layers.0.mlp.gate_proj.weight"])) * F.linear(y, w["layers.0.mlp.up_proj.weight"])
    return x + F.linear(y, w["layers.0.mlp.down_proj.weight"])


def test_it_drafts_as_its_description_says(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gpt = text_gpt()
    torch.nn.init.normal_(gpt.output.weight)
    weights = released(gpt)
    save_file(weights, tmp_path / "drafter.safetensors")
    model = load_drafter(tmp_path / "drafter.safetensors", LlamaGenTarget(gpt, gpt.config.grid))
    assert isinstance(model, EagleHead) and model.config.codes == gpt.config.vocab_size
    length = gpt.config.grid**2
    s = LlamaGenSession(gpt, CAPTIONS, MASK, length=length, window=4, guidance=GUIDANCE, aux_layers=())
    drafter = DRAFTERS["eagle"].attach(s, model, LlamaGenTarget(gpt, gpt.config.grid), 3, 4, (CAPTIONS, MASK))
    tokens = torch.randint(gpt.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    for count in (2, 3, 1, 4):
        n = int(s.lengths[0])
        root = tokens[:, max(n - 1, 0) : max(n - 1, 0) + 1]
        if n:
            found = [drafter.root(tokens, s.lengths), drafter.extend(tokens[:, n : n + 1], None, 1)]
            assert s.features is not None
            true = s.features[:, 1 : s.prefix + n]  # of all slots that were fed: those before the root
            ids = torch.cat([torch.zeros(3, s.prefix - 1, dtype=torch.long), tokens[:, :n]], dim=1).repeat(2, 1)
            first = dense(weights, gpt, true, ids)
            second = dense(
                weights,
                gpt,
                torch.cat([true, first[:, -1:]], 1),
                torch.cat([ids, tokens[:, n : n + 1].repeat(2, 1)], 1),
            )
            for k, (logits, predicted) in enumerate(zip(found, (first, second), strict=True)):
                wanted = GUIDANCE.combine(*gpt.logits(predicted[:, -1:]).chunk(2), s.positions(4)[:, k : k + 1])
                assert torch.allclose(logits, wanted, atol=1e-4), (n, k)
        else:
            drafter.root(tokens, s.lengths)
        s.forward(torch.cat([root, tokens[:, n : n + 3]], dim=1))
        s.commit(torch.full((3,), count))
    assert Target().probs(found[0], s.positions(1)).shape == (3, 1, gpt.config.vocab_size)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_its_trainer_loads(tmp_path: Path, name: str) -> None:
    gpt = class_gpt()
    weights = released(gpt)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    if name.endswith(".bin"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    model = load_drafter(tmp_path, LlamaGenTarget(gpt, gpt.config.grid))
    assert isinstance(model, EagleHead) and model.embedding is not None
    assert torch.equal(model.embedding.weight, weights["embed_tokens.weight"])  # not that of the target's input


def test_bad_files(tmp_path: Path) -> None:
    gpt = class_gpt()
    weights = released(gpt)
    file = tmp_path / "drafter.safetensors"
    for change, message in (
        ({"fc.bias": None}, "'fc.bias' is missing"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "has a tensor 'lm_head.weight'"),
        ({"fc.weight": torch.zeros(8, 8)}, r"'fc.weight' of .* has shape \[8, 8\]"),
        ({"embed_tokens.weight": torch.zeros(9)}, r"'embed_tokens.weight' of .* has shape \[9\]"),
        ({"layers.0.self_attn.k_proj.weight": torch.zeros(4, 9)}, r"'layers.0.self_attn.k_proj.weight' of .* \[4, 9\]"),
        ({"embed_tokens.weight": torch.zeros(9, gpt.config.dim)}, "has 9 codes, the target"),
    ):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, file)
        with pytest.raises(VisarError, match=message):
            load_drafter(file, LlamaGenTarget(gpt, gpt.config.grid))
