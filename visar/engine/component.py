"""Modules that are saved and loaded as a folder: `config.json` and one safetensors file, laid out as diffusers does.

huggingface_hub's model mixin is not used: it fills in missing tensors silently, and has other file names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from visar import __version__
from visar.errors import VisarError
from visar.files import replacing, writable_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = (WEIGHTS, "model.safetensors")  # of weights that are read

M = TypeVar("M", bound=nn.Module)


class Config(Mapping[str, Any]):
    """The arguments that a component was made with, as `config.dim` or `config["dim"]`. They do not change."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"This configuration has no {name!r}; it has: {', '.join(self.__dict__)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("A configuration does not change; make one with `replace`.")

    def __repr__(self) -> str:
        return f"Config({self.__dict__})"

    def replace(self, **changes: Any) -> Config:
        """A copy with `changes`."""
        return Config(self.__dict__ | changes)


class Component(nn.Module):
    """A module that saves to a folder and loads from it. Its constructor arguments are its `config`."""

    config: Config

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs)
        bound.apply_defaults()
        made.config = Config(dict(list(bound.arguments.items())[1:]))
        return made

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder; `dtype`, if given, is that of floating-point tensors in the file and may have 8 bits."""
        folder = writable_folder(folder)
        state = {
            key: value.detach().to(device="cpu", dtype=dtype if value.is_floating_point() else None).contiguous()
            for key, value in self.state_dict().items()
        }
        if state:
            with replacing(folder / WEIGHTS) as temporary:
                save_file(state, temporary, {"format": "pt"})
        written = {"_class_name": type(self).__name__, "_visar_version": __version__, **self.config}
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder that `save_pretrained` or diffusers wrote: in evaluation mode, on the CPU, in fp32.

        The weights are in memory once. Raises `VisarError` for a missing or damaged file, for a tensor that is missing,
        unexpected, of another shape or not finite, and for the folder of another class.
        """
        named, config = read_config(folder)
        if named != cls.__name__:
            raise VisarError(f"{folder} holds a {named}, not a {cls.__name__}.")
        try:
            with unfilled():
                made = cls(**config)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VisarError(f"{Path(folder) / 'config.json'} does not describe a {named}: {reason}.") from error
        if not made.state_dict():
            return made.eval()
        file = weights_file(folder)
        return fill(made, read_safetensors(file), file).requires_grad_()


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules made in this context have tensors on the meta device, which `fill` replaces."""
    with torch.device("meta"), _Initialisation():
        yield


class _Initialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it fills nothing, and imports torch's compiler for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The class name and the arguments in a folder's `config.json`. Raises `VisarError` if it is not readable."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text())
        named = str(found["_class_name"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VisarError(f"{folder} holds no component: it has no readable config.json that names a class.") from error
    return named, {key: value for key, value in found.items() if not key.startswith("_")}


def weights_file(folder: str | Path) -> Path:
    """The file of weights in a component's folder. Raises `VisarError` if there is none."""
    for name in NAMES:
        if (path := Path(folder) / name).is_file():
            return path
    raise VisarError(f"There is no {WEIGHTS} in {folder}.")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as `own_tensors` gives them. Raises `VisarError` for one that cannot be read."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise VisarError(f"Cannot read {path}: it is truncated or not a weights file.") from error
    return own_tensors(tensors, path)


def own_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """Copies; floating-point tensors are converted to `dtype`, if given. Raises `VisarError` for NaN or infinity."""
    state = {}
    for key, value in tensors.items():
        # 8-bit types have no isfinite.
        if value.is_floating_point() and not (value.float() if value.itemsize == 1 else value).isfinite().all():
            raise VisarError(f"Tensor {key!r} of {path} holds a NaN or an infinity.")
        state[key] = value.to(dtype=dtype if value.is_floating_point() else None, copy=True)
    return state


def fill(module: M, state: Mapping[str, Tensor], path: str | Path, names: Mapping[str, str] | None = None) -> M:
    """Give a module on the meta device the tensors of `state`; raises `VisarError` unless names and shapes match.

    `names` maps the module's keys to those of `state`, where they differ; messages name those of `state`.
    """
    wanted = module.state_dict()
    names = names or {key: key for key in wanted}
    for key, tensor in wanted.items():
        if (name := names[key]) not in state:
            raise missing(name, path)
        if state[name].shape != tensor.shape:
            found, expected = list(state[name].shape), list(tensor.shape)
            raise VisarError(f"Tensor {name!r} of {path} has shape {found}, expected {expected}.")
    known = set(names.values())
    for key in state:
        if key not in known:
            raise VisarError(f"{path} has a tensor {key!r} that this model does not.")
    module.load_state_dict({key: state[names[key]] for key in wanted}, assign=True)
    return module.requires_grad_(False).eval()


def missing(key: str, path: str | Path) -> VisarError:
    return VisarError(f"Tensor {key!r} is missing from {path}.")
