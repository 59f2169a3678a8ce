"""Load the published LlamaGen files (Sun et al. 2024, arXiv:2406.06525), GPT and VQ tokenizer, unchanged.

Every size is read from the shapes of the tensors, so files of other sizes with the same keys load as well. Modules are
built without memory and take over the tensors that were read, so the largest model needs its weights' memory once.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visar.errors import VisarError
from visar.models.llamagen import LlamaGen
from visar.models.specs import match_heads, published_grid
from visar.models.vq import VQConfig, VQModel

NESTINGS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
DEFAULT_GRID = 16

M = TypeVar("M", bound=nn.Module)


def load_state(
    path: str | Path,
    *,
    ema: bool = False,
    names: Sequence[str] = NESTINGS,
    dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    """Tensors by key of a `.pt`, `.pth` or `.safetensors` file, on the CPU, in memory of their own.

    The weights may be the file itself or lie under one of `names`, of which the first that is there counts. With `ema`
    they must lie under `ema`. Prefixes that wrappers add to all keys are removed, and so are tables and caches that are
    no weights. Floating-point tensors are converted to `dtype`; None keeps what the file has.

    Raises `VisarError` for a file that cannot be read, holds no weights, or holds a NaN or an infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise VisarError(f"There is no weights file {path}.")
    weights = _nested(_read(path), path, ("ema",) if ema else names, bare=not ema)
    state: dict[str, Tensor] = {}
    for key, value in _without_prefix(weights).items():
        if not isinstance(value, Tensor):
            raise VisarError(f"{path} holds {key!r}, which is not a tensor: it is not a file of weights.")
        if _stale(key):
            continue
        # Types of 8 bits have no such test of their own.
        if value.is_floating_point() and not (value.float() if value.itemsize == 1 else value).isfinite().all():
            raise VisarError(f"Tensor {key!r} of {path} holds a NaN or an infinity.")
        state[key] = value.to(dtype=dtype if value.is_floating_point() else None, copy=True)
    return state


