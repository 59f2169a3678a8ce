"""Small files of the layouts and under the names that the documentation speaks of: what its examples are run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.drafters.test_published import released
from tests.families.mar.test_loading import CHANNELS, checkpoint, kl_shapes, random_state
from tests.helpers import tiny_chameleon, tiny_emu3, tiny_glm, tiny_hf, tiny_meta
from tests.helpers.tiny import GPT, VQ, WORDS, image_folder
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.lpd import LPD, their_keys
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.vq import VQModel
from visar.families.mar.transformer import MAR
from visar.text_encoders.words import WordEncoder

PROMPTS = ("a red heart, 3d", "a sun, flat", "a lion, noto", "a green apple, flat")
CAPTION = dict(condition="text", condition_length=120, caption_features=32)
GROUPS = (
    "animals & nature", "food & drink", "symbols", "people & body", "objects", "other", "activities", "travel & places",
)  # fmt: skip


def lay_down(folder: Path) -> None:
    """Everything that a page may name and does not make itself."""
    torch.manual_seed(0)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "captions.txt").write_text("\n".join(PROMPTS) + "\n")
    lines = [json.dumps({"tag": "single_object", "include": [], "prompt": p}) for p in PROMPTS[:1]]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "dpg_bench" / "prompts").mkdir(parents=True)
    for i, prompt in enumerate(PROMPTS):
        (folder / "dpg_bench" / "prompts" / f"{i}.txt").write_text(prompt)
    image_folder(folder / "images", 60, ("3d", "noto", "flat"), size=16, groups=GROUPS)
    known = sorted({*WORDS, *(word for prompt in PROMPTS for word in prompt.replace(",", "").split())})
    WordEncoder.compress(known, torch.randn(len(known), 12), features=6, length=4).save_pretrained(folder / "words")

    llamagen = LlamaGen(**GPT | dict(grid=24), condition="class", classes=1000)
    torch.nn.init.normal_(llamagen.output.weight)
    torch.save({"model": llamagen.state_dict()}, folder / "c2i_L_384.pt")
    for name, grid in (("c2i_B_384.pt", 24), ("my_gpt.pt", 32)):
        torch.save(
            {"model": LlamaGen(**GPT | dict(grid=grid), condition="class", classes=1000).state_dict()}, folder / name
        )
    torch.save({"model": LlamaGen(**GPT | dict(grid=24), **CAPTION).state_dict()}, folder / "t2i_XL_stage2_512.pt")
    for name in ("vq_ds16_c2i.pt", "vq_ds16_t2i.pt"):
        torch.save({"model": VQModel(**VQ).state_dict()}, folder / name)
    caption_encoder(folder / "flan-t5-xl")
    (folder / "lantern").mkdir()
    (folder / "lantern" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    torch.save(released(llamagen), folder / "lantern" / "pytorch_model.bin")

    mar = MAR(token_dim=16, grid=8, dim=16, encoder_layers=2, decoder_layers=2, num_heads=2, head_width=24,
              head_layers=2, condition="class", classes=1000, buffer=4)  # fmt: skip
    state = random_state({key: tuple(t.shape) for key, t in mar.state_dict().items()})
    torch.save(checkpoint(state), folder / "checkpoint-last.pth")
    torch.save({"model": random_state(kl_shapes(CHANNELS))}, folder / "kl16.ckpt")


def lay_down_family(folder: Path, name: str) -> None:
    """The model that the page of a family names."""
    if name == "randar":
        save_file(
            RandAR(**GPT, condition="class", classes=1000).state_dict(),
            folder / "randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors",
        )
    if name == "lpd":
        model = LPD(**GPT | {"grid": 4}, condition="class", classes=1000)
        state = {their: model.state_dict()[own] for own, their in their_keys(model).items()}
        state["class_emb.weight"], state["fake_latent"] = state["class_emb.weight"].split([1000, 1])
        torch.save({"model": state}, folder / "lpd_l_256.pth")
    if name == "janus":
        for part in tiny_hf.janus():
            part.save_pretrained(folder / "Janus-Pro-1B")
    if name == "chameleon":
        for title, lumina in (("Anole-7b-v0.1-hf", False), ("Lumina-mGPT-7B-768", True)):
            tiny_chameleon.save(folder / title, lumina)
        tiny_meta.write(folder / "Anole-7b-v0.1", model := tiny_meta.model_of(), tiny_meta.meta_parts(model))
    if name == "emu3":
        for part in (tiny_emu3.tiny_emu3(max_position_embeddings=9216), tiny_emu3.emu3_processor()):
            part.save_pretrained(folder / "Emu3-Gen-hf")
    if name == "glm-image":
        tiny_glm.tiny_pipeline().save_pretrained(folder / "GLM-Image")


def small_glm(patch: pytest.MonkeyPatch) -> None:
    """Few codes in a draft, and few steps of the pixels."""
    tiny_glm.small_drafts(patch)
    patch.setattr("visar.families.hf.glm_pipeline.ARGUMENTS", {"num_inference_steps": 1})


def caption_encoder(folder: Path) -> None:
    """A T5 encoder and its tokenizer, in one folder as on the hub."""
    known = ["<pad>", "</s>", "<unk>", "a", "red", "heart"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    config = T5Config(vocab_size=len(known), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)


def two_heads(patch: pytest.MonkeyPatch) -> None:
    """Sizes that were never published have no row in the table that says how many heads a file has."""
    patch.setattr("visar.families.llamagen.loading.match_heads", lambda *_: 2)
    patch.setattr("visar.families.mar.loading.match_mar_heads", lambda *_: 2)
    patch.setattr(
        "visar.families.llamagen.loading.published_grid",
        lambda name: {"c2i_L_384.pt": 6, "c2i_B_384.pt": 6}.get(name, 4),
    )
