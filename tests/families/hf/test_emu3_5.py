"""Emu3.5 on tiny random weights: the stock `generate` of a Qwen3, another library's decoder, and published names.

Nothing here knows the published weights: that their names and shapes are as tested is the authors' code's word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import visar
from tests.helpers.hf_folders import Damage, check_damaged
from tests.helpers.tiny_emu3 import emu3_tokenizer, tiny_qwen3
from tests.helpers.tiny_hf import PROMPTS
from tests.helpers.tiny_vqgan import tiny_vqgan
from visar.errors import VisarError
from visar.families.hf.emu3_5 import NOTHING, USER, Emu35Family
from visar.generation.model import ImageModel

SIDE = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the published configuration, whose keys name code that is not there."""
    path = tmp_path_factory.mktemp("families") / "emu3.5"
    tiny_qwen3().save_pretrained(path)
    emu3_tokenizer(16).save_pretrained(path)
    made = json.loads((path / "config.json").read_text())
    del made["rope_parameters"]
    made |= {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "rope_theta": 1e6}
    (path / "config.json").write_text(json.dumps(made | {"auto_map": {"AutoConfig": "configuration_emu3.Emu3Config"}}))
    (path / "vision_tokenizer").mkdir()
    torch.save(tiny_vqgan(), path / "vision_tokenizer" / "model.ckpt")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return ImageModel.load(folder, image_size=4 * SIDE)


def stock(model: ImageModel, prompts: tuple[str, ...]) -> Tensor:
    """Greedy ids after the prompts by the `generate` of a Qwen3, with the authors' rules for the end of rows."""
    family: Any = model.family
    t = family.processor
    codes = [t.convert_tokens_to_ids(f"<|visual token {n:06d}|>") for n in range(16)]
    line_end, image_end = t.convert_tokens_to_ids(["<|extra_200|>", "<|image end|>"])
    last = SIDE * (SIDE + 1)

    def texts(*of: str) -> Any:
        start = f"<|image start|>{SIDE}*{SIDE}<|image token|>"
        whole = ["<|extra_203|>" + text + "<|extra_100|>" + start for text in of]
        return t(whole, return_tensors="pt", padding=True, add_special_tokens=False)

    inputs, nothing = texts(*(USER.format(p) for p in prompts)), texts(*[NOTHING] * len(prompts))
    length = inputs["input_ids"].shape[1]

    def allowed(_: int, ids: Tensor) -> list[int]:
        n = len(ids) - length + 1
        return [image_end] if n == last else [line_end] if n % (SIDE + 1) == 0 else codes

    ids: Tensor = family.model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=last,
        guidance_scale=5.0, prefix_allowed_tokens_fn=allowed, negative_prompt_ids=nothing["input_ids"],
        negative_prompt_attention_mask=nothing["attention_mask"],
    )  # fmt: skip
    return ids[:, length:]


@pytest.mark.parametrize("sampler", ["ar", "scd"])
def test_greedy_ids_are_those_of_generate(model: ImageModel, sampler: str) -> None:
    family: Any = model.family
    wanted = stock(model, PROMPTS)
    assert len(wanted.unique(dim=0)) == 3 and len(wanted.unique()) > 8
    out = model.generate(list(PROMPTS), sampler=sampler, top_k=1, output_type="tokens")
    assert torch.equal(family.ids(out.tokens), wanted)
    alone = model.generate(PROMPTS[1], sampler=sampler, top_k=1, output_type="tokens")
    assert torch.equal(family.ids(alone.tokens), wanted[1:2])


