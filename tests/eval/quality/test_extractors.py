"""Feature extractors with random weights: the arithmetic around the networks, files of weights, and what is refused.

The published weights are not in any package, so what needs them is skipped unless VISAR_INCEPTION names a file.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.clip_score import clip_scores
from visar.eval.quality.extractors import EXTRACTORS, Extractor, as_uint8, get_extractor
from visar.eval.quality.extractors.base import weights_hash
from visar.eval.quality.extractors.clip import MODELS, Clip
from visar.eval.quality.extractors.inception import RESIZES, inception
from visar.eval.quality.extractors.timm_backbone import hub_positions, timm_backbone
from visar.eval.quality.image_folder import ImageFolder

PUBLISHED_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Cells(Extractor):
    name, weights, resize, versions = "cells", "0" * 64, "none", {}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)}


def test_the_interface() -> None:
    found = Cells()(noise(2, 3, 8, 8))
    assert found["pool"].shape == (2, 12) and found["pool"].dtype == torch.float32
    for wrong in (torch.rand(2, 3, 8, 8), noise(3, 8, 8), noise(2, 1, 8, 8)):
        with pytest.raises(VisarError, match=r"Features are of uint8 images \[B, 3, H, W\]"):
            Cells()(wrong)


def test_images_are_rounded_and_clipped_once() -> None:
    values = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.2])
    assert as_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert torch.equal(as_uint8(torch.arange(256) / 255), torch.arange(256, dtype=torch.uint8))


def test_the_hash_is_of_the_numbers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    first = weights_hash(model)
    assert len(first) == 64 and weights_hash(model) == first
    assert weights_hash(model.double()) != first
    with torch.no_grad():
        model.float().weight[0, 0] += 1e-6
    assert weights_hash(model) != first


def test_names() -> None:
    with pytest.raises(VisarError, match=r"Unknown extractor 'inception-tf'. Did you mean 'inception-tf1'"):
        get_extractor("inception-tf")
    for name in ("clip:ViT-B-32", "timm:", "clip-vit", "clip:MODEL"):
        with pytest.raises(VisarError, match="Unknown extractor"):
            get_extractor(name)
    with pytest.raises(VisarError, match="takes no file"):
        get_extractor("efflite0", weights="a.pth")
    with pytest.raises(VisarError, match="open_clip has no model 'ViT'"):
        get_extractor("clip:ViT/openai")
    with pytest.raises(VisarError, match="timm has no model 'vit'"):
        get_extractor("timm:vit")
    assert {f"inception-{kind}" for kind in RESIZES} | set(MODELS) < set(EXTRACTORS)


@pytest.mark.parametrize("module, name", [
    ("torch_fidelity", "inception-tf1"), ("open_clip", "clip-vit-b32"), ("timm", "dinov2"), ("timm", "efflite0"),
])  # fmt: skip
def test_a_missing_extra_is_said(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VisarError, match="need the extra `eval`"):
        get_extractor(name)


# Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in torch-fidelity's layout, spread so that features differ between images."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        model = source.FeatureExtractorInceptionV3("random", ["2048"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.02, 0.05)
    torch.nn.init.constant_(model.fc.bias, 1e6)  # so that it is seen if it is added
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(model.state_dict(), file)
    return file


def torch_fidelitys(file: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    return model(images)


def test_inception_is_torch_fidelitys(inception_file: Path) -> None:
    images = noise(2, 3, 40, 40)
    extract = inception("tf1", weights=str(inception_file))
    found = extract(images)
    pool, logits = torch_fidelitys(inception_file, images)
    assert (pool[0] - pool[1]).abs().max() > 0.01  # else the rest says nothing
    assert torch.allclose(found["pool"], pool, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    assert torch.allclose(extract(images[1:])["pool"], found["pool"][1:], rtol=1e-4, atol=1e-5)
    assert extract.name == "inception-tf1" and len(extract.weights) == 64 and "torch-fidelity" in extract.versions


def test_inceptions_spatial_features(inception_file: Path) -> None:
    """The 1x1 branch of Mixed_6d, which is its first 192 channels; 7 of them, the channel last."""
    extract = inception("tf1", weights=str(inception_file))
    seen: list[Tensor] = []
    hook = extract.model.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = extract(noise(2, 3, 40, 40))["spatial"]
    hook.remove()
    assert found.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))


def test_inceptions_resizings_differ(inception_file: Path) -> None:
    images = noise(1, 3, 40, 40)
    scaled: dict[str, Tensor] = {}
    for kind in RESIZES:
        extract = inception(kind, weights=str(inception_file))
        hook = extract.model.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda module, inputs, kind=kind: scaled.__setitem__(kind, inputs[0])
        )
        extract(images)
        hook.remove()
    interpolate = torch.nn.functional.interpolate
    expected = 2 * interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    assert torch.allclose(scaled["pytorch"], expected, atol=1e-5)
    plane = Image.fromarray(images[0, 1].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    assert torch.allclose(scaled["clean"][0, 1], (torch.from_numpy(np.array(plane)) - 128) / 128, atol=1e-6)
    assert (scaled["tf1"] - scaled["pytorch"]).abs().max() > 0.1
    with pytest.raises(VisarError, match="Unknown resizing 'tf2'"):
        inception("tf2", weights=str(inception_file))


def test_inceptions_weights(inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(source, "load_state_dict_from_url", no_network)
    monkeypatch.delenv("VISAR_INCEPTION", raising=False)
    with pytest.raises(VisarError, match=r"could not be downloaded .*no network.*VISAR_INCEPTION"):
        inception()
    monkeypatch.setenv("VISAR_INCEPTION", str(inception_file))
    assert len(inception().weights) == 64
    (tmp_path / "text.pth").write_text("text")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(os.system, tmp_path / "code.pth")
    for name, message in (
        ("none.pth", "There is no weights file"),
        ("text.pth", "it is text, not weights"),
        ("code.pth", "it holds more than tensors"),
        ("other.pth", "does not hold the weights of FID's Inception"),
    ):
        with pytest.raises(VisarError, match=message):
            inception(weights=str(tmp_path / name))


@pytest.mark.skipif(not os.environ.get("VISAR_INCEPTION"), reason="needs the published weights of Inception")
def test_published_inception() -> None:
    """The hash in the file's name is torch.hub's: the first digits of the file's sha256."""
    import hashlib

    digest = hashlib.sha256(Path(os.environ["VISAR_INCEPTION"]).read_bytes()).hexdigest()
    assert PUBLISHED_INCEPTION.endswith(f"-{digest[:8]}.pth")
    logits = inception()(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8))["logits"]
    assert logits.shape == (1, 1008) and bool(logits.isfinite().all())


