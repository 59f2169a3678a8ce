"""Chameleon (Anole) and Lumina-mGPT against a plain loop over transformers' decoder and whole output head, and their
image decoder against a plain one, on tiny ones of random weights."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import visar
from tests.families.hf.grids import NAMES, check_joint, expected_images
from tests.helpers.hf_folders import Damage, check_commands, check_damaged, check_verified, edited
from tests.helpers.tiny_chameleon import (
    WIDTHS,
    chameleon,
    chameleon_tokenizer,
    code_name,
    greedy,
    prompts_of,
    save,
    tiny_chameleon,
    vocabulary,
)
from tests.helpers.tiny_hf import PROMPTS
from tests.helpers.tiny_vqgan import plain_pixels, tiny_vqgan
from visar.errors import VisarError
from visar.families.hf.chameleon import ChameleonFamily, LuminaFamily, side_of
from visar.families.hf.vqgan import VQGAN, _published
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request

SIZE = 32, 64  # height and width of the images of Lumina here


def vqgan(codes: int = 16) -> VQGAN:
    return VQGAN.of(tiny_vqgan(codes, WIDTHS, attention=False), Path("vqgan.ckpt"))


@pytest.fixture(params=["chameleon", "lumina-mgpt"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    lumina = request.param == "lumina-mgpt"
    if lumina:
        return ImageModel(LuminaFamily(*chameleon(lumina), vqgan(), SIZE))
    return ImageModel(ChameleonFamily(*chameleon(lumina), vqgan()))


@functools.cache
def stock(name: str, scale: float = 3.0) -> Tensor:
    """Greedy ids of `PROMPTS`, without those after the image."""
    if name == "chameleon":
        return greedy(chameleon()[0], *prompts_of(False), 9, scale)
    columns, rows = SIZE[1] // 16, SIZE[0] // 16
    return greedy(chameleon(True)[0], *prompts_of(True, SIZE), rows * (columns + 1), scale, columns + 1)


def ids_of(model: ImageModel, tokens: Tensor) -> Tensor:
    family: Any = model.family
    if family.name == "chameleon":
        return family.decoder.codes[tokens]
    ids = family.ids(tokens)
    assert ids[0, family.layout.length :].tolist() == [vocabulary(16)[t] for t in ("<eoss>", "<reserved08706>")]
    return ids[:, : family.layout.length]


@pytest.mark.parametrize("sampler", ["ar", "scd"])
def test_greedy_ids_are_those_of_a_plain_loop(model: ImageModel, sampler: str) -> None:
    wanted = stock(model.family.name)
    greedily: dict[str, Any] = dict(sampler=sampler, output_type="tokens")
    assert len(wanted.unique(dim=0)) == len(PROMPTS) and len(wanted.unique()) > 4
    found = model.generate(list(PROMPTS), model.params_of(top_k=1, top_p=1.0), **greedily)
    assert torch.equal(ids_of(model, found.tokens), wanted)
    alone = model.generate(PROMPTS[1], model.params_of(top_k=1, top_p=1.0), **greedily)
    assert torch.equal(ids_of(model, alone.tokens), wanted[1:2])
    weak = stock(model.family.name, 1.5)
    found = model.generate(list(PROMPTS), model.params_of(top_k=1, top_p=1.0, guidance_scale=1.5), **greedily)
    assert torch.equal(ids_of(model, found.tokens), weak) and not torch.equal(weak, wanted)


def test_transformers_forbids_codes_of_images() -> None:
    """Why passes run the decoder and the head: in the stock logits every code has the least value there is."""
    made = chameleon()[0]
    codes = made.model.vocabulary_mapping.image_tokens
    assert (made(torch.tensor([[0, 50, 20]])).logits[..., codes] == torch.finfo(torch.float32).min).all()


def test_two_batches_are_the_three_of_the_authors() -> None:
    """For a text alone, Meta's prompts without the text are those with nothing, whatever the scale of images."""
    family = ChameleonFamily(*chameleon())
    prompt, other = family.prompt_ids(PROMPTS[0])
    kept = {*family.codes, *(vocabulary(16)[token] for token in ("<s>", "<racm3:break>", "<eoss>"))}
    assert [i for i in prompt if i in kept] == other
    full, image, nothing = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    image = nothing
    torch.testing.assert_close(nothing + 1.2 * (image - nothing) + 3 * (full - image), nothing + 3 * (full - nothing))


