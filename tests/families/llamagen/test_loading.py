"""Published files: every nesting and leftover they come with, sizes read from shapes, and what broken files say."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.published import gpt_arguments, vq_arguments
from visar.cli import main
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import gpt_config, load_gpt, load_vq
from visar.families.llamagen.specs import MODELS, TOKENIZERS, match_heads, published_grid
from visar.families.llamagen.vq import VQConfig, VQModel
from visar.families.source import resolve
from visar.families.weights import load_state
from visar.generation.model import ImageModel

TINY: dict[str, dict[str, Any]] = {
    "class": dict(vocab_size=11, dim=32, num_layers=2, num_heads=2, ffn=48, condition="class", classes=5, grid=3),
    "text": dict(
        vocab_size=11, dim=32, num_layers=3, num_heads=4, ffn=40, condition="text", condition_length=6,
        caption_features=12, grid=3,
    ),
}  # fmt: skip
VQ = dict(codebook_size=24, code_dim=4, channels=32, channel_multipliers=(1, 2, 2), res_blocks=1, z_channels=16)


def gpt_state(kind: str = "class") -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {k: t.clone() for k, t in LlamaGen(**TINY[kind]).state_dict().items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def check(gpt: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """The module holds exactly these tensors, for real, and is ready to run."""
    loaded = gpt.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert not gpt.training
    assert not any(t.is_meta for t in (*gpt.parameters(), *gpt.buffers()))
    assert not any(p.requires_grad for p in gpt.parameters())


WRAPS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(lr=1e-4)},
    "module": lambda s: {"module": s, "steps": 3},
    "state_dict": lambda s: {"state_dict": s},
    "ddp": lambda s: {"model": {f"module.{k}": t for k, t in s.items()}},
    "compiled ddp": lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()},
    "ema beside": lambda s: {"ema": {k: t + 1 for k, t in s.items()}, "model": s},
    "compiled blocks": lambda s: {k.replace("layers.0.", "layers.0._orig_mod."): t for k, t in s.items()},
    "FSDP": lambda s: {f"_fsdp_wrapped_module.{k}".replace("0.", "0._fsdp_wrapped_module."): t for k, t in s.items()},
    "checkpointed": lambda s: {k.replace("1.", "1._checkpoint_wrapped_module."): t for k, t in s.items()},
    "modules inside": lambda s: {k.replace("layers.0.", "layers.0.module."): t for k, t in s.items()},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": t for k, t in s.items()}, "epoch": 3, "callbacks": {}},
    "Lightning, compiled": lambda s: {"state_dict": {f"model._orig_mod.{k}": t for k, t in s.items()}},
    "Fabric": lambda s: {"model": {f"_forward_module.{k}": t for k, t in s.items()}},
    "PEFT": lambda s: {f"base_model.model.{k}": t for k, t in s.items()},
    "swa_utils": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": t for k, t in s.items()}},
    "two levels": lambda s: {"model": {"state_dict": {f"module.{k}": t for k, t in s.items()}}},
    "mixed dtypes": lambda s: {k: t.double() if "norm" in k else t for k, t in s.items()},
    "stale": lambda s: {
        **s,
        "freqs_cis": torch.zeros(9, 4),
        "layers.0.attention.kv_cache.k_cache": torch.full((2,), torch.nan),
    },
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", TINY)
def test_every_nesting_loads(kind: str, wrap: str, tmp_path: Path) -> None:
    state = gpt_state(kind)
    gpt = load_gpt(saved(WRAPS[wrap](state), tmp_path / "gpt.pt"), grid=3, num_heads=TINY[kind]["num_heads"])
    check(gpt, state)
    assert {k: gpt.config[k] for k in TINY[kind]} == TINY[kind]
    condition = torch.tensor([1]) if kind == "class" else torch.randn(1, 6, 12)
    torch.manual_seed(0)
    original, ids = LlamaGen(**TINY[kind]), torch.tensor([[1, 2, 3]])
    assert torch.equal(gpt(condition, ids), original(condition, ids))


def test_old_file_format_and_safetensors_load(tmp_path: Path) -> None:
    state = gpt_state()
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        check(load_gpt(tmp_path / name, num_heads=2), state)


def test_ema_is_taken_only_on_request(tmp_path: Path) -> None:
    state = gpt_state()
    both = saved({"model": state, "ema": {k: t + 1 for k, t in state.items()}}, tmp_path / "both.pt")
    assert torch.equal(load_state(both, ema=True)["norm.weight"], state["norm.weight"] + 1)
    assert torch.equal(load_state(both)["norm.weight"], state["norm.weight"])
    with pytest.raises(VisarError, match=r"one\.pt has no 'ema' .*; it has: model; give ema=False \(--no-ema\)"):
        load_state(saved({"model": state}, tmp_path / "one.pt"), ema=True)
    alone = saved({"ema": {f"module.{k}": t for k, t in state.items()}, "steps": 3}, tmp_path / "alone.pt")
    check(load_gpt(alone, num_heads=2, ema=True), state)
    with pytest.raises(VisarError, match=r"alone\.pt has no 'model' .*; it has: ema, steps; give ema=True \(--ema\)"):
        load_gpt(alone, num_heads=2)


def test_averaged_weights_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer's are taken where it has them."""
    state, vq = gpt_state(), VQModel(**VQ).state_dict()
    gpt = saved({"model": state, "ema": {k: t + 1 for k, t in state.items()}}, tmp_path / "gpt.pt")
    for content in ({"model": vq}, {"ema": vq}):
        file = saved(content, tmp_path / "vq.pt")
        model = ImageModel.load(gpt, vq=file, num_heads=2, image_size=12, ema=True)
        assert torch.equal(model.family.model.norm.weight, state["norm.weight"] + 1)
    given = [
        "generate",
        "--class",
        "1",
        "--model",
        str(gpt),
        "--vq",
        str(file),
        "--num-heads",
        "2",
        "--image-size",
        "12",
    ]
    assert main([*given, "--sampler", "ar", "--ema", "-o", str(tmp_path / "a.png")]) == 0
    assert main([*given, "--sampler", "ar", "-o", str(tmp_path / "b.png")]) == 2
    assert "has no 'model'" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
    with pytest.raises(VisarError, match="and ema are given with a published file"):
        ImageModel.load("icons", ema=True)


