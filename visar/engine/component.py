"""Modules that are saved and loaded as a folder: `config.json` and one safetensors file, laid out as diffusers does.

huggingface_hub's model mixin is not used: it fills in missing tensors silently, and has other file names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from visar import __version__
from visar.dtypes import STORED, checked_dtype
from visar.engine.packed import LARGEST, PACKED, packed, unpacked
from visar.engine.weight_files import INDEX, read_content
from visar.errors import VisarError
from visar.files import path_of, replacing, writable_folder
from visar.host import check_memory
from visar.reading import checked_arguments, counts_of, read_json

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
    """A module that saves to a folder and loads from it. Its constructor arguments are its `config`.

    `passed_by` are layers within it that decoding reads and does not call, and `own_dtype` those with a dtype of their
    own.
    """

    config: Config
    passed_by: ClassVar[tuple[str, ...]] = ()  # layers that decoding reads and does not call, so that hooks do nothing
    own_dtype: ClassVar[tuple[str, ...]] = ()

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

    def check_stored(self, dtype: torch.dtype | str | None) -> torch.dtype | None:
        """The dtype of a file. Raises `VisarError` for one that weights cannot have, or that does not reach theirs."""
        if dtype is None:
            return None
        dtype = checked_dtype("The dtype of a file", dtype, STORED)
        # Beyond its range a dtype has infinity, NaN or, of 8 bits, its largest number. Packed rows have a scale.
        most = LARGEST if dtype in PACKED else torch.finfo(dtype).max
        for key, value in self.state_dict().items():
            if value.is_floating_point() and not (value.detach().float().abs() <= most).all():
                raise VisarError(
                    f"Tensor {key!r} cannot be stored as {dtype}: it holds a number beyond that, or a NaN."
                )
        return dtype

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write the folder; `dtype`, if given, is that of floating-point tensors in the file and may have 8 bits.

        `torch.int8` and `torch.int6` are those of matrices, with a scale for each row (`visar.engine.packed`). Raises
        `VisarError` before anything is written for a dtype that the weights cannot be stored in.
        """
        dtype = self.check_stored(dtype)
        folder = writable_folder(folder)
        own = None if dtype in PACKED else dtype
        state = {
            key: value.detach().to(device="cpu", dtype=own if value.is_floating_point() else None).contiguous()
            for key, value in self.state_dict().items()
        }
        if dtype is not None and dtype in PACKED:
            state = packed(state, dtype)
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
        unexpected, of another shape or not finite, and for the folder of another class; that of a subclass gives one of
        the subclass.
        """
        named, config = read_config(folder)
        if named != cls.__name__:
            if (own := next((c for c in cls.__subclasses__() if c.__name__ == named), None)) is not None:
                return own.from_pretrained(folder)
            raise VisarError(f"{folder} holds a {named}, not a {cls.__name__}.")
        where = Path(folder) / "config.json"
        config = checked_arguments(cls.__init__, config, f"Cannot read {where}")
        file = weights_file(folder)
        state = {} if file is None else read_tensors(file)
        for name, count in counts_of(cls.__init__, config).items():
            if file is not None and count > len(state):
                raise VisarError(f"{where} says {name} is {count}, and {file.name} has {len(state)} tensors.")
        try:
            with unfilled():
                made = cls(**config)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise VisarError(f"{where} does not describe a {named}: {reason}.") from error
        if not made.state_dict():
            return made.eval()
        if file is None:
            raise VisarError(f"There is no {WEIGHTS} in {folder}.")
        return fill(made, state, file).requires_grad_()


@contextmanager
def unfilled(device: torch.device | str = "meta") -> Iterator[None]:
    """Modules made in this context have parameters that nothing fills, by default on the meta device for `fill`."""
    with torch.device(device), _Initialisation():
        yield


class _Initialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it fills nothing, and imports torch's compiler for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The class name and the arguments in a folder's `config.json`. Raises `VisarError` if it is not readable."""
    path = path_of("The folder", folder) / "config.json"
    found = read_json(path, dict[str, Any])
    if not isinstance(named := found.get("_class_name"), str):
        raise VisarError(f"{folder} holds no component: its config.json names no class.")
    return named, {key: value for key, value in found.items() if not key.startswith("_")}


def weights_file(folder: str | Path) -> Path | None:
    """The file of weights in a component's folder, or the index of its shards; None if there is none."""
    names = [*NAMES, *(name + INDEX for name in NAMES)]
    return next((path for name in names if (path := Path(folder) / name).exists()), None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as `own_tensors` and `unpacked` give them.

    Raises `VisarError` for one that cannot be read.
    """
    return unpacked(own_tensors(read_content(path), path), path)


def own_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """Copies; floating-point tensors are converted to `dtype`, if given.

    Raises `VisarError` for NaN or infinity, for tensors that are not dense numbers in the file, and, before anything is
    copied, where the memory is too small.
    """
    needed = 0
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            raise VisarError(f"Tensor {key!r} of {path} is not dense and real ({value.dtype}, {value.layout}).")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            shape = list(value.shape)
            raise VisarError(f"Tensor {key!r} of {path} claims shape {shape}, of which the file does not hold all.")
        needed += value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
    check_memory(path, needed)
    state = {}
    for key, value in tensors.items():
        try:
            own = value.to(dtype=dtype if value.is_floating_point() else None, copy=True)
            # 8-bit types have no isfinite.
            finite = not own.is_floating_point() or (own.float() if own.itemsize == 1 else own).isfinite().all()
        except (RuntimeError, NotImplementedError, TypeError) as error:  # torch's, for a dtype without this operation
            raise VisarError(f"Tensor {key!r} of {path} cannot be read as numbers: it is {value.dtype}.") from error
        if not finite:
            raise VisarError(f"Tensor {key!r} of {path} holds a NaN or an infinity.")
        state[key] = own
    return state


def fill(module: M, state: Mapping[str, Tensor], path: str | Path, names: Mapping[str, str] | None = None) -> M:
    """Give a module on the meta device the tensors of `state`; raises `VisarError` unless names and shapes match.

    `names` maps the module's keys to those of `state`, where they differ; messages name those of `state`.
    """
    wanted = module.state_dict()
    names = names or {key: key for key in wanted}
    if absent := [names[key] for key in wanted if names[key] not in state]:
        raise missing(absent[0], path, len(absent) - 1)
    for key, tensor in wanted.items():
        own = state[name := names[key]]
        if own.shape != tensor.shape:
            found, expected = list(own.shape), list(tensor.shape)
            raise VisarError(f"Tensor {name!r} of {path} has shape {found}, expected {expected}.")
        if own.is_floating_point() != tensor.is_floating_point():
            kind = "floating-point" if tensor.is_floating_point() else str(tensor.dtype)
            raise VisarError(f"Tensor {name!r} of {path} has {own.dtype} numbers, expected {kind}.")
    known = set(names.values())
    if more := [key for key in state if key not in known]:
        others = f", nor {len(more) - 1} others of it" if len(more) > 1 else ""
        raise VisarError(f"{path} has a tensor {more[0]!r} that this model does not{others}.")
    module.load_state_dict({key: state[names[key]] for key in wanted}, assign=True)
    return module.requires_grad_(False).eval()


def missing(key: str, path: str | Path, others: int = 0) -> VisarError:
    return VisarError(f"Tensor {key!r} is missing from {path}{f', and {others} others are' if others else ''}.")