# CLIP


@pytest.fixture(scope="module")
def small_clip() -> Clip:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(16, vision, text)
    transform = open_clip.image_transform(32, is_train=False)
    return Clip(
        "clip-vit-b32", model, transform, open_clip.get_tokenizer("ViT-B-32"), "cpu", "32 px", {"open_clip": "x"}
    )


def test_clip_score_by_hand(small_clip: Clip, tmp_path: Path) -> None:
    """Ids whose order is not that of captions or files; and every step once more, one image at a time."""
    import open_clip

    captions = {"9": "a red heart", "10": "two dogs", "1": "a star"}
    for i, name in enumerate(captions):
        Image.fromarray(noise(40, 50, 3, seed=i).numpy()).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(captions[name])
    folder = ImageFolder.open(tmp_path)
    found = clip_scores(folder, small_clip, prefix="A photo depicts ", scale=100.0, batch=2)
    tokens = open_clip.get_tokenizer("ViT-B-32")
    for name, caption in captions.items():
        with torch.inference_mode():
            image = open_clip.image_transform(32, is_train=False)(Image.open(tmp_path / f"{name}.png"))
            image = small_clip.model.encode_image(image[None])[0]
            text = small_clip.model.encode_text(tokens([f"A photo depicts {caption}"]))[0]
        cosine = float(image @ text / (image.norm() * text.norm()))
        assert found.scores[name] == pytest.approx(100 * cosine, rel=1e-4, abs=1e-4)
    scores = np.array(list(found.scores.values()))
    assert found.mean.mean == pytest.approx(scores.mean())
    assert found.mean.high - found.mean.mean == pytest.approx(1.96 * scores.std(ddof=1) / 3**0.5, rel=1e-3)
    assert np.ptp(scores) > 0.1  # else pairs could be mixed up unseen
    plain = clip_scores(folder, small_clip, prefix="", scale=100.0)
    assert abs(plain.mean.mean - found.mean.mean) > 1e-3
    again = clip_scores(folder, small_clip, scale=100.0, batch=32)
    assert again.scores == pytest.approx(found.scores, abs=1e-4)


