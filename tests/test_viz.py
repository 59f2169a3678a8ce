"""Plots show what was decoded: their cells, lines and bars are counted again from the decodings themselves."""

from __future__ import annotations

import json
import re
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from tests.generation.test_stats import stats_of
from tests.helpers.tiny import GRID
from tests.pipelines.test_masked import class_mar, fast, small_vae
from visar.cli import main
from visar.errors import VisarError
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import get_sampler
from visar.viz import FEW, Curve, commit_curve, compare, heat_map, to_svg

TOKENS = GRID**2
Figure = Any


def counted(commit_pass: torch.Tensor) -> list[list[int]]:
    """Tokens per pass of each cell, by a loop."""
    row, side = commit_pass.tolist(), int(len(commit_pass) ** 0.5)
    each = [-1 if p < 0 else sum(q == p for q in row) for p in row]
    return [each[i : i + side] for i in range(0, len(row), side)]


def the_map(figure: Figure) -> Any:
    """The image that has the colour bar."""
    (image,) = [i for axes in figure.axes for i in axes.images if i.colorbar is not None]
    return image


def scale_texts(figure: Figure) -> tuple[str, list[str]]:
    """What the colour bar is called, and the figures beside it."""
    axes = the_map(figure).colorbar.ax
    figure.canvas.draw()
    low, high = axes.get_ylim()
    return axes.get_ylabel(), [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]


# Maps


@pytest.mark.parametrize("sampler", ["ar", "scd", "zipar"])
def test_map_of_a_raster_model(text_pipe: TextToImagePipeline, sampler: str) -> None:
    made = get_sampler(sampler, **({"ahead": 2} if sampler == "zipar" else {}))
    out = text_pipe(["red heart", "cat"], sampler=made, window=4 if sampler == "scd" else None)
    for image in range(2):
        cells = the_map(heat_map(out, image)).get_array()
        assert cells.tolist() == counted(out.commit_pass[image])
        assert (cells == 1).all() == (sampler == "ar")
    most = max(map(max, counted(out.commit_pass[0])))
    assert scale_texts(heat_map(out)) == ("tokens accepted by the pass", [str(n) for n in range(1, most + 1)])


