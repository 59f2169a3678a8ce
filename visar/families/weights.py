"""Files of weights from any trainer: tensors by key, without wrappers' prefixes and nesting."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visar.engine.component import Component, missing, own_tensors
from visar.errors import VisarError

NESTINGS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.")


def load_state(
    path: str | Path,
    *,
    ema: bool = False,
    names: Sequence[str] = NESTINGS,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    """Tensors by key of a `.pt`, `.pth` or `.safetensors` file, on the CPU, not mapped to the file.

    The weights may be the file's top level or the first of `names` in it; with `ema` they must be under `ema`. Prefixes
    that wrappers add to all keys are removed, and so are tables and caches. Floating-point tensors are converted to
    `dtype`; None leaves them unchanged.

    Raises `VisarError` for a file that cannot be read, holds no weights, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise VisarError(f"There is no weights file {path}.")
    weights = _nested(_read(path), path, ("ema",) if ema else names, bare=not ema)
    state: dict[str, Tensor] = {}
    for key, value in _without_prefix(weights).items():
        if not isinstance(value, Tensor):
            raise VisarError(f"{path} holds {key!r}, which is not a tensor: it is not a file of weights.")
        if not _stale(key):
            state[key] = value
    return own_tensors(state, path, dtype)


def shape_of(state: Mapping[str, Tensor], key: str, path: str | Path, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of a tensor. Raises `VisarError` if it is missing or has other `dimensions`; `path` is for messages."""
    if key not in state:
        raise missing(key, path)
    shape = tuple(state[key].shape)
    if len(shape) != dimensions:
        word = {2: "two", 3: "three", 4: "four"}[dimensions]
        raise VisarError(f"Tensor {key!r} of {path} has shape {list(shape)}, not {word} dimensions.")
    return shape


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


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The training scripts store their arguments with the weights, as a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise VisarError(
            f"Cannot read {path}: it is truncated, not a weights file, or holds objects other than tensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise VisarError(f"Cannot read {path}: it is truncated or not a weights file.") from error


def _nested(content: Any, path: Path, names: Sequence[str], bare: bool) -> Mapping[str, Any]:
    """The first of `names` in the file, or the file's top level if `bare` and nothing in it is nested."""
    if not isinstance(content, Mapping):
        raise VisarError(f"{path} holds no weights by name.")
    for name in names:
        if isinstance(content.get(name), Mapping):
            return content[name]
    if bare and not any(isinstance(value, Mapping) for value in content.values()):
        return content
    has = sorted(str(key) for key, value in content.items() if value is not None)
    raise VisarError(f"{path} has no {' or '.join(map(repr, names))} weights; it has: {', '.join(has[:8])}.")


def _without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Without the prefixes of data-parallel and compiling wrappers, in any order."""
    result = dict(weights)
    while result and (found := [p for p in PREFIXES if all(k.startswith(p) for k in result)]):
        result = {k.removeprefix(found[0]): v for k, v in result.items()}
    return result


def _stale(key: str) -> bool:
    return key == "freqs_cis" or "kv_cache" in key or key == "quantize.codebook_used"
