"""Whether samplers change pictures: the distance, the features it is measured in, and what the commands print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from visar.cli import main
from visar.errors import VisarError
from visar.eval import plots
from visar.eval.extractors import as_uint8
from visar.eval.extractors.lite0 import lite0
from visar.eval.plots import Point, draw
from visar.eval.quality import energy, quality
from visar.pipelines import ClassToImagePipeline
from visar.samplers import GroupedJacobi, get_sampler

Capture = pytest.CaptureFixture[str]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_is_that_of_its_definition() -> None:
    x, y = normal(3, 5), normal(4, 5, seed=1) + 1
    cross = sum(float((a - b).norm()) for a in x for b in y) / 12
    own = [sum(float((a - b).norm()) for i, a in enumerate(z) for b in z[:i]) / (n * (n - 1) / 2)
           for z, n in ((x, 3), (y, 4))]  # fmt: skip
    assert energy(x, y).item() == pytest.approx(2 * cross - sum(own))
    assert energy(x.expand(2, -1, -1), y).tolist() == pytest.approx([energy(x, y).item()] * 2)


def test_energy_distance_has_no_bias_and_sees_a_shift() -> None:
    same, moved = (energy(normal(4000, 3, 2), normal(4000, 3, 2, seed=1) + shift) for shift in (0.0, 0.5))
    error = same.std() / 4000**0.5
    assert abs(same.mean()) < 4 * error < moved.mean()
    assert bool((same < 0).any())


def cells(pictures: Tensor) -> dict[str, Tensor]:
    assert pictures.dtype == torch.uint8
    return {"pool": torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 4).flatten(1)}


def test_exact_samplers_do_not_move_pictures_and_others_do(class_pipe: ClassToImagePipeline) -> None:
    torch.manual_seed(5)
    torch.nn.init.normal_(class_pipe.gpt.output.weight, std=3.0)  # laws that are far from uniform
    samplers = {"sjd": get_sampler("sjd"), "gsd": GroupedJacobi(group=23, gap=1.0)}
    rows = quality(class_pipe, samplers, range(7), cells, each=32, real=torch.rand(8, 3, 8, 8))
    found = {row.sampler: row for row in rows}
    assert [row.sampler for row in rows] == ["ar", "sjd", "gsd"]
    for name in ("ar", "sjd"):
        assert abs(found[name].moved) < 4 * found[name].error
    assert found["gsd"].moved > 10 * found["sjd"].error
    assert all(row.real is not None and row.real > 0 for row in rows)
    with pytest.raises(VisarError, match="2 or more pictures of 2 or more prompts"):
        quality(class_pipe, samplers, [1, 2], cells, each=1)


def test_lite0() -> None:
    extract = lite0()
    ramp = torch.linspace(0, 1, 48).expand(3, 48, 48)
    pictures = as_uint8(torch.stack([ramp, ramp.transpose(1, 2), torch.full_like(ramp, 0.5)]))
    found = extract(pictures)["pool"]
    assert found.shape == (3, 1280) and bool((found >= 0).all())
    assert torch.allclose(extract(pictures[1:2])["pool"], found[1:2], atol=1e-4)
    assert found[0, :4].tolist() == pytest.approx([0.0, 0.0, 3.3110, 0.0], abs=2e-3)  # as the package itself gives


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("timm", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VisarError, match="Features need the extra `eval`"):
        lite0()
    with pytest.raises(VisarError, match="Plots need the extra `eval`"):
        draw([Point("a", "", 1, 1)], tmp_path / "a.svg", x="x", y="y")


def test_bench_with_quality(
    class_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visar.eval.extractors.lite0.lite0", lambda device: cells)
    command = ["bench", "--model", str(class_folder), "--samplers", "ar,sjd,gsd", "--images", "1", "--repeats", "1"]
    assert main([*command, "--quality", "2", "--json", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    assert "MOVED FROM AR" in out and "2 pictures of each of 7 prompts" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["sampler"] for row in report["quality"]] == ["ar", "sjd", "gsd"]
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "bench.json"), str(tmp_path / "a.svg")])
    assert plots.main() == 0
    for out, message in (("a.xyz", "a .xyz file"), ("none/a.svg", "")):
        monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "bench.json"), str(tmp_path / out)])
        assert plots.main() == (2 if message else 0)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "bench.json"), str(tmp_path / "a.svg")])
    first = (tmp_path / "a.svg").read_text()
    assert plots.main() == 0 and (tmp_path / "a.svg").read_text() == first and "sjd" in first
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("cat")
    for arguments, message in (
        (["--quality", "1"], "--quality must be 2 or more"), (["--real", "x"], "--real needs --quality"),
        (["--quality", "2", "--real", str(tmp_path / "none")], "none"),
        (["--styles", "3d"], "choose from the pictures of --real"),
        (["--quality", "2", "--real", str(pictures)], "--real compares by prompts, and this model draws classes"),
    ):  # fmt: skip
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "bench.json").write_text("{}")
    assert plots.main() == 2
    assert "is not of `visar bench --quality N --json`" in capsys.readouterr().err
