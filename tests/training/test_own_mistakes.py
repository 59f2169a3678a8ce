"""Training on what the model draws itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import text_gpt
from visar.training.ar import ARLoss, draw, own_mistakes


def test_draws_follow_the_law() -> None:
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0]).expand(1, 1000, -1)
    coins = (torch.arange(1000)[None] + 0.5) / 1000  # evenly spread, so that shares are the law but for rounding
    shares = torch.bincount(draw(logits, coins)[0], minlength=4) / 1000
    assert torch.allclose(shares, logits[0, 0].softmax(-1), atol=2e-3) and shares[2] == 0
    assert (draw(logits, torch.full((1, 1000), 1 - 1e-9)) == 3).all()  # a coin of nearly 1 stays inside


def test_rates_differ_from_row_to_row() -> None:
    own = own_mistakes(2000, 256, torch.Generator().manual_seed(0), most=0.5)
    rates = (own > 0).double().mean(1)
    assert own.min() == 0 and own.max() < 1 and 0.45 < rates.max() < 0.62
    assert rates.mean() == pytest.approx(0.25, abs=0.01) and (rates < 0.1).double().mean() == pytest.approx(
        0.2, abs=0.03
    )


def test_inputs_are_the_models_own_tokens_where_asked() -> None:
    torch.manual_seed(0)
    gpt = text_gpt()
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    loss = ARLoss(gpt)
    tokens, inputs = torch.randint(24, (3, 25)), torch.randint(24, (3, 25))
    features, mask, drop = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    own = torch.zeros(2, 25)
    own[0, 5:] = 0.5  # row 0 from its sixth token on, row 1 nowhere, row 2 keeps its inputs
    drawn = draw(gpt(features[:1], inputs[:1, :-1], mask[:1]), own[:1])
    fed = torch.stack([torch.cat([tokens[0, :5], drawn[0, 5:]]), tokens[1], inputs[2]])
    wanted = F.cross_entropy(gpt(features, fed[:, :-1], mask).flatten(0, 1), tokens.flatten())
    assert torch.allclose(loss(features, mask, drop, inputs, tokens, own), wanted)
    assert not torch.allclose(loss(features, mask, drop, inputs, tokens), wanted)
