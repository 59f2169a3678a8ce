"""Damaged files through the public loaders and the command line: each is loaded, or refused by a `VisarError`."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.fuzz.mutations import damaged_bytes, damaged_json, damaged_state, damaged_value
from tests.helpers.tiny import VQ, class_gpt, image_folder
from visar.bulk.export import export
from visar.bulk.folder import RunFolder
from visar.cli import main
from visar.drafters.loading import load_drafter
from visar.errors import VisarError
from visar.eval.benchmark import history
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.metrics.frechet import load_moments
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.loading import load_gpt, load_vq
from visar.families.llamagen.vq import VQModel
from visar.families.mar.autoencoder import KLAutoencoder
from visar.families.mar.loading import load_kl16, load_mar
from visar.families.mar.transformer import MAR
from visar.generation.model import ImageModel
from visar.text_encoders.t5 import T5CaptionEncoder
from visar.training.data import ImageSet

pytestmark = pytest.mark.slow

SEED = 0
CASES = 60  # of each kind of file
COMMANDS = 40
MIB = 300  # that all cases of a test may add to the memory in use at its highest
SECONDS = 60  # after which a case hangs

Load = Callable[[Path], object]


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """No error but `VisarError`, and no hang; messages of one line."""

    def hang(*_: object) -> None:
        raise AssertionError(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except VisarError as error:
        assert "\n" not in str(error) and len(str(error)) > 10, what
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < MIB * 1024, "the highest memory in use, in KiB"


def states() -> dict[str, tuple[dict[str, Tensor], Load]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(token_dim=4, grid=3, dim=16, encoder_layers=1, decoder_layers=1, num_heads=2)
    mar = MAR(**sizes, head_width=8, head_layers=1, classes=5, buffer=4)
    return {
        "gpt": (class_gpt().state_dict(), lambda p: load_gpt(p, num_heads=2)),
        "gpt ema": ({"ema." + k: v for k, v in class_gpt().state_dict().items()}, lambda p: load_gpt(p, ema=True)),
        "vq": (VQModel(**VQ).state_dict(), load_vq),
        "mar": (mar.state_dict(), lambda p: load_mar(p, num_heads=2)),
        "kl": (KLAutoencoder((32, 32), 1, 4, 8).state_dict(), load_kl16),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_bytes_of_weights(form: str, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {form}")
    whole = {}
    for name, (state, load) in states().items():
        path = tmp_path / f"{name}.{'safetensors' if form == 'safetensors' else 'pt'}"
        if form == "safetensors":
            save_file(state, path)
        else:
            torch.save({"model": state}, path, _use_new_zipfile_serialization=form == "zip")
        whole[path] = (path.read_bytes(), load)
    for case in range(CASES * 3):
        path = rng.choice(list(whole))
        content, load = whole[path]
        path.write_bytes(damaged_bytes(content, rng))
        with bounded(f"{form} {path.name} {case}"):
            load(path)


def test_damaged_headers_of_safetensors(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for name, (state, load) in states().items():
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for case in range(CASES):
            made = json.dumps(damaged_value(header, rng)).encode()
            size = len(made) if rng.random() < 0.9 else rng.choice((0, 1, 10**6, 2**63))
            path.write_bytes(size.to_bytes(8, "little") + made + content[8 + length :])
            with bounded(f"{name} {case}"):
                load(path)


def test_damaged_tensors(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for name, (state, load) in states().items():
        for case in range(CASES):
            path = tmp_path / f"{name}.pt"
            torch.save(damaged_state(state, rng), path)
            with bounded(f"{name} {case}"):
                load(path)


def test_damaged_indices_and_shards(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    state = class_gpt().state_dict()
    keys = list(state)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    index = {"metadata": {"total_size": 1}, "weight_map": {k: name for name, own in parts.items() for k in own}}
    for case in range(CASES):
        for name, own in parts.items():
            save_file({k: state[k] for k in own}, tmp_path / name)
        (tmp_path / "m.safetensors.index.json").write_bytes(damaged_json(json.dumps(index).encode(), rng))
        if rng.random() < 0.2:
            (tmp_path / "a.safetensors").unlink()
        with bounded(str(case)):
            load_gpt(tmp_path / "m.safetensors.index.json", num_heads=2)
        with bounded(f"{case}, the folder"):
            load_gpt(tmp_path, num_heads=2)


def used(folder: Path) -> None:
    """Load a model and use it as it says it is."""
    model = ImageModel.load(folder)
    model.bar = {"disable": True}
    model.generate(["red heart"] if model.family.condition == "prompt" else [1], sampler="ar", seed=0)


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    about = {"format": 1, "count": 4, "conditions": {"kind": "prompt", "conditions": 2}, "machines": [{"device": "x"}]}
    (folder / "run.json").write_text(json.dumps(about))
    lines = []
    for i in range(4):
        Image.new("RGB", (4, 4)).save(folder / f"{i:06d}.png")
        metadata = {"tag": "x", "include": []}
        line = {
            "id": f"{i:06d}",
            "file": f"{i:06d}.png",
            "prompt": f"p{i % 2}",
            "prompt_id": i % 2,
            "metadata": metadata,
        }
        lines.append(json.dumps(line))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read_run(folder: Path) -> None:
    for at, layout in enumerate(("geneval", "dpg", "npz")):
        with bounded(layout):
            RunFolder(folder).finished()
            export(folder, layout, folder.parent / f"out{at}" / ("a.npz" if layout == "npz" else "a"))
    shutil.rmtree(folder.parent / "out0", ignore_errors=True)
    ImageFolder.open(folder).require_captions("CLIP")


def history_file(folder: Path) -> Path:
    folder.mkdir()
    row = {"sampler": "ar", "nfe": 1.0, "ms_per_pass": 2.0, "seconds_per_image": 3.0}
    report = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "batch": 1,
        "images": 1,
        "bandwidth": 1.0,
        "torch": "2",
    }
    run = {"date": "2026", "version": "1", "commit": None, "settings": {}, "report": report | {"rows": [row]}}
    (folder / "runs.jsonl").write_text(f"{json.dumps(run)}\n{json.dumps(run)}\n")
    return folder


def read_history(folder: Path) -> None:
    runs = history.load(folder / "runs.jsonl")
    history.comparison(runs[0], runs)


def captions(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    notes = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    (folder / "captions.json").write_text(json.dumps(notes))
    return folder


def t5(folder: Path) -> Path:
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(folder)
    return folder


def test_damaged_json(
    text_folder: Path, class_folder: Path, drafters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    rng = random.Random(SEED)
    target = LlamaGenTarget(ImageModel.load(text_folder).family.model, 5)
    loads: list[tuple[Path, Load]] = [
        (text_folder, used),
        (class_folder, used),
        *((folder, lambda p: load_drafter(p, target)) for folder in drafters),
        (image_folder(tmp_path / "set", 3), lambda p: ImageSet(p).pixels(4)),
        (run_folder(tmp_path / "run"), read_run),
        (history_file(tmp_path / "history"), read_history),
        (captions(tmp_path / "captions"), lambda p: ImageFolder.open(p, captions=p / "captions.json")),
        (t5(tmp_path / "t5"), T5CaptionEncoder.from_pretrained),
    ]
    for folder, load in loads:
        files = [f for f in folder.rglob("*") if f.suffix in (".json", ".jsonl")]
        for file in files:
            content = file.read_bytes()
            for case in range(CASES // 2):
                file.write_bytes(damaged_json(content, rng))
                with bounded(f"{folder.name}/{file.name} {case}: {file.read_bytes()[:3000]!r}"):
                    load(folder)
            file.write_bytes(content)


def test_damaged_arrays(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    path = tmp_path / "a.npz"
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(9), "provenance": np.array('{"of": "noise"}')}
    for case in range(CASES * 2):
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(
            path, **arrays, arr_0=np.zeros((2, 4, 4, 3), np.uint8)
        )
        content = path.read_bytes()
        shape = rng.choice((b"(10**12, 4, 4, 3)", b"(1000000000000, 4, 4, 3)", b"(-2, 4, 4, 3)", b"(2, 4, 4, True)"))
        made = content.replace(b"(2, 4, 4, 3)", shape) if rng.random() < 0.2 else damaged_bytes(content, rng)
        path.write_bytes(made)
        for load in (load_moments, lambda p: list(ImageFolder.open(p).batches())):
            with bounded(str(case)):
                load(path)


def test_damaged_files_on_the_command_line(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 or 2, one sentence, and no image of a command that failed."""
    rng = random.Random(SEED)
    for case in range(COMMANDS):
        folder, out = tmp_path / f"{case}", tmp_path / f"{case}.png"
        shutil.copytree(text_folder, folder)
        file = rng.choice([f for f in folder.rglob("*") if f.is_file()])
        damage = damaged_json if file.suffix == ".json" and rng.random() < 0.7 else damaged_bytes
        file.write_bytes(damage(file.read_bytes(), rng))
        what = f"{case} {file.name}"
        with bounded(what):
            code = main(["generate", "red heart", "--model", str(folder), "--sampler", "ar", "-o", str(out)])
        err = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in err, what
        assert code == 0 or (err.count("error: ") == 1 and not out.exists()), what
        shutil.rmtree(folder)
