"""Samplers of continuous tokens on the weights of a small random model, where no distribution is known."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.engine.loop import decode
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.exactness.continuous import PLAIN, build
from visar.eval.exactness.continuous_mutants import EXACT
from visar.eval.exactness.head_mutants import Untested
from visar.eval.exactness.joint import EXACT_LIMIT, MUTANT_LIMIT
from visar.eval.exactness.linear_gaussian import NARROW, Setting
from visar.eval.exactness.ranks import rank_test, rank_z
from visar.eval.quality.metrics.energy import energy_test
from visar.families.mar.diffusion import HeadNet, alphas_bar
from visar.families.mar.session import MARSession
from visar.families.mar.transformer import MAR
from visar.samplers import ContinuousSpeculative, ContinuousTarget, HeadSpeculation, MaskedAutoregressive


def sampled(session: MaskedSession, sampler: Any, seed: int = 0) -> Tensor:
    return decode(session, sampler, ContinuousTarget(), Noise(seed, torch.arange(session.batch))).tokens


class TameHead(HeadNet):
    """A random network's guess of the clean token, between -1 and 1, so that the chain does not run away."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.embed, self.time_embed = self.time_embed, torch.nn.Identity()

    def at(self, x: Tensor, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        raw, place = super().at(x, self.embed(times), z)
        bar = alphas_bar().float()[times, None]
        clean = torch.tanh(2 * raw + x)
        return (x - bar.sqrt() * clean) / (1 - bar).sqrt(), torch.tanh(place)


@cache
def tiny() -> MAR:
    torch.manual_seed(0)
    mar = MAR(token_dim=3, grid=2, dim=24, encoder_layers=1, decoder_layers=1, num_heads=2, head_width=24,
              head_layers=1, classes=3, buffer=2).eval()  # fmt: skip
    mar.diffloss.net = TameHead(3, 24, 24, 1)
    with torch.no_grad():
        for name, parameter in mar.named_parameters():
            if name.endswith(("learned", "latent", "token", "linear.weight", "adaLN_modulation.1.weight")):
                parameter.normal_(std=0.5)
    return mar


def sessions(images: Tensor) -> MaskedSession:
    orders = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    return MARSession(tiny(), images % 3, orders[images % 5], scale=1.5)


REAL: dict[str, Any] = {"steps": 3, "head_steps": 8}
IMAGES = torch.arange(1000)


def worlds(images: Tensor) -> MaskedSession:
    setting, order = Setting(6, 6, 1.0, 1.5, last_noise=True), torch.tensor([3, 0, 5, 1, 4, 2]).expand(len(images), -1)
    model = build(PLAIN, NARROW)
    session = model.world.session(setting, images % 2, order)
    session.draft = model.draft.session(setting, images % 2, order)
    return session


@pytest.mark.parametrize("sampler", [MaskedAutoregressive(**REAL), HeadSpeculation(**REAL, draft=4)], ids=repr)
def test_ranks_on_real_weights_are_uniform(sampler: Any) -> None:
    assert abs(rank_test(sessions, sampler, IMAGES).z) < EXACT_LIMIT


def test_ranks_on_real_weights_show_untested_drafts() -> None:
    assert rank_test(sessions, Untested(**REAL, adaptive=False), IMAGES).z > MUTANT_LIMIT


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, -EXACT_LIMIT, EXACT_LIMIT), ({"nested": False}, MUTANT_LIMIT, math.inf), ({"truncate": False}, 6, math.inf)],
)
def test_ranks_of_drafted_tokens(options: dict[str, bool], low: float, high: float) -> None:
    """Tokens that never saw the ones before, and tokens that saw others than are there, have the wrong ranks."""
    sampler = ContinuousSpeculative(**{"gamma": 3, "head_steps": 6} | EXACT | options)
    assert low < rank_test(worlds, sampler, torch.arange(2048)).z < high


def test_rank_z() -> None:
    g = torch.Generator().manual_seed(0)
    z = [rank_z(torch.randint(20, (2000, 4), generator=g), 20) for _ in range(50)]
    assert abs(np.mean(z)) < 0.5 and max(z) < EXACT_LIMIT
    uniform = torch.randint(20, (2000, 4), generator=g)
    assert rank_z(uniform[:, [0, 0, 1, 2]], 20) > MUTANT_LIMIT  # each uniform, the second the first again
    assert rank_z((uniform * 0.95).long(), 20) > MUTANT_LIMIT


def test_images_of_real_weights_by_energy_distance() -> None:
    """Plain decoding against itself is the control, untested drafts show that there is something to see."""

    def sample(sampler: Any, seed: int) -> Tensor:
        return sampled(sessions(IMAGES), sampler, seed=seed).flatten(1)

    plain = sample(MaskedAutoregressive(**REAL), 1)
    control = energy_test(plain, sample(MaskedAutoregressive(**REAL), 2))
    exact = energy_test(plain, sample(HeadSpeculation(**REAL, draft=4), 3))
    wrong = energy_test(plain, sample(Untested(**REAL, adaptive=False), 4))
    assert control.p > 0.01 and exact.p > 0.01 and abs(exact.z) < EXACT_LIMIT
    assert wrong.p < 0.005 and wrong.z > MUTANT_LIMIT
    with pytest.raises(VisarError, match="two samples of equal width"):
        energy_test(plain, plain[:, :5])


def test_head_speculation_on_real_weights_drafts() -> None:
    for images in (IMAGES, IMAGES[:2]):
        session = sessions(images)
        sampled(session, HeadSpeculation(**REAL, draft=4))
        assert 0.2 < session.accepted / session.tested < 0.9
    assert session.denoisers[0].calls < 3 * 8  # in a large batch some token takes a round for each step
