"""Files of weights from any trainer: tensors by key, without wrappers' prefixes and nesting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.component import Component, missing, own_tensors
from visar.engine.weight_files import read_content
from visar.errors import VisarError

NESTINGS = ("model", "module", "state_dict", "model_state_dict")
EMA = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")  # averaged weights, as trainers call them
# What wrappers put into names, anywhere: data parallelism, torch.compile, FSDP, activation checkpoints, Fabric.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
PREFIXES = ("model.", "base_model.", "ema_model.")  # of all names: Lightning's, PEFT's
KINDS = {  # by a tensor that only this kind of file has
    "tok_embeddings.weight": "a GPT of LlamaGen",
    "token_emb.weight": "an LPD",
    "quantize.embedding.weight": "a VQ tokenizer of LlamaGen",
    "encoder_pos_embed_learned": "a MAR",
    "encoder.down.0.block.0.conv1.weight": "a KL autoencoder",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "an autoencoder of diffusers",
    "shared.weight": "a T5",
}


def load_state(
    path: str | Path, *, ema: bool = False, bare: bool | None = None, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """Tensors by key of what `read_content` reads, on the CPU, not mapped to the file.

    The weights may be the file's top level or under one of `NESTINGS`; with `ema` they must be under one of `EMA`,
    unless a file of nothing but weights will do (`bare`). Prefixes of wrappers are removed, and so are tables and
    caches. Floating-point tensors are converted to `dtype`; None leaves them unchanged.

    Raises `VisarError` for a file that cannot be read, holds no weights, or holds NaN or infinity.
    """
    path = Path(path)
    weights = _nested(read_content(path), path, ema, not ema if bare is None else bare)
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(key, str):
            raise VisarError(f"{path} holds no weights by name.")
        if _stale(name := WRAPPERS.sub("", key)):
            continue
        if not isinstance(value, Tensor):
            raise VisarError(f"{path} holds {key!r}, which is not a tensor: it is not a file of weights.")
        _check_key(key, path)
        if name in state:
            raise VisarError(f"{path} holds {name!r} twice, once as {key!r}.")
        state[name] = value
    while state and (found := [p for p in PREFIXES if all(k.startswith(p) for k in state)]):
        state = {k.removeprefix(found[0]): v for k, v in state.items()}
    return own_tensors(state, path, dtype)


def has_ema(path: str | Path) -> bool:
    """Whether a file has averaged weights. Raises `VisarError` as `read_content` does."""
    content = read_content(path)
    return isinstance(content, Mapping) and any(isinstance(content.get(name), Mapping) for name in EMA)


def expect(state: Mapping[str, Tensor], kind: str, path: str | Path) -> None:
    """Raise `VisarError` for weights that are not of this one of `KINDS`; `path` is for messages."""
    mark = next(key for key, name in KINDS.items() if name == kind)
    if mark not in state:
        if (other := next((name for key, name in KINDS.items() if key in state), None)) is not None:
            raise VisarError(f"{path} holds {other}, expected {kind}.")
        has = f"; it has {', '.join(map(repr, sorted(state)[:3]))}" if state else ""
        raise VisarError(f"Tensor {mark!r} is missing from {path}, expected {kind}{has}.")


def shape_of(state: Mapping[str, Tensor], key: str, path: str | Path, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of a tensor. Raises `VisarError` if it is missing or has other `dimensions`; `path` is for messages."""
    if key not in state:
        raise missing(key, path)
    shape = tuple(state[key].shape)
    if len(shape) != dimensions:
        word = {2: "two", 3: "three", 4: "four"}[dimensions]
        raise VisarError(f"Tensor {key!r} of {path} has shape {list(shape)}, not {word} dimensions.")
    if 0 in shape:
        raise VisarError(f"Tensor {key!r} of {path} has shape {list(shape)}, and so no numbers.")
    return shape


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of numbered modules whose keys start with `prefix`, which is at most that of the tensors."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def load_part(kind: Any, folder: Path, name: str) -> Any:
    """One component of a saved folder; `name` is for messages.

    Raises `VisarError` if it cannot be loaded, has missing or unexpected tensors, or holds NaN or infinity.
    """
    try:
        part = kind.from_pretrained(folder)
    except VisarError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise VisarError(f"Could not load {name} from {folder}: {reason}") from error
    if isinstance(part, nn.Module) and not isinstance(part, Component):  # Component checks its own
        for key, tensor in part.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise VisarError(f"The weights of {name} are not finite: {key} holds NaN or infinity.")
    return part


def _nested(content: Any, path: Path, ema: bool, bare: bool) -> Mapping[Any, Any]:
    """The weights in the file: under a known name, perhaps of one more level, or the top level if `bare`."""
    if not isinstance(content, Mapping):
        raise VisarError(f"{path} holds no weights by name.")
    names = EMA if ema else NESTINGS
    for _ in range(4):
        found = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
        if found is None:
            break
        content, names, bare = found, NESTINGS, True
    if bare and not any(isinstance(value, Mapping) for value in content.values()):
        return content
    has = sorted(str(key) for key, value in content.items() if value is not None)
    averaged = not ema and any(isinstance(content.get(name), Mapping) for name in EMA)
    hint = "; give ema=True (--ema) for the averaged weights" if averaged else ""
    if ema and any(isinstance(content.get(name), Mapping) for name in NESTINGS):
        hint = "; give ema=False (--no-ema) for the weights that are not averaged"
    wanted = " or ".join(map(repr, names))
    raise VisarError(f"{path} has no {wanted} weights; it has: {', '.join(has[:8])}{hint}.")


def _check_key(key: str, path: Path) -> None:
    """Raise `VisarError` for the names of tensors that are no weights of a whole model."""
    if "lora_" in key:
        raise VisarError(f"{path} holds LoRA adapters, such as {key!r}: merge them into the model, and save that.")
    if "flat_param" in key:
        raise VisarError(f"{path} holds flattened shards of FSDP, such as {key!r}: save a full state dict.")


def _stale(key: str) -> bool:
    return key in ("freqs_cis", "rope.freqs", "quantize.codebook_used", "n_averaged") or "kv_cache" in key
