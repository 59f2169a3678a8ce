"""Tiny random LlamaGens with drafters of every kind, and sessions over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visar.drafters import DRAFTERS, SkippedLayers, drafter_kind
from visar.engine.guidance import Guidance
from visar.engine.loop import Decoded, decode
from visar.engine.rng import Noise
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.samplers import BeamTree, Sampler, Target, TreeSpeculative, get_sampler

SEED = 6
SCALE = 2.0  # of guidance
HEAD = 0.08  # the deviation of the output head's weights
TEXT = dict(condition="text", condition_length=4, caption_features=8)
CLASS = dict(condition="class", classes=5)
LARGE = dict(vocab=64, grid=4, conditions=8)


def made(name: str, window: int | None = None) -> Sampler:
    """A sampler by name, its tree no larger than images of four tokens are worth."""
    sampler = get_sampler(name, window=window)
    if isinstance(sampler, TreeSpeculative):
        return replace(sampler, tree="3x2x1")
    if isinstance(sampler, BeamTree):
        return replace(sampler, beam=3, depth=3, nodes=min(sampler.nodes, 8))
    return sampler


@dataclass(frozen=True)
class World:
    """A random model, drafters that know little, and two conditions, captions of 3 and 1 valid slots at the end."""

    model: LlamaGen
    drafters: dict[str, Any]
    condition: Tensor
    mask: Tensor | None


@functools.cache
def world(kind: str, vocab: int = 4, grid: int = 2, conditions: int = 2) -> World:
    """Weights that are large enough for every token to matter to those behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        sizes = dict(vocab_size=vocab, grid=grid, dim=32, num_layers=2, num_heads=2, ffn=48)
        model = LlamaGen(**sizes, **(TEXT if kind == "text" else CLASS)).eval().requires_grad_(False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=1.5 * p.shape[-1] ** -0.5) if p.ndim == 2 else p.fill_(1.0)
        torch.nn.init.normal_(model.output.weight, std=HEAD)
        captions = torch.randn(conditions, 4, 8)
        smaller = LlamaGen(**sizes | dict(num_layers=1), **(TEXT if kind == "text" else CLASS)).eval()
        torch.nn.init.normal_(smaller.output.weight, std=HEAD)
        drafters: dict[str, Any] = {"model": smaller, "skip": SkippedLayers([1])}
        for name in ("eagle", "medusa", "hydra", "exit"):
            drafters[name] = drafter_kind(name).new(LlamaGenTarget(model, grid), depth=5, layers=1).eval()
        if kind == "class":
            return World(model, drafters, torch.arange(conditions) % 5, None)
        mask = torch.arange(4) >= torch.tensor([1, 3, 0, 2] * 2)[:conditions, None]
        return World(model, drafters, captions * mask[..., None], mask)


def conditions_of(w: World, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The condition and mask of each image: i modulo their number."""
    row = images % len(w.condition)
    return w.condition[row], None if w.mask is None else w.mask[row]


def session_of(
    w: World,
    sampler: Sampler,
    images: Tensor,
    session: type[LlamaGenSession] = LlamaGenSession,
    guidance: Guidance = Guidance(SCALE),
) -> LlamaGenSession:
    """A session with the drafter that the sampler needs."""
    (condition, mask), grid = conditions_of(w, images), w.model.config.grid
    made = session(w.model, condition, mask, length=grid**2, window=sampler.window, guidance=guidance, aux_layers=(0,))
    made.codebook = torch.eye(w.model.config.vocab_size)
    if kind := getattr(sampler, "drafter", None):
        target, encoded = LlamaGenTarget(w.model, grid), (condition,) if mask is None else (condition, mask)
        made.drafter = DRAFTERS[kind].attach(made, w.drafters[kind], target, sampler.depth, sampler.window, encoded)
    return made


def run(
    w: World,
    sampler: Sampler,
    images: Tensor,
    target: Target,
    session: type[LlamaGenSession] = LlamaGenSession,
    seed: int = 0,
) -> Decoded:
    """Decode image i from condition i modulo their number."""
    return decode(session_of(w, sampler, images, session), sampler, target, Noise(seed, images))
