"""Lookups and neighbours on sequences whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from visar.eval.benchmark.lookups import main, overlaps, recycled, suffix_lookup


def test_a_text_that_was_seen_is_found_in_full_and_a_new_one_never() -> None:
    image = list(range(22))
    assert suffix_lookup([image], [image], 1) == 22 / 3  # one token, then twice ten drafts and one more
    assert suffix_lookup([image], [[30, 31, 32]], 1) == 1
    late, early = [0, *range(40, 61)], [9, *range(40, 61)]
    assert suffix_lookup([late], [early], 1) == 22 / 4 and suffix_lookup([late], [early], 5) == 22 / 8


def test_token_recycling_needs_the_successors_that_it_has_seen() -> None:
    vocab, image = 20, [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4]
    p = torch.zeros(len(image), vocab)
    p[torch.arange(len(image)), image] = 1.0
    # The first five one by one and the wrap, then six of one pass: five drafts and one more.
    assert recycled([(image, p)], vocab) == 12 / 7
    assert recycled([(image, p), (image, p)], vocab) > 12 / 7
    wrong = torch.zeros_like(p)
    wrong[:, 10:18] = 1 / 8
    assert recycled([(image, wrong)], vocab) == 1


def test_overlaps_by_hand() -> None:
    tokens = torch.tensor([0, 1, 0, 1])
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])
    found = overlaps([(tokens, p)], [tokens], stride=2)
    assert found["uniform"] == pytest.approx(((0.2 + 0.5) + (0.5 + 0.4)) / 2)
    assert found["distribution of the cell left"] == pytest.approx(((0.2 + 0.5) + (0.2 + 0.4)) / 2)
    assert found["distribution of the cell above"] == pytest.approx((0.2 + (0.5 + 0.4)) / 2)
    mean = (0.2 + 0.25) + (0.35 + 0.4)
    assert found["mean of the two"] == pytest.approx(mean / 2)
    assert found["bigram, above"] == pytest.approx((0.2 + 0.25 + 0.25 + 0.4) / 2, abs=0.01)  # a count and the unigram


def test_it_runs_and_refuses(class_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("3", "3", "4"):
        assert main(["--model", str(class_folder), "--images", "2", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert main(["--images", "1"]) == 2 and "--images must be 2 or more, not 1" in capsys.readouterr().err
    assert main(["--model", "icons-mar"]) == 2 and "models of discrete tokens" in capsys.readouterr().err
