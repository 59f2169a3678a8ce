"""Models and processors of transformers from a folder: never a repository's own code, never weights made up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from visar.engine.component import unfilled
from visar.errors import VisarError
from visar.host import check_memory
from visar.reading import read_json

NUMBER = re.compile(r"\d+")


def load_model(architecture: str, folder: Path, config: Any = None, strict: bool = False) -> Any:
    """The model in the folder of this class of transformers, in the dtype of its files, on the CPU, in evaluation mode.

    `config` is taken instead of the folder's own. Raises `VisarError` for files that are missing or damaged, weights of
    which a part is missing, which transformers would fill with random numbers, with `strict` for tensors that the model
    does not have, and for too little memory.
    """
    import transformers

    if (kind := getattr(transformers, architecture, None)) is None:
        raise VisarError(f"transformers {transformers.__version__} has no {architecture}; a later version has it.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise VisarError(f"{folder} has no weights: a file model.safetensors, or shards of it.")
    told_before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of keys: those that matter are named below
    try:
        check_memory(folder, described(kind, folder, config) * bytes_of_a_weight(files))
        model, told = kind.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are named below
            **({} if config is None else {"config": config}),
        )  # fmt: skip
    except VisarError:
        raise
    except Exception as error:  # of several libraries, on files that are missing, cut or changed
        raise unreadable(f"the {architecture}", folder, error) from error
    finally:
        transformers.logging.set_verbosity(told_before)
    absent = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    if absent:
        others = f", and {len(absent) - 1} others are" if len(absent) > 1 else ""
        raise VisarError(f"Tensor {sorted(absent)[0]!r} of {folder} is missing or misshapen{others}.")
    unknown = sorted(told["unexpected_keys"])
    if strict and unknown:
        raise VisarError(f"Tensor {unknown[0]!r} of {folder} is unknown; a {architecture} has none such.")
    names = {NUMBER.sub("", key) for key in model.state_dict()}
    if more := [key for key in unknown if NUMBER.sub("", key) in names]:
        raise VisarError(f"Tensor {more[0]!r} of {folder} is of a layer that the model has not by its config.json.")
    return model.eval().requires_grad_(False)


def described(kind: Any, folder: Path, config: Any = None) -> int:
    """How many weights a model has by its configuration: transformers makes up those that no file holds."""
    config = config or kind.config_class.from_pretrained(folder, local_files_only=True)
    with unfilled():
        return sum(p.numel() for p in kind(config).parameters())


def bytes_of_a_weight(files: Iterable[Path]) -> float:
    """The mean over the files."""
    size = count = 0
    for file in files:
        size += file.stat().st_size
        with safe_open(file, "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118 (it is no dict)
        count += sum(map(math.prod, shapes))
    return size / max(count, 1)


def check_room(folder: Path, files: Iterable[Path]) -> None:
    """Raise `VisarError` for files of weights that memory has no room for."""
    check_memory(folder, sum(file.stat().st_size for file in files))


def load_processor(folder: Path) -> Any:
    """The processor in the folder, or its tokenizer if there is no more. Raises `VisarError` if neither can be read."""
    from transformers import AutoProcessor, AutoTokenizer

    whole = any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json"))
    return _of_prompts(AutoProcessor if whole else AutoTokenizer, folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the folder, whatever processor it names. Raises `VisarError` if it cannot be read."""
    from transformers import AutoTokenizer

    return _of_prompts(AutoTokenizer, folder)


def _of_prompts(kind: Any, folder: Path) -> Any:
    if code := own_code(folder):
        raise VisarError(f"{folder} has a tokenizer of its own code ({code}), which visar does not run.")
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise unreadable("the processor of prompts", folder, error) from error


def own_code(folder: Path) -> str | None:
    """The code that a folder's processor or tokenizer asks for, by name."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            found = read_json(folder / name, dict[str, Any]).get("auto_map")
        except VisarError:
            continue
        if isinstance(found, dict) and found:
            return str(next(iter(found.values())))
    return None


def unreadable(what: str, folder: Path, error: Exception) -> VisarError:
    """The error of files that a library could not read."""
    reason, *more = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        reason += " is not known"
    elif reason.endswith(":") and more:
        reason += f" {more[0].strip()}"
    return VisarError(f"Could not load {what} from {folder}: {reason}")
