"""Images of 2 x 2 codes of three values, whose rows end in a forced token: their joint distribution under a sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.engine.drafter import SessionDrafter
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.eval.exactness.joint import chi_square_z, values
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.own_model import Flattened
from visar.families.hf.grid import GridFamily
from visar.samplers import Target, get_sampler

SLOW = ("sjd", "scd", "scd-gumbel", "speculative-tree")
NAMES = ["ar", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
TEXT = "a red heart"


@torch.inference_mode()
def expected_images(small: GridFamily, stock: Callable[[Tensor], Tensor]) -> np.ndarray:
    """The probability of each of the 81 images, by `stock` passes over whole sequences and the whole vocabulary."""
    codes = torch.cartesian_prod(*[torch.arange(3)] * 4)
    tokens = torch.stack([*codes[:, :2].T, torch.full((81,), 3), *codes[:, 2:].T, torch.full((81,), 3)], 1)
    logits = []
    for prompt in small.prompt_ids(TEXT):
        ids = torch.cat([torch.tensor(prompt).expand(81, -1), small.ids(tokens)], 1)
        logits.append(stock(ids)[:, len(prompt) - 1 :].double().log_softmax(-1))
    guided = logits[1] + 3.0 * (logits[0] - logits[1])
    first = small.decoder.codes
    p = (guided[:, [0, 1, 3, 4]][..., first] / 0.9).softmax(-1).gather(-1, codes[..., None])[..., 0]
    out: np.ndarray = p.prod(1).numpy()
    assert abs(out.sum() - 1) < 1e-5 and out.max() < 0.5 and (out > 1e-3).sum() > 20
    return out


def session(small: GridFamily, batch: int, window: int, guidance: Guidance) -> Any:
    ids, lengths, others, their_lengths = small.encode([TEXT] * batch)
    shorter = ids[:, : lengths[0]], lengths, others[:, : their_lengths[0]], their_lengths
    made: Any = small.session(shorter, window=window, guidance=guidance)
    made.layout = small.layout
    return made


@torch.inference_mode()
def check_joint(small: GridFamily, expected: np.ndarray, name: str) -> None:
    """The images of a sampler have the `expected` distribution, `ar` takes no pass for a forced token, and images are
    the same in slots."""
    sampler = get_sampler(name) if name in ("ar", "speculative-tree") else get_sampler(name, window=3)
    target = Target(0.9, forced=small.forced, allowed=small.allowed)
    window = max(sampler.window, 2)
    guidance, parts = Guidance(3.0), list[Tensor]()
    for images in torch.arange(2048 if name == "ar" else 8192).split(1024):
        made = session(small, len(images), window, guidance)
        if hasattr(sampler, "drafter"):
            made.drafter = SessionDrafter(Flattened(session(small, len(images), window + 1, guidance)))
        out = decode(made, sampler, target, Noise(7, images))
        assert name != "ar" or out.passes == 4
        parts.append(out.tokens)
    tokens = torch.cat(parts)
    assert (tokens[:, [2, 5]] == 3).all() and (tokens[:, [0, 1, 3, 4]] < 3).all()
    counts = np.bincount(values(tokens[:, [0, 1, 3, 4]], 3), minlength=81)
    assert abs(chi_square_z(counts, expected)) < 4
    if not hasattr(sampler, "drafter"):
        late = decoded_late(
            lambda batch, own: session(small, batch, window, own), sampler, target, guidance, torch.arange(6), 7
        )
        assert torch.equal(late, tokens[:6])
