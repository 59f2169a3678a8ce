"""What a notebook shows: one line or a quiet table of figures, images inline, and nothing that a page could run."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny import GRID
from visar.generation.notebook import MOST, SIDE
from visar.generation.output import ImageOutput
from visar.generation.stats import DecodeStats, MaskedStats
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline


def stats_of(kind: type[DecodeStats] = DecodeStats, **changed: object) -> DecodeStats:
    masked = dict(
        denoising_steps=100,
        denoiser_calls=700,
        calls_per_pass=70.04,
        evaluations_per_token=81.6,
        tested=50,
        accepted=20,
    )
    made = kind(
        sampler="sjd", parameters={"window": 16, "init": "uniform"}, window=16, exact=True, exactness="exact", seed=7,
        settings={"guidance_scale": 2.5, "top_k": 0, "guidance_schedule": None, "dtype": "float32", "device": "cpu"},
        images=2, tokens=256,
        nfe=83, passes_per_image=[80, 82], tokens_per_pass=3.161, seconds=0.714, draft_seconds=None, draft_passes=None,
        ms_per_pass=8.604, gigabytes=1.25, graph_passes=0, capture_seconds=0.0,
        **(masked if kind is MaskedStats else {}),
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


class Table(HTMLParser):
    """The cells of a page, row by row, and its tags; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def test_one_line() -> None:
    for stats in (stats_of(), stats_of(MaskedStats)):
        assert repr(stats) == str(stats) and "\n" not in repr(stats)
    assert repr([stats_of()]) == (
        "[sjd (exact): 83 NFE for 256 tokens x 2 images, 3.16 tokens/pass, 8.60 ms/pass, 0.71 s]"
    )


def test_the_target_of_16_bits_depends_on_the_passes() -> None:
    def said(**settings: object) -> object:
        return stats_of(settings=settings).to_dict()["distribution"]

    assert said(dtype="bfloat16", invariant=False) == "the model's in bfloat16, by passes of 16 tokens"
    assert said(dtype="bfloat16", invariant=True) == "the model's in bfloat16, by passes of any width"
    assert said(dtype="float32", invariant=False) == "the model's in float32"
    assert "1 token" in stats_of(settings={"dtype": "float16", "invariant": False}, window=1).distribution


def test_table() -> None:
    rows = dict(Table(stats_of()._repr_html_()).rows)
    assert rows == {
        "sampler": "sjd window 16, init uniform",
        "distribution": "exact: images have the model's own distribution",
        "target": "the model's in float32",
        "passes (NFE)": "83 for 2 x 256 tokens",
        "tokens per pass": "3.16",
        "a pass": "8.60 ms",
        "decoding": "0.71 s",
        "settings": "seed 7, guidance_scale 2.5, top_k 0, dtype float32, device cpu",
    }
    masked = dict(Table(stats_of(MaskedStats)._repr_html_()).rows)
    head = masked.pop("diffusion head")
    assert head == "70.0 calls per pass, 82 evaluations per token, 40% of drafts accepted" and masked == rows
    assert "drafts" not in stats_of(MaskedStats, tested=0)._repr_html_()


def test_joined_metrics_are_sums_over_sums() -> None:
    one = stats_of(tokens_per_pass=4.0, passes_per_image=[64], images=1, nfe=65)
    other = stats_of(tokens_per_pass=2.0, passes_per_image=[100, 128], images=2, nfe=129)
    whole = one.joined([other])
    assert whole.tokens_per_pass == pytest.approx(512 / 192) and whole.nfe == 194 and whole.images == 3
    masked = [
        stats_of(MaskedStats, images=i, denoiser_calls=calls, calls_per_pass=calls / passes, tested=t, accepted=a,
                 evaluations_per_token=e)
        for i, calls, passes, t, a, e in ((1, 100, 10, 10, 9, 50.0), (3, 300, 60, 90, 10, 90.0))
    ]  # fmt: skip
    both = masked[0].joined(masked[1:])
    assert (both.denoiser_calls, both.tested, both.accepted) == (400, 100, 19) and both.acceptance == 0.19
    assert both.calls_per_pass == pytest.approx(400 / 70)  # type: ignore[attr-defined]
    assert both.evaluations_per_token == pytest.approx((50 + 3 * 90) / 4)  # type: ignore[attr-defined]


def test_exactness_in_words() -> None:
    relaxed = stats_of(exact=False, exactness="relaxed")
    assert (
        dict(Table(relaxed._repr_html_()).rows)["distribution"]
        == "relaxed: images do not have the model's distribution"
    )
    greedy = stats_of(exact=False, exactness="exact for greedy decoding; does not sample")
    assert dict(Table(greedy._repr_html_()).rows)["distribution"] == greedy.exactness


def test_everything_is_escaped() -> None:
    evil = "<script>alert('&')</script>"
    stats = stats_of(sampler=evil, parameters={evil: evil}, exact=False, exactness=evil, settings={evil: evil})
    page = Table(stats._repr_html_())
    assert set(page.tags) == {"table", "tr", "td"} and "'&'" in dict(page.rows)["distribution"]
    assert unescape(stats._repr_html_()).count(evil) == 6


def images_in(html: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    ]


def test_images_inline(text_pipe: TextToImagePipeline) -> None:
    out = text_pipe("red heart", num_images_per_prompt=2)
    html = out._repr_html_()
    for shown, image in zip(images_in(html), out.images, strict=True):
        assert np.array_equal(np.asarray(shown), np.asarray(image))
    assert html.endswith(out.stats._repr_html_()) and "more" not in html
    assert not re.search(r"(src|href)=\"(?!data:)|url\(", html)
    as_tensor = text_pipe("red heart", num_images_per_prompt=2, output_type="pt")
    assert as_tensor.images.shape[0] == 2
    assert [np.asarray(p).tolist() for p in images_in(as_tensor._repr_html_())] == [
        np.asarray(p).tolist() for p in out.images
    ]
    assert images_in(text_pipe("red heart", output_type="tokens")._repr_html_()) == []


def test_images_are_bounded(text_pipe: TextToImagePipeline) -> None:
    out = text_pipe("red heart", output_type="tokens")
    many = ImageOutput([Image.new("RGB", (600, 300), "red")] * (MOST + 3), out.tokens, out.commit_pass, out.stats)
    shown = images_in(many._repr_html_())
    assert [p.size for p in shown] == [(SIDE, SIDE // 2)] * MOST
    assert "<div>and 3 more</div>" in many._repr_html_()
    assert many.images[0].size == (600, 300)  # what was shown is not what was shrunk


def test_the_output_is_still_that_of_diffusers(class_pipe: ClassToImagePipeline) -> None:
    out = class_pipe([1, 2])
    assert repr(out) == f"ImageOutput(tokens [2, {GRID**2}], {out.stats})"
    assert out[0] is out.images and out["stats"] is out.stats and out[1:3] == (out.tokens, out.commit_pass)
    assert list(out) == ["images", "tokens", "commit_pass", "stats"] and len(out.to_tuple()) == 4
    with pytest.raises(TypeError):
        hash(out)
    assert torch.equal(ImageOutput(*out.to_tuple()).tokens, out.tokens)
