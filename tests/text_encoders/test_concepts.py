"""What a model knows: the list next to its text encoder, and notes on prompts of what it does not know."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from visar import TextToImagePipeline
from visar.bulk import sample_images
from visar.errors import VisarError
from visar.text_encoders.concepts import Concepts, concepts, listed
from visar.text_encoders.spelling import words_of
from visar.text_encoders.words import WordEncoder

VECTORS = {
    "cat": (1, 0, 0), "lion": (0.9, 0.3, 0), "airship": (0, 1, 0.2), "zeppelin": (0, 1, 0.3), "red": (0, 0, 1),
    "boat": (0.1, 0.9, -0.9), "oil": (0.5, 0.5, 0), "fluffy": (0.7, 0, 0.4), "3d": (0.3, 0.1, 0.1), "two": (0, 0, -1),
}  # fmt: skip


@pytest.fixture
def encoder() -> WordEncoder:
    x = torch.nn.functional.normalize(torch.tensor(list(VECTORS.values())), dim=-1)
    scale = x.abs().amax(-1) / 127
    known = listed(
        ["3d", "flat"],
        [("animals", "cat"), ("travel", "airship"), ("animals", "cat"), ("travel", "boat")],
        ["cat", "airship", "boat", "red two", "3d"],
    )
    return WordEncoder(list(VECTORS), (x / scale[:, None]).round().to(torch.int8), scale, 4, known)


def test_the_list(encoder: WordEncoder) -> None:
    known = encoder.concepts
    assert known is not None and known.groups == {"animals": ["cat"], "travel": ["airship", "boat"]}
    assert known.names() == ["cat", "airship", "boat"] and known.words == sorted(known.words)


@pytest.mark.parametrize(
    "prompt", ["a cat", "a red cat, 3d", "CATS, Flat", "two red boats", "3d, airship", "boat, red"]
)
def test_nothing_to_note(encoder: WordEncoder, prompt: str) -> None:
    assert encoder.notes([prompt]) == []


def test_an_unknown_style_names_the_styles(encoder: WordEncoder) -> None:
    note = "The style 'oil painting' was not in training; the styles are 3d, flat."
    assert encoder.notes(["a cat, oil painting", "a boat, oil painting"]) == [note]
    assert encoder.notes(["a cat, cubist"]) == [note.replace("oil painting", "cubist")]
    one = encoder.knowing(Concepts(["3d"], {"": ["cat"]}, ["cat", "3d"]))
    assert one.notes(["a cat, flat"]) == ["The style 'flat' was not in training; the only style is 3d."]


def test_an_unknown_thing_names_the_nearest(encoder: WordEncoder) -> None:
    assert encoder.notes(["a zeppelin, 3d"]) == [
        "'zeppelin' was never in training; the nearest known thing is 'airship'."
    ]
    assert encoder.notes(["lion"]) == ["'lion' was never in training; the nearest known thing is 'cat'."]
    assert encoder.notes(["fluffy lion"]) == [
        "'fluffy', 'lion' were never in training; the nearest known thing is 'cat'."
    ]
    assert encoder.notes(["xyzzy cat"]) == []  # `encode` says that this word is left out


def test_the_list_is_kept_with_the_encoder(encoder: WordEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text_encoder")
    loaded = WordEncoder.from_pretrained(tmp_path / "text_encoder")
    assert loaded.concepts == encoder.concepts == concepts(tmp_path)
    loaded.concepts = None
    assert loaded.notes(["a zeppelin, cubist"]) == []
    (tmp_path / "text_encoder" / "concepts.json").write_text('{"styles": []}')
    with pytest.raises(VisarError, match=r"concepts\.json: it has no 'groups'"):
        concepts(tmp_path)
    (tmp_path / "text_encoder" / "concepts.json").unlink()
    with pytest.raises(VisarError, match="has no list of what it knows"):
        concepts(tmp_path)


def test_the_pipeline_says_it(text_pipe: TextToImagePipeline) -> None:
    text_pipe.text_encoder.concepts = Concepts(["flat"], {"": ["dog"]}, ["dog", "flat"])
    with pytest.warns(UserWarning, match="'cat' was never in training; the nearest known thing is 'dog'"):
        text_pipe("cat", output_type="tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_pipe("dog", output_type="tokens")


def test_a_run_of_many_prompts_does_not_say_it(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    text_pipe.text_encoder.concepts = Concepts([], {"": ["dog"]}, ["dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_images(text_pipe, ["cat", "dog"], tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a photo of a cat", ["cat"]),
        ("Draw me a red boat, 3d", ["red", "boat", "3d"]),
        ("please show me an icon of the sun", ["sun"]),
        ("a nice picture of two dogs", ["two", "dogs"]),
        ("framed picture", ["framed", "picture"]),
        ("give and take", ["give", "take"]),
        ("paint brush", ["paint", "brush"]),
        ("photo of", ["photo"]),
    ],
)
def test_what_stands_before_the_thing_is_left_out(text: str, words: list[str]) -> None:
    assert words_of(text) == words
