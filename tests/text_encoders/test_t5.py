"""The T5 caption encoder, on a tiny random T5: layout of the slots, cleaning, round trip, and what a failure says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from visar.errors import VisarError
from visar.text_encoders import t5
from visar.text_encoders.t5 import T5CaptionEncoder, clean_caption

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "heart", "blue", "car", "on", "the", "road"]
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub-like folder: encoder and tokenizer files side by side. The tokenizer pads left unless told otherwise."""
    path = tmp_path_factory.mktemp("t5")
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(path)
    return path


def test_features_are_left_padded_and_zero_where_masked(folder: Path) -> None:
    encoder = T5CaptionEncoder.from_pretrained(folder, length=LENGTH)
    prompts = ["a red heart", "car", "the blue car on the red road on the road"]
    features, mask = encoder.encode(prompts)
    valid = [4, 2, LENGTH]  # the words, the end of the sentence, cut at the length
    assert features.shape == (3, LENGTH, 32) and features.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.tolist() == [[False] * (LENGTH - n) + [True] * n for n in valid]
    assert (features[~mask] == 0).all() and (features[mask] != 0).any(-1).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, row, n in zip(prompts, features, valid, strict=True):
        alone = tokenizer(prompt, truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        assert alone.shape[1] == n and alone[0, -1] == 1
        with torch.no_grad():
            expected = encoder.encoder(input_ids=alone).last_hidden_state[0]
        torch.testing.assert_close(row[LENGTH - n :], expected, rtol=0, atol=1e-5)


def test_features_do_not_depend_on_the_batch(folder: Path) -> None:
    encoder = T5CaptionEncoder.from_pretrained(folder, length=LENGTH)
    together, _ = encoder.encode(["car", "the blue car on the road"])
    torch.testing.assert_close(encoder.encode(["car"])[0], together[:1], rtol=0, atol=1e-5)


def test_no_gradients_and_padding_that_is_not_a_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = T5CaptionEncoder.from_pretrained(folder, length=LENGTH)
    assert not encoder.encoder.training and not any(p.requires_grad for p in encoder.parameters())
    run = encoder.encoder.forward

    def broken(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (run(input_ids, attention_mask)[0].masked_fill(attention_mask[..., None] == 0, torch.nan),)

    monkeypatch.setattr(encoder.encoder, "forward", broken)
    features, _ = encoder.encode(["car"])
    assert not features.requires_grad and features.isfinite().all()


def test_captions_are_cleaned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messy = "A <b>RED</b> heart @someone see https://x.com/y IMG12345.jpg"
    assert clean_caption(messy) == "a red heart see"
    encoder = T5CaptionEncoder.from_pretrained(folder, length=LENGTH)
    torch.testing.assert_close(encoder.encode(["<i>A RED  heart</i>"])[0], encoder.encode(["a red heart"])[0])
    seen: list[str] = []
    monkeypatch.setattr(t5, "clean_caption", lambda c: seen.append(c) or "car")
    encoder.encode(["one", "two"])
    assert seen == ["one", "two"]


def test_cleaning_is_applied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.PixArtAlphaPipeline._clean_caption", lambda _, caption: caption + "!")
    assert clean_caption("x") == "x!!"


def test_round_trip_keeps_the_length(folder: Path, tmp_path: Path) -> None:
    encoder = T5CaptionEncoder.from_pretrained(folder, length=LENGTH)
    encoder.save_pretrained(tmp_path / "saved")
    again = T5CaptionEncoder.from_pretrained(tmp_path / "saved")
    assert again.length == LENGTH
    assert torch.equal(again.encode(["a car"])[0], encoder.encode(["a car"])[0])
    assert T5CaptionEncoder.from_pretrained(folder).length == 120
    assert T5CaptionEncoder.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert encoder.to("cpu").device == torch.device("cpu")


def test_failures_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect")

    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (tmp_path / "none", str(tmp_path / "none"), "no-such-folder", tmp_path / "empty"):
        with pytest.raises(VisarError, match=f"Cannot load the caption encoder from {source}: .*local folder"):
            T5CaptionEncoder.from_pretrained(source)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(VisarError, match=r"from google/flan-t5-xl: .*connection to the hub"):
        T5CaptionEncoder.from_pretrained()


def test_no_code_of_a_folder_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether to run it; here somebody says yes to everything."""
    shutil.copytree(folder, tmp_path / "t5")
    ran = tmp_path / "ran"
    (tmp_path / "t5" / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "t5" / name
        changed = json.loads(file.read_text()) | {"auto_map": own, "model_type": "own", "tokenizer_class": "Own"}
        file.write_text(json.dumps(changed))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(str(question)) or "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VisarError, match="Cannot load the caption encoder"):
        T5CaptionEncoder.from_pretrained(tmp_path / "t5")
    assert not ran.exists() and not asked


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    def copied(**changes: object) -> Path:
        made = Path(shutil.copytree(folder, tmp_path / "t5", dirs_exist_ok=True))
        (made / "config.json").write_text(json.dumps(json.loads((made / "config.json").read_text()) | changes))
        return made

    for changes, message in (
        ({"num_layers": 10**9}, "num_layers should be less than or equal to 4096"),
        ({"d_model": "32"}, "d_model should be a valid integer"),
        ({"d_ff": 10**6}, "says that the encoder has .* numbers; its files hold"),
        ({"caption_length": -1}, "caption_length should be greater than or equal to 1"),
        ({"num_layers": 3}, "Tensor 'encoder.block.2.* is missing or misshapen"),
    ):
        with pytest.raises(VisarError, match=message):
            T5CaptionEncoder.from_pretrained(copied(**changes))
