"""The small CLIP: its words, its training, what it stores, and what the shipped one tells apart."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.tiny import WORDS, image_folder
from visar.cli import main
from visar.errors import VisarError
from visar.eval.quality.extractors import get_extractor
from visar.eval.quality.extractors.icons_clip import IconsClip, icons_clip, metrics
from visar.eval.quality.measure import measure
from visar.generation.model import ImageModel
from visar.text_encoders.words import WordEncoder
from visar.training.clip import (
    HIGHEST_SCALE,
    CaptionWords,
    ClipObjective,
    build_clip,
    clip_sizes,
    hide_words,
    load_clip,
    moved,
    retrieval,
    save_clip,
    start_words,
    train_clip,
)
from visar.training.data import ImageSet, Record
from visar.training.loop import TrainConfig

pytest.importorskip("open_clip")

COLOURS = {"red": (220, 20, 30), "blue": (30, 40, 220), "heart": (250, 160, 190), "star": (250, 220, 40),
           "cat": (120, 80, 40), "dog": (200, 150, 90), "city": (110, 110, 120)}  # fmt: skip


def config(out: Path, steps: int) -> TrainConfig:
    return TrainConfig(out=out, minutes=1e9, steps=steps, batch=16, lr=3e-3, warmup=2, ema=0.9, compile=False)


def random_clip(words: CaptionWords, size: int = 16) -> tuple[IconsClip, dict[str, object]]:
    torch.manual_seed(0)
    sizes = clip_sizes(words, size, 32, 1, 1, 2)
    model = build_clip(sizes)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return IconsClip(model, words, "cpu", {}), sizes


def images(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Two images of each of seven plainly coloured things; every one is for training."""
    folder = tmp_path_factory.mktemp("colours") / "set"
    folder.mkdir()
    entries = []
    for name, colour in COLOURS.items():
        for style in ("flat", "noto"):
            Image.new("RGB", (16, 16), colour).save(folder / f"{name}-{style}.png")
            entry = {"file": f"{name}-{style}.png", "caption": name, "concept": name, "style": style}
            entries.append(entry | {"tags": ["3d"]})
    (folder / "pictures.json").write_text(json.dumps(entries))
    return ImageSet(folder)


def test_ids_are_words_and_the_end_is_the_highest() -> None:
    words = CaptionWords.of(["A red heart", "the BLUE star", "red, flat"], length=4)
    assert words.words == ["blue", "flat", "heart", "red", "star"] and words.end == 7
    found = words(["Red Heart", "heart", "green heart", "", "red blue star heart flat"])
    assert found.tolist() == [[5, 4, 7, 0], [4, 7, 0, 0], [1, 4, 7, 0], [7, 0, 0, 0], [5, 2, 6, 7]]
    assert words.knows("a heart of gold") and not words.knows("of gold") and not words.knows("")


def test_hidden_words_are_never_the_end_or_padding() -> None:
    words = CaptionWords(WORDS, 6)
    ids = words(["red heart 3d"] * 400)
    found = hide_words(ids, words.end, torch.Generator().manual_seed(0), share=0.3)
    assert torch.equal(found[:, 3:], ids[:, 3:])
    assert set(found[:, 0].tolist()) == {1, ids[0, 0].item()}
    assert (found[:, :3] == 1).double().mean().item() == pytest.approx(0.3, abs=0.04)