def load_gpt(
    path: str | Path,
    *,
    grid: int | None = None,
    num_heads: int | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlamaGen:
    """The GPT of a published file, in evaluation mode and without gradients, on the CPU.

    `grid` is the number of tokens along one side; by default that of the published file of this name, else 16. The
    weights do not depend on it. `num_heads` is needed only for sizes that were never published.

    Raises `VisarError` as `load_state` does, and for a tensor that is missing, superfluous or of another shape.
    """
    path = Path(path)
    return gpt_of(load_state(path, ema=ema, dtype=dtype), path, grid or published_grid(path.name), num_heads)


def gpt_of(
    state: Mapping[str, Tensor], path: str | Path, grid: int | None = None, num_heads: int | None = None
) -> LlamaGen:
    """The GPT of a published file's tensors, which it takes over; else as `load_gpt`."""
    arguments = gpt_config(state, path, num_heads=num_heads)
    with torch.device("meta"):
        gpt = LlamaGen(**arguments, grid=grid or DEFAULT_GRID)
    return fill(gpt, state, path)


def load_vq(path: str | Path, *, ema: bool = False, dtype: torch.dtype = torch.float32) -> VQModel:
    """The VQ tokenizer of a published file, in evaluation mode and without gradients, on the CPU.

    Raises `VisarError` as `load_gpt` does.
    """
    state = load_state(path, ema=ema, dtype=dtype)
    try:
        c = VQConfig.infer(state)
        with torch.device("meta"):
            vq = VQModel(**asdict(c))
    except KeyError as error:
        raise _missing(error.args[0], path) from error
    except (ValueError, IndexError) as error:
        raise VisarError(f"{path} is not a LlamaGen VQ tokenizer: its keys or shapes are of another kind.") from error
    return fill(vq, state, path)


def gpt_config(state: Mapping[str, Tensor], path: str | Path, *, num_heads: int | None = None) -> dict[str, Any]:
    """The `LlamaGen(...)` arguments, all but the grid, that the shapes of a state dict tell; `path` is for messages.

    The number of heads is in no shape: it is that of the published model of the same size unless it is given.
    """

    vocab, dim = shape_of(state, "tok_embeddings.weight", path)
    ffn, _ = shape_of(state, "layers.0.feed_forward.w1.weight", path)
    numbers = [k.split(".")[1] for k in state if k.startswith("layers.")]
    layers = 1 + max(int(n) for n in numbers if n.isdigit())
    heads = num_heads or match_heads(layers, dim, ffn)
    if heads is None:
        raise VisarError(
            f"{path} has {layers} layers of width {dim} and {ffn}, a size that was never published: "
            "give its number of heads (num_heads)."
        )
    if heads < 1 or dim % heads or dim // heads % 4:
        raise VisarError(f"A width of {dim} cannot be split into {heads} heads of a multiple of 4 each.")
    arguments = {"vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": heads, "ffn": ffn}
    if any(k.startswith("cls_embedding.cap_proj.") for k in state):
        length, features = shape_of(state, "cls_embedding.uncond_embedding", path)
        return arguments | {"condition": "text", "condition_length": length, "caption_features": features}
    rows, _ = shape_of(state, "cls_embedding.embedding_table.weight", path)
    return arguments | {"condition": "class", "condition_length": 1, "classes": rows - 1}


def shape_of(state: Mapping[str, Tensor], key: str, path: str | Path, dimensions: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have so many dimensions; `path` is for messages."""
    if key not in state:
        raise _missing(key, path)
    shape = tuple(state[key].shape)
    if len(shape) != dimensions:
        word = {2: "two", 3: "three", 4: "four"}[dimensions]
        raise VisarError(f"Tensor {key!r} of {path} has shape {list(shape)}, not {word} dimensions.")
    return shape


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The training scripts store their arguments beside the weights, as a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise VisarError(
            f"Cannot read {path}: it is truncated, not a weights file, or holds objects other than tensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise VisarError(f"Cannot read {path}: it is truncated or not a weights file.") from error


def _nested(content: Any, path: Path, names: Sequence[str], bare: bool) -> Mapping[str, Any]:
    """What lies under the first of `names`, or else the file itself where `bare` and nothing in it is nested."""
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
    """Without what data-parallel and compiling wrappers put before every key, in whatever order."""
    result = dict(weights)
    while result and (found := [p for p in PREFIXES if all(k.startswith(p) for k in result)]):
        result = {k.removeprefix(found[0]): v for k, v in result.items()}
    return result


def _stale(key: str) -> bool:
    return key == "freqs_cis" or "kv_cache" in key or key == "quantize.codebook_used"


def _missing(key: str, path: str | Path) -> VisarError:
    return VisarError(f"Tensor {key!r} is missing from {path}.")


def fill(module: M, state: Mapping[str, Tensor], path: str | Path, names: Mapping[str, str] | None = None) -> M:
    """Give a module on the meta device the tensors of `state`, which must be its own to the last one.

    `names` are the keys of `state` by those of the module, where they differ; messages name those of `state`.
    """
    wanted = module.state_dict()
    names = names or {key: key for key in wanted}
    for key, tensor in wanted.items():
        if (name := names[key]) not in state:
            raise _missing(name, path)
        if state[name].shape != tensor.shape:
            found, expected = list(state[name].shape), list(tensor.shape)
            raise VisarError(f"Tensor {name!r} of {path} has shape {found}, expected {expected}.")
    known = set(names.values())
    for key in state:
        if key not in known:
            raise VisarError(f"{path} has a tensor {key!r} that this model does not.")
    module.load_state_dict({key: state[names[key]] for key in wanted}, assign=True)
    return module.requires_grad_(False).eval()


def load_part(kind: Any, folder: Path, name: str) -> Any:
    """One component of a saved folder, `name` in messages; diffusers would fill missing tensors with random numbers.

    Raises `VisarError` for what cannot be loaded, has too few or too many tensors, or holds a NaN or an infinity.
    """
    try:
        if issubclass(kind, ModelMixin):
            model, info = kind.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
        else:
            model, info = kind.from_pretrained(folder), {}
    except VisarError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise VisarError(f"Could not load {name} from {folder}: {reason}") from error
    for what, where in (("lacks the tensor", "missing_keys"), ("has an unknown tensor", "unexpected_keys")):
        if keys := info.get(where):
            raise VisarError(f"{folder} {what} {sorted(keys)[0]!r}; {len(keys)} in all.")
    tensors = model.state_dict().items() if isinstance(model, nn.Module) else ()
    for key, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VisarError(f"The weights of {name} are not finite: {key} holds NaN or infinity.")
    return model


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Without diffusers' warning about an empty list of modules, whenever one is converted."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def said_for_a_reason(record: logging.LogRecord) -> bool:
        return "kept in float32: []" not in record.getMessage()

    logger.addFilter(said_for_a_reason)
    try:
        yield
    finally:
        logger.removeFilter(said_for_a_reason)