def test_clip_score_needs_every_caption(small_clip: Clip, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(VisarError, match="The CLIP score needs a caption for every image, and 1 of"):
        clip_scores(ImageFolder.open(tmp_path), small_clip)


def test_the_prefix_is_llamagens(small_clip: Clip) -> None:
    """LlamaGen puts three tokens behind the start of a tokenized caption, and the end last where it is full."""
    import open_clip

    tokenize = open_clip.get_tokenizer("ViT-B-32")
    captions = ["A cat's hat, 3d & flat!", "  spaces   and\nlines ", "word " * 90, "word " * 73, "word " * 72, "", "'s"]
    plain, prefix = tokenize(captions), tokenize("A photo depicts ")[:, 1:4].expand(len(captions), -1)
    expected = torch.cat([plain[:, :1], prefix, plain[:, 1:]], 1)[:, :77]
    expected[:, 76] = torch.where(expected[:, 76] > 0, 49407, 0)
    assert torch.equal(tokenize([f"A photo depicts {caption}" for caption in captions]), expected)


def test_clip_features_have_length_one(small_clip: Clip) -> None:
    images = noise(3, 3, 40, 40)
    found = small_clip(images)["pool"]
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(small_clip(images[2:])["pool"], found[2:], atol=1e-5)
    assert torch.allclose(small_clip.texts(["a", "b"]).norm(dim=1), torch.ones(2), atol=1e-5)


def test_clip_from_a_file(tmp_path: Path) -> None:
    """The smallest model of open_clip's table through a file of random weights."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    extract = get_extractor("clip:ViT-S-32-alt/none", weights=str(tmp_path / "clip.pt"))
    assert extract.weights == weights_hash(model) and extract.name == "clip:ViT-S-32-alt/none"
    assert "224 px" in extract.resize and extract(noise(1, 3, 64, 64))["pool"].shape[0] == 1
    for weights, message in ((str(tmp_path / "none.pt"), "There is no weights file"), (None, "could not be loaded")):
        with pytest.raises(VisarError, match=message):
            get_extractor("clip:ViT-S-32-alt/none", weights=weights)


# timm


def test_a_timm_model_from_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    extract = timm_backbone("test_vit", weights=str(tmp_path / "vit.pth"))
    assert extract.name == "timm:test_vit" and extract.size == model.pretrained_cfg["input_size"][-1]
    images = noise(2, 3, 40, 40)
    plane = [
        [Image.fromarray(c).resize((extract.size,) * 2, Image.Resampling.BICUBIC) for c in p]
        for p in images.float().numpy()
    ]
    x = torch.from_numpy(np.array([[np.asarray(c) for c in p] for p in plane])).clamp(0, 255) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        model = model.eval()
        expected = model.forward_head(model.forward_features((x - mean) / std), pre_logits=True)
    assert torch.allclose(extract(images)["pool"], expected, atol=1e-4)
    assert expected.std(0).max() > 1e-3
    with pytest.raises(VisarError, match=r"There is no weights file .*none\.pth"):
        timm_backbone("test_vit", weights=str(tmp_path / "none.pth"))


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, torch's."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_positions_of_dinov2() -> None:
    """Along rows, output i looks at (i + 1/2) / scale - 1/2, and the scale is (16 + 0.1) / 37: four inputs, no more."""
    values = torch.rand(37, generator=torch.Generator().manual_seed(0))
    plane = values[:, None].expand(37, 37).reshape(1, -1, 1)
    found = hub_positions(torch.cat([torch.full((1, 1, 1), -5.0), plane], 1), 16)
    assert found.shape == (1, 257, 1) and found[0, 0, 0] == -5
    grid = found[0, 1:, 0].view(16, 16)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        expected = sum(cubic(place - j) * float(values[min(max(j, 0), 36)]) for j in near)
        assert float(grid[i, 3]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_dinov2_from_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2.lvd142m"
    model: Any = timm.create_model(name, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    extract = timm_backbone(name, weights=str(tmp_path / "dinov2.pth"))
    assert extract.size == 224 and extract(noise(1, 3, 64, 64))["pool"].shape == (1, 384)
    assert torch.equal(extract.model.pos_embed, hub_positions(model.pos_embed, 16))
