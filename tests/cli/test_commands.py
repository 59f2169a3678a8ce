"""The command line on tiny models: what it prints and writes, its exit codes, and that errors are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visar.cli import main
from visar.eval.exactness import joint as exactness
from visar.families.catalogue import catalogue
from visar.samplers import SAMPLERS, jacobi
from visar.text_encoders.concepts import Concepts

WEIGHTS = Path("gpt/diffusion_pytorch_model.safetensors")
Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# Tables


def test_models(capsys: Capture) -> None:
    assert run("models") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "CONDITION", "PIXELS", "PARAMETERS", "FLOOR", "MS", "LICENCE", "WEIGHTS"]
    assert [line.split()[0] for line in lines[1:-1]] == list(catalogue()) and "H100" in lines[-1]
    assert next(line for line in lines if line.startswith("emu3.5-image")).split()[1:5] == [
        "prompt",
        "1024",
        "34.1B",
        "19.36",
    ]
    assert run("models", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["icons"]["weights"] == "embedded" and rows["icons"]["condition"] == "prompt"
    assert rows["llamagen-b"]["pixels"] == [256, 384] and "c2i_B_384.pt" in rows["llamagen-b"]["weights"]
    assert rows["llamagen-b"]["parameters"] == 110_888_448 and rows["mar-b"]["floor_ms"] is None
    assert rows["glm-image"]["licence"] == "not checked" and rows["glm-image"]["floor_ms"] == pytest.approx(
        4.92, abs=0.005
    )
    assert run("models", "icons") == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["name", "icons"] and ["pixels", "128"] in lines and ["weights", "embedded"] in lines
    assert ["settings", "guidance_scale 3.0, top_k 10"] in lines and ["components", "gpt, text_encoder, vq"] in lines
    assert ["drafters", "eagle, exit, hydra, medusa, model, skip"] in lines
    assert run("models", "mar-b") == 0 and "kl16.ckpt" in capsys.readouterr().out
    assert run("models", "icon") == 2 and "Did you mean 'icons'?" in capsys.readouterr().err


def test_what_a_model_was_trained_on(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("models", text_folder, "--concepts") == 2
    err = capsys.readouterr().err
    assert "This model has no list of what it knows" in err and len(err.splitlines()) == 1
    shutil.copytree(text_folder, folder := tmp_path / "model")
    Concepts(["3d", "flat"], {"": ["red"], "animals": ["cat", "dog"]}, ["cat"]).save(folder / "text_encoder")
    assert run("models", folder, "--concepts") == 0
    assert capsys.readouterr().out.splitlines() == ["styles: 3d, flat", "things: red", "animals: cat, dog"]
    assert run("models", folder, "--concepts", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"styles": ["3d", "flat"], "groups": {"": ["red"], "animals": ["cat", "dog"]}}
    assert run("models", "--concepts") == 2 and "give its name" in capsys.readouterr().err
    assert run("models", "icon", "--concepts") == 2 and "Did you mean 'icons'?" in capsys.readouterr().err


def test_samplers(capsys: Capture) -> None:
    assert run("samplers") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(SAMPLERS)
    assert lines[-1].startswith("`visar samplers NAME`")
    assert [line.split()[:4] for line in lines if "(default)" in line] == [
        ["scd", "(default)", "discrete", "yes"],
        ["mar-headspec", "(default)", "continuous", "yes"],
    ]
    assert run("samplers", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == SAMPLERS.keys()
    assert [n for n, row in rows.items() if row["default"]] == ["scd", "mar-headspec"]
    assert rows["sjd"]["parameters"] == {"window": 16, "init": "uniform"}


# Generate


def test_one_prompt_to_a_file(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "new" / "heart.png"
    assert run("generate", "red heart", "--model", text_folder, "-o", target) == 0
    out, err = capsys.readouterr()
    assert Image.open(target).size == (10, 10) and names(tmp_path) == ["new", "new/heart.png"]
    assert out.splitlines()[0] == str(target) and out.splitlines()[1].startswith("scd (exact): ") and err == ""


def test_names_of_many_images(text_folder: Path, tmp_path: Path) -> None:
    tail = ("--model", text_folder, "-o")
    assert run("generate", "Red heart, 3D!", "cat", "cat", "cat 1", "-n", 2, *tail, tmp_path / "a") == 0
    cats = [f"cat{end}.png" for end in ("", "-1", "-1-1", "-1-2", "-2", "-3")]
    assert names(tmp_path / "a") == sorted([*cats, "red-heart-3d.png", "red-heart-3d-1.png"])
    assert run("generate", "cat", "-n", 3, *tail, tmp_path / "b" / "x.png") == 0
    assert names(tmp_path / "b") == ["x-0.png", "x-1.png", "x-2.png"]
    (tmp_path / "c.png").mkdir()
    assert run("generate", "cat", *tail, tmp_path / "c.png") == 0
    assert names(tmp_path / "c.png") == ["cat.png"]


def test_nothing_is_overwritten_in_silence(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ("generate", "cat", "--model", text_folder, "-o")
    for _ in range(2):
        assert run(*common, tmp_path) == 0
    assert names(tmp_path) == ["cat-1.png", "cat.png"]
    old = (tmp_path / "cat.png").read_bytes()
    capsys.readouterr()
    assert run(*common, tmp_path / "cat.png", "--seed", 1) == 2
    sentence = f"visar: error: {tmp_path / 'cat.png'} exists; give --force to overwrite it, or another --out.\n"
    assert capsys.readouterr().err == sentence and (tmp_path / "cat.png").read_bytes() == old
    (tmp_path / "x-1.png").touch()
    assert run(*common, tmp_path / "x.png", "-n", 2) == 2
    assert "x-1.png exists" in capsys.readouterr().err
    for out, seed in ((tmp_path / "cat.png", 1), (tmp_path, 2)):
        assert run(*common, out, "--force", "--seed", seed) == 0
        assert names(tmp_path) == ["cat-1.png", "cat.png", "x-1.png"] and (tmp_path / "cat.png").read_bytes() != old
        old = (tmp_path / "cat.png").read_bytes()


def test_a_random_seed_is_reported(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ("generate", "cat", "--model", text_folder, "-o", tmp_path, "--json")
    seeds = []
    for _ in range(2):
        assert run(*common, "--seed", "random") == 0
        out, err = capsys.readouterr()
        seeds.append(json.loads(out)["seed"])
        assert err == f"visar: note: the seed is {seeds[-1]}\n"
    assert seeds[0] != seeds[1]
    assert run(*common, "--seed", seeds[0]) == 0
    assert (tmp_path / "cat.png").read_bytes() == (tmp_path / "cat-2.png").read_bytes()


def test_json(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("generate", "red heart", "-n", 2, "--json", "--seed", 4, "--sampler", "sjd", "--window", 6,
               "--top-k", 9, "--top-p", 0.9, "--temperature", 0.8, "--guidance-scale", 1.5, "--model", text_folder,
               "-o", tmp_path) == 0  # fmt: skip
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["sampler"], found["exact"], found["seed"], found["tokens"]) == ("sjd", True, 4, 25)
    assert found["parameters"]["window"] == 6 and 5 <= found["nfe"] <= 26
    assert found["seconds"] > 0 and found["ms_per_pass"] > 0 and err == ""
    assert found["images"] == [str(tmp_path / "red-heart.png"), str(tmp_path / "red-heart-1.png")]
    assert names(tmp_path) == ["red-heart-1.png", "red-heart.png"]
    assert run("generate", "cat", "--json", tmp_path / "new" / "s.json", "--model", text_folder, "-o", tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cat.png'}\nscd (exact): ")
    assert json.loads((tmp_path / "new" / "s.json").read_text())["images"] == [str(tmp_path / "cat.png")]


def test_parameters_of_a_sampler(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("generate", "cat", "--json", "--sampler", "scd", "--set", "window=6", "--set", "init=left",
               "--model", text_folder, "-o", tmp_path) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"]["window"], found["parameters"]["init"]) == (6, "left")


def test_the_seed_makes_the_image(text_folder: Path, tmp_path: Path) -> None:
    def image(name: str, seed: int) -> bytes:
        assert run("generate", "cat", "--model", text_folder, "--seed", seed, "-o", tmp_path / name) == 0
        return Image.open(tmp_path / name).tobytes()

    assert image("a.png", 1) == image("b.png", 1) != image("c.png", 2)


def test_classes(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("generate", "--class", 3, "--class", 5, "--model", class_folder, "-o", tmp_path, "--json") == 0
    assert names(tmp_path) == ["class-3.png", "class-5.png"]
    assert json.loads(capsys.readouterr().out)["images"] == [str(tmp_path / f"class-{c}.png") for c in (3, 5)]


def test_unknown_words_are_a_note(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("generate", "zebra cat", "--model", text_folder, "-o", tmp_path) == 0
    assert capsys.readouterr().err == "visar: note: Words not known to this model were left out: zebra.\n"


# Errors


@pytest.fixture
def broken(text_folder: Path, tmp_path: Path) -> Path:
    """A folder with damaged copies of the pipeline, a regular file, and an image folder nothing may appear in."""
    for name in ("cut", "nan"):
        shutil.copytree(text_folder, tmp_path / name)
    weights = tmp_path / "cut" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    state = load_file(tmp_path / "nan" / WEIGHTS)
    state["norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "nan" / WEIGHTS)
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.pt").write_text("no weights")
    for name in ("out", "a.py"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cat --model icon", "Unknown model 'icon'. Did you mean 'icons'?"),
        ("cat --model llamagen-b", "The weights of 'llamagen-b' are not shipped with visar"),
        ("cat --model ./none", "There is no model folder ./none."),
        ("cat --model TMP/cut", "diffusion_pytorch_model.safetensors: it is truncated"),
        ("cat --model TMP/nan", "holds a NaN or an infinity"),
        ("cat --model TMP/bad.pt", "bad.pt is a file of weights: give the file of its tokenizer too"),
        ("cat --model TMP/bad.pt --vq TMP/bad.pt", "bad.pt: it is text, not weights"),
        ("cat --model TMP/none.pt --vq TMP/none.pt", "There is no weights file"),
        ("cat --model /dev/zero", "/dev/zero is neither a model folder nor a file of weights."),
        ("cat --sampler TMP/out.py:x", "out.py."),
        ("cat --sampler TMP/a.py:x", "a.py: it is a folder."),
        ("cat --class 1", "Give either prompts or --class IDs."),
        ("", "Give either prompts or --class IDs."),
        ("  EMPTY", "The prompt is empty"),
        ("zebra", "No word of the prompt 'zebra' is known"),
        ("zebra -o TMP/new/folder", "No word of the prompt 'zebra' is known"),
        ("cat --num-heads 4", "a number of heads and ema are given with a published file of weights"),
        ("--class 1", "is called with a prompt, not a class; give prompts"),
        ("cat --sampler scd-gumbl", "Unknown sampler 'scd-gumbl'. Did you mean 'scd-gumbel'?"),
        ("cat --sampler SCD", "Unknown sampler 'SCD'. Did you mean 'scd'?"),
        ("cat --window 1", "window must be 2 or more tokens, not 1"),
        ("cat --sampler ar --window 4", "Sampler 'ar' has no parameter 'window'"),
        ("cat --temperature 0", "temperature must be above 0"),
        ("cat --temperature -0.5", "--temperature must be 0 or more"),
        ("cat --top-p 0", "--top-p must be above 0 and at most 1"),
        ("cat --top-p 1.5", "--top-p must be above 0 and at most 1"),
        ("cat --top-k -2", "--top-k must be 0 or more, not -2"),
        ("cat --guidance-scale nan", "--guidance-scale must be a finite number"),
        ("cat --guidance-schedule linear", "guidance_schedule is for models of continuous tokens"),
        ("cat --seed one", "--seed must be a whole number or random, not 'one'."),
        ("cat -n 0", "--num-images must be 1 or more, not 0."),
        ("cat -n two", "--num-images must be a whole number, 1 or more, not 'two'."),
        ("--json cat", "--json takes a .json file, or - for stdout, not 'cat'"),
        ("cat --json TMP/file/a.json", "Cannot write to folder"),
        ("cat --device cuda:99", "Device 'cuda:99' is not there"),
        ("cat --device tpu9", "Unknown device 'tpu9'"),
        ("cat --device meta", "Device 'meta' is not supported"),
        ("cat -o TMP/out/cat.jpg", "Images are written as .png, not .jpg"),
        ("cat -o TMP/file/images", "Cannot write to folder"),
        ("cat -o TMP/file/cat.png", "Cannot write to folder"),
    ],
)
def test_bad_input_is_one_line(
    broken: Path, text_folder: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(broken / "out")
    words = [" " if a == "EMPTY" else a.replace("TMP", str(broken)) for a in arguments.split()]
    before = names(broken)
    assert run("generate", *([] if "--model" in words else ["--model", text_folder]), *words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("visar: error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert names(broken) == before


def test_a_prompt_without_quotes(text_folder: Path, tmp_path: Path, capfd: Capture) -> None:
    assert run("generate", "cat", "zebra", "--model", text_folder, "-o", tmp_path) == 2
    note, error = capfd.readouterr().err.splitlines()
    assert note == "visar: note: These are 2 prompts of one word each; put quotes around several words."
    assert "'zebra' is known" in error


def test_an_interrupted_image_leaves_nothing(
    text_folder: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(image: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    assert run("generate", "cat", "--model", text_folder, "-o", tmp_path) == 130
    assert capfd.readouterr().err == "visar: interrupted\n" and names(tmp_path) == []


# Verify


def test_verify_passes(capsys: Capture) -> None:
    assert run("verify", "--sequences", 16384, "--samplers", "ar,jacobi", "--no-mutants") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["SAMPLER", "CASE", "z", "TOKENS/PASS", "RESULT"]
    assert out.endswith("All rows pass.\n") and "FAILED" not in out and "mutant" not in out


def test_verify_fails(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visar.eval.exactness.joint.EXACT_LIMIT", 0.0)
    assert run("verify", "--sequences", 16384, "--samplers", "jacobi", "--no-mutants", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert {row["sampler"] for row in rows} == {"jacobi"} and not any(row["passed"] for row in rows)


def test_verify_notices_an_inexact_sampler(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that keeps every draft."""

    def keep_all(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, coins: object) -> object:
        verified = jacobi.verify_independent(p, q, drafts, coins)
        return verified._replace(tokens=torch.cat([drafts, verified.tokens[:, -1:]], dim=1))

    monkeypatch.setitem(jacobi.RULES, "independent", keep_all)
    monkeypatch.setattr(exactness, "verify", partial(exactness.verify, cases=exactness.CASES[:2]))
    assert run("verify", "--sequences", 16384, "--samplers", "sjd", "--no-mutants") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and out.endswith("SOME ROWS FAIL.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--sequences 10", "--sequences must be 16384 or more"), ("--samplers sjdd", "Unknown sampler 'sjdd'")],
)
def test_verify_bad_input(capsys: Capture, arguments: str, message: str) -> None:
    assert run("verify", *arguments.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# Bench


def test_bench(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "new" / "report.json"
    assert run("bench", "--model", text_folder, "--samplers", "ar,scd", "-n", 3, "--batch", 2, "--repeats", 3,
               "--window", 8, "--json", report) == 0  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:5] == ["SAMPLER", "EXACT", "W", "NFE", "TOKENS/PASS"] and "TIME/ar" in out[0]
    assert [line.split()[:3] for line in out[1:3]] == [["ar", "yes", "1"], ["scd", "yes", "8"]]
    found = json.loads(report.read_text())
    ar, scd = found["rows"]
    assert (found["images"], found["batch"], found["repeats"]) == (3, 2, 3) and found["bandwidth"] > 0
    assert (ar["nfe"], ar["tokens_per_pass"], ar["nfe_ratio"], ar["time_ratio"]) == (26, 1, 1, 1)
    assert scd["nfe"] < 26 and scd["nfe_ratio"] == scd["nfe"] / 26 and scd["tokens_per_pass"] > 1
    assert scd["images_per_second"] == pytest.approx(1 / scd["seconds_per_image"])
    assert names(tmp_path) == ["new", "new/report.json"]
    assert run("bench", "--model", text_folder, "--samplers", "ar,scd", "-n", 1, "--set", "window=5") == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["scd", "yes", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 0", "--batch must be 1 or more"),
        ("--repeats 0", "--repeats must be 1 or more"),
        ("--samplers ar,scdd", "Unknown sampler 'scdd'"),
        ("--samplers ,", "No sampler was given"),
        ("--set delta=1", "None of these samplers has a parameter 'delta'"),
        ("--set window", "A parameter is given as name=value, not 'window'"),
        ("--set window=8 --set window=4", "Parameter 'window' of 'sjd' is given twice"),
        ("--set window=8 --window 4", "Parameter 'window' of 'sjd' is given twice"),
        ("--set window=many", "Parameter 'window' of 'sjd' must be a whole number, not 'many'"),
        ("--temperature 0", "temperature must be above 0"),
        ("--json TMP/file/report.json", "Cannot write to folder"),
    ],
)
def test_bench_bad_input(text_folder: Path, tmp_path: Path, capsys: Capture, arguments: str, message: str) -> None:
    (tmp_path / "file").touch()
    assert run("bench", "--model", text_folder, *arguments.replace("TMP", str(tmp_path)).split()) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == "" and names(tmp_path) == ["file"]


# The command itself


def test_the_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "visar", "generate", " "]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "visar: error: The prompt is empty; give at least one word.\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_error(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "visar", "models"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