def test_names_that_are_no_weights_of_a_model(tmp_path: Path) -> None:
    state = gpt_state()
    for more, message in (
        ({"layers.0.attention.wqkv.lora_A.default.weight": torch.ones(2, 2)}, "holds LoRA adapters, .* merge them"),
        ({"_flat_param": torch.ones(2)}, "holds flattened shards of FSDP"),
        ({"module.norm.weight": torch.ones(32)}, "holds 'norm.weight' twice, once as 'module.norm.weight'"),
        ({3: torch.ones(2)}, "holds no weights by name"),
        ({"layers.99999999999.ffn_norm.weight": torch.ones(2)}, "is missing from"),
        ({"layers.².ffn_norm.weight": torch.ones(2)}, "is missing from"),
    ):
        with pytest.raises(VisarError, match=message):
            load_gpt(saved(state | more, tmp_path / "gpt.pt"), num_heads=2)
    with pytest.raises(VisarError, match=r"has shape \[0, 32\], and so no numbers"):
        load_gpt(saved(state | {"tok_embeddings.weight": torch.ones(0, 32)}, tmp_path / "gpt.pt"), num_heads=2)
    other = saved({"wte.weight": torch.ones(2, 2), "h.0.ln": torch.ones(2)}, tmp_path / "gpt.pt")
    with pytest.raises(VisarError, match=r"expected a GPT of LlamaGen; it has 'h\.0\.ln', 'wte\.weight'"):
        load_gpt(other, num_heads=2)


def test_precision_on_return(tmp_path: Path) -> None:
    half = saved({k: t.bfloat16() for k, t in gpt_state("text").items()}, tmp_path / "half.pt")
    for wanted in (torch.float32, torch.float16):
        gpt = load_gpt(half, num_heads=4, dtype=wanted)
        assert {t.dtype for t in gpt.state_dict().values()} == {wanted}
    assert {t.dtype for t in load_gpt(half, num_heads=4).state_dict().values()} == {torch.float32}
    assert load_state(half, dtype=None)["norm.weight"].dtype == torch.bfloat16


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """A mapped file that is overwritten would change, or crash, a model that still reads it."""
    state = gpt_state()
    path = saved(state, tmp_path / "gpt.pt")
    gpt = load_gpt(path, num_heads=2)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    check(gpt, state)


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vq = VQModel(**VQ)
    state = vq.state_dict()
    path = saved({"model": state | {"quantize.codebook_used": torch.zeros(65536)}}, tmp_path / "vq.pt")
    loaded = load_vq(path)
    check(loaded, state)
    assert loaded.sizes == vq.sizes == VQConfig(**VQ)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(pixels), vq.encode(pixels))


