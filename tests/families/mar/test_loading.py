"""Published files of MAR and its autoencoder: layout, sizes read from shapes, what they compute, and broken files."""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.published import mar_arguments
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, published_name
from visar.families.mar.loading import kl_config, load_kl16, load_mar, mar_config
from visar.families.mar.specs import MAR_MODELS, match_mar_heads
from visar.families.mar.transformer import MAR
from visar.families.weights import load_state

TINY: dict[str, Any] = dict(
    token_dim=3, grid=3, dim=16, encoder_layers=2, decoder_layers=3, num_heads=2, head_width=24, head_layers=2,
    condition="class", classes=5, buffer=4,
)  # fmt: skip
State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    g = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=g) / max(1, math.prod(shape[1:])) ** 0.5 for key, shape in shapes.items()}


def mar_state() -> State:
    with torch.device("meta"):
        mar = MAR(**TINY)
    return random_state({key: tuple(t.shape) for key, t in mar.state_dict().items()})


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def check(module: nn.Module, state: State) -> None:
    """The module holds exactly these tensors, for real, and is ready to run."""
    loaded = module.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    assert not module.training and not any(p.requires_grad or p.is_meta for p in module.parameters())


def checkpoint(state: State) -> dict[str, Any]:
    """All that the training script writes; what it averages stays a parameter."""
    return {
        "model": OrderedDict((k, t + 1) for k, t in state.items()),
        "model_ema": OrderedDict((k, nn.Parameter(t)) for k, t in state.items()),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mar_base", lr=None, output_dir="./out"),
    }


def test_the_averaged_weights_of_a_checkpoint_are_taken(tmp_path: Path) -> None:
    state = mar_state()
    path = saved(checkpoint(state), tmp_path / "checkpoint-last.pth")
    mar = load_mar(path, num_heads=2)
    check(mar, state)
    assert {key: mar.config[key] for key in TINY} == TINY
    check(load_mar(path, ema=False, num_heads=2), {k: t + 1 for k, t in state.items()})
    released = {k: checkpoint(state)[k] for k in ("model", "model_ema")}
    check(load_mar(saved(released, tmp_path / "released.pth"), num_heads=2), state)


def test_files_of_nothing_but_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    state = mar_state()
    save_file(state, tmp_path / "mar.safetensors")
    for path in (saved(state, tmp_path / "bare.pth"), tmp_path / "mar.safetensors"):
        for ema in (True, False):
            check(load_mar(path, ema=ema, num_heads=2), state)


def test_a_checkpoint_without_averaged_weights(tmp_path: Path) -> None:
    whole = checkpoint(mar_state())
    for content in (whole | {"model_ema": None}, {k: whole[k] for k in whole if k != "model_ema"}):
        path = saved(content, tmp_path / "one.pth")
        message = r"one\.pth has no 'ema' .*; it has: args, epoch, model, optimizer, scaler; give ema=False"
        with pytest.raises(VisarError, match=message):
            load_mar(path, num_heads=2)
        assert load_mar(path, ema=False, num_heads=2).config.dim == 16
    path = saved({"model_ema": mar_state()}, tmp_path / "other.pth")
    with pytest.raises(VisarError, match=r"has no 'model' .*; it has: model_ema; give ema=True"):
        load_mar(path, ema=False, num_heads=2)


@pytest.mark.parametrize("name", MAR_MODELS)
def test_configuration_of_every_published_size(name: str) -> None:
    """MAR-H has heads of 80: dividing the width by 64 would not do."""
    arguments = mar_arguments(MAR_MODELS[name])
    with torch.device("meta"):
        state = MAR(**arguments).state_dict()
    assert mar_config(state, "x.pth") == arguments
    assert arguments["num_heads"] == {"mar-b": 12, "mar-l": 16, "mar-h": 16}[name]
    assert MAR_MODELS[name].guidance == {"mar-b": 2.9, "mar-l": 3.0, "mar-h": 3.2}[name]


def test_number_of_heads(tmp_path: Path) -> None:
    path = saved(mar_state(), tmp_path / "mar.pth")
    with pytest.raises(VisarError, match=r"mar\.pth has 2 and 3 layers of width 16.*num_heads"):
        load_mar(path)
    for heads in (0, 5):
        with pytest.raises(VisarError, match=f"16 cannot be split into {heads} heads"):
            load_mar(path, num_heads=heads)
    assert load_mar(path, num_heads=4).encoder_blocks[0].attn.heads == 4
    assert match_mar_heads(20, 20, 1280) == 16 and match_mar_heads(20, 12, 1280) is None


NORM = "decoder_blocks.2.norm1.weight"