@pytest.mark.parametrize("attention", [False, True])
def test_pixels_are_those_of_a_plain_decoder(attention: bool, tmp_path: Path) -> None:
    """As Chameleon has it, and with attention in the smallest map; the file is nested as Meta's is."""
    state = tiny_vqgan(16, WIDTHS, attention)
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    codes = torch.randint(16, (2, 2, 3), generator=torch.Generator().manual_seed(0))
    wanted = plain_pixels(state, codes)
    assert wanted.shape == (2, 3, 32, 48) and wanted.std() > 0.1
    torch.testing.assert_close(VQGAN.load(tmp_path / "vqgan.ckpt")(codes), wanted, atol=2e-5, rtol=1e-4)


def test_the_published_sizes_have_the_published_keys() -> None:
    """Those of Meta's vqgan.ckpt: 8192 codes of 256 numbers, and of its decoder no attention but in the middle."""
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    with torch.device("meta"):
        made = VQGAN(8192, 256, [128, 128, 256, 256, 512], 2, 256, attention=False)
        other = JanusVQVAEDecoder(JanusVQVAEConfig(latent_channels=256))  # the same network with attention in a level
    wanted = {
        re.sub(r"^up\.(\d)", lambda m: f"up.{4 - int(m[1])}", key): value.shape
        for key, value in other.state_dict().items()
        if not re.match(r"up\.0\.attn", key)
    }
    found = {_published(name, 5): value.shape for name, value in made.state_dict().items()}
    codes = {"quantize.embedding.weight": (8192, 256), "post_quant_conv.weight": (256, 256, 1, 1)}
    assert found == {f"decoder.{key}": shape for key, shape in wanted.items()} | codes | {
        "post_quant_conv.bias": (256,)
    }


