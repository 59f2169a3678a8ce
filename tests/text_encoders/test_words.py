"""The word encoder: which words it knows, how a caption fills the slots, and what is said of words it does not know."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from visar.errors import VisarError
from visar.text_encoders.spelling import words_of
from visar.text_encoders.words import WordEncoder
from visar.training import words as training


def test_words_of_a_text() -> None:
    assert words_of("The cat's RED-hot house, with 3D of it") == ["cats", "red", "hot", "house", "3d", "it"]
    assert words_of("a the of") == []


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("hearts", "heart"), ("cities", "city"), ("starring", None), ("stars", "star"), ("stared", "star"),
        ("redly", "red"), ("doging", "dog"), ("RED", "red"), ("cates", "cat"), ("hear", None),
    ],
)  # fmt: skip
def test_simpler_forms_are_looked_for(words: WordEncoder, text: str, known: str | None) -> None:
    rows, missing = words.ids(text)
    assert [words.words[r] for r in rows] == ([known] if known else [])
    assert missing == ([] if known else [text])


def test_the_word_itself_goes_before_its_stem() -> None:
    encoder = WordEncoder.compress(["glass", "glas", "glasses"], torch.randn(3, 4), features=2)
    assert encoder.ids("glasses glass glas") == ([2, 0, 1], [])


def test_vectors_keep_their_angles() -> None:
    """With as many components as dimensions, only the rounding to int8 is lost."""
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    encoder = WordEncoder.compress([f"w{i}" for i in range(20)], vectors, features=8)
    features = encoder.table.float() * encoder.scale[:, None]
    centred = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=-1)
    torch.testing.assert_close(features @ features.T, centred @ centred.T, rtol=0, atol=0.02)
    assert encoder.table.dtype == torch.int8 and int(encoder.table.abs().amax()) == 127
    assert WordEncoder.compress(encoder.words, vectors, features=3).table.shape == (20, 3)


def test_the_words_of_a_caption_fill_the_slots_in_turn(words: WordEncoder) -> None:
    def row(word: str) -> torch.Tensor:
        i = words.words.index(word)
        return words.table[i].float() * words.scale[i]

    features, mask = words.encode(["cat", "red heart", "blue red cat", "red blue heart star"])
    assert features.shape == (4, 4, 6) and features.dtype == torch.float32 and mask.all() and mask.dtype == torch.bool
    layouts = (["cat"] * 4, ["red", "heart"] * 2, ["cat", "blue", "red", "cat"], ["red", "blue", "heart", "star"])
    for got, layout in zip(features, layouts, strict=True):
        assert torch.equal(got, torch.stack([row(w) for w in layout]))


def test_features_do_not_depend_on_the_batch(words: WordEncoder) -> None:
    together, _ = words.encode(["cat", "red heart"])
    assert torch.equal(words.encode(["red heart"])[0][0], together[1])


def test_unknown_and_superfluous_words_are_told(words: WordEncoder) -> None:
    with pytest.warns(UserWarning, match=r"left out: zebra, moon\.$"):
        features, _ = words.encode(["zebra cat moon"])
    assert torch.equal(features, words.encode(["cat"])[0])
    with pytest.warns(UserWarning, match="Only the last 4 words"):
        features, _ = words.encode(["dog red blue heart star"])
    assert torch.equal(features, words.encode(["red blue heart star"])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words.encode(["a red cat"])
    for prompt in ("zebra moon", "the of", "!?"):
        with pytest.raises(VisarError, match=r"No word of the prompt '.*' is known"):
            words.encode([prompt])


def test_round_trip(words: WordEncoder, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path / "new" / "words")
    again = WordEncoder.from_pretrained(tmp_path / "new" / "words")
    assert (again.words, again.length) == (words.words, words.length)
    assert torch.equal(again.table, words.table) and torch.equal(again.scale, words.scale)
    assert again.table.dtype == torch.int8
    names = {p.name for p in (tmp_path / "new" / "words").iterdir()}
    assert names == {"words.txt", "config.json", "model.safetensors"}


def test_half_precision_keeps_the_features(words: WordEncoder, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path)
    half = WordEncoder.from_pretrained(tmp_path).to(torch.float16)
    assert half.dtype == torch.float16 and half.table.dtype == torch.int8
    features, _ = half.encode(["red cat"])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, words.encode(["red cat"])[0], rtol=1e-3, atol=0)


def test_years_and_rare_forms_are_left_out_of_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nx\n7\n24\n1749\ncat\ndogs\ncats\ndog\nmusics\n##s\n")
    monkeypatch.setattr(training, "RARE", 3)
    monkeypatch.setattr(training, "_minilm_folder", lambda: tmp_path)
    assert training.vocabulary(["a cat of 1998", "a kite"]) == ["7", "24", "cat", "dog", "musics", "1998", "kite"]
    assert "cats" in training.vocabulary(["two cats"])
