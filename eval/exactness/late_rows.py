"""Images decoded in slots, whose rows begin and end at different times: their tokens must be those of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visar.engine.guidance import Guidance, RowGuidance
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.engine.slots import Slots
from visar.samplers import RowTargets, Sampler, Target

ROWS = 3


def decoded_late(
    make: Callable[[int, Guidance], Session],
    sampler: Sampler,
    target: Target,
    guidance: Guidance,
    images: Tensor,
    seed: int,
) -> Tensor:
    """The tokens [M, N] of the `images` [M], each in the slot that is free first; `make` gives sessions of B rows.

    The first image comes alone, the second three passes later, so that no two begin together.
    """
    session = make(ROWS, RowGuidance(ROWS, images.device) if guidance.active else guidance)
    targets = RowTargets(ROWS, session.length, session.device, target.allowed)
    slots = Slots(session, sampler, targets, Noise(0, torch.zeros(ROWS)), every=1)
    waiting, at_work = images.tolist(), dict[int, int]()
    found: dict[int, Tensor] = {}
    while waiting or at_work:
        if waiting and slots.free and (slots.passes % 3 == 0 or not at_work):
            row, image = min(slots.free), waiting.pop(0)
            at_work[row] = image
            one = RowGuidance(1, images.device) if guidance.active else guidance
            slots.admit(row, make(1, one), target, guidance, Noise(seed, torch.tensor([image])))
        done, failed = slots.step()
        for row in [*done, *failed]:
            found[at_work.pop(row)] = slots.read(row).tokens
            slots.release(row)
    return torch.stack([found[i] for i in images.tolist()])