def without(key: str) -> State:
    return {k: t for k, t in mar_state().items() if k != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(NORM), rf"'{NORM}' is missing from .*mar\.pth"),
        (without("z_proj.weight"), r"'z_proj\.weight' is missing"),
        (without("class_emb.weight"), r"'class_emb\.weight' is missing"),
        (without("fake_latent"), "'fake_latent' is missing"),
        (mar_state() | {"diffloss.net.extra": torch.zeros(2)}, r"a tensor 'diffloss\.net\.extra' that this model"),
        (mar_state() | {NORM: torch.ones(15)}, rf"'{NORM}' .*has shape \[15\], expected \[16\]"),
        (mar_state() | {"z_proj.weight": torch.ones(3)}, r"'z_proj\.weight' .*\[3\], not two dimensions"),
        (mar_state() | {"encoder_pos_embed_learned": torch.ones(13, 16)}, r"\[13, 16\], not three dimensions"),
        (mar_state() | {"diffusion_pos_embed_learned": torch.ones(1, 8, 16)}, "8 tokens, which is not a square"),
        (
            mar_state() | {"encoder_pos_embed_learned": torch.ones(1, 9, 16)},
            "9 positions in its encoder, too few for 9",
        ),
        (mar_state() | {"decoder_pos_embed_learned": torch.ones(1, 12, 16)}, r"\[1, 12, 16\], expected \[1, 13, 16\]"),
        (mar_state() | {NORM: torch.full((16,), torch.nan)}, rf"'{NORM}' .*mar\.pth.* NaN"),
        (mar_state() | {NORM: 3}, rf"'{NORM}', which is not a tensor"),
        ({}, "is missing"),
        ([torch.ones(2)], r"mar\.pth holds no weights by name"),
    ],
)
def test_wrong_tensors_are_named(state: Any, message: str, tmp_path: Path) -> None:
    for content in (state, {"model_ema": state}) if isinstance(state, dict) else (state,):
        with pytest.raises(VisarError, match=message) as caught:
            load_mar(saved(content, tmp_path / "mar.pth"), num_heads=2)
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("load", [load_mar, load_kl16])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(load: Callable[[Path], nn.Module], kept: float, tmp_path: Path) -> None:
    path = saved({"model": mar_state(), "model_ema": mar_state()}, tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    cause = "is truncated" if kept else "is empty"
    with pytest.raises(VisarError, match=rf"^Cannot read .*cut\.pth: it {cause}[^.]*\.$"):
        load(path)
    with pytest.raises(VisarError, match=r"There is no weights file .*none\.pth"):
        load(tmp_path / "none.pth")


# The autoencoder, in the layout of its published file.


def kl_shapes(channels: tuple[int, ...], blocks: int = 2, latent: int = 16) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    top, last = channels[-1], len(channels) - 1

    def conv(name: str, inputs: int, outputs: int, side: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, side, side), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str) -> None:
        block(f"{name}.block_1", top, top)
        attention(f"{name}.attn_1", top)
        block(f"{name}.block_2", top, top)

    conv("encoder.conv_in", 3, channels[0])
    width = channels[0]
    for i, wide in enumerate(channels):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width, wide)
            width = wide
            if i == last:
                attention(f"encoder.down.{i}.attn.{j}", wide)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", wide, wide)
    middle("encoder.mid")
    norm("encoder.norm_out", top)
    conv("encoder.conv_out", top, 2 * latent)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    conv("decoder.conv_in", latent, top)
    middle("decoder.mid")
    width = top
    for i in range(last, -1, -1):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, channels[i])
            width = channels[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    return shapes


CHANNELS = (8, 8, 16, 16, 32)
GROUPS = 8


class Plain:
    """What a state dict of that layout computes, layer by layer."""

    def __init__(self, state: State):
        self.state = state

    def conv(self, x: Tensor, name: str, padding: int = 1, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, GROUPS, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut", 0) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}", 0).flatten(2) for part in "qkv")
        seen = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.conv(torch.einsum("bij,bcj->bci", seen, v).view_as(x), f"{name}.proj_out", 0)

    def middle(self, x: Tensor, name: str) -> Tensor:
        return self.block(self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    def out(self, x: Tensor, name: str) -> Tensor:
        return self.conv(F.silu(self.norm(x, f"{name}.norm_out")), f"{name}.conv_out")

    def moments(self, pixels: Tensor) -> Tensor:
        h = self.conv(pixels, "encoder.conv_in")
        for i in range(5):
            for j in range(2):
                h = self.block(h, f"encoder.down.{i}.block.{j}")
                if i == 4:
                    h = self.attention(h, f"encoder.down.{i}.attn.{j}")
            if i < 4:
                h = self.conv(F.pad(h, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", 0, 2)
        return self.conv(self.out(self.middle(h, "encoder.mid"), "encoder"), "quant_conv", 0)

    def decode(self, latents: Tensor) -> Tensor:
        h = self.conv(self.conv(latents, "post_quant_conv", 0), "decoder.conv_in")
        h = self.middle(h, "decoder.mid")
        for i in (4, 3, 2, 1, 0):
            for j in range(3):
                h = self.block(h, f"decoder.up.{i}.block.{j}")
            if i > 0:
                h = self.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{i}.upsample.conv")
        return self.out(h, "decoder")


def kl_state(**others: Tensor) -> State:
    return random_state(kl_shapes(CHANNELS)) | others


def test_the_autoencoder_computes_what_its_file_says(tmp_path: Path) -> None:
    state = kl_state()
    assert len(state) == 312
    vae = load_kl16(saved({"model": state}, tmp_path / "kl16.ckpt"))
    assert vae.config.groups == GROUPS and vae.config.scaling_factor == 0.2325
    assert not vae.training and not any(p.requires_grad or p.is_meta for p in vae.parameters())
    assert {m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    plain = Plain(state)
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments, latents = plain.moments(pixels), torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(2))
    mean, log_variance = vae.encode(pixels)
    assert torch.allclose(mean, moments[:, :16], atol=1e-4)
    assert torch.allclose(log_variance, moments[:, 16:].clamp(-30, 20), atol=1e-4)
    assert torch.allclose(vae.decode(latents), plain.decode(latents), atol=1e-4)


def test_published_autoencoder_size() -> None:
    shapes = kl_shapes((128, 128, 256, 256, 512))
    assert (len(shapes), sum(math.prod(s) for s in shapes.values())) == (312, 66_456_019)
    with torch.device("meta"):
        config = kl_config({key: torch.empty(shape) for key, shape in shapes.items()}, "kl16.ckpt")
        ours = KLAutoencoder()
    assert config | {"scaling_factor": 0.2325, "patch": 1} == dict(ours.config)
    named = {published_name(key, 5): t for key, t in ours.state_dict().items()}
    assert {key: tuple(t.shape) for key, t in named.items()} == shapes


def test_other_sizes_of_the_same_layout(tmp_path: Path) -> None:
    """Levels, blocks, latent channels, and no attention in the encoder's last level."""
    shapes = kl_shapes((12, 24), blocks=1, latent=4)
    state = random_state({key: shape for key, shape in shapes.items() if ".attn." not in key})
    save_file(state, tmp_path / "small.safetensors")
    vae = load_kl16(tmp_path / "small.safetensors")
    config = vae.config
    assert (config.channels, config.blocks, config.latent_channels) == ((12, 24), 1, 4)
    assert config.groups == 4 and len(vae.state_dict()) == len(state)


CONV, ATTN = "decoder.up.3.block.0.nin_shortcut.weight", "encoder.mid.attn_1.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONV: None}, rf"'{CONV}' is missing from .*kl16\.ckpt"),
        ({"encoder.down.3.block.0.conv1.weight": None}, r"'encoder\.down\.3\.block\.0\.conv1\.weight' is missing"),
        ({"post_quant_conv.weight": None}, r"'post_quant_conv\.weight' is missing"),
        ({"loss.logvar": torch.zeros(())}, r"a tensor 'loss\.logvar' that this model does not"),
        ({CONV: torch.ones(16, 32, 3, 3)}, rf"'{CONV}' .*\[16, 32, 3, 3\], expected \[16, 32, 1, 1\]"),
        ({ATTN: torch.ones(32, 32, 3, 3)}, rf"'{ATTN}' .*\[32, 32, 3, 3\], expected \[32, 32, 1, 1\]"),
        ({"post_quant_conv.weight": torch.ones(16, 16)}, r"\[16, 16\], not four dimensions"),
        ({CONV: torch.full((16, 32, 1, 1), torch.inf)}, rf"'{CONV}' .*infinity"),
    ],
)
def test_wrong_tensors_of_the_autoencoder_have_its_names(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {key: t for key, t in (kl_state() | change).items() if t is not None}
    with pytest.raises(VisarError, match=message):
        load_kl16(saved({"model": state}, tmp_path / "kl16.ckpt"))


def test_the_wrong_kind_of_file(tmp_path: Path) -> None:
    mar, kl = saved({"model_ema": mar_state()}, tmp_path / "a.pth"), saved({"model": kl_state()}, tmp_path / "b.ckpt")
    for load, path, message in (
        (load_mar, kl, "b.ckpt has no 'ema' or 'model_ema' .* weights; it has: model"),
        (load_kl16, mar, "a.pth has no 'model' or .* weights; it has: model_ema"),
        (load_kl16, saved(mar_state(), tmp_path / "c.pth"), "c.pth holds a MAR, expected a KL autoencoder"),
        (load_mar, saved(kl_state(), tmp_path / "d.pth"), "d.pth holds a KL autoencoder, expected a MAR"),
    ):
        with pytest.raises(VisarError, match=message):
            load(path)
    assert load_state(kl).keys() == kl_state().keys()