def test_moved_images_are_shifted_not_flipped() -> None:
    x = torch.full((64, 3, 32, 32), -1.0)
    x[..., 4:12] = 1.0  # a bar on the left
    found = moved(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape and (found - x).abs().mean() > 0.02
    assert torch.allclose(found[..., -1], x[..., -1], atol=1e-5)  # what comes in from outside is the background
    places = (found[:, 0, 16] + 1).argmax(1)
    assert places.max() < 16 and len(set(places.tolist())) > 2
    assert torch.equal(moved(x, torch.Generator().manual_seed(0)), found)
    still = moved(x, torch.Generator().manual_seed(0), shift=0.0, zoom=0.0)
    assert torch.allclose(still, x, atol=1e-5)


def test_the_table_starts_with_the_vectors_of_known_words(words: WordEncoder) -> None:
    own = CaptionWords(["cat", "unheard"])
    clip = build_clip(clip_sizes(own, 16, 32, 1, 1, 2))
    start_words(clip, own, words)
    table = clip.token_embedding.weight
    known, unheard = table[2], table[3]
    vector = words.table[WORDS.index("cat")].float()
    assert torch.allclose(known[:6], vector / vector.norm(), atol=1e-6) and not known[6:].any()
    assert unheard.norm().item() == pytest.approx(1, abs=1e-5) and unheard[6:].any()


def test_the_loss_is_the_papers(words: WordEncoder) -> None:
    own = CaptionWords(WORDS, 5)
    clip, _ = random_clip(own)
    x, ids = torch.rand(6, 3, 16, 16) * 2 - 1, own([f"{w} 3d" for w in WORDS[:6]])
    loss = ClipObjective(clip.model)(x, ids)
    images, texts = clip.model.encode_image(x, normalize=True), clip.model.encode_text(ids, normalize=True)
    logits = clip.model.logit_scale.exp() * images @ texts.T
    wanted = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_run_learns_its_images_and_loads_as_it_was(data: ImageSet, words: WordEncoder, tmp_path: Path) -> None:
    clip, own = train_clip(data, 16, config(tmp_path, 120), words, 32, 1, 1, 2, torch.float32)
    log = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert log["train_chance"] == round(1 / 7, 4) and log["train_top1"] > 0.8
    assert clip.logit_scale <= HIGHEST_SCALE
    (tmp_path / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"clip is not of a run that can resume, which has a state\.pt; give another"):
        train_clip(data, 16, config(tmp_path, 120), words)
    with pytest.raises(VisarError, match=r"dtype must be a torch.dtype .*, not torch.float8_e4m3fn"):
        train_clip(data, 16, config(tmp_path / "b", 1), words, dtype=torch.float8_e4m3fn)
    again = icons_clip(weights=tmp_path / "clip")
    kept = IconsClip(clip, own, "cpu", {})
    assert again.words.words == own.words and again.weights == kept.weights
    drawn = data.pixels(16)
    prompts = [r.prompt() for r in data.records]
    assert torch.equal(again.scores(drawn, prompts), kept.scores(drawn, prompts))
    report = metrics(again, data)
    assert list(report) == ["train"] and report["train"]["auc"] > 0.9 and report["train"]["higher"] > 0.9
    assert report["train"]["top1"] == report["train"]["top1_of_all"] == log["train_top1"]


@pytest.mark.parametrize(("rank", "top1", "top5"), [(0, 1.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)])
def test_retrieval_counts_what_is_first_and_among_five(rank: int, top1: float, top5: float) -> None:
    """Features are planted so that `rank` captions are nearer to every image than its own."""
    names = list(WORDS[:7])

    class Planted:
        logit_scale = torch.zeros(())

        def encode_image(self, x: Tensor, normalize: bool) -> Tensor:
            number = ((x[:, :1, 0, 0] + 1) * 127.5).round().long()
            return -((torch.arange(7) - number + rank) % 7).float()

        def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
            assert (ids[:, 1] == 9).all()  # every caption in the image's own style
            return torch.eye(7)[ids[:, 0] - 2]

    pixels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    found = retrieval(
        Planted(), CaptionWords([*names, "flat"]), pixels, [Record("", n, "flat") for n in names], names * 2
    )
    assert found == {"top1": top1, "top5": top5, "chance": round(1 / 7, 4)}


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("int8", 0.02), ("int6", 0.06)])
def test_stored_matrices_are_near(dtype: str, error: float, tmp_path: Path) -> None:
    own = CaptionWords(WORDS, 5)
    clip, sizes = random_clip(own)
    with torch.no_grad():
        clip.model.token_embedding.weight.mul_(1e-4)  # without scales, 8 bits would make it zero
        save_clip(clip.model, own, sizes, tmp_path, getattr(torch, dtype))
    stored = load_clip(tmp_path)[0].state_dict()
    assert stored.keys() == clip.model.state_dict().keys()
    for name, tensor in clip.model.state_dict().items():
        assert (stored[name] - tensor).norm() <= error * tensor.norm(), name
    if dtype != "float16":
        numbers = sum(p.numel() for p in clip.model.parameters())
        assert (tmp_path / "model.safetensors").stat().st_size < 1.6 * numbers


