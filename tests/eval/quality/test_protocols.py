"""Protocol files, and measuring by them: what a figure carries, what it is of, and every guard."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.extractors import EXTRACTORS, Extractor
from visar.eval.quality.extractors.resize import PREPARE
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.measure import Result, measure, reference_stats
from visar.eval.quality.metrics.frechet import Moments, frechet_distance, load_moments
from visar.eval.quality.metrics.inception_score import inception_score
from visar.eval.quality.metrics.manifold import precision
from visar.eval.quality.metrics.mmd import cmmd, kid
from visar.eval.quality.protocols import Protocol, get_protocol, parse_protocol, protocol_names

NAMES = protocol_names()


def test_every_protocol_is_there() -> None:
    assert sorted(NAMES) == NAMES
    assert set(NAMES) >= {
        "clip-vit-b16-torchmetrics", "clip-vit-b32", "cmmd", "coco-30k-cleanfid256", "coco-5k-pytorchfid", "fd-dinov2",
        "icons-efflite0", "imagenet256-adm",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_complete(name: str) -> None:
    found = get_protocol(name)
    assert found.name == name and found.version >= 1 and found.label == f"{name}@{found.version}"
    assert get_protocol(found.label) == found
    assert found.extractor in EXTRACTORS and found.prepare in PREPARE
    assert 2 <= found.least < found.wanted and found.least <= found.warn_below
    assert found.about.endswith(".") and found.rules and found.metrics
    assert "jpeg" not in found.formats and {"png", "npz"} <= set(found.formats)
    for user in found.used_by:
        assert set(user) == {"paper", "arxiv"} and re.fullmatch(r"\d{4}\.\d{5}", user["arxiv"])
    kinds = {metric["kind"] for metric in found.metrics.values()}
    if kinds & {"frechet", "inception_score"} and name != "icons-efflite0":
        assert found.least >= 2048 and found.warn_below >= 10000
    assert ("fid" in found.metrics) == found.extractor.startswith("inception-")  # only Inception's distance is FID


def test_bad_protocols() -> None:
    with pytest.raises(VisarError, match=r"Unknown protocol 'imagenet-adm'. Did you mean 'imagenet256-adm'\?"):
        get_protocol("imagenet-adm")
    with pytest.raises(VisarError, match="at version 1 here, not 2"):
        get_protocol("cmmd@2")
    body = dataclasses.asdict(get_protocol("cmmd"))
    assert parse_protocol(body) == get_protocol("cmmd")
    with pytest.raises(VisarError, match="'wanted' is amiss"):
        parse_protocol({k: v for k, v in body.items() if k != "wanted"})
    with pytest.raises(VisarError, match="'more' is amiss"):
        parse_protocol(body | {"more": 1})
    with pytest.raises(VisarError, match="Unknown kind of metric 'fid'"):
        parse_protocol(body | {"metrics": {"a": {"kind": "fid"}}})
    with pytest.raises(VisarError, match="'cmmd' of protocol 'cmmd' needs a reference"):
        parse_protocol(body | {"reference": None})


# Measuring, with a network that is a few means of pixels


class Means(Extractor):
    """As many features as the metrics ask for, from means of pixels."""

    weights, resize, versions = "ab" * 32, "none at all", {"means": "1.0"}

    def __init__(self, name: str) -> None:
        self.name = name
        self.batches: list[int] = []

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(images))
        cells = torch.nn.functional.adaptive_avg_pool2d(images.double() / 64, 2).flatten(1)
        return {"pool": cells, "spatial": cells[:, :5], "logits": cells[:, :4] * 3}

    def texts(self, captions: list[str]) -> Tensor:
        """The features of a grey image whose level is the number that ends the caption."""
        return torch.stack([torch.linspace(0, 1, 12) + int(caption.rpartition(" ")[2]) / 9 for caption in captions])


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the .* images wanted")
        yield


def small(name: str, **changes: Any) -> Protocol:
    """The protocol for a few images of any size."""
    return dataclasses.replace(get_protocol(name), least=8, warn_below=8, pixels=None, **changes)


def pixels(count: int, seed: int, height: int = 4, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(seed, 200 + seed, (count, height, width, 3), dtype=np.uint8)


def folder_of(path: Path, count: int, seed: int, suffix: str = ".png") -> Path:
    path.mkdir()
    for i, image in enumerate(pixels(count, seed)):
        Image.fromarray(image).save(path / f"{i:03d}{suffix}")
    return path


def features(count: int, seed: int, name: str = "pool") -> Tensor:
    images = torch.from_numpy(pixels(count, seed)).permute(0, 3, 1, 2)
    return Means("x")(images)[name]


def test_every_figure_of_adm(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 40, 1), folder_of(tmp_path / "b", 30, 20)
    extract = Means("inception-tf1")
    protocol = small("imagenet256-adm")
    found = measure(protocol, one, two, batch=7, extractor=extract)
    x, y = features(40, 1), features(30, 20)
    spatial = (Moments.of(features(n, seed, "spatial")) for n, seed in ((40, 1), (30, 20)))
    assert found.values == pytest.approx({
        "fid": frechet_distance(Moments.of(x), Moments.of(y)), "sfid": frechet_distance(*spatial),
        "is": inception_score(features(40, 1, "logits")), "precision": precision(x, y), "recall": precision(y, x),
    }, rel=1e-9)  # fmt: skip
    assert found.values["precision"] != found.values["recall"]
    assert not found.left_out and not found.spread
    assert extract.batches == [7, 7, 7, 7, 2] + [7] * 5 + [5]  # every image once
    assert measure(protocol, one, two, batch=40, extractor=extract).values == pytest.approx(found.values, rel=1e-9)


def test_the_line_says_everything(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 12, 20)
    found = measure(small("coco-5k-pytorchfid"), one, two, extractor=Means("inception-pytorch"), seed=5)
    value = found.values["fid"]
    reference = ImageFolder.open(two).fingerprint()
    assert str(found) == (
        f"fid[coco-5k-pytorchfid@1 n=12 inception-pytorch=sha256:{'ab' * 6} ref-images=sha256:{reference[:12]} "
        f'prepare=none resize="none at all" 6x4 png torch={torch.__version__} pillow={Image.__version__} means=1.0 '
        f"seed=5] = {value:.6g}"
    )
    told = json.loads(json.dumps(found.to_dict()))
    assert told["weights"] == "ab" * 32 and told["reference"] == {"images": reference} and told["n"] == 12
    assert told["images"] == ImageFolder.open(one).fingerprint() and told["pixels"] == [4, 6]
    assert isinstance(found, Result) and "\n" not in str(found)


def test_saved_moments_give_the_same(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 14, 20)
    protocol, extract = small("imagenet256-adm"), Means("inception-tf1")
    stored = reference_stats(protocol, two, tmp_path / "ref.npz", extractor=extract)
    again = load_moments(tmp_path / "ref.npz")
    assert again.fingerprint == stored.fingerprint and again.moments["spatial"].n == 14
    assert again.provenance == stored.provenance
    assert again.provenance["images"] == [ImageFolder.open(two).fingerprint()]
    assert again.provenance["protocol"] == "imagenet256-adm@1" and again.provenance["weights"] == extract.weights
    full = measure(protocol, one, two, extractor=extract)
    found = measure(protocol, one, tmp_path / "ref.npz", extractor=extract)
    assert found.values == pytest.approx({k: full.values[k] for k in ("fid", "sfid", "is")}, rel=1e-9)
    assert set(found.left_out) == {"precision", "recall"}
    assert found.reference == {"moments": stored.fingerprint}
    other = Means("inception-tf1")
    other.weights = "cd" * 32
    with pytest.raises(VisarError, match=r"moments are of weights 'abab.*', and here it is 'cdcd"):
        measure(protocol, one, tmp_path / "ref.npz", extractor=other)
    with pytest.raises(VisarError, match="has no Frechet distance"):
        reference_stats(small("cmmd"), two, tmp_path / "more.npz", extractor=Means("clip-vit-l14-336"))


def test_moments_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    protocol, extract = small("imagenet256-adm"), Means("inception-tf1")
    parts, whole = [folder_of(tmp_path / name, n, seed) for name, n, seed in (("a", 9, 1), ("b", 13, 20))], Moments()
    for n, seed in ((9, 1), (13, 20)):
        whole.add(features(n, seed))
    reference_stats(protocol, parts[0], tmp_path / "0.npz", extractor=extract)
    found = reference_stats(protocol, [tmp_path / "0.npz", parts[1]], tmp_path / "ref.npz", extractor=extract)
    moments = load_moments(tmp_path / "ref.npz").moments["pool"]
    assert moments.n == 22 and torch.allclose(moments.sigma, whole.sigma, rtol=1e-9)
    assert found.provenance["images"] == [ImageFolder.open(part).fingerprint() for part in parts]
    np.savez(tmp_path / "plain.npz", mu=whole.mu.numpy(), sigma=whole.sigma.numpy())
    other = small("imagenet256-adm", metrics={"fid": {"kind": "frechet", "features": "pool"}})
    for using, sources, message in (
        (protocol, [parts[0], tmp_path / "0.npz"], "The same images are in two parts"),
        (protocol, [tmp_path / "plain.npz"], "no moments of spatial features"),
        (other, [tmp_path / "plain.npz"], "unknown number of images cannot be merged"),
        (dataclasses.replace(protocol, least=23), parts, "needs 23 or more images, and there are 22"),
    ):
        with pytest.raises(VisarError, match=message):
            reference_stats(using, sources, tmp_path / "none.npz", extractor=extract)
    assert not (tmp_path / "none.npz").exists()


def test_a_reference_of_adms_layout(tmp_path: Path) -> None:
    """Moments of one set for FID, and images of another for precision; or moments alone."""
    one, moments = folder_of(tmp_path / "a", 12, 1), Moments.of(features(90, 33))
    numbers = {"mu": moments.mu.numpy(), "sigma": moments.sigma.numpy()}
    np.savez(tmp_path / "plain.npz", **numbers)
    np.savez(tmp_path / "adm.npz", arr_0=pixels(15, 20), **numbers)
    protocol, extract = small("imagenet256-adm"), Means("inception-tf1")
    found = measure(protocol, one, tmp_path / "adm.npz", extractor=extract)
    assert found.values["fid"] == pytest.approx(frechet_distance(Moments.of(features(12, 1)), moments), rel=1e-9)
    assert found.values["precision"] == precision(features(12, 1), features(15, 20))
    assert found.left_out == {"sfid": "the reference has no moments of spatial features"}
    assert set(found.reference) == {"moments", "images"}
    plain = measure(protocol, one, tmp_path / "plain.npz", extractor=extract)
    assert plain.values["fid"] == found.values["fid"] and set(plain.left_out) == {"sfid", "precision", "recall"}
    with pytest.raises(VisarError, match="serves no metric of cmmd@1: the reference has moments and no images"):
        measure(small("cmmd"), one, tmp_path / "plain.npz", extractor=Means("clip-vit-l14-336"))


def test_kernel_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = folder_of(tmp_path / "a", 120, 1), folder_of(tmp_path / "b", 110, 20)
    found = measure(small("icons-efflite0"), one, two, extractor=Means("efflite0"), seed=3)
    mean, std = kid(features(120, 1), features(110, 20), 100, 100, 3)
    assert found.values["kid-efflite0"] == pytest.approx(mean, rel=1e-9)
    assert found.spread["kid-efflite0"] == pytest.approx((mean - std, mean + std))
    assert "fid" not in str(found).split("[")[0] and f" ({mean - std:.6g} to {mean + std:.6g})" in str(found)
    monkeypatch.setitem(PREPARE, "center-bicubic-336", lambda images: 255 - images)
    found = measure(small("cmmd"), one, two, extractor=Means("clip-vit-l14-336"))
    x, y = (
        Means("x")(255 - torch.from_numpy(pixels(n, s)).permute(0, 3, 1, 2))["pool"] for n, s in ((120, 1), (110, 20))
    )
    assert found.values["cmmd"] == pytest.approx(cmmd(x, y), rel=1e-9)


def test_clip_scores_are_paired_by_id(tmp_path: Path) -> None:
    """Files in one order, ids in another: each image's own caption gives another mean than any other pairing."""
    order = [3, 0, 7, 5, 1, 9, 2, 8]
    lines = []
    for i, level in enumerate(order):
        ramp = np.linspace(0, 60, 6 * 8).reshape(6, 8, 1).repeat(3, 2) + 20 * level
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append({"id": f"x{9 - level}", "file": f"{i}.png", "prompt": f"level {level}"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    extract, protocol = Means("clip-vit-b32"), small("clip-vit-b32", prepare="none")
    found = measure(protocol, tmp_path, extractor=extract, batch=3)
    cosines = []
    for i, level in enumerate(order):
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.png"))).permute(2, 0, 1)[None]
        x, y = extract(image)["pool"][0].double(), extract.texts([f"level {level}"])[0].double()
        cosines.append(float(x @ y / (x.norm() * y.norm())))
    assert found.values["clip-score"] == pytest.approx(np.mean(cosines), rel=1e-6)
    half = 1.96 * np.std(cosines, ddof=1) / 8**0.5
    assert found.spread["clip-score"] == pytest.approx((np.mean(cosines) - half, np.mean(cosines) + half), rel=1e-3)
    assert found.reference == {}
    other = small("clip-vit-b16-torchmetrics", prepare="none")
    times = measure(other, tmp_path, extractor=Means("clip-vit-b16")).values["clip-score-100"]
    assert times == pytest.approx(100 * np.mean(cosines), rel=1e-6)


def test_clip_scores_are_of_prepared_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = folder_of(tmp_path / "a", 8, 1), tmp_path / "b"
    two.mkdir()
    for file in one.glob("*.png"):
        Image.fromarray(255 - np.array(Image.open(file))).save(two / file.name)
    for folder in (one, two):
        for file in list(folder.glob("*.png")):
            file.with_suffix(".txt").write_text("level 3")
    monkeypatch.setitem(PREPARE, "center-lanczos-256", lambda images: 255 - images)
    extract = Means("clip-vit-b32")
    found = measure(small("clip-vit-b32"), one, extractor=extract).values["clip-score"]
    same, other = (measure(small("clip-vit-b32", prepare="none"), of, extractor=extract) for of in (two, one))
    assert found == pytest.approx(same.values["clip-score"], rel=1e-9)
    assert abs(found - other.values["clip-score"]) > 1e-4


def test_what_is_refused(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 12, 20)
    extract = Means("inception-tf1")

    def refused(protocol: Protocol | str, *arguments: Any, using: Extractor = extract) -> str:
        with pytest.raises(VisarError) as error:
            measure(protocol, *arguments, extractor=using)
        return str(error.value)

    adm = small("imagenet256-adm")
    assert "imagenet256-adm@1 needs 13 or more images" in refused(dataclasses.replace(adm, least=13), one, two)
    assert "needs 2048 or more images" in refused("coco-5k-pytorchfid", one, two)
    assert "measures images of 256x256 pixels, not 6x4" in refused("imagenet256-adm", one, two)
    assert "needs a reference: VIRTUAL_imagenet256_labeled.npz" in refused(adm, one)
    assert "of inception-tf1 features, not of other" in refused(adm, one, two, using=Means("other"))
    clip = small("clip-vit-b32")
    assert "compares with nothing" in refused(clip, one, two)
    assert "clip-vit-b32@1 needs a caption for every image" in refused(clip, one, using=Means("clip-vit-b32"))
    few = folder_of(tmp_path / "few", 7, 20)
    assert "The reference of protocol imagenet256-adm@1 needs 8 or more" in refused(adm, one, few)
    jpeg = folder_of(tmp_path / "jpeg", 12, 1, ".jpg")
    assert "is JPEG" in refused(adm, jpeg, two)
    assert "measures png, webp, npz files, and" in refused(adm, ImageFolder.open(jpeg, jpeg_allowed=True), two)
    Image.new("RGB", (9, 9)).save(one / "x.png")
    assert "must have one size" in refused(adm, one, two)
    assert "those of" in refused(adm, ImageFolder.open(one, mixed_allowed=True), two)


def test_references_may_be_photographs(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 12, 20, ".jpg")
    Image.new("RGB", (9, 9)).save(two / "x.png")
    found = measure(small("coco-5k-pytorchfid"), one, two, extractor=Means("inception-pytorch"))
    assert found.values["fid"] > 0 and found.format == "png"


def test_features_that_are_no_numbers(tmp_path: Path) -> None:
    class Broken(Means):
        def extract(self, images: Tensor) -> dict[str, Tensor]:
            found = super().extract(images)
            return found | {"logits": found["logits"].log().sub(torch.inf).mul(0)}

    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 12, 20)
    with pytest.raises(VisarError, match="have inception-tf1 features that are NaN or infinite"):
        measure(small("imagenet256-adm"), one, two, extractor=Broken("inception-tf1"))


def test_few_images_are_warned_of(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 14, 20)
    protocol = dataclasses.replace(small("coco-5k-pytorchfid"), warn_below=13)
    with pytest.warns(UserWarning, match="has 12 of the 5000 images wanted") as seen:
        measure(protocol, one, two, extractor=Means("inception-pytorch"))
    assert len(seen) == 1 and seen[0].filename == __file__


def test_icons_need_no_download(tmp_path: Path) -> None:
    """The one protocol whose network is at hand, with it."""
    one, two = folder_of(tmp_path / "a", 12, 1), folder_of(tmp_path / "b", 12, 20)
    protocol = small("icons-efflite0", metrics={"fd-efflite0": {"kind": "frechet", "features": "pool"}})
    found = measure(protocol, one, two)
    assert found.values["fd-efflite0"] > 0.01 and found.extractor == "efflite0"
    assert str(found).startswith("fd-efflite0[icons-efflite0@1 n=12 efflite0=sha256:")
