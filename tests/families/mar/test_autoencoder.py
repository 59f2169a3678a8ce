"""The KL autoencoder against diffusers' own, and what it makes of diffusers' folders and objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from visar import assets
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, downsample, fingerprint

LAST = {True: "AttnDownEncoderBlock2D", False: "DownEncoderBlock2D"}


def theirs(attention: bool = True, **others: Any) -> AutoencoderKL:
    """An autoencoder of diffusers with random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    sizes = dict(
        down_block_types=("DownEncoderBlock2D", LAST[attention]), up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    vae = AutoencoderKL(**sizes | others).eval()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5) if p.ndim > 1 else p.data.add_(torch.randn_like(p) * 0.2)
    return vae


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("way", ["object", "folder"])
@torch.no_grad()
def test_it_computes_what_diffusers_does(attention: bool, way: str, tmp_path: Path) -> None:
    vae = theirs(attention)
    if way == "folder":
        vae.save_pretrained(tmp_path)
        ours = KLAutoencoder.from_pretrained(tmp_path)
    else:
        ours = KLAutoencoder.of(vae)
        assert ours.encoder.conv_in.weight.data_ptr() == vae.encoder.conv_in.weight.data_ptr(), "weights are shared"
    assert dict(ours.config) == dict(
        channels=(8, 16), blocks=2, latent_channels=4, groups=4, attention=attention, scaling_factor=0.5, patch=1
    )
    assert not ours.training and downsample(ours) == 2 and fingerprint(ours) == fingerprint(vae)
    pixels, latents = torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 4, 4, 6)
    law, (mean, log_variance) = vae.encode(pixels).latent_dist, ours.encode(pixels)
    assert mean.std() > 0.3 and log_variance.std() > 0.3
    torch.testing.assert_close(mean, law.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((log_variance / 2).exp(), law.std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(latents), vae.decode(latents).sample, rtol=1e-5, atol=1e-5)


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    made = KLAutoencoder.of(theirs())
    made.save_pretrained(tmp_path)
    again = KLAutoencoder.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "KLAutoencoder"
    assert dict(again.config) | {"channels": (8, 16)} == dict(made.config) and KLAutoencoder.of(again) is again
    assert all(torch.equal(t, made.state_dict()[key]) for key, t in again.state_dict().items())


def test_the_embedded_one_is_that_of_its_model() -> None:
    home = Path(assets.__file__).parent / "icons-mar"
    wanted = json.loads((home / "mar" / "config.json").read_text())["vae"]
    assert fingerprint(KLAutoencoder.from_pretrained(home / "vae")) == wanted


def test_what_is_no_such_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(VisarError, match="vae must be a KLAutoencoder, or an AutoencoderKL of diffusers, not a Linear"):
        KLAutoencoder.of(torch.nn.Linear(1, 1))
    with pytest.raises(VisarError, match="shifts its latents"):
        KLAutoencoder.of(theirs(shift_factor=0.1))
    with pytest.raises(VisarError, match=r"'encoder\.mid_block\.attentions\.0\.group_norm\.weight' is missing"):
        KLAutoencoder.of(theirs(mid_block_add_attention=False))
    vae = theirs()
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"block_out_channels": [8, 32]}, r"'encoder.down_blocks.1.*\[16, 8, 3, 3\], expected \[32, 8, 3, 3\]"),
        ({"norm_num_groups": 5}, "no configuration of an AutoencoderKL"),
        ({"down_block_types": None}, "no configuration of an AutoencoderKL"),
        ({"_class_name": "VQModel"}, "holds a VQModel, not a KLAutoencoder"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(VisarError, match=message):
            KLAutoencoder.from_pretrained(tmp_path)