def test_map_of_a_masked_model_with_given_cells() -> None:
    pipe = ClassToImagePipeline(mar=class_mar(), vae=small_vae())
    pipe.set_progress_bar_config(disable=True)
    forced = torch.full((9, 4), float("nan"))
    forced[[1, 7]] = 0.5
    out = pipe(3, sampler=fast("mar"), forced_tokens=forced, output_type="tokens")
    figure = heat_map(out)
    cells = the_map(figure).get_array()
    expected = counted(out.commit_pass[0])
    assert cells.filled(-1).tolist() == expected and expected[0][1] == expected[2][1] == -1
    assert cells.mask.sum() == 2  # what is masked is hatched instead
    axes = the_map(figure).axes
    (hatched,) = [p for p in axes.patches if p.get_hatch()]
    corners = {tuple(v) for v in hatched.get_path().vertices}
    assert corners == {(1, 0), (2, 0), (2, 1), (1, 1), (1, 2), (2, 2), (2, 3), (1, 3)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["given"]
    assert axes.images[0].get_extent() == [0, 3, 3, 0]  # cell (0, 0) is the upper left one
    named = heat_map(out.commit_pass, missing="not yet")
    assert [t.get_text() for t in the_map(named).axes.get_legend().get_texts()] == ["not yet"]


def test_image_beside_and_beneath(text_pipe: TextToImagePipeline) -> None:
    out = text_pipe(["red heart", "cat"], window=4)
    beside = heat_map(out, 1)
    assert len(beside.axes) == 3
    assert np.array_equal(beside.axes[0].images[0].get_array(), np.asarray(out.images[1]))
    assert len(heat_map(out.commit_pass).axes) == 2
    over = heat_map(out, 1, over=True)
    ground, cells = over.axes[0].images
    assert np.allclose(ground.get_array(), np.asarray(out.images[1], float).mean(-1))
    assert cells is the_map(over) and cells.get_alpha() < 1 and ground.get_extent() == cells.get_extent()
    tensor = text_pipe(["red heart", "cat"], window=4, output_type="pt")
    shown = heat_map(tensor, 1).axes[0].images[0].get_array()
    assert np.abs(shown * 255 - np.asarray(out.images[1])).max() <= 0.51


def test_one_scale_for_two_maps() -> None:
    few, many = torch.arange(16) // 2, torch.arange(16) // 8
    alone, shared = the_map(heat_map(few)), the_map(heat_map(few, most=8))
    assert shared.to_rgba(2) == the_map(heat_map(many, most=8)).to_rgba(2) != alone.to_rgba(2)
    with pytest.raises(VisarError, match="A pass committed 8 tokens: most must be 8 or more, not 7"):
        heat_map(many, most=7)
    with pytest.raises(VisarError, match="or more, not 0"):
        heat_map(torch.full((4,), -1), most=0)


def test_many_counts_have_a_continuous_scale() -> None:
    commit_pass = torch.zeros(49)
    commit_pass[-1] = 1
    _, figures = scale_texts(heat_map(commit_pass))
    assert 2 <= len(figures) <= 9 and all(f.isdigit() for f in figures)
    commit_pass[FEW:] = torch.arange(1, 50 - FEW)
    assert scale_texts(heat_map(commit_pass))[1] == [str(n + 1) for n in range(FEW)]


def test_maps_that_cannot_be_drawn() -> None:
    for row, image, message in (
        (torch.zeros(2, 9), 2, "There is no image 2: there are 2"),
        (torch.zeros(2, 9), -1, "There is no image -1"),
        (torch.zeros(10), 0, "side x side cells, not 10"),
        (torch.zeros(0), 0, "side x side cells, not 0"),
        (torch.zeros(2, 3, 9), 0, r"must be \[B, N\] or \[N\], not \[2, 3, 9\]"),
    ):
        with pytest.raises(VisarError, match=message):
            heat_map(row, image)


# Curves


def test_curve_of_a_decoding(class_pipe: ClassToImagePipeline) -> None:
    out = class_pipe([1, 2], window=4, output_type="tokens")
    row = out.commit_pass[1].tolist()
    curve = Curve.of("scd", out.commit_pass[1], 3.0)
    assert curve.passes == list(range(max(row) + 2)) and len(curve.passes) < TOKENS
    assert curve.tokens == [sum(p < n for p in row) for n in curve.passes] and curve.tokens[-1] == TOKENS
    assert curve.seconds == pytest.approx([3.0 * n / curve.passes[-1] for n in curve.passes])
    assert Curve.of("given", [-1, -1, 0, 1, 1]).tokens == [2, 3, 5]
    assert Curve.of("all given", [-1, -1]).tokens == [2]


def test_lines_are_the_curves(class_pipe: ClassToImagePipeline) -> None:
    rows = {name: class_pipe(1, sampler=name, output_type="tokens").commit_pass[0] for name in ("ar", "scd")}
    curves = [Curve.of("ar", rows["ar"], 2.0), Curve.of("scd", rows["scd"])]
    figure = commit_curve(curves, TOKENS)
    passes, seconds = figure.axes
    ar_line, ar, scd = [line.get_xydata().tolist() for line in passes.lines]
    assert ar_line == [[0, 0], [TOKENS, TOKENS]]
    assert ar == [[n, n] for n in range(TOKENS + 1)]
    assert scd == [list(p) for p in zip(curves[1].passes, curves[1].tokens, strict=True)]
    assert scd[-1][1] == TOKENS and scd[-1][0] < TOKENS
    assert [line.get_xydata().tolist()[-1] for line in seconds.lines] == [[2.0, TOKENS]]
    assert [t.get_text() for t in passes.get_legend().get_texts()] == ["one token per pass", "ar", "scd"]
    assert seconds.lines[0].get_color() == passes.lines[1].get_color() != passes.lines[2].get_color()
    assert (passes.get_xlabel(), seconds.get_xlabel(), passes.get_ylabel()) == ("passes", "seconds", "committed tokens")


def test_runs_that_are_not_over_and_panels() -> None:
    empty = Curve("scd", [], [], [])
    begun = Curve("sjd", [0, 1, 2], [0, 3, 4])
    assert len(commit_curve([begun], 16).axes) == 1
    figure = commit_curve([empty, begun], 16)
    assert figure.axes[0].get_ylim()[1] >= 16 and figure.axes[0].get_xlim()[1] >= 16  # it does not grow with the run
    wide, narrow = commit_curve([empty], 16), commit_curve([empty], 16, stacked=True)
    assert narrow.get_figwidth() < wide.get_figwidth() and narrow.get_figheight() > wide.get_figheight()
    assert [axes.get_ylabel() for axes in narrow.axes] == ["committed tokens"] * 2


def test_curves_that_cannot_be_drawn() -> None:
    with pytest.raises(VisarError, match="series of curve 'a' must be of one length"):
        Curve("a", [0, 1], [0])
    with pytest.raises(VisarError, match="series of curve 'a' must be of one length"):
        Curve("a", [0, 1], [0, 1], [0.0])
    with pytest.raises(VisarError, match="Curve 'a' has 9 tokens of an image of 8"):
        commit_curve([Curve("a", [0, 1], [0, 9])], 8)
    with pytest.raises(VisarError, match=r"commit_pass must be \[N\], not \[2, 3\]"):
        Curve.of("a", torch.zeros(2, 3))


# Comparisons


def bars(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_samplers_side_by_side() -> None:
    runs = [stats_of(), stats_of(sampler="gsd", exact=False, exactness="relaxed", nfe=12345, ms_per_pass=9.5)]
    figure = compare(runs)
    passes, cost = figure.axes
    assert bars(passes) == [83, 12345] and bars(cost) == [8.604, 9.5]
    assert [[t.get_text() for t in axes.texts] for axes in figure.axes] == [["83", "12345"], ["8.60", "9.50"]]
    assert [t.get_text() for t in passes.get_yticklabels()] == ["sjd", "gsd"] and passes.get_ylim()[0] > 0
    assert (passes.get_xlabel(), cost.get_xlabel()) == ("passes (NFE)", "ms per pass")
    assert [bool(p.get_hatch()) for p in passes.patches] == [False, True]
    assert figure.get_suptitle() == "one run, this machine (batch 2, cpu, float32)"
    (legend,) = figure.legends
    assert [t.get_text()[:7] for t in legend.get_texts()] == ["exact: ", "relaxed"]
    (alone,) = compare(runs[:1]).legends
    assert len(alone.get_texts()) == 1


def test_a_report_of_the_command_line(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    tail = ["-n", "1", "--repeats", "1", "--json", str(file), "--model", str(text_folder)]
    assert main(["bench", "--samplers", "ar,gsd", *tail]) == 0
    report = json.loads(file.read_text())
    figure = compare(report)
    assert bars(figure.axes[0]) == [row["nfe"] for row in report["rows"]] and bars(figure.axes[0])[0] == TOKENS + 1
    assert bars(figure.axes[1]) == [row["ms_per_pass"] for row in report["rows"]]
    assert [bool(p.get_hatch()) for p in figure.axes[0].patches] == [False, True]
    assert report["device"] in figure.get_suptitle()


def test_nothing_to_compare() -> None:
    with pytest.raises(VisarError, match="no samplers to compare"):
        compare([])
    for wrong in ({}, {"rows": {"ar": {}}}, {"rows": [{"shape": "llamagen-b"}]}):
        with pytest.raises(VisarError, match="This is no report of samplers"):
            compare(wrong)


# SVG


def drawn() -> list[Figure]:
    return [
        heat_map(torch.tensor([-1, 0, 0, 1])),
        heat_map(torch.arange(9) // 2),
        commit_curve([Curve("<scd> & co", [0, 1], [0, 4], [0.0, 0.1])], 4),
        compare([stats_of(), stats_of(exact=False, exactness="relaxed")]),
    ]


def test_svg_is_inline_and_its_text_is_text() -> None:
    for figure in drawn():
        svg = to_svg(figure)
        root = ElementTree.fromstring(svg)
        assert svg.startswith("<svg ") and root.get("aria-label") == figure.get_label() != ""
        assert root.get("width") is None and root.get("height") is None and root.get("viewBox")
        texts = {"".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")}
        for axes in figure.axes:
            assert {axes.get_xlabel(), axes.get_ylabel()} - {""} <= texts
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith(("#", "data:image/png;")) for link in links) and "@import" not in svg
        assert "date" not in svg and "<!--" not in svg
        ground = next(p for p in root.iter("{http://www.w3.org/2000/svg}path"))
        assert "fill: none" in ground.get("style", "")  # transparent
    assert "<scd> & co" in {"".join(t.itertext()) for t in ElementTree.fromstring(to_svg(drawn()[2])).iter()}


def test_ids_on_one_page() -> None:
    pages = [to_svg(figure) for figure in drawn()]
    ids = [set(re.findall(r'\bid="([^"]+)"', page)) for page in pages]
    assert all(ids) and sum(map(len, ids)) == len(set.union(*ids))
    for page, own in zip(pages, ids, strict=True):
        assert len(re.findall(r'\bid="', page)) == len(own)
        used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
        assert used and {a or b for a, b in used} <= own
    assert pages == [to_svg(figure) for figure in drawn()]


def test_text_is_legible_on_light_and_dark() -> None:
    def luminance(colour: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    for figure in drawn()[2:]:
        svg = to_svg(figure)
        texts = re.findall(r"<text [^>]*style=\"([^\"]*)\"", svg)
        colours = {c for style in texts for c in re.findall(r"fill: (#\w+)", style)}
        assert texts and len(colours) == 1 and all("fill:" in style for style in texts)
        light = luminance(colours.pop())
        assert 1.05 / (light + 0.05) > 4 and (light + 0.05) / 0.05 > 4  # WCAG's contrast, on white and on black


def test_threads_and_settings() -> None:
    """Threads draw the same at once, and neither leaves settings behind nor asks for a window."""
    before = dict(matplotlib.rcParams)
    expected = [to_svg(figure) for figure in drawn()]
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append([to_svg(f) for f in drawn()])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4 and dict(matplotlib.rcParams) == before


def test_a_figure_shows_itself_in_a_notebook() -> None:
    figure = drawn()[0]
    assert figure._repr_html_() == to_svg(figure)


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: heat_map([0]), lambda: commit_curve([], 4), lambda: compare([stats_of()])):
        with pytest.raises(VisarError, match=r"visar\[demo\]"):
            draw()


def test_labels_are_text() -> None:
    """What matplotlib would take for a formula, or for a curve that the legend leaves out."""
    figure = commit_curve([Curve(r"$\nonsense$", [0, 1], [0, 1]), Curve("_tree", [0, 1], [0, 1])], 4)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one token per pass", r"\$\nonsense\$", "tree"]
    assert "nonsense" in to_svg(figure)
