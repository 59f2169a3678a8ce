"""Comparison of two folders: real changes are found, and seed noise alone is not called one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.tiny import Cells
from visar.errors import VisarError
from visar.eval.quality.compare import compare, mean_shift, reference_shift
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.metrics.energy import energy

CLASSES = 40
SIZE = 6


def sampled(count: int, seed: int, shared: int | None = None) -> np.ndarray:
    """Images [count, SIZE, SIZE, 3]: a colour per class, and noise, half of which may be shared with another seed."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(0).uniform(60, 200, (CLASSES, 1, 1, 3))
    noise = rng.normal(0, 25, (count, SIZE, SIZE, 3))
    if shared is not None:
        other = np.random.default_rng(shared).normal(0, 25, noise.shape)
        noise = np.where(np.arange(count)[:, None, None, None] % 2 == 0, other, (noise + other) / 2**0.5)
    return np.clip(np.round(colours[np.arange(count) % CLASSES] + noise), 0, 255).astype(np.uint8)


def folder(path: Path, images: np.ndarray, tokens: Any = None, prompt: str = "class {}") -> ImageFolder:
    path.mkdir()
    lines = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
        line: dict[str, Any] = {"id": f"{i:06d}", "file": f"{i:06d}.png", "prompt": prompt.format(i % CLASSES)}
        lines.append(line | ({} if tokens is None else {"tokens": tokens[i]}))
    (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ImageFolder.open(path)


COUNT = 1200


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return folder(tmp_path_factory.mktemp("compare") / "a", sampled(COUNT, 1))


def one_in_a_hundred(images: np.ndarray) -> np.ndarray:
    images[::100] = 255 - images[::100]
    return images


def colour(images: np.ndarray) -> np.ndarray:
    return np.clip(images + np.array([6, 0, 0]), 0, 255).astype(np.uint8)


def dropped_class(images: np.ndarray) -> np.ndarray:
    images[3::CLASSES] = images[4::CLASSES]
    return images


@pytest.mark.parametrize(
    ("change", "shared"),
    [(one_in_a_hundred, True), (colour, True), (colour, False), (dropped_class, True), (dropped_class, False)],
)
def test_changes_are_found(plain: ImageFolder, tmp_path: Path, change: Any, shared: bool) -> None:
    """Under one seed and under two, whose noise hides what happens to a hundredth of the images."""
    b = folder(tmp_path / "b", change(sampled(COUNT, 1) if shared else sampled(COUNT, 2)))
    found = compare(plain, b, Cells())
    if change is dropped_class and shared:
        assert found.conclusion.startswith("Mixed up: 30 of 1200 images are those of another prompt")
    else:
        assert found.changed and found.conclusion.startswith("Changed: "), found.conclusion


def test_seed_noise_is_no_change(plain: ImageFolder, tmp_path: Path) -> None:
    a2, a3 = (folder(tmp_path / f"a{seed}", sampled(COUNT, seed)) for seed in (5, 6))
    independent = compare(plain, a2, Cells(), seeds=[a3])
    assert not independent.changed and independent.same == 0 and independent.seeds[0].p > 0.01
    assert independent.conclusion.startswith("No change seen in 1200 pairs")
    b = folder(tmp_path / "b", sampled(COUNT, 7, shared=1))
    coupled = compare(plain, b, Cells())
    assert not coupled.changed and coupled.same == 0.5 and coupled.overall.least < independent.overall.least


def test_a_folder_is_no_other_seed_of_itself(plain: ImageFolder, tmp_path: Path) -> None:
    a2, a3 = (folder(tmp_path / f"a{seed}", sampled(COUNT, seed)) for seed in (5, 6))
    for seeds in ([plain], [a3, a2], [a3, a3]):
        with pytest.raises(VisarError, match="is given twice; `seeds` are images like A's under other seeds"):
            compare(plain, a2, Cells(), seeds=seeds)


def test_the_same_folder_is_the_same(plain: ImageFolder) -> None:
    found = compare(plain, plain, Cells())
    assert (found.same, found.levels, found.p, found.changed) == (1, 0, 1, False)
    assert found.conclusion == "The same: all 1200 images are equal in every pixel."


def test_what_is_counted(tmp_path: Path) -> None:
    images = sampled(8, 1)
    a = folder(tmp_path / "a", images, tokens=[[1, 2, 3, 4]] * 8)
    other = images.copy()
    other[2, 0, 0, 0] = 255 - other[2, 0, 0, 0]
    b = folder(tmp_path / "b", other, tokens=[[1, 2, 3, 4]] * 7 + [[1, 2, 0, 0]])
    reference = folder(tmp_path / "r", sampled(5, 3), prompt="another {}")
    scores = {str(a.path): torch.arange(8.0), str(b.path): torch.arange(8.0) + torch.tensor([1.0, 3] * 4)}
    with pytest.raises(
        VisarError, match=r"holds 1 images; a reference needs 2 or more"
    ):  # or its distance is no number
        compare(a, b, Cells(), reference=folder(tmp_path / "one", sampled(5, 3)[:1]))
    found = compare(a, b, Cells(), reference=reference, clip=lambda f, ids: scores[str(f.path)])
    assert found.same == 7 / 8 and found.tokens == 30 / 32 and found.elsewhere == 0
    gap = abs(int(other[2, 0, 0, 0]) - int(images[2, 0, 0, 0]))
    assert found.levels == pytest.approx(gap / (8 * SIZE * SIZE * 3))
    assert found.clip is not None and (found.clip.a, found.clip.b, found.clip.difference) == (3.5, 5.5, 2.0)
    assert found.clip.low == pytest.approx(2 - 1.96 * (8 / 7 / 8) ** 0.5)
    assert found.changed and "how well they follow their prompts" in found.conclusion
    x, y, z = (Cells()(next(f.batches()))["pool"].double() for f in (a, b, reference))
    assert found.reference is not None
    assert found.reference.a == pytest.approx(float(energy(x, z))) and found.reference.b == pytest.approx(
        float(energy(y, z))
    )
    assert found.to_dict()["reference"]["low"] <= found.reference.difference <= found.reference.high


def test_shifts_of_means() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, generator=g)
    assert mean_shift(a, a + 0.1 * torch.randn(400, generator=g)).p > 0.01
    moved = mean_shift(a, a + 0.1 * torch.randn(400, generator=g) + 0.05)
    assert moved.p < 1e-6 and moved.low < 0.05 < moved.high
    assert mean_shift(a, a).p == 1
    x, reference = torch.randn(300, 4, generator=g), torch.randn(200, 4, generator=g)
    near = reference_shift(x, torch.randn(300, 4, generator=g), reference)
    far = reference_shift(x, torch.randn(300, 4, generator=g) + 0.5, reference)
    assert near.p > 0.01 and near.low < 0 < near.high
    assert far.p < 0.01 and 0 < far.low < far.difference < far.high


