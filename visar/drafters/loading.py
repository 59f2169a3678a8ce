"""Drafters of a pipeline: loading them, checking that they fit the target, and attaching one to a session."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from visar.drafters import DRAFTERS, DraftModel, fingerprint
from visar.drafters.eagle import EagleHead
from visar.drafters.eagle_runtime import EagleDrafter
from visar.drafters.heads import DraftHeads
from visar.drafters.heads_runtime import HeadsDrafter
from visar.drafters.published import is_published, published_eagle
from visar.drafters.shallow import ExitHead, SkippedLayers, with_layers
from visar.engine.drafter import Drafter, SessionDrafter, Timed
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import gpt_of
from visar.families.llamagen.session import ModelSession
from visar.families.specs import resolve_model
from visar.families.weights import load_part, load_state, quiet_conversion


def load_drafter(path: str | Path, target: LlamaGen, grid: int) -> DraftModel:
    """A drafter for `target`: a folder of `visar train drafter`, a pipeline's folder or name, or a published file.

    Published are LlamaGen's models, and LANTERN's drafters for them.

    Raises `VisarError` where it is none, or does not fit the target.
    """
    model: DraftModel
    file = Path(path).expanduser()
    if (released := released_file(file)) is not None:
        state = load_state(released)
        model = published_eagle(state, target.head_dim, str(path)) if is_published(state) else gpt_of(state, path, grid)
    else:
        folder = resolve_model(path)
        if isinstance(folder, str):
            raise VisarError(f"There is no drafter folder {path}.")
        gpt = folder / "gpt" if (folder / "model_index.json").exists() else folder
        try:
            kind = json.loads((gpt / "config.json").read_text()).get("_class_name")
        except (OSError, ValueError, AttributeError) as error:
            raise VisarError(f"{path} holds no drafter: it has no readable config.json.") from error
        if kind not in DRAFTERS:
            raise VisarError(f"{path} holds a {kind}, not a drafter; those are: {', '.join(DRAFTERS)}.")
        model = load_part(DRAFTERS[kind], gpt, "the drafter")
    check(model, target, str(path), grid)
    return model.eval()


def released_file(path: Path) -> Path | None:
    """The weights at a path that is a file, or a folder that LANTERN's trainer wrote; None for other folders."""
    if path.is_file():
        return path
    if (path / "model_index.json").exists():
        return None
    try:
        if "_class_name" in json.loads((path / "config.json").read_text()):
            return None
    except (OSError, ValueError, TypeError):
        pass
    return next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()), None)


def check(model: DraftModel, target: LlamaGen, name: str, grid: int) -> None:
    """Raise `VisarError` for a drafter that cannot draft for the target."""
    t, d = target.config, model.config
    if not isinstance(model, LlamaGen):
        if "dim" in d and d.dim != t.dim:
            raise VisarError(f"The drafter {name} is {d.dim} wide, the target {t.dim}: it is another model's.")
        if d.get("codes") and d.codes != t.vocab_size:
            raise VisarError(f"The drafter {name} has {d.codes} codes, the target {t.vocab_size}.")
        if "num_heads" in d and d.dim // d.num_heads != target.head_dim:
            own = d.dim // d.num_heads
            raise VisarError(f"The drafter {name} has heads of {own}, the target of {target.head_dim}.")
        used = [d.layers - 1] if isinstance(d.get("layers"), int) else [*d.get("layers", ()), *d.get("aux_layers", ())]
        if not all(isinstance(i, int) and 0 <= i < t.num_layers for i in used) or ("layers" in d and not used):
            raise VisarError(f"The drafter {name} uses layers {used} of a target that has {t.num_layers}.")
        if d.target and d.target != fingerprint(target):
            raise VisarError(f"The drafter {name} was trained for another target; see `visar train drafter`.")
        return
    if d.vocab_size != t.vocab_size:
        raise VisarError(f"The drafter {name} has {d.vocab_size} codes, the target {t.vocab_size}.")
    same = ["condition", "condition_length", "classes" if t.condition == "class" else "caption_features"]
    for field in same:
        if d[field] != t[field]:
            raise VisarError(f"The drafter {name} has {field} {d[field]}, the target {t[field]}.")
    if d.grid != grid:
        raise VisarError(f"The drafter {name} draws {d.grid} x {d.grid} tokens, the target {grid} x {grid}.")


def kind_of(model: DraftModel) -> str:
    """What samplers call it: one of `visar.drafters.KINDS`."""
    return "model" if isinstance(model, LlamaGen) else model.kind


def aux_layers_of(model: DraftModel | None) -> tuple[int, ...] | None:
    """The layers whose outputs it reads beside the target's features; None if it reads no features at all."""
    if isinstance(model, EagleHead):
        return tuple(model.config.aux_layers)
    return () if isinstance(model, DraftHeads) else None


def attach(
    session: ModelSession, model: DraftModel, depth: int, window: int, condition: Tensor, mask: Tensor | None, grid: int
) -> Drafter:
    """A drafter at work for a session, which has the condition and mask given; it drafts `depth` tokens deep."""
    with quiet_conversion():
        model.to(session.device, session.model.dtype)
    drafter: Drafter
    if isinstance(model, EagleHead):
        drafter = EagleDrafter(session, model, depth)
    elif isinstance(model, DraftHeads):
        drafter = HeadsDrafter(session, model, depth)
    else:
        drafter = _own_session(session, model, window, condition, mask, grid)
    return Timed(drafter, session.device)


def _own_session(
    session: ModelSession,
    model: LlamaGen | ExitHead | SkippedLayers,
    window: int,
    condition: Tensor,
    mask: Tensor | None,
    grid: int,
) -> SessionDrafter:
    gpt = model if isinstance(model, LlamaGen) else with_layers(session.model, *model.blocks(session.model))
    # The root of the drafter's own session is one node before that of the tree.
    inner = ModelSession(
        gpt,
        condition,
        mask,
        length=session.length,
        window=window + 1,
        grid=grid,
        guidance=session.guidance,
    )
    weights = sum(p.numel() * p.element_size() for n, p in gpt.named_parameters() if "embedding" not in n)
    return SessionDrafter(inner, weights)
