"""Trees from measured acceptance."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.helpers.tiny import WORDS
from visar.eval.benchmark.calibrate import Watched
from visar.pipelines import TextToImagePipeline
from visar.samplers.trees import best_tree, expected_tokens, named_tree

RATES = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]]


def test_the_best_tree_takes_the_drafts_that_are_accepted_most() -> None:
    # 0: .6, 00: .3, 1: .2, 01: .18, 10: .1 (and 2: .1), 02 and 11: .06, ...
    assert best_tree(RATES, 4) == "0 1 00 01"
    assert expected_tokens(named_tree("0 1 00 01"), RATES) == pytest.approx(1 + 0.6 + 0.2 + 0.3 + 0.18)
    assert best_tree(RATES, 1) == "0" and best_tree(RATES, 100) == best_tree(RATES, 12)
    assert expected_tokens(named_tree("1x1x1x1"), RATES) == pytest.approx(1 + 0.6 + 0.3)  # nothing is known deeper
    flat = [[0.5, 0.0]] * 3
    assert best_tree(flat, 3) == "0 00 000"


def test_every_budget_is_spent_as_well_as_can_be() -> None:
    found = [expected_tokens(named_tree(best_tree(RATES, n)), RATES) for n in range(1, 13)]
    gains = [b - a for a, b in itertools.pairwise(found)]
    assert all(a >= b > 0 for a, b in itertools.pairwise(gains))


def test_what_is_counted_is_what_was_accepted(text_pipe: TextToImagePipeline, text_folder: Path) -> None:
    text_pipe.load_drafter(text_folder)  # a drafter that is the target: its first draft always stands
    watched = Watched(tree="2x2", drafter="model")
    passes = [text_pipe(word, sampler=watched, output_type="tokens").stats.passes_per_image[0] for word in WORDS[:3]]
    assert watched.acceptance() == [[1.0, 0.0], [1.0, 0.0]] and watched.reached == [sum(passes)] * 2
    different = Watched(tree="2x2", drafter="model")
    text_pipe(WORDS[0], sampler=different, output_type="tokens", temperature=0.5)
    assert different.acceptance()[0][0] == 1.0  # no count is shared
