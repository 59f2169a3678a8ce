"""A kind of drafter of one's own: one file with a network, a drafter, a loss and a registration is all it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visar.drafters import DRAFTERS, DraftKind, register_drafter
from visar.drafters.loss import DraftLoss, TargetPass
from visar.engine.component import Component
from visar.engine.drafter import Drafter
from visar.engine.guidance import Guidance
from visar.pipelines import ClassToImagePipeline
from visar.samplers import Speculative, Target
from visar.training.drafter import train_drafter
from visar.training.loop import TrainConfig


class Unigram(Component):
    """How likely each token is, whatever came before it."""

    kind = "unigram"

    def __init__(self, vocab: int = 24):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab))


class UnigramDrafter(Drafter):
    def __init__(self, bias: Tensor):
        self.bias = bias

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.bias.float().expand(len(tokens), 1, -1)

    def extend(self, tokens: Tensor, tree: Any, first: int) -> Tensor:
        return self.bias.float().expand(*tokens.shape, -1)


class UnigramLoss(DraftLoss[Unigram]):
    def steps(self, seen: TargetPass) -> list[Tensor]:
        return [self.drafter.bias.expand(len(seen.x), seen.positions.shape[1], -1)]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.float()


@pytest.fixture
def unigram() -> Iterator[str]:
    @register_drafter("unigram")
    class Kind(DraftKind):
        network, loss = Unigram, UnigramLoss

        def check(self, model: Unigram, target: Any, path: str | Path) -> None:
            assert model.config.vocab == target.model.config.vocab_size

        def new(self, target: Any, depth: int, layers: int) -> Unigram:
            return Unigram(target.model.config.vocab_size)

        def drafter(self, session: Any, model: Unigram, depth: int) -> UnigramDrafter:
            return UnigramDrafter(model.bias)

    yield "unigram"
    del DRAFTERS["unigram"]


def test_it_is_trained_loaded_and_drafts(unigram: str, class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    target = class_pipe.image_model.family.drafting
    tokens = torch.randint(24, (8, 25))
    config = TrainConfig(tmp_path, steps=40, batch=2, lr=0.2, warmup=1, ema=0.5, compile=False)

    def of(rows: list[int]) -> tuple[Tensor, Tensor]:
        return torch.tensor(rows) % 7, torch.ones(len(rows), 1)

    gpt = class_pipe.gpt
    nn.init.normal_(gpt.output.weight, std=0.3)
    with torch.no_grad():  # to this target all tokens are the same, so that its distributions are nearly unigrams
        for table in (gpt.tok_embeddings.weight, gpt.cls_embedding.embedding_table.weight):
            table.copy_(table[:1].clone())
    made = train_drafter(unigram, target, of, tokens, config, Guidance(2.0), Target())
    log = json.loads((tmp_path / "unigram-run" / "log.jsonl").read_text().splitlines()[-1])
    untrained = UnigramLoss(Unigram(), target, Guidance(2.0), Target(), 1)
    before = untrained.acceptance(untrained.run_target(*of([7]), tokens[7:]))[0]
    assert before < 0.7 and log["acceptance_1"] > 0.85
    class_pipe.load_drafter(tmp_path / "unigram")
    stats = class_pipe([1, 2], sampler=Speculative(gamma=2, drafter="unigram"), output_type="tokens").stats
    assert stats.exact and max(stats.passes_per_image) < 15
    assert made.bias.abs().max() > 0.1