def test_a_score_is_of_its_image_and_caption_alone() -> None:
    clip, _ = random_clip(CaptionWords(WORDS))
    drawn, prompts = images(70), [f"{WORDS[i % 7]} {WORDS[i % 10]}" for i in range(70)]
    together = clip.scores(drawn, prompts)
    assert together.std() > 0.01 and together.abs().max() <= 1
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(clip.scores(drawn[order], [prompts[i] for i in order]), together[order], atol=1e-5)
    alone = torch.cat([clip.scores(drawn[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert torch.allclose(alone, together[:5], atol=1e-5)
    pool = clip(drawn)["pool"]
    assert pool.dtype == torch.float32 and torch.allclose(pool.norm(dim=1), torch.ones(70), atol=1e-5)


def test_any_size_is_made_the_models_with_antialiasing() -> None:
    clip, _ = random_clip(CaptionWords(WORDS))
    stripes = torch.zeros(1, 3, 64, 48, dtype=torch.uint8)
    stripes[..., ::2, :] = 255  # finer than what the model sees
    found = clip._resized(stripes)
    assert found.shape == (1, 3, 16, 16) and (found[..., 1:-1, :].float() - 127.5).abs().max() < 20
    assert torch.equal(clip(stripes)["pool"], clip(found)["pool"])
    exact = images(2)
    assert torch.equal(clip._resized(exact), exact)


def test_the_command_line_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = image_folder(tmp_path / "set", 40, styles=("3d", "noto"))
    common = ["train", "clip", "--data", str(data), "--size", "8", "--batch", "4", "--no-compile", "--dim", "32"]
    small = ["--layers", "1", "--text-layers", "1", "--heads", "2", "--stored-as", "int8"]
    out = ["--out", str(tmp_path / "run")]
    assert main([*common, *small, *out, "--minutes", "0.0001"]) == 0
    assert main([*common, *small, *out, "--minutes", "0.02"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 < steps[0] < steps[-1]
    found = icons_clip(weights=tmp_path / "run" / "clip")
    assert found.size == 8 and {"noto", "39", "heart"} <= set(found.words.words) and "a" not in found.words.words
    capsys.readouterr()
    for wrong, message in (
        (["--heads", "3"], "must be a multiple of the 3 heads"),
        (["--size", "12"], "a multiple of 8 pixels, not 12"),
        (["--words", "nowhere"], "nowhere is not a saved component"),
        (["--batch", "1"], "--batch must be 2 or more"),
    ):
        assert main([*common, *small, "--out", str(tmp_path / "no"), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_bad_input_is_said_in_a_sentence(tmp_path: Path) -> None:
    own = CaptionWords(WORDS)
    clip, sizes = random_clip(own)
    with pytest.raises(VisarError, match="No word of the caption 'zzz qqq' is known"):
        clip.texts(["red heart", "zzz qqq"])
    with pytest.raises(VisarError, match="2 images have 1 captions"):
        clip.scores(images(2), ["red"])
    with pytest.raises(VisarError, match="uint8 images"):
        clip(images(2).float())
    with pytest.raises(VisarError, match="There is no folder"):
        icons_clip(weights=tmp_path / "none")
    with pytest.raises(VisarError, match="holds no whole CLIP"):
        icons_clip(weights=tmp_path)
    whole = tmp_path / "whole"
    save_clip(clip.model, own, sizes, whole, torch.float16)
    for name, content, message in (
        ("model.safetensors", (whole / "model.safetensors").read_bytes()[:-100], "holds no whole CLIP"),
        ("words.json", b'["red"]', "has 1 words"),
        ("config.json", b'{"embed_dim": 64}', "holds no whole CLIP"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken, dirs_exist_ok=True)
        (broken / name).write_bytes(content)
        with pytest.raises(VisarError, match=message):
            load_clip(broken)
    with torch.no_grad():
        clip.model.logit_scale.fill_(float("nan"))
    save_clip(clip.model, own, sizes, whole, torch.float16)
    with pytest.raises(VisarError, match="NaN"):
        load_clip(whole)


# The shipped model, on eight things in three styles that `icons` draws


THINGS = ("red heart", "blue heart", "green apple", "grinning face", "cat face", "crying face", "pig face", "banana")
STYLES = ("3d", "noto", "flat")


@pytest.fixture(scope="module")
def shipped() -> IconsClip:
    found = get_extractor("icons-clip")
    assert isinstance(found, IconsClip)
    return found


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """uint8 images [3, 8, 3, 128, 128]: of every style, every thing."""
    model = ImageModel.load("icons")
    model.bar = {"disable": True}
    prompts = [f"{thing}, {style}" for style in STYLES for thing in THINGS]
    images = model.generate(prompts, seed=0, output_type="pt").images
    assert isinstance(images, Tensor)
    return (images * 255).round().to(torch.uint8).unflatten(0, (3, 8))


def test_the_shipped_model_knows_what_icons_draws(shipped: IconsClip, drawn: Tensor) -> None:
    first, right, wrong = 0, [], []
    for style, row in zip(STYLES, drawn, strict=True):
        cosines = shipped(row)["pool"] @ shipped.texts([f"{thing}, {style}" for thing in THINGS]).T
        first += int((cosines.argmax(1) == torch.arange(8)).sum())
        right.append(cosines.diagonal())
        wrong.append(cosines[~torch.eye(8, dtype=torch.bool)])
    assert first >= 14  # of 24; a guess finds 3
    higher = (torch.cat(right)[:, None] > torch.cat(wrong)).double().mean()
    assert higher > 0.9


def test_the_shipped_model_sees_images_that_changed_places(shipped: IconsClip, drawn: Tensor) -> None:
    prompts = [f"{thing}, 3d" for thing in THINGS]
    kept = shipped.scores(drawn[0], prompts)
    assert (kept > shipped.scores(drawn[0].roll(1, 0), prompts)).sum() >= 7


@pytest.mark.parametrize("style", STYLES)
def test_the_shipped_model_sees_the_style(style: str, shipped: IconsClip, drawn: Tensor) -> None:
    row = drawn[STYLES.index(style)]
    means = {asked: shipped.scores(row, [f"{thing}, {asked}" for thing in THINGS]).mean() for asked in STYLES}
    assert max(means, key=lambda asked: means[asked]) == style


def test_the_shipped_model_is_small_and_its_figures_are_those_of_its_card(shipped: IconsClip) -> None:
    folder = Path(str(resources.files("visar.assets"))) / "icons-clip"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1.3 * 2**20
    assert shipped.name == "icons-clip" and shipped.weights[:12] in (folder / "README.md").read_text()


def test_the_protocol_measures_a_folder(shipped: IconsClip, drawn: Tensor, tmp_path: Path) -> None:
    pixels = torch.cat([drawn.flatten(0, 1), drawn[0]])
    prompts = [f"{thing}, {style}" for style in (*STYLES, "3d") for thing in THINGS]
    for i, (image, prompt) in enumerate(zip(pixels, prompts, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(prompt)
    with pytest.warns(UserWarning, match="256"):
        found = measure("icons-clip", tmp_path)
    assert list(found.values) == ["icons-clip"] and found.extractor == "icons-clip" and found.n == 32
    assert found.values["icons-clip"] == pytest.approx(shipped.scores(pixels, prompts).mean().item(), abs=1e-5)
