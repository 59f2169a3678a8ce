"""Bulk sampling: which image has which condition, the files that conditions are read from, and bad input."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.bulk.test_run import manifest, names
from visar.bulk import Condition, read_classes, read_prompts, sample_images
from visar.bulk.conditions import Interleaved
from visar.errors import VisarError
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline


def test_classes_are_balanced_and_interleaved(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="11 images are no multiple of 4 classes: the first 3 get one more"):
        sample_images(class_pipe, [6, 0, 3, 1], tmp_path, count=11, batch=5, seed=2, tokens=True)
    lines = manifest(tmp_path)
    assert [line["class"] for line in lines] == [6, 0, 3, 1, 6, 0, 3, 1, 6, 0, 3]
    assert [line["index"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 3
    for i in (2, 5, 10):
        alone = class_pipe(lines[i]["class"], seed=2, first_image=lines[i]["index"])
        assert lines[i]["tokens"] == alone.tokens[0].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_images(class_pipe, [6, 0, 3, 1], tmp_path / "even", count=8)


def test_a_round_larger_than_a_batch(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """Batches that hold the end of a round and the beginning of the next."""
    prompts = ["red", "blue", "cat", "dog", "city"]
    sample_images(text_pipe, prompts, tmp_path, count=10, batch=3, seed=1, tokens=True)
    for i, line in enumerate(manifest(tmp_path)):
        alone = text_pipe(prompts[i % 5], seed=1, first_image=i // 5, output_type="tokens")
        assert line["tokens"] == alone.tokens[0].tolist()


def test_a_prompt_that_is_given_twice_has_other_images(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """Each of its images is the next one of the prompt, whatever batch it is in."""
    sample_images(text_pipe, ["red", "cat", "red"], tmp_path, count=8, batch=2, tokens=True)
    lines = manifest(tmp_path)
    assert [line["index"] for line in lines] == [0, 0, 1, 2, 1, 3, 4, 2]
    for line in lines:
        alone = text_pipe(line["prompt"], first_image=line["index"], output_type="tokens")
        assert line["tokens"] == alone.tokens[0].tolist()
    assert len({tuple(line["tokens"]) for line in lines}) == 8


@pytest.mark.parametrize("values", [[1, 2, 3], [1, 2, 1], [4], [1, 1, 2, 3, 2, 5, 7]])
def test_an_index_counts_the_images_of_a_value(values: list[int]) -> None:
    order = Interleaved([Condition(v) for v in values])
    seen: Counter[int] = Counter()
    for i in range(40):
        assert order.index(i) == seen[values[i % len(values)]]
        seen[values[i % len(values)]] += 1


def test_prompt_files(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffred cat\r\nblue\u2028dog \n".encode())
    assert read_prompts(text) == [Condition("red cat"), Condition("blue\u2028dog")]
    lines.write_text('{"id": "a", "prompt": "cat", "tag": "x", "include": [1]}\n{"prompt": "dog"}')
    assert read_prompts(lines) == [Condition("cat", "a", {"tag": "x", "include": [1]}), Condition("dog")]


def test_prompt_files_as_editors_save_them(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("red cat\r\n💩 dog\r\n\r\n".encode("utf-16"))
    assert read_prompts(text) == [Condition("red cat"), Condition("💩 dog")]
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n{"prompt": "cat"}\r\n\n')
    assert read_prompts(lines) == [Condition("a\u2028b"), Condition("cat")]
    for line, message in (
        ('{"prompt": null}', "Line 1 .* has a prompt that is no text, null"), ('{"prompt": 7}', "no text, 7"),
        ('{"prompt": ["cat"]}', "no text"), ('{"prompt": "cat \\udcff"}', "Line 1 .* no valid text"),
        ("[" * 100_000, "Line 1 .* nested too deeply. Give"),
    ):  # fmt: skip
        lines.write_text(line)
        with pytest.raises(VisarError, match=message):
            read_prompts(lines)
    for name in ("p.csv", "captions_val2014.json"):
        with pytest.raises(VisarError, match=r"from a \.txt or \.jsonl file"):
            read_prompts(tmp_path / name)
    with pytest.raises(VisarError, match="At most 1000000 classes"):
        read_classes("0-999999999999")


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("7\n3-4, 1\n")
    for given, classes in (("0-3", [0, 1, 2, 3]), ("5", [5]), ("9,2-3", [9, 2, 3]), (str(tmp_path / "classes"), [7, 3, 4, 1])):  # fmt: skip # noqa: E501
        assert [c.value for c in read_classes(given)] == classes


@pytest.mark.parametrize(
    ("conditions", "other", "message"),
    [
        ([], {}, "Give prompts, or classes, and at least one"),
        (["cat", 1], {}, "Give prompts, or classes, and at least one"),
        ([1], {}, "This model makes images from a prompt, and it was given a class"),
        (["cat", " "], {}, "The prompt is empty"),
        (["cat", "zebra"], {}, "No word of the prompt 'zebra' is known"),
        (["cat"], {"count": 0}, "number of images must be 1 or more, not 0"),
        (["cat"], {"count": 2**24 + 1}, "at most 16777216 images of one condition"),
        (["cat"], {"batch": 0}, "batch must be 1 or more images, not 0"),
        (["cat"], {"sampler": "mar"}, "Sampler 'mar'.*continuous"),
        (["cat"], {"sampler": "speculative"}, "Sampler 'speculative' needs a smaller model"),
        (["cat"], {"warmth": 2}, "Unknown setting 'warmth'"),
        (["cat"], {"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_input_leaves_nothing(
    text_pipe: TextToImagePipeline, tmp_path: Path, conditions: list[Any], other: dict[str, Any], message: str
) -> None:
    with pytest.raises(VisarError, match=message):
        sample_images(text_pipe, conditions, tmp_path / "new" / "own", **other)
    assert names(tmp_path) == []


def test_bad_classes(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(VisarError, match="Class 7 does not exist; this model knows 0 to 6"):
        sample_images(class_pipe, [0, 7], tmp_path / "own")
    with pytest.raises(VisarError, match="This model makes images from a class, and it was given a prompt"):
        sample_images(class_pipe, ["cat"], tmp_path / "own")
    assert names(tmp_path) == []
