"""A seed for each image: every image of a batch is the one that its seed gives alone, for every sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visar.samplers import samplers_for

SEEDS = [5, 2**63 + 1, 5]
PROMPTS = ["red heart", "cat", "red heart"]
QUICK = ("ar", "scd", "speculative-tree", "medusa", "zipar")


@pytest.mark.parametrize(
    "sampler",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in samplers_for("discrete")],
)
def test_every_sampler_gives_the_images_of_single_calls(text_pipe: Any, drafters: list[Path], sampler: str) -> None:
    for folder in drafters:
        text_pipe.load_drafter(folder)
    settings = dict(sampler=sampler, output_type="tokens", temperature=0.9, top_p=0.95)
    together = text_pipe(PROMPTS, seed=SEEDS, **settings)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = text_pipe(prompt, seed=seed, **settings)
        assert torch.equal(together.tokens[i], alone.tokens[0]), i
        assert torch.equal(together.commit_pass[i], alone.commit_pass[0]), i
    assert together.stats.seed == SEEDS


def test_indices_go_with_seeds(text_pipe: Any) -> None:
    several = text_pipe("cat", num_images_per_prompt=2, seed=[3, 4], first_image=1, output_type="tokens").tokens
    for seed, row in zip((3, 4), several, strict=True):
        assert torch.equal(text_pipe("cat", seed=seed, first_image=1, output_type="tokens").tokens[0], row)
