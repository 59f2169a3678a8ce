"""Folders in Meta's own layout, written of a tiny model of transformers by hand, against that model and against a plain
pass with Meta's arithmetic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.hf_folders import check_commands
from tests.helpers.tiny_chameleon import chameleon_tokenizer
from tests.helpers.tiny_hf import PROMPTS
from tests.helpers.tiny_meta import HEADS, meta_parts, model_of, pixels_of, write
from visar.errors import VisarError
from visar.families.hf.chameleon import ChameleonFamily
from visar.families.hf.vqgan import VQGAN
from visar.families.source import Source
from visar.generation.model import ImageModel


def fused(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices joined as Meta's code joins them when it loads."""
    for layer in range(2):
        for names, to in (("wq wk wv", "attention.wqkv"), ("w1 w3", "feed_forward.w13")):
            own = [f"layers.{layer}.{to.split('.')[0]}.{name}.weight" for name in names.split()]
            part[f"layers.{layer}.{to}.weight"] = torch.cat([part.pop(name) for name in own])
    return part


def meta_logits(state: Mapping[str, Tensor], ids: Tensor, swin: bool, kv_heads: int = HEADS) -> Tensor:
    """Logits [T, V] of ids [T] by the names and the arithmetic of Meta's code: pairs are complex numbers that turn."""

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    def heads(layer: str, part: str, x: Tensor, count: int) -> Tensor:
        x = (x @ state[f"{layer}.attention.w{part}.weight"].T).unflatten(-1, (count, -1))
        if part == "v":
            return x
        name = f"{layer}.attention.{part}_normalization"
        x = F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
        angle = torch.arange(len(x))[:, None, None] * 1e4 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    x = state["tok_embeddings.weight"][ids]
    for layer in ("layers.0", "layers.1"):
        y = x if swin else norm(f"{layer}.attention_norm", x)
        q, k, v = (heads(layer, p, y, n) for p, n in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)))
        k, v = (t.repeat_interleave(HEADS // kv_heads, 1) for t in (k, v))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(0, 1).flatten(1) @ state[f"{layer}.attention.wo.weight"].T
        x = x + (norm(f"{layer}.attention_norm", y) if swin else y)
        y = x if swin else norm(f"{layer}.ffn_norm", x)
        w1, w2, w3 = (state[f"{layer}.feed_forward.w{i}.weight"].T for i in (1, 2, 3))
        y = (F.silu(y @ w1) * (y @ w3)) @ w2
        x = x + (norm(f"{layer}.ffn_norm", y) if swin else y)
    return norm("norm", x) @ state["output.weight"].T


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one file": (1, {}),
    "joined matrices": (1, {}),
    "two parts": (2, {"swin_norm": True}),
    "joined, two parts": (2, {}),
    "grouped keys": (1, {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_that_of_the_other_layout(layout: str, tmp_path: Path) -> None:
    number, config = LAYOUTS[layout]
    model = model_of(number, **config)
    parts = meta_parts(model, number)
    if number == 1:
        ids = torch.tensor([0, 24, 30, 5, 9, 41, 7])
        plain = meta_logits(parts[0], ids, model.config.swin_norm, model.config.num_key_value_heads)
        with torch.no_grad():
            torch.testing.assert_close(model.lm_head(model.model(ids[None])[0])[0], plain, atol=2e-5, rtol=1e-5)
    if layout.startswith("joined"):
        parts = [fused(part) for part in parts]
    found: Any = ImageModel.load(write(tmp_path, model, parts)).family
    assert (found.name, found.pixels, found.layout.length) == ("chameleon", (48, 48), 9)
    own, wanted = found.model.state_dict(), model.state_dict()
    assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in wanted)
    assert not any(t.is_meta for t in found.model.buffers()) and not found.model.training
    ids = torch.tensor([[0, 24, 30, 5, 9, 41]])
    torch.testing.assert_close(found.model.model(ids)[0], model.model(ids)[0], atol=0, rtol=0)


def test_tokens_and_pixels_are_those_of_the_other_layout(tmp_path: Path) -> None:
    model = model_of()
    vqgan = VQGAN.of(pixels_of(model), tmp_path)
    wanted = ImageModel(ChameleonFamily(model, chameleon_tokenizer(), vqgan))
    found = ImageModel.load(write(tmp_path / "anole", model, meta_parts(model)))
    settings: dict[str, Any] = dict(sampler="scd", seed=4, output_type="pt")
    a, b = found.generate(list(PROMPTS), **settings), wanted.generate(list(PROMPTS), **settings)
    assert torch.equal(a.tokens, b.tokens) and len(a.tokens.unique()) > 5
    assert torch.equal(a.images, b.images)


def test_the_folder_of_the_weights_will_do_and_files_keep_their_dtype(tmp_path: Path) -> None:
    model = model_of()
    part: dict[str, Any] = {key: value.bfloat16() for key, value in meta_parts(model)[0].items()}
    part["rope.freqs"] = None  # as Anole's training writes it
    write(tmp_path / "lumina-too", model, [part])
    (tmp_path / "lumina-too/models/7b/config.json").write_text('{"model_type": "chameleon"}')
    found: Any = ImageModel.load(tmp_path / "lumina-too/models/7b").family
    assert found.name == "chameleon" and {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert found.components["vqgan"].embedding.weight.dtype == torch.float32
    with pytest.raises(VisarError, match=r"lumina-too holds two models or more; give one of them, such as .*30b"):
        shutil.copytree(tmp_path / "lumina-too/models/7b", tmp_path / "lumina-too/models/30b")
        ImageModel.load(tmp_path / "lumina-too")


def test_norms_that_differ_between_parts_are_averaged(tmp_path: Path) -> None:
    """As transformers does; each part of Meta's code applies its own."""
    model = model_of(2)
    parts = meta_parts(model, 2)
    parts[1]["norm.weight"] += 0.5
    found: Any = ImageModel.load(write(tmp_path, model, parts)).family
    torch.testing.assert_close(found.model.model.norm.weight, model.model.norm.weight + 0.25)


@pytest.mark.slow
def test_the_command_line_takes_the_layout(tmp_path: Path) -> None:
    model = model_of()
    check_commands(write(tmp_path / "anole", model, meta_parts(model)), tmp_path, (48, 48), samplers="ar,scd")


def test_a_repository_in_this_layout_is_downloaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: list[list[str]] = []

    def download(_: str, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        if not path.exists():
            model = model_of()
            write(path, model, meta_parts(model))
        return str(path)

    path = tmp_path / "model"
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert ImageModel.load("GAIR/Anole-7b-v0.1").family.name == "chameleon"
    patterns = [pattern for one in asked for pattern in one]
    files = [str(file.relative_to(path)) for file in path.rglob("*.*")]
    for name in ("models/7b/consolidated.pth", "tokenizer/vqgan.ckpt", "tokenizer/vqgan.yaml", "models/7b/params.json"):
        assert name in files and any(fnmatch(name, pattern) for pattern in patterns)


class Planted:
    """What runs a command when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.system, ("touch planted",)


Spoil = Callable[[Path], Any]


def without(name: str) -> Spoil:
    return lambda path: (path / name).unlink()


def text(name: str, content: str) -> Spoil:
    return lambda path: (path / name).write_text(content)


def changed(change: Callable[[Any], Any], name: str = "models/7b/consolidated.01.pth") -> Spoil:
    """Other content of a file of weights."""

    def edit(path: Path) -> None:
        state = torch.load(path / name)
        change(state)
        torch.save(state, path / name)

    return edit


def both(change: Callable[[Any], Any]) -> Spoil:
    """Other content of both parts."""
    edits = [changed(change, f"models/7b/consolidated.{n:02d}.pth") for n in (0, 1)]
    return lambda path: [edit(path) for edit in edits]


def without_encoder(content: Any) -> None:
    for key in [key for key in content["state_dict"] if key.startswith("encoder.")]:
        del content["state_dict"][key]


def params(**values: Any) -> Spoil:
    def edit(path: Path) -> None:
        file = path / "models/7b/params.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"model": found["model"] | values}))

    return edit


WQ, NORM = "layers.1.attention.wq.weight", "layers.0.attention.q_normalization.weight"
DAMAGE: dict[str, tuple[Spoil, str]] = {
    "no weights": (lambda path: shutil.rmtree(path / "models"), r"neither a config\.json.*nor a models/7b/conso"),
    "no params": (without("models/7b/params.json"), r"There is no .*params\.json, which Meta's layout"),
    "no tokenizer": (without("tokenizer/text_tokenizer.json"), r"There is no .*text_tokenizer\.json, which Meta's"),
    "no pixels": (without("tokenizer/vqgan.ckpt"), r"There is no .*vqgan\.ckpt, which Meta's"),
    "no yaml": (without("tokenizer/vqgan.yaml"), r"There is no .*vqgan\.yaml, which Meta's"),
    "a part missing": (without("models/7b/consolidated.01.pth"), r"has consolidated\.00\.pth, and by .* in 2 parts"),
    "a part more": (
        lambda path: shutil.copy(path / "models/7b/consolidated.01.pth", path / "models/7b/consolidated.02.pth"),
        r"00\.pth, consolidated\.01\.pth, consolidated\.02\.pth, and by its params\.json it is in 2 parts",
    ),
    "a tensor of one part": (changed(lambda s: s.pop(WQ)), r"wq\.weight' is missing from .*consolidated\.01\.pth"),
    "a tensor more in one": (changed(lambda s: s.update(more=s[WQ])), r"01\.pth has a tensor 'more' that consolidated"),
    "parts of other sizes": (changed(lambda s: s.update({WQ: s[WQ][:8]})), r"01\.pth has shape \[8, 32\], and \[16"),
    "a tensor more": (
        both(lambda s: s.update(more=s[WQ])),
        r"has a tensor 'more' that this model does not",
    ),
    "norms of all heads": (
        both(lambda s: s.update({NORM: torch.ones(4, 8)})),
        r"q_normalization\.weight' of .* has shape \[4, 8\], expected \[8\]",
    ),
    "no numbers": (changed(lambda s: s.update({WQ: s[WQ] * torch.nan})), "holds a NaN or an infinity"),
    "other heads": (params(n_heads=2, n_kv_heads=2), r"q_normalization\.weight' of .* has shape"),
    "odd heads": (params(n_heads=5), r"params\.json describes no decoder: 32 numbers in 5 heads"),
    "layers": (params(n_layers=3), r"says 3 layers, and the weights have 2"),
    "too many layers": (params(n_layers=10**9), r"params\.json: n_layers should be less than"),
    "another width": (params(dim=64), r"has shape .*, expected "),
    "a text for a number": (params(dim="wide"), r"params\.json: dim should be a valid integer, not 'wide'"),
    "no JSON": (text("models/7b/params.json", "{"), r"Cannot read .*params\.json: it is not valid JSON"),
    "a list": (text("models/7b/consolidate_params.json", "[]"), r"Cannot read .*consolidate_params\.json"),
    "a tokenizer that is none": (text("tokenizer/text_tokenizer.json", "{}"), "Could not load the tokenizer from"),
    "a yaml that is none": (text("tokenizer/vqgan.yaml", "a: [1"), r"it has no model\.params\.ddconfig\.resolution"),
    "another yaml": (text("tokenizer/vqgan.yaml", "model: 3"), r"it has no model\.params\.ddconfig\.resolution"),
    "odd pixels": (
        text("tokenizer/vqgan.yaml", "model: {params: {ddconfig: {resolution: 50}}}"),
        r"says images of 50 pixels, and a code is 16 of them",
    ),
    "code in a file": (changed(lambda s: s.update(planted=Planted())), r"reading it could run code"),
    "code in the pixels": (
        changed(lambda s: s.update(planted=Planted()), "tokenizer/vqgan.ckpt"), r"reading it could run code",
    ),
    "no encoder": (changed(without_encoder, "tokenizer/vqgan.ckpt"), r"vqgan\.ckpt holds no encoder of images"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = model_of(2)
    return write(tmp_path_factory.mktemp("meta") / "anole", model, meta_parts(model, 2))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    spoil, message = DAMAGE[damage]
    spoil(path)
    with pytest.raises(VisarError, match=message) as caught:
        ImageModel.load(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "planted").exists()


def test_another_model_of_meta_is_not_taken_for_it(tmp_path: Path) -> None:
    """A Llama has `consolidated.00.pth` and `params.json` too, and no tokenizers of images."""
    (tmp_path / "consolidated.00.pth").touch()
    assert not ChameleonFamily.recognises(Source("llama", tmp_path))
