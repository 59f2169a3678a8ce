"""A report of samplers: its folders, its figures, and a page that needs no other file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import Cells
from visar.cli import main
from visar.errors import VisarError
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.report.make import Report, make_report
from visar.eval.report.page import escaped, write_page
from visar.pipelines import ClassToImagePipeline
from visar.samplers import GroupedJacobi, get_sampler

COUNT = 7 * 24
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def report(class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    pipe = ClassToImagePipeline.from_pretrained(class_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    torch.nn.init.normal_(pipe.gpt.output.weight, std=3.0)  # distributions that are far from uniform
    out = tmp_path_factory.mktemp("report")
    samplers = {"ar": get_sampler("ar"), "sjd": get_sampler("sjd"), "gsd": GroupedJacobi(group=23, gap=1.0)}
    given = [*range(7)]

    def redder(folder: ImageFolder, ids: object) -> torch.Tensor:
        return Cells()(torch.cat(list(folder.batches())))["pool"][:, 0].double()

    made = make_report(pipe, samplers, given, out, Cells(), name="tiny & small", count=COUNT, batch=56,
                       clip=redder, speed_images=1, top_k=0)  # fmt: skip
    return made, out


def test_exact_samplers_do_not_change_images_and_others_do(report: tuple[Report, Path]) -> None:
    ar, sjd, gsd = report[0].entries
    assert (ar.label, ar.exact, sjd.exact, gsd.exact) == ("ar", True, True, False)
    assert Path(ar.comparison.a).name == "ar" and ar.folder.name == "ar-seed-1" and sjd.folder.name == "sjd"
    assert not ar.comparison.changed and not sjd.comparison.changed and gsd.comparison.changed
    assert ar.comparison.same < 0.5 and ar.comparison.images == COUNT and ar.comparison.prompts == 7
    for entry in report[0].entries:
        assert len(entry.worst) == 4 and entry.worst[0].drop >= entry.worst[-1].drop
    assert [row.sampler for row in report[0].speed.rows] == ["ar", "sjd", "gsd"]


def test_the_worst_are_those_that_lost_most(report: tuple[Report, Path]) -> None:
    gsd = report[0].entries[2]
    folders = [ImageFolder.open(f) for f in (gsd.comparison.a, gsd.folder)]
    a, b = (Cells()(torch.cat(list(f.batches())))["pool"][:, 0] for f in folders)
    assert gsd.worst[0].drop == pytest.approx(float((a - b).max()))
    assert int(gsd.worst[0].id) == int((a - b).argmax()) and gsd.worst[0].prompt.startswith("class ")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.cells += tag == "td"


def test_the_page_needs_no_other_file(report: tuple[Report, Path]) -> None:
    made, out = report
    files = write_page(made, out)
    assert sorted(f.name for f in files) == ["grid.webp", "plot.svg", "report.html", "report.json", "report.md"]
    page = (out / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.links and all(link.startswith(("data:image/", "#")) for link in tags.links)
    header = re.search(r"<table><tr>(.*?)</tr>", page)
    assert header is not None and tags.cells == 3 * header[1].count("<th>")
    assert "tiny &amp; small" in page and "tiny & small" not in page and "ar (another seed)" in page
    assert page.count(">changed: ") == 1 and page.count('class="text changed"') == 1
    text = (out / "report.md").read_text()
    assert text.startswith("# Samplers of tiny \\& small\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    assert "from the reference" not in text and "change of score" in text  # the one is unknown, the other is not
    written = json.loads((out / "report.json").read_text())
    assert [row["changed"] for row in written["rows"]] == [False, False, True]
    grid = Image.open(out / "grid.webp")
    assert grid.height > 7 * 96 and grid.width > 4 * 96


def test_prompts_are_no_markup_in_markdown() -> None:
    for text, shown in (
        ("a red heart, 3d", "a red heart, 3d"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("a | b\n\n# c\x0b", r"a \| b # c"),
        ("[x](http://a.b) ![y](z) *b* _c_ `d`", r"\[x\](http\://a.b) !\[y\](z) \*b\* \_c\_ \`d\`"),
        ("www.a.b &lt; \\", r"www\.a.b \&lt; \\"),
    ):
        assert escaped(text) == shown


def test_from_python_too_nothing_of_others_is_replaced(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(VisarError, match=r"holds a report\.json of something else"):
        samplers = {name: get_sampler(name) for name in ("ar", "sjd")}
        make_report(class_pipe, samplers, [0], tmp_path, Cells(), name="tiny", count=2)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_report_goes_on_where_it_was(report: tuple[Report, Path], class_folder: Path) -> None:
    made, out = report
    times = {f: f.stat().st_mtime_ns for f in (out / "images").glob("*/*.png")}
    assert len(times) == 4 * COUNT
    one = next(iter(times))
    pipe = ClassToImagePipeline.from_pretrained(class_folder)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(VisarError, match="weights"):
        make_report(pipe, {"ar": get_sampler("ar"), "sjd": get_sampler("sjd")}, [*range(7)], out, Cells(),
                    name="tiny & small", count=COUNT, batch=56, top_k=0)  # fmt: skip
    assert one.stat().st_mtime_ns == times[one] and made.seed == 0


def test_what_cannot_go_on_is_said_before_images(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["eval", "report", "--model", str(class_folder), "--speed-images", "1", "-o", str(tmp_path / "out")]
    assert main([*command, "--samplers", "ar,sjd", "--clip", "icons-clip"]) == 2
    assert "--clip is of images and their prompts" in capsys.readouterr().err and not (tmp_path / "out").exists()
    sample = [
        "sample",
        "--model",
        str(class_folder),
        "--classes",
        "0-6",
        "-o",
        str(tmp_path / "out" / "images" / "sjd"),
    ]
    assert main([*sample, "--sampler", "sjd", "--window", "5"]) == 0
    assert main([*command, "--samplers", "ar,sjd"]) == 2
    assert "sjd holds a run with other settings: window was 5, now 16" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "out" / "images").iterdir()] == ["sjd"]


@pytest.mark.parametrize("name", ["report.md", "grid.webp"])
def test_what_others_wrote_is_not_replaced(class_folder: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    (tmp_path / name).write_text("mine")
    command = ["eval", "report", "--model", str(class_folder), "--samplers", "ar,sjd", "-n", "4", "-o", str(tmp_path)]
    assert main(command) == 2
    assert f"{tmp_path} holds a {name} of something else; give another folder." in capsys.readouterr().err
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
    (tmp_path / name).unlink()
    (tmp_path / "images" / "ar").mkdir(parents=True)  # as a report that was cut short
    (tmp_path / "images" / "ar" / "run.json").write_text("{}")
    (tmp_path / name).mkdir()
    assert main(command) == 2 and f"Cannot write {tmp_path / name}: Is a directory" in capsys.readouterr().err


def test_command(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    command = ["eval", "report", "--model", str(class_folder), "--out", str(out), "--speed-images", "1"]
    for _ in range(2):  # the second replaces its own page
        assert main([*command, "--samplers", "ar,sjd", "-n", "8"]) == 0
    told = capsys.readouterr().out
    assert "ar (another seed): " in told and str(out / "report.html") in told
    assert json.loads((out / "report.json").read_text())["rows"][1]["features"] == "efflite0"
    for arguments, message in (
        (["--samplers", "ar"], "A report compares 2 or more samplers"),
        (["--samplers", "ar,sdj"], "Did you mean 'sjd'?"),
        (["-n", "0"], "--num-images must be 1 or more"),
        (["-n", "1"], "A report compares 2 or more images of each sampler, not 1"),
        (["--seed", str(2**64 - 1)], "seed must be from 0 to 18446744073709551615, not 18446744073709551616"),
        (["--protocol", "icons"], "Unknown protocol 'icons'"),
        (["--clip-weights", "x"], "--clip-weights needs --clip"),
        (["--clip", "icons-efflite0"], "has no CLIP score"),
        (["--classes", "0-1", "--prompts", "x"], "Give either --prompts FILE or --classes LIST"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt"),
        (["--reference", str(tmp_path / "none")], "no images at"),
    ):
        assert main([*command[:-4], "--out", str(tmp_path / "new"), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
