"""`visar sample` and `visar export`: what they write and print, masked models, layouts, and one-line errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bulk.test_run import images, manifest, names
from visar.bulk import export, export_npz
from visar.cli import main
from visar.text_encoders.words import WordEncoder

Capture = pytest.CaptureFixture[str]
GENEVAL = (
    '{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"}',
    '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}',
)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def read(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def geneval_run(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of GenEval's two prompts."""
    folder = tmp_path_factory.mktemp("geneval")
    (folder / "metadata.jsonl").write_text("\n".join(GENEVAL) + "\n")
    assert (
        run("sample", "--model", text_folder, "--prompts", folder / "metadata.jsonl", "-n", 8, "--out", folder / "run")
        == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def class_run(class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "run"
    assert run("sample", "--model", class_folder, "--classes", "5,0-1", "-n", 6, "--out", folder, "--npz",
               folder.with_name("new") / "a.npz") == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def dpg_run(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpg")
    (folder / "dpg.jsonl").write_text('{"id": "COCO_7", "prompt": "cat"}\n{"id": 31, "prompt": "dog"}\n')
    assert run("sample", "--model", text_folder, "--prompts", folder / "dpg.jsonl", "-n", 8, "--out", folder / "r") == 0
    return folder / "r"


# Sample


def test_sample(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.txt").write_text("red zebra\ncat\n")
    given = ["sample", "--model", text_folder, "--prompts", tmp_path / "p.txt", "-n", 5, "--batch", 3, "--seed", 4,
             "--sampler", "sjd", "--set", "init=left", "--window", 6, "--top-k", 9, "--top-p", 0.9,
             "--temperature", 0.8, "--guidance-scale", 1.5, "--out", tmp_path / "a"]  # fmt: skip
    assert run(*given) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"sjd (exact): 5 images in {tmp_path / 'a'}, 5 of them sampled now, ")
    assert err == "visar: note: Words not known to this model were left out: zebra.\n"  # and no bar: this is no tty
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (about["model"], about["batch"], about["count"], about["seed"]) == (str(text_folder), 3, 5, 4)
    assert about["parameters"] == {"window": 6, "coupling": "independent", "init": "left"}
    assert about["settings"] == {"guidance_scale": 1.5, "guidance_interval": -1, "guidance_schedule": None,
                                 "temperature": 0.8, "top_k": 9, "top_p": 0.9}  # fmt: skip
    assert run(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["sampled"], found["exact"], found["folder"]) == (5, 0, True, str(tmp_path / "a"))


def test_its_images_are_those_of_generate(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("cat\n")
    assert run("sample", "--model", text_folder, "--prompts", tmp_path / "p.txt", "-n", 3, "--out", tmp_path / "a") == 0
    assert run("generate", "cat", "-n", 3, "--model", text_folder, "-o", tmp_path / "b") == 0
    for i, name in enumerate(("cat", "cat-1", "cat-2")):
        assert (read(tmp_path / "a" / f"{i:06d}.png") == read(tmp_path / "b" / f"{name}.png")).all()


def test_the_bar_counts_what_is_there(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    import visar.bulk
    from visar.pipelines import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(text_folder)
    pipe.set_progress_bar_config(disable=True)
    visar.bulk.sample_images(pipe, ["cat", "dog"], tmp_path, count=4, batch=2)
    visar.bulk.sample_images(pipe, ["cat", "dog"], tmp_path, count=8, batch=2, progress=True)
    shown = capsys.readouterr().err.replace("\r", "\n").split("\n")
    bars = [line for line in shown if "image" in line]
    assert " 4/8 [" in bars[0] and " 8/8 [" in bars[-1] and "<" in bars[-1]


def test_masked_models(words: WordEncoder, tmp_path: Path, capsys: Capture) -> None:
    from tests.pipelines.test_masked import small_vae, text_mar
    from visar.pipelines import TextToImagePipeline

    TextToImagePipeline(mar=text_mar(), vae=small_vae(), text_encoder=words).save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("red cat\nblue dog\n")
    given = ["sample", "--model", tmp_path / "model", "--prompts", tmp_path / "p.txt", "-n", 4, "--sampler", "mar",
             "--set", "steps=4", "--set", "head_steps=6", "--batch", 2, "--out", tmp_path / "a"]  # fmt: skip
    assert run(*given) == 0
    lines = manifest(tmp_path / "a")
    assert [line["index"] for line in lines] == [0, 0, 1, 1]
    assert lines[0]["stats"]["denoiser_calls"] == 16  # 4 of 6 steps
    assert len(set(images(tmp_path / "a").values())) == 4
    (tmp_path / "a" / "000002.png").unlink()
    before = images(tmp_path / "a")
    capsys.readouterr()
    assert run(*given) == 0 and "1 of them sampled now" in capsys.readouterr().out
    assert before.items() < images(tmp_path / "a").items()
    assert run(*given, "--tokens") == 2
    assert "--tokens is for models of discrete tokens; this one's are vectors." in capsys.readouterr().err
    assert run(*given[:7], "--out", tmp_path / "b") == 0  # its default sampler, with no more passes than tokens
    about = json.loads((tmp_path / "b" / "run.json").read_text())
    assert about["sampler"] == "mar-headspec" and about["parameters"]["steps"] == 9


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Give either --prompts FILE or --classes LIST."),
        ("--prompts TMP/p.txt --classes 1", "Give either --prompts FILE or --classes LIST."),
        ("--prompts TMP/none.txt", "There is no file TMP/none.txt."),
        ("--prompts TMP/model", "Prompts are read from a .txt or .jsonl file"),
        ("--prompts TMP/binary.txt", "it is no UTF-8 text."),
        ("--prompts TMP/nothing.txt", "nothing.txt is empty."),
        ("--prompts TMP/gap.txt", "Line 2 of TMP/gap.txt is empty; give a prompt in each line."),
        ("--prompts TMP/twice.jsonl", "Lines 1 and 3 of TMP/twice.jsonl have the same id 'a'."),
        ("--prompts TMP/bad.jsonl", "Line 2 of TMP/bad.jsonl: it is not valid JSON"),
        ("--prompts TMP/other.jsonl", "Line 1 of TMP/other.jsonl: it should be an object"),
        ("--prompts TMP/blank.jsonl", "Line 2 of TMP/blank.jsonl has an empty prompt."),
        ("--prompts TMP/id.jsonl", "Line 1 of TMP/id.jsonl has an id that is neither text nor a whole number: [1]."),
        ("--prompts TMP/zebra.txt", "No word of the prompt 'zebra' is known to this model"),
        ("--prompts TMP/p.txt -n 0", "--num-images must be 1 or more, not 0."),
        ("--prompts TMP/p.txt --batch 0", "--batch must be 1 or more, not 0."),
        ("--prompts TMP/p.txt --npz TMP/a.zip", "a .npz file, not to TMP/a.zip"),
        ("--prompts TMP/p.txt --npz TMP/file/a.npz", "Cannot write to folder TMP/file"),
        ("--prompts TMP/p.txt --npz TMP/mine.npz", "TMP/mine.npz exists; give another name, or delete it."),
        ("--prompts TMP/p.txt --out TMP/file/a", "Cannot write to folder TMP/file/a"),
        ("--prompts TMP/p.txt --sampler scdd", "Unknown sampler 'scdd'."),
        ("--prompts TMP/p.txt --sampler mar", "Sampler 'mar' is for continuous tokens."),
        ("--prompts TMP/p.txt --sampler eagle", "Sampler 'eagle' needs a drafter of the kind 'eagle'"),
        ("--prompts TMP/p.txt --set gamma=2", "Sampler 'scd' has no parameter 'gamma'"),
        ("--prompts TMP/p.txt --temperature 0", "temperature must be above 0"),
        ("--prompts TMP/p.txt --guidance-scale nan", "--guidance-scale must be a finite number"),
        ("--prompts TMP/p.txt --device cuda:99", "Device 'cuda:99' is not there"),
        ("--prompts TMP/p.txt --model icns", "Unknown model 'icns'. Did you mean 'icons'?"),
        ("--classes 1", "is called with a prompt, not a class; give prompts"),
        ("--classes 3-1", "Classes are given as 0-999 or 1,5,7-9, or as a file of these, not as '3-1'."),
        ("--classes 1,2,1", "Class 1 is given twice"),
        ("--classes 1,cat", "not as 'cat'."),
    ],
)
def test_bad_input_is_one_line(text_folder: Path, tmp_path: Path, capfd: Capture, arguments: str, message: str) -> None:
    for name, text in (
        ("file", "x"), ("mine.npz", "x"),
        ("p.txt", "cat\n"), ("gap.txt", "cat\n \ndog\n"), ("nothing.txt", ""), ("zebra.txt", "zebra\n"),
        ("twice.jsonl", '{"id": "a", "prompt": "cat"}\n{"prompt": "x"}\n{"id": "a", "prompt": "dog"}\n'),
        ("bad.jsonl", '{"prompt": "cat"}\n{"prompt"\n'), ("other.jsonl", '["cat"]\n'),
        ("blank.jsonl", '{"prompt": "cat"}\n{"prompt": ""}\n'), ("id.jsonl", '{"id": [1], "prompt": "cat"}\n'),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    before = names(tmp_path)
    words = arguments.replace("TMP", str(tmp_path)).split()
    words = ["--model", str(text_folder), "--out", str(tmp_path / "new" / "a"), *words]
    assert run("sample", *words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("visar: error: ") and message.replace("TMP", str(tmp_path)) in err
    assert err.count("\n") == 1 and names(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("--seed 1", "seed was 0, now 1"),
        ("--sampler ar", "sampler was scd, now ar"),
        ("--temperature 0.5", "temperature was 1.0, now 0.5"),
        ("--tokens", "tokens was False, now True"),
        ("-n 7", "give -n 8 or more"),
        ("--prompts OTHER", "sha256 was "),
    ],
)
def test_another_run_is_refused_before_weights_are_read(
    geneval_run: Path, text_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    other: str, difference: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("visar.cli.sample.load_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "other.txt").write_text("dog\ncat\n")
    words = other.replace("OTHER", str(tmp_path / "other.txt")).split()
    prompts = geneval_run.with_name("metadata.jsonl")
    before = {p: p.stat().st_mtime_ns for p in geneval_run.iterdir()}
    assert run("sample", "--model", text_folder, "--prompts", prompts, "-n", 8, "--out", geneval_run, *words) == 2
    err = capsys.readouterr().err
    assert difference in err and err.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in geneval_run.iterdir()} == before


# Export


def test_npz_of_classes(class_run: Path) -> None:
    found = np.load(class_run.with_name("new") / "a.npz")
    assert sorted(found) == ["arr_0", "arr_1"]
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (6, 10, 10, 3)
    assert found["arr_1"].dtype == np.int64 and found["arr_1"].tolist() == [5, 0, 1, 5, 0, 1]
    for i in range(6):
        assert (found["arr_0"][i] == read(class_run / f"{i:06d}.png")).all()


def test_npz_of_prompts(geneval_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("export", geneval_run, "--layout", "npz", "-o", tmp_path / "a.npz") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.npz'}: 8 images of {geneval_run}\n"
    assert sorted(np.load(tmp_path / "a.npz")) == ["arr_0"] and names(tmp_path) == ["a.npz"]


def test_geneval(geneval_run: Path, tmp_path: Path) -> None:
    """Each prompt's line as it was, and its images in the order of their indices."""
    (tmp_path / "out").mkdir()
    assert run("export", geneval_run, "--layout", "geneval", "-o", tmp_path / "out") == 0
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["00000", "00001"]
    for prompt, line in enumerate(GENEVAL):
        folder = tmp_path / "out" / f"{prompt:05d}"
        assert names(folder) == ["metadata.jsonl", "samples"]
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        assert names(folder / "samples") == [f"{i:04d}.png" for i in range(4)]
        for i in range(4):
            source = geneval_run / f"{2 * i + prompt:06d}.png"
            assert (folder / "samples" / f"{i:04d}.png").read_bytes() == source.read_bytes()


def test_dpg(dpg_run: Path, tmp_path: Path) -> None:
    """The crops that its evaluator takes are the prompt's four images, in the order of their indices."""
    assert run("export", dpg_run, "--layout", "dpg", "-o", tmp_path / "new" / "out") == 0
    assert names(tmp_path / "new" / "out") == ["31.png", "COCO_7.png"]
    for prompt, name in enumerate(("COCO_7", "31")):
        with Image.open(tmp_path / "new" / "out" / f"{name}.png") as grid:
            assert grid.size == (20, 20)
            for i, corner in enumerate(((0, 0), (10, 0), (0, 10), (10, 10))):
                crop = grid.crop((*corner, corner[0] + 10, corner[1] + 10))
                assert (np.asarray(crop) == read(dpg_run / f"{2 * i + prompt:06d}.png")).all()


@pytest.mark.parametrize("layout", ["npz", "geneval", "dpg"])
@pytest.mark.parametrize("damage", ["no manifest", "no image", "half an image", "longer", "no run"])
def test_an_unfinished_run_is_not_exported(
    dpg_run: Path, tmp_path: Path, capsys: Capture, layout: str, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(dpg_run, folder)
    if damage == "no manifest":
        (folder / "manifest.jsonl").unlink()
    elif damage == "no image":
        (folder / "000003.png").unlink()
    elif damage == "half an image":
        (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:60])
    elif damage == "longer":
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(about | {"count": 12}))
    else:
        (folder / "run.json").unlink()
    assert run("export", folder, "--layout", layout, "-o", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert ("holds no run of" if damage == "no run" else "is not finished") in err and err.count("\n") == 1
    assert names(tmp_path) == ["run"]


def test_what_does_not_fit_a_layout(
    class_run: Path, geneval_run: Path, dpg_run: Path, text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "two.jsonl").write_text('{"id": "a.b", "prompt": "cat"}\n')
    for n, out in ((2, "two"), (4, "dot")):
        assert (
            run("sample", "--model", text_folder, "--prompts", tmp_path / "two.jsonl", "-n", n, "--out", tmp_path / out)
            == 0
        )
    (tmp_path / "there.npz").touch()
    capsys.readouterr()
    before = names(tmp_path)
    for folder, layout, out, message in (
        (class_run, "geneval", "new", "The layout 'geneval' is for prompts, and this run is of classes."),
        (class_run, "dpg", "new", "The layout 'dpg' is for prompts, and this run is of classes."),
        (dpg_run, "geneval", "new", "GenEval's evaluator reads a 'tag' of each prompt"),
        (geneval_run, "dpg", "new", "DPG-Bench names images by the item_id"),
        (tmp_path / "dot", "dpg", "new", "give each prompt an id without . / and \\, not 'a.b'."),
        (tmp_path / "two", "dpg", "new", "DPG-Bench takes 4 images of each prompt; sample with -n 4."),
        (dpg_run, "dpg", "full", "exists: give a folder that is new or empty."),
        (geneval_run, "geneval", "two.jsonl", "exists: give a folder that is new or empty."),
        (dpg_run, "npz", "full", "All images are written to a .npz file, not to"),
        (dpg_run, "npz", "a.zip", "All images are written to a .npz file, not to"),
        (dpg_run, "npz", "there.npz", "exists; give another name, or delete it."),
        (tmp_path / "none", "npz", "a.npz", "holds no run of `visar sample`."),
    ):
        assert run("export", folder, "--layout", layout, "-o", tmp_path / out) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and names(tmp_path) == before
    with pytest.raises(ValueError, match="Unknown layout 'npy'"):
        export(dpg_run, "npy", tmp_path / "a")


@pytest.mark.parametrize("layout", ["npz", "geneval", "dpg"])
@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_no_layout_takes_files_from_elsewhere(
    dpg_run: Path, geneval_run: Path, tmp_path: Path, capsys: Capture, layout: str, how: str
) -> None:
    shutil.copytree(geneval_run if layout == "geneval" else dpg_run, run_folder := tmp_path / "run")
    (tmp_path / "secret.png").write_bytes((run_folder / "000000.png").read_bytes())
    if how == "link":
        (run_folder / "000000.png").unlink()
        (run_folder / "000000.png").symlink_to("../secret.png")
    else:
        lines = (run_folder / "manifest.jsonl").read_text()
        name = "../secret.png" if how == "up" else str(tmp_path / "secret.png")
        (run_folder / "manifest.jsonl").write_text(lines.replace('"000000.png"', json.dumps(name)))
    before = names(tmp_path)
    assert run("export", run_folder, "--layout", layout, "-o", tmp_path / "out.npz") == 2
    err = capsys.readouterr().err
    assert ("not inside it" if how == "link" else "the file of that image is '000000.png'") in err
    assert err.count("\n") == 1 and names(tmp_path) == before


def test_a_image_of_another_size_is_no_npz(dpg_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dpg_run, tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "000005.png")
    with pytest.raises(ValueError, match=r"000005\.png is of another size"):
        export_npz(tmp_path / "run", tmp_path / "a.npz")
    assert names(tmp_path) == ["run"]


def test_the_help_names_both() -> None:
    done = subprocess.run([sys.executable, "-m", "visar", "--help"], capture_output=True, text=True)
    assert "\n  sample " in done.stdout and "\n  export " in done.stdout