def test_pixels_are_those_of_another_decoder(model: ImageModel) -> None:
    """Of Janus in transformers, which is the same network with levels numbered the other way round."""
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    config = JanusVQVAEConfig(
        latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=2, out_channels=3
    )
    other, state = JanusVQVAEDecoder(config), tiny_vqgan()
    renamed = {
        key.removeprefix("decoder.").replace(f"up.{key[11:12]}.", f"up.{2 - int(key[11])}.")
        if key.startswith("decoder.up.")
        else key.removeprefix("decoder."): value
        for key, value in state.items()
        if key.startswith("decoder.")
    }
    other.load_state_dict(renamed)
    codes = torch.randint(16, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.embedding(codes, state["quantize.embedding.weight"]).permute(0, 3, 1, 2)
    z = torch.nn.functional.conv2d(z, state["post_quant_conv.weight"], state["post_quant_conv.bias"])
    wanted = other(z) / 2 + 0.5
    tokens = torch.cat([codes, torch.full((2, SIDE, 1), 16)], dim=2).flatten(1)
    found = model.family.decode(tokens)
    assert found.shape == (2, 3, 4 * SIDE, 4 * SIDE) and found.std() > 0.1 and found.min() >= 0
    torch.testing.assert_close(found, wanted.detach().clamp(0, 1), atol=1e-5, rtol=0)


def test_a_folder_in_the_published_form_loads(folder: Path) -> None:
    family: Any = ImageModel.load(folder, image_size=256).family
    assert isinstance(family, Emu35Family) and family.layout.rows == 64 and family.layout.length == 64 * 65
    assert family.model.config.rope_parameters["rope_theta"] == 1e6
    other = tiny_qwen3().state_dict()
    assert all(torch.equal(value, other[name]) for name, value in family.model.state_dict().items())
    ids = torch.tensor([[3, 5, 9]])
    torch.testing.assert_close(family.model(ids).logits, tiny_qwen3()(ids).logits)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Of the weights of the model."""

    def edited(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        change(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})

    return edited


def edit_vision(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        state = tiny_vqgan()
        change(state)
        torch.save(state, path / "vision_tokenizer" / "model.ckpt")

    return edited


def without_codes(path: Path) -> None:
    """A tokenizer of words alone, as Qwen3's is, in a vocabulary that is too small for the published ids."""
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace("<|visual token 000000|>", "word"))


def without_vision(path: Path) -> None:
    """Known by the size of its vocabulary."""
    shutil.rmtree(path / "vision_tokenizer")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 282926}))


DAMAGE: Damage = {
    "no image tokenizer": (without_vision, r"has no image tokenizer: put the files of BAAI/Emu3\.5-VisionTokenizer"),
    "a tensor missing": (edit(lambda s: s.pop("model.norm.weight")), r"Tensor 'model\.norm\.weight' of .* is missing"),
    "a tensor unknown": (
        edit(lambda s: s.update({"model.other": torch.ones(2)})),
        r"Tensor 'model\.other' of .* is unknown; a Qwen3ForCausalLM has none such",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "Could not load the processor of prompts"),
    "no codes in the vocabulary": (without_codes, r"has no token <\|visual token 000000\|>"),
    "more codes than ids": (
        edit_vision(lambda s: s.update({"quantize.embedding.weight": torch.ones(99, 8)})),
        r"the vocabulary of this model has \d+ ids: it is no Emu3\.5",
    ),
    "a decoder's tensor missing": (
        edit_vision(lambda s: s.pop("decoder.mid.attn_1.q.weight")),
        r"'decoder\.mid\.attn_1\.q\.weight' of the image decoder is missing",
    ),
    "a decoder's tensor unknown": (
        edit_vision(lambda s: s.update({"decoder.up.0.attn.0.q.weight": torch.ones(32, 32, 1, 1)})),
        r"Tensor 'decoder\.up\.0\.attn\.0\.q\.weight' of .* is unknown",
    ),
    "a decoder's tensor misshapen": (
        edit_vision(lambda s: s.update({"decoder.conv_in.weight": torch.ones(64, 9, 3, 3)})),
        r"has shape \[64, 9, 3, 3\], expected \[64, 32, 3, 3\]",
    ),
    "another file": (edit_vision(lambda s: s.clear()), r"quantize\.embedding\.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folder: Path, tmp_path: Path) -> None:
    check_damaged(folder, tmp_path, *DAMAGE[damage])


def test_what_is_refused(folder: Path, model: ImageModel) -> None:
    family: Any = model.family
    with pytest.raises(VisarError, match=r"are multiples of 4 pixels, not 30 and 30"):
        ImageModel.load(folder, image_size=30)
    with pytest.raises(VisarError, match=r"An image of 200 x 200 cells is 40200 tokens, and this model has 8192"):
        Emu35Family(family.model, family.processor, family.vision_tokenizer, (800, 800))
    with pytest.raises(VisarError, match="knows no images of a Qwen3ForCausalLM"):
        visar.accelerate(family.model, family.processor)
    with pytest.raises(VisarError, match=r"The prompt has \d+ tokens; this model takes at most"):
        model.generate(" ".join(["wide"] * 9000))