@pytest.mark.parametrize("name", MODELS)
def test_configuration_of_every_published_size(name: str) -> None:
    """The 3B model has heads of 100: dividing the width by 64 would not do."""
    arguments = gpt_arguments(MODELS[name])
    with torch.device("meta"):
        state = LlamaGen(**arguments).state_dict()
    assert gpt_config(state, "x.pt") == {k: arguments[k] for k in arguments.keys() & gpt_config(state, "x.pt")}
    assert gpt_config(state, "x.pt")["num_heads"] == {"llamagen-3b": 32}.get(name, arguments["dim"] // 64)


def test_number_of_heads(tmp_path: Path) -> None:
    path = saved(gpt_state(), tmp_path / "gpt.pt")
    with pytest.raises(VisarError, match=r"gpt\.pt has 2 layers.*num_heads"):
        load_gpt(path)
    with pytest.raises(VisarError, match="32 cannot be split into 5 heads"):
        load_gpt(path, num_heads=5)
    assert load_gpt(path, num_heads=8).head_dim == 4
    assert match_heads(24, 3200, 8704) == 32 and match_heads(24, 3200, 8705) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": "x"}, "num_heads must be a whole number, not 'x'"),
        ({"num_heads": 2.5}, r"num_heads must be a whole number, not 2\.5"),
        ({"num_heads": 0}, "num_heads must be 1 or more, not 0"),
        ({"num_heads": True}, "num_heads must be a whole number, not True"),
        ({"image_size": True}, "image_size is a number of pixels, .* not True"),
        ({"image_size": 2.5}, r"image_size is a number of pixels, .* not 2\.5"),
    ],
)
def test_sizes_that_are_no_numbers(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = saved(gpt_state(), tmp_path / "gpt.pt")
    with pytest.raises(VisarError, match=message):
        ImageModel.load(file, vq=file, **options)


def test_grid_of_a_published_file_name(tmp_path: Path) -> None:
    state = gpt_state()
    for name, grid in (("c2i_B_384.pt", 24), ("t2i_XL_stage2_512.pt", 32), ("c2i_B_256.pt", 16), ("mine.pt", 16)):
        gpt = load_gpt(saved(state, tmp_path / name), num_heads=2)
        assert gpt.config.grid == grid and len(gpt.rotary()) == 1 + grid**2
    assert load_gpt(tmp_path / "c2i_B_384.pt", num_heads=2, grid=5).config.grid == 5
    assert published_grid("mine.pt") is None


PARAMETERS = {
    "llamagen-b": (110_888_448, 7 * 12 + 4),
    "llamagen-l": (342_910_976, 7 * 24 + 4),
    "llamagen-xl": (774_699_520, 7 * 36 + 4),
    "llamagen-xxl": (1_410_972_672, 7 * 48 + 4),
    "llamagen-3b": (3_096_659_200, 7 * 24 + 4),
    "llamagen-t2i-xl": (777_678_080, 7 * 36 + 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_gpt_sizes(name: str) -> None:
    with torch.device("meta"):
        gpt = LlamaGen(**gpt_arguments(MODELS[name]))
    assert (sum(p.numel() for p in gpt.parameters()), len(gpt.state_dict())) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "count", "elements"), [("ds16", 343, 71_883_403), ("ds8", 299, 70_109_835)])
def test_published_tokenizer_sizes(name: str, count: int, elements: int) -> None:
    with torch.device("meta"):
        vq = VQModel(**vq_arguments(TOKENIZERS[name]))
    state = vq.state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (count, elements)
    assert VQConfig.infer(state) == vq.sizes
    assert vq.sizes.downsample == TOKENIZERS[name].downsample


NORM = "layers.1.ffn_norm.weight"


def without(key: str) -> dict[str, Tensor]:
    return {k: t for k, t in gpt_state().items() if k != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(NORM), rf"'{NORM}' is missing from .*gpt\.pt"),
        (without("tok_embeddings.weight"), r"'tok_embeddings\.weight' is missing"),
        (without("cls_embedding.embedding_table.weight"), r"'cls_embedding\.embedding_table\.weight' is missing"),
        (gpt_state() | {"lm_head.weight": torch.zeros(2)}, r"a tensor 'lm_head\.weight' that this model"),
        (gpt_state() | {NORM: torch.ones(31)}, rf"'{NORM}' .*has shape \[31\], expected \[32\]"),
        (gpt_state() | {"tok_embeddings.weight": torch.ones(31)}, r"'tok_embeddings\.weight' .*\[31\]"),
        (gpt_state() | {NORM: torch.full((32,), torch.nan)}, rf"'{NORM}' .*gpt\.pt.* NaN"),
        (gpt_state() | {NORM: torch.ones(32).index_fill(0, torch.tensor([3]), torch.inf)}, rf"'{NORM}' .*infinity"),
        (gpt_state() | {NORM: 3}, rf"'{NORM}', which is not a tensor"),
        ({}, "is missing"),
        ([torch.ones(2)], r"gpt\.pt holds no weights by name"),
    ],
)
def test_wrong_tensors_are_named(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(VisarError, match=message) as caught:
        load_gpt(saved(state, tmp_path / "gpt.pt"), num_heads=2)
    assert str(caught.value).count("\n") == 0


def test_wrong_tokenizer_tensors_are_named(tmp_path: Path) -> None:
    state = VQModel(**VQ).state_dict()
    for key in ("quantize.embedding.weight", "encoder.conv_blocks.1.res.0.conv1.weight", "decoder.mid.1.q.bias"):
        with pytest.raises(VisarError, match=f"'{key}' is missing from .*vq.pt"):
            load_vq(saved({k: t for k, t in state.items() if k != key}, tmp_path / "vq.pt"))
    wrong = state | {"decoder.conv_out.bias": torch.zeros(4)}
    with pytest.raises(VisarError, match=r"'decoder\.conv_out\.bias' .*has shape \[4\], expected \[3\]"):
        load_vq(saved(wrong, tmp_path / "vq.pt"))
    with pytest.raises(VisarError, match=r"vq\.pt holds a GPT of LlamaGen, expected a VQ tokenizer of LlamaGen"):
        load_vq(saved(gpt_state(), tmp_path / "vq.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    save_file(gpt_state(), path) if suffix == ".safetensors" else torch.save(gpt_state(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    cause = "is truncated" if kept else "is empty"
    with pytest.raises(VisarError, match=rf"^Cannot read .*cut\{suffix}: it {cause}[^.]*\.$"):
        load_state(path)


class Code:
    """Unpickles by making a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_a_missing_file_and_a_hostile_one(tmp_path: Path) -> None:
    with pytest.raises(VisarError, match=r"There is no weights file .*none\.pt"):
        load_state(tmp_path / "none.pt")
    path = saved({"model": gpt_state(), "run": Code(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(VisarError, match=r"Cannot read .*code\.pt"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "gpt.pt").touch()
    assert resolve("mine") == Path("mine") and resolve(tmp_path) == tmp_path
    assert resolve("owner/name-1.0") == "owner/name-1.0"
    for name, message in {
        "llamagen-b": r"'llamagen-b' are not shipped.*c2i_B_256\.pt or c2i_B_384\.pt and vq_ds16_c2i\.pt",
        "llamagen-t2i-xl": r"t2i_XL_stage1_256\.pt.*vq_ds16_t2i\.pt.*peizesun/llamagen_t2i",
        "icon": "Unknown model 'icon'. Did you mean 'icons'?",
        "./none": r"no model folder \./none",
        "gpt.pt": r"gpt\.pt is a file",
    }.items():
        with pytest.raises(VisarError, match=message):
            resolve(name)


def test_the_embedded_model_is_a_folder_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visar.families.catalogue.resources.files", lambda _: tmp_path)
    with pytest.raises(VisarError, match="'icons' is missing"):
        resolve("icons")
    (tmp_path / "icons").mkdir()
    assert resolve("icons") == tmp_path / "icons"


def test_the_table_imports_nothing_heavy() -> None:
    code = """import sys; from visar.families.catalogue import catalogue
catalogue(); print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
