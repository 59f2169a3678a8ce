"""Training a drafter: the images that it learns from, what it learns, and what it says about bad input."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import GRID, WORDS
from visar.cli import main
from visar.drafters import EagleHead, SkippedLayers, drafter_kinds, fingerprint
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.files import locked
from visar.kernels.backend import backend, triton
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import Speculative, Target
from visar.training.drafter import train_drafter
from visar.training.loop import TrainConfig, alone
from visar.training.self_generated import generate_tokens

Capture = pytest.CaptureFixture[str]


def test_a_trained_drafter_is_accepted_more_often(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.nn.init.normal_(class_pipe.gpt.output.weight, std=0.3)  # distributions with something to learn
    classes = list(range(7))
    tokens = generate_tokens(class_pipe.image_model, classes, 64, tmp_path / "p.safetensors", seed=0).tokens
    config = TrainConfig(tmp_path, minutes=1e3, steps=150, batch=8, lr=3e-3, warmup=10, ema=0.9, compile=False)

    def of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([classes[i % 7] for i in rows]), torch.ones(len(rows), 1)

    target = class_pipe.image_model.family.drafting
    head = train_drafter("eagle", target, of, tokens, config, Guidance(2.0), Target(), depth=3)
    found = json.loads((tmp_path / "eagle-run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(0.5 < found[f"acceptance_{depth}"] < 1 for depth in (1, 2, 3))
    fresh = EagleHead(32, 2, 48)
    passes = []
    for name, drafter in (("fresh", fresh), ("trained", head)):
        drafter.save_pretrained(tmp_path / name)
        class_pipe.load_drafter(tmp_path / name)
        stats = class_pipe(classes * 4, sampler=Speculative(gamma=3, drafter="eagle"), output_type="tokens").stats
        passes.append(sum(stats.passes_per_image))
    assert passes[1] < 0.9 * passes[0]
    assert head.config.target == fingerprint(class_pipe.gpt) == fingerprint(class_pipe.gpt.to(torch.bfloat16))
    with pytest.raises(VisarError, match="2 or more images"):
        train_drafter("eagle", target, of, tokens[:1], config, Guidance(), Target())
    with pytest.raises(VisarError, match=r"stored_as must be a torch.dtype .*, not torch.int16"):
        train_drafter("eagle", target, of, tokens, config, Guidance(), Target(), stored_as=torch.int16)
    (tmp_path / "eagle-run").rename(tmp_path / "elsewhere")  # so that it might be anybody's
    with pytest.raises(
        VisarError, match=r"eagle is not of a run .*, which has a eagle-run/drafter\.json; give another"
    ):
        train_drafter("eagle", target, of, tokens, config, Guidance(), Target())


def test_images_are_drawn_once_and_all_differ(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    seen: list[int] = []
    first = generate_tokens(text_pipe.image_model, WORDS[:3], 5, file, batch=2, report=seen.append, seed=1).tokens
    assert seen == [2, 3, 5] and len(first.unique(dim=0)) == 5
    more = generate_tokens(text_pipe.image_model, WORDS[:3], 8, file, batch=2, report=seen.append, seed=1).tokens
    assert seen[3:] == [6, 8] and torch.equal(more[:5], first) and len(more.unique(dim=0)) == 8
    again = generate_tokens(text_pipe.image_model, WORDS[:3], 8, tmp_path / "q.safetensors", batch=8, seed=1)
    assert torch.equal(again.tokens, more)
    for change in ({"seed": 2}, {"seed": 1, "top_k": 3}):
        with pytest.raises(VisarError, match="of another model or other settings"):
            generate_tokens(text_pipe.image_model, WORDS[:3], 8, file, **change)
    with pytest.raises(VisarError, match="of another model or other settings"):
        generate_tokens(text_pipe.image_model, WORDS[1:4], 8, file, seed=1)
    save_file({"tokens": first.int()}, file)  # of nobody knows what
    with pytest.raises(VisarError, match="of another model or other settings"):
        generate_tokens(text_pipe.image_model, WORDS[:3], 8, file, seed=1)
    with (
        locked(tmp_path / ".r.safetensors.lock", ""),
        pytest.raises(VisarError, match=r"Another run samples .*wait until"),
    ):
        generate_tokens(text_pipe.image_model, WORDS[:3], 1, tmp_path / "r.safetensors")
    file.write_bytes(b"x")
    with pytest.raises(VisarError, match="is damaged; delete it"):
        generate_tokens(text_pipe.image_model, WORDS[:3], 8, file)


def test_what_another_run_has_sampled_meanwhile_is_not_sampled_again(
    text_pipe: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = text_pipe.image_model, WORDS[:3], 2
    theirs = generate_tokens(*given, tmp_path / "theirs").tokens
    monkeypatch.setattr(
        "visar.training.self_generated.locked",
        lambda *_: contextlib.nullcontext(shutil.copy(tmp_path / "theirs", tmp_path / "own")),  # just before
    )
    found = generate_tokens(*given, tmp_path / "own", report=lambda done: pytest.fail(f"{done} again"))
    assert torch.equal(found.tokens, theirs)


def run(folder: Path, out: Path, *arguments: object) -> int:
    fixed = ("--minutes", 0.02, "--batch", 2, "-n", 6, "--no-compile")
    return main([str(a) for a in ("train", "drafter", "--model", folder, "--out", out, *fixed, *arguments)])


def test_command(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "captions.txt").write_text("red heart\n\ncat, 3d\nred heart\n")
    assert run(text_folder, tmp_path / "run", "--captions", tmp_path / "captions.txt") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "run" / "eagle") and "6 of 6 images sampled" in err
    assert main(["generate", "cat", "--model", str(text_folder), "--sampler", "eagle", "--json", "-o",
                 str(tmp_path / "cat.png"), "--drafter", str(tmp_path / "run" / "eagle")]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["sampler"] == "eagle"


def test_a_second_run_ends_before_it_samples(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "eagle-run"
    folder.mkdir()
    with alone(folder):
        assert run(class_folder, tmp_path) == 2
        assert f"Another run trains in {folder}; wait until" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle", "exit"])
def test_the_command_compiles_by_default(class_folder: Path, tmp_path: Path, kind: str) -> None:
    """With Inductor, on whatever device this is; the target runs without gradients within the compiled loss."""
    command = ["train", "drafter", "--model", str(class_folder), "--kind", kind, "-n", "6", "--batch", "2"]
    assert main([*command, "--steps", "2", "-o", str(tmp_path)]) == 0
    assert (tmp_path / kind / "config.json").exists()


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(class_pipe: ClassToImagePipeline) -> None:
    """As users compile one to score sequences; decoding refuses it, as it runs the layers itself."""
    given = torch.tensor([1, 2]), torch.randint(0, 24, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(class_pipe.gpt)(*given), class_pipe.gpt(*given))


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("medusa", "medusa"), ("hydra", "hydra"), ("exit", "kangaroo"), ("skip", "swift"), ("model", "speculative")],
)
def test_command_for_every_kind(
    class_folder: Path, class_pipe: ClassToImagePipeline, tmp_path: Path, capsys: Capture, kind: str, sampler: str
) -> None:
    (tmp_path / "mine" / kind).mkdir(parents=True)
    (tmp_path / "mine" / kind / "config.json").write_text("{}")
    deep = ("--depth", 5) if kind in ("medusa", "hydra") else ()
    assert run(class_folder, tmp_path / "mine", "--kind", kind, *deep) == 2
    assert (
        f"{kind} is not of a run that can resume, which has a {kind}-run/drafter.json; give" in capsys.readouterr().err
    )
    assert run(class_folder, tmp_path / "run", "--kind", kind, *deep) == 0
    class_pipe.load_drafter(tmp_path / "run" / kind)
    out = class_pipe([1, 2], sampler=sampler, output_type="tokens", seed=3)
    assert out.stats.sampler == sampler and out.stats.exact and 0 < out.stats.draft_seconds < out.stats.seconds
    assert torch.equal(class_pipe([2], sampler=sampler, output_type="tokens", seed=3).tokens[0], out.tokens[1])
    figures = json.loads((tmp_path / "run" / f"{kind}-run" / "log.jsonl").read_text().splitlines()[-1])
    assert sum(key.startswith("acceptance_") for key in figures) == (5 if kind in ("medusa", "hydra") else 1)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("float8_e4m3fn", 1)])
def test_what_is_stored_in_few_bits_drafts_nearly_the_same(
    class_folder: Path, class_pipe: ClassToImagePipeline, tmp_path: Path, dtype: str, size: int
) -> None:
    assert run(class_folder, tmp_path, "--stored-as", dtype, "--kind", "model") == 0
    stored = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert {t.element_size() for t in stored.values()} == {size}
    class_pipe.load_drafter(tmp_path / "model")
    loaded = class_pipe.image_model.drafters.loaded["model"].state_dict()
    state = torch.load(tmp_path / "model-run" / "state.pt", weights_only=True)["ema"]
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, state[f"drafter.{name}"], rtol=0.07, atol=2e-3)
    assert class_pipe([1, 2], sampler="speculative", output_type="tokens").stats.exact


@pytest.mark.parametrize("kind", drafter_kinds())
def test_every_kind_learns_from_a_target_in_half_precision(
    class_pipe: ClassToImagePipeline, tmp_path: Path, kind: str
) -> None:
    target = class_pipe.to(torch.bfloat16).image_model.family.drafting
    tokens = torch.randint(23, (6, 16), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(tmp_path, compile=False, batch=2, steps=3)

    def of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(rows), torch.ones(len(rows), 1)

    train_drafter(kind, target, of, tokens, config, Guidance(2.0), Target(), depth=2, held=0.5)
    class_pipe.load_drafter(tmp_path / kind)
    if kind == "exit":  # another exit is another run
        with pytest.raises(VisarError, match="a run with other settings: layers was 2, now 1"):
            train_drafter(kind, target, of, tokens, config, Guidance(2.0), Target(), layers=1)


@pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")
def test_it_learns_where_kernels_are_tritons(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    target = class_pipe.image_model.family.drafting
    tokens = torch.randint(23, (4, 16), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(tmp_path, compile=False, batch=2, steps=2)

    def of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(rows), torch.ones(len(rows), 1)

    with backend("triton"):
        head = train_drafter("medusa", target, of, tokens, config, Guidance(2.0), Target(top_k=5), depth=1)
    assert head.config.target == fingerprint(class_pipe.gpt)


def test_layers_are_left_out_by_what_they_cost(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    idle = copy.deepcopy(class_pipe.gpt.layers[0])
    for p in idle.parameters():
        torch.nn.init.zeros_(p)
    target = class_pipe.image_model.family.drafting
    gpt = target.with_layers([*class_pipe.gpt.layers, idle], class_pipe.gpt.norm)
    target = LlamaGenTarget(gpt, GRID)
    tokens = torch.randint(23, (4, 16), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(tmp_path, compile=False, batch=2)

    def of(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(rows), torch.ones(len(rows), 1)

    made = train_drafter("skip", target, of, tokens, config, Guidance(2.0), Target(), layers=2)
    assert isinstance(made, SkippedLayers) and made.config.layers == [0, 1]
    assert json.loads((tmp_path / "skip-run" / "log.jsonl").read_text())["acceptance_1"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(VisarError, match="The layers must be 1 to 3, not 4"):
        train_drafter("skip", target, of, tokens, config, Guidance(), Target(), layers=4)
    with pytest.raises(VisarError, match=r"Unknown drafter 'hidra'\. Did you mean 'hydra'\?"):
        train_drafter("hidra", target, of, tokens, config, Guidance(), Target())


def test_a_run_of_so_many_steps(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["train", "drafter", "--model", str(class_folder), "--out", str(tmp_path)]
    assert main([*command, "-n", "6", "--batch", "2", "--steps", "3", "--no-compile"]) == 0
    assert json.loads((tmp_path / "eagle-run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    images = (tmp_path / "images.safetensors").read_bytes()
    assert main([*command, "-n", "8", "--batch", "2", "--steps", "5", "--no-compile"]) == 2
    assert "num_images was 6, now 8" in capsys.readouterr().err
    assert (tmp_path / "images.safetensors").read_bytes() == images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "A text model needs --captions"),
        ("--captions TMP/none.txt", "none.txt."),
        ("--captions TMP/empty.txt", "holds no captions"),
        ("--captions TMP/some.txt -n 1", "--num-images must be 2 or more"),
        ("--captions TMP/some.txt --minutes 0", "--minutes must be above 0"),
        ("--captions TMP/some.txt --kind egle", "Unknown drafter 'egle'. Did you mean 'eagle'?"),
        ("--captions TMP/some.txt --layers 1", "A drafter of the kind 'eagle' has no layers to choose"),
        ("--captions TMP/some.txt --kind exit --layers 3", "The layers must be 1 to 2, not 3"),
        ("--captions TMP/some.txt --depth 0", "--depth must be 1 or more, not 0."),
        (
            "--captions TMP/some.txt --depth 3 --kind model",
            "kind 'model' learns the next token alone: it has no --depth",
        ),
        ("--captions TMP/some.txt --styles 3d", "choose from an image set, and --captions is none"),
        ("--captions TMP/some.txt --temperature 0", "temperature must be above 0"),
        ("--captions TMP/zebra.txt", "No word of the prompt 'zebra' is known"),
    ],
)
def test_bad_input(text_folder: Path, tmp_path: Path, capsys: Capture, arguments: str, message: str) -> None:
    for name, text in (("empty", "\n \n"), ("some", "cat\n"), ("zebra", "zebra\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert run(text_folder, tmp_path / "run", *arguments.replace("TMP", str(tmp_path)).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("visar: error: ") and message in err and err.count("\n") == 1


def test_class_ids_from_a_file(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "ids.txt").write_text("3\n\n5\n3\n")
    assert run(class_folder, tmp_path / "run", "--captions", tmp_path / "ids.txt", "-n", 4) == 0
    drawn = load_file(tmp_path / "run" / "images.safetensors")["tokens"]
    pipe = ClassToImagePipeline.from_pretrained(class_folder)
    assert torch.equal(drawn.long(), pipe([3, 5, 3, 5], sampler="ar", output_type="tokens").tokens)
    for line in ("7", "-1", "cat"):
        (tmp_path / "ids.txt").write_text(f"0\n{line}\n")
        assert run(class_folder, tmp_path / "run", "--captions", tmp_path / "ids.txt") == 2
        assert f"must hold a class id from 0 to 6 in each line, not '{line}'" in capsys.readouterr().err