def test_images_are_those_of_the_cells(model: ImageModel) -> None:
    family: Any = model.family
    out = model.generate(list(PROMPTS), model.params_of(seed=3), output_type="pt")
    rows, columns = family.layout.rows, family.layout.columns
    assert out.images.shape == (3, 3, 16 * rows, 16 * columns) == (3, 3, *family.pixels)
    ids = ids_of(model, out.tokens).unflatten(1, (rows, -1))[..., :columns]
    codes = torch.tensor([[[int(name_of(int(i))) for i in row] for row in one] for one in ids])
    wanted = plain_pixels(tiny_vqgan(16, WIDTHS, attention=False), codes)
    torch.testing.assert_close(out.images, (wanted / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=0)


def name_of(code_id: int) -> str:
    """The number of a code by the letters of its name."""
    return next(str(n) for n in range(16) if vocabulary(16)[code_name(n)] == code_id)


def test_rows_that_are_taken_in_turns(model: ImageModel) -> None:
    requests = [Request(text, model.params_of(seed=i), tag=i) for i, text in enumerate((*PROMPTS, PROMPTS[0]))]
    for done in Pool(model, "scd", size=2).run(requests):
        r = done.request
        out = model.generate(r.condition, r.params, sampler="scd", output_type="tokens")
        assert torch.equal(done.tokens, out.tokens[0]) and done.nfe == out.stats.nfe


@pytest.fixture(scope="module")
def small() -> LuminaFamily:
    """Images of 2 x 2 codes of three values."""
    made = tiny_chameleon(codes=3, lumina=True)
    with torch.no_grad():
        made.lm_head.weight /= 4
    return LuminaFamily(made, chameleon_tokenizer(codes=3), size=(32, 32))


@pytest.fixture(scope="module")
def expected(small: LuminaFamily) -> np.ndarray:
    return expected_images(small, lambda ids: small.model.lm_head(small.model.model(ids)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_joint_distribution_with_forced_tokens(name: str, small: LuminaFamily, expected: np.ndarray) -> None:
    check_joint(small, expected, name)


def test_another_size_shares_the_weights(model: ImageModel) -> None:
    if model.family.name == "chameleon":
        with pytest.raises(VisarError, match="height must be 48: this model makes images of one size"):
            model.sized(64)
        return
    other: Any = model.sized(64, 32)
    assert other.family.pixels == (64, 32) and other.family.model is model.family.model
    prompt = other.family.prompt_ids("cat")[0]
    assert prompt[-2:] == [vocabulary(16)[f"<reserved{n}>"] for n in ("08802", "08801")]  # height, then width
    assert other.generate("cat", output_type="pt").images.shape == (1, 3, 64, 32)
    for size, message in (
        ((48, 64), "multiples of 32 pixels, not 48 and 64"),
        ((0, 64), "multiples of 32 pixels"),
        ((32, 288), "has no token <reserved08809>"),
        ((256, 256), r"16 x 16 cells is 272 tokens, and this model has 256 positions"),
    ):
        with pytest.raises(VisarError, match=message):
            model.sized(*size)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("Alpha-VLLM/Lumina-mGPT-7B-512", 512),
        ("lumina/Lumina-mGPT-7B-768-Omni", 768),
        ("models/Lumina-mGPT-7B-1024/", 1024),
        ("models/lumina", None),
    ],
)
def test_the_name_of_a_published_model_says_its_size(name: str, side: int | None) -> None:
    assert side_of(name) == (side and (side, side))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models: Lumina with Meta's file, Anole whose weights hold the decoder."""
    path = tmp_path_factory.mktemp("families")
    save(path / "anole", lumina=False)
    save(path / "Lumina-mGPT-7B-512", lumina=True)
    shutil.rmtree(path / "anole" / "tokenizer")
    state = tiny_vqgan(16, WIDTHS, attention=False)
    weights = load_file(path / "anole" / "model.safetensors")
    carried = {f"model.vqmodel.{key}": value for key, value in state.items() if key.startswith(("decoder.", "post_"))}
    weights["model.vqmodel.quantize.embedding.weight"] = state["quantize.embedding.weight"]
    save_file(weights | carried, path / "anole" / "model.safetensors", {"format": "pt"})
    return path


def test_folders_load_by_registration(folders: Path) -> None:
    anole: Any = ImageModel.load(folders / "anole").family
    assert (anole.name, anole.pixels, anole.layout.length) == ("chameleon", (48, 48), 9)
    assert (anole.defaults.guidance_scale, anole.defaults.temperature, anole.defaults.top_p) == (3.0, 0.7, 0.9)
    lumina: Any = ImageModel.load(folders / "Lumina-mGPT-7B-512", image_size="96x64").family
    assert (lumina.name, lumina.pixels, lumina.layout.length) == ("lumina-mgpt", (64, 96), 4 * 7)
    assert (lumina.defaults.guidance_scale, lumina.defaults.temperature, lumina.defaults.top_k) == (3.0, 1.0, 2000)
    codes = torch.arange(16).view(1, 4, 4)
    wanted = plain_pixels(tiny_vqgan(16, WIDTHS, attention=False), codes)
    for family in (anole, lumina):
        torch.testing.assert_close(family.components["vqgan"](codes), wanted, atol=2e-5, rtol=1e-4)
    wrapped: Any = ImageModel.of(visar.accelerate(lumina.model, lumina.processor)).family
    assert wrapped.name == "lumina-mgpt" and wrapped.components["vqgan"].cell == 16


@pytest.mark.slow
def test_the_command_line_works_by_registration(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_commands(folders / "anole", tmp_path, (48, 48))
    size = "--image-size", "96x64"
    (tmp_path / "lumina").mkdir()
    check_commands(folders / "Lumina-mGPT-7B-512", tmp_path / "lumina", (96, 64), *size)
    check_verified(folders / "anole", capsys, "ar,sjd,scd")
    check_verified(folders / "Lumina-mGPT-7B-512", capsys, "ar,sjd,scd", *size)


def replaced(file: str, old: str, new: str) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        text = (path / file).read_text()
        assert old in text
        (path / file).write_text(text.replace(old, new))

    return edit


def decoder(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Of the weights of the image decoder."""

    def edit(path: Path) -> None:
        state = tiny_vqgan(16, WIDTHS, attention=False)
        change(state)
        torch.save({"state_dict": state}, path / "tokenizer" / "vqgan.ckpt")

    return edit


class Planted:
    """What runs a command when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.system, ("touch planted",)


def other_layout(path: Path) -> None:
    (path / "config.json").unlink()


def cut(path: Path) -> None:
    whole = (path / "tokenizer" / "vqgan.ckpt").read_bytes()
    (path / "tokenizer" / "vqgan.ckpt").write_bytes(whole[: len(whole) // 2])


KEY = "decoder.up.4.block.0.conv1.weight"
DAMAGE: Damage = {
    "neither layout": (
        other_layout,
        r"has no weights: neither a config\.json, .* nor a models/7b/consolid",
    ),
    "no map": (edited("config.json", vocabulary_map=None), "has no vocabulary_map"),
    "a code missing": (replaced("config.json", code_name(15), "word"), r"has 15 tokens IMGIMG\.\.\., and .* 16 codes"),
    "no end of rows": (replaced("config.json", "<reserved08799>", "word"), "Lumina-mGPT has no token <reserved08799>"),
    "another tokenizer": (replaced("tokenizer.json", "<racm3:break>", "<other>"), "not that of this Lumina-mGPT"),
    "a tensor missing": (decoder(lambda s: s.pop("decoder.conv_out.bias")), "'decoder.conv_out.bias' of the image dec"),
    "the codes missing": (decoder(lambda s: s.pop("quantize.embedding.weight")), r"'quantize\.embedding\.weight'"),
    "a tensor more": (decoder(lambda s: s.update(more=torch.ones(1))), "Tensor 'more' of .* is unknown"),
    "another shape": (decoder(lambda s: s.update({KEY: s[KEY][:, :8]})), r"conv1\.weight' of .* has shape \[64, 8"),
    "other codes": (decoder(lambda s: s.update(tiny_vqgan(8, WIDTHS, False))), "has 8 codes of 16 pixels, and this"),
    "a file that is cut": (cut, r"vqgan\.ckpt"),
    "code in a file": (decoder(lambda s: s.update(planted=Planted())), r"vqgan\.ckpt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = None if damage == "neither layout" else "96x64"
    check_damaged(folders / "Lumina-mGPT-7B-512", tmp_path, *DAMAGE[damage], image_size=size)
    assert not (tmp_path / "planted").exists()


def test_without_an_image_decoder_there_are_tokens() -> None:
    for family in (ChameleonFamily(*chameleon()), LuminaFamily(*chameleon(True), size=SIZE)):
        bare = ImageModel(family)
        assert bare.generate("cat", output_type="tokens").tokens.shape == (1, family.layout.length)
        with pytest.raises(VisarError, match=r"no decoder of pixels: put Meta's file tokenizer/vqgan\.ckpt into its"):
            bare.generate("cat")


def test_what_is_refused(model: ImageModel) -> None:
    room = 256 - model.family.layout.length
    with pytest.raises(VisarError, match=rf"The prompt has \d+ tokens; this model takes at most {room} next to the"):
        model.generate(" ".join(["wide"] * 300))
    for token in (code_name(3), "<racm3:break>", "<reserved08706>"):
        with pytest.raises(VisarError, match="holds, as text, a token of the model's that stands for an image"):
            model.generate(f"a red {token} heart")
    with pytest.raises(VisarError, match="Give the processor of this ChameleonForConditionalGeneration"):
        visar.accelerate(chameleon()[0])
    with pytest.raises(VisarError, match="An image has 9 tokens, and this model 9 positions"):
        ChameleonFamily(tiny_chameleon(max_position_embeddings=9), chameleon_tokenizer())