def test_folders_that_do_not_belong_together(plain: ImageFolder, tmp_path: Path) -> None:
    fewer = folder(tmp_path / "fewer", sampled(30, 1))
    with pytest.raises(VisarError, match=r"lacks 1170 images that .* has, the first being 000030"):
        compare(plain, fewer, Cells())
    with pytest.raises(VisarError, match=r"Image 000000 is of 'class 0' in .* and of 'thing 0' in"):
        compare(fewer, folder(tmp_path / "things", sampled(30, 1), prompt="thing {}"), Cells())
    with pytest.raises(VisarError, match=r"of \(6, 6\) pixels .* of \(5, 5\)"):
        compare(fewer, folder(tmp_path / "small", sampled(30, 1)[:, :5, :5]), Cells())
    with pytest.raises(VisarError, match="holds 1 images; a comparison needs 2"):
        one = folder(tmp_path / "one", sampled(1, 1))
        compare(one, one, Cells())


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    class Broken(Cells):
        def extract(self, images: Tensor) -> dict[str, Tensor]:
            found = super().extract(images)["pool"]
            found[1:2] = float("nan")
            return {"pool": found}

    a, b = (folder(tmp_path / name, sampled(4, seed)) for seed, name in enumerate("ab"))
    with pytest.raises(VisarError, match=r"Features of image 000001 of .* are not finite"):
        compare(a, b, Broken())


def test_what_would_have_been_seen_is_of_all_tests_together(plain: ImageFolder, tmp_path: Path) -> None:
    """The conclusion cannot say that a distance beyond its own limit was not seen, for want of the correction."""
    b = folder(tmp_path / "b", sampled(COUNT, 2))
    alone, both = compare(plain, b, Cells()), compare(plain, b, Cells(), clip=lambda f, ids: torch.rand(len(ids)))
    assert alone.overall.level == 0.005 and both.overall.level == pytest.approx(0.01 / 3)
    assert both.overall.least > alone.overall.least


def test_images_of_one_prompt_are_compared_with_one_another(plain: ImageFolder, tmp_path: Path) -> None:
    """Classes that change places in turn look alike as a whole."""
    images = sampled(COUNT, 2)
    found = compare(plain, folder(tmp_path / "b", np.roll(images, CLASSES + 1, axis=0)), Cells())
    assert found.per_prompt is not None and found.overall.p > 0.01 > found.per_prompt.p and found.changed
