"""Folders in DeepSeek's own layout, of a tiny model whose keys are renamed by hand, against transformers' layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_hf import PROMPTS, janus
from visar.errors import VisarError
from visar.generation.model import ImageModel

# Parts of keys as DeepSeek's code names its modules, by those of transformers.
THEIRS = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.generation_embeddings.": "gen_embed.",
    "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
    "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
    "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
    "model.generation_head.vision_head.": "gen_head.vision_head.",
    "model.vqmodel.encoder.down.": "gen_vision_model.encoder.conv_blocks.",
    "model.vqmodel.decoder.up.": "gen_vision_model.decoder.conv_blocks.",
    "model.vqmodel.encoder.mid.block_1.": "gen_vision_model.encoder.mid.0.",
    "model.vqmodel.encoder.mid.attn_1.": "gen_vision_model.encoder.mid.1.",
    "model.vqmodel.encoder.mid.block_2.": "gen_vision_model.encoder.mid.2.",
    "model.vqmodel.decoder.mid.block_1.": "gen_vision_model.decoder.mid.0.",
    "model.vqmodel.decoder.mid.attn_1.": "gen_vision_model.decoder.mid.1.",
    "model.vqmodel.decoder.mid.block_2.": "gen_vision_model.decoder.mid.2.",
    "model.vqmodel.": "gen_vision_model.",
    "model.vision_model.": "vision_model.vision_tower.",
    "model.aligner.fc1.": "aligner.layers.0.",
    "model.aligner.hidden_layers.0.": "aligner.layers.2.",
}


def their_key(key: str) -> str:
    ours = next(part for part in THEIRS if key.startswith(part))
    key = THEIRS[ours] + key.removeprefix(ours)
    return key.replace(".block.", ".res.") if "conv_blocks" in key else key


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    model, _ = janus()
    own = {their_key(key): value for key, value in model.state_dict().items()}
    return own | {"gen_vision_model.quantize.codebook_used": torch.zeros(9)}


def write(path: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    model, processor = janus()
    config = {
        "model_type": "multi_modality",
        "language_config": model.config.text_config.to_dict(),
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 64}},
    }
    processor.tokenizer.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "VLChatProcessor"}))
    (path / "config.json").write_text(json.dumps(config | changes))
    torch.save(state, path / "pytorch_model.bin")
    return path


def test_tokens_and_pixels_are_those_of_the_other_layout(state: dict[str, Tensor], tmp_path: Path) -> None:
    model, processor = janus()
    path = write(tmp_path / "model", state)
    found, wanted = ImageModel.load(path), ImageModel.load(folder_of(model, processor.tokenizer, tmp_path / "other"))
    assert found.family.name == "janus" and not any(t.is_meta for t in found.family.model.buffers())
    for model_ in (found, wanted):
        model_.bar = {"disable": True}
    settings: dict[str, Any] = dict(sampler="scd", seed=4, output_type="pt")
    a, b = found.generate(list(PROMPTS), **settings), wanted.generate(list(PROMPTS), **settings)
    assert torch.equal(a.tokens, b.tokens) and len(a.tokens.unique()) > 15
    torch.testing.assert_close(a.images, b.images)


def folder_of(model: Any, tokenizer: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def dropped(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: [state.pop(key) for key in list(state) if part in key]


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor missing": (dropped("layers.1.mlp.up_proj"), r"'model\.language_model\.layers\.1\.mlp.* is missing"),
    "no image tokenizer": (dropped("gen_vision_model"), r"gen_vision_model\..*"),
    "a tensor more": (lambda s: s.update({"gen_head.more": torch.ones(1)}), r"generation_head\.more' .* is unknown"),
    "another shape": (lambda s: s.update({"gen_embed.weight": torch.ones(9, 8)}), r"has shape \[9, 8\], not \[50, 8\]"),
}


@pytest.mark.parametrize("damage", SPOILT)
def test_damaged_files(damage: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    spoil, message = SPOILT[damage]
    spoil(own := dict(state))
    with pytest.raises(VisarError, match=message) as caught:
        ImageModel.load(write(tmp_path / "model", own))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    {"language_config": {"hidden_size": "wide"}}, {"vision_config": {"params": {"image_size": "large"}}},
    {"language_config": {"num_attention_heads": 0}},
], ids=str)  # fmt: skip
def test_damaged_configurations(config: dict[str, Any], state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(VisarError, match="Could not load the configuration from") as caught:
        ImageModel.load(write(tmp_path / "model", state, **config))
    assert "\n" not in str(caught.value)


def test_a_repository_without_safetensors_is_downloaded_whole(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(_: str, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        if len(asked) == 1:
            (tmp_path / "model").mkdir()
        elif "*.bin" in allow_patterns:
            write(tmp_path / "model", state)
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert ImageModel.load("deepseek-ai/Janus-Pro-1B").family.name == "janus"
    assert len(asked) == 2 and "*.bin" not in asked[0] and "*.json" in asked[0]
