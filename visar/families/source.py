"""The source of a model: an embedded name, a folder, files, or a hub id. Nothing is loaded here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from visar.errors import VisarError, unknown
from visar.families.catalogue import catalogue, embedded_folder, is_embedded
from visar.files import looked_up
from visar.params import whole
from visar.reading import Name, checked_arguments, read_json, short

FOR_FILES = (
    "A text encoder, an image size, a number of heads and ema are given with a published file of weights; a folder has "
    "its own."
)


class Index(TypedDict, total=False):
    """What is known of a folder's `model_index.json`; the other keys are components and settings."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012 (pydantic reads it)

    _class_name: str
    _family: str
    _parts_of: dict[Name, Name]


@dataclass(frozen=True)
class HubOptions:
    """Arguments of `huggingface_hub` for a model that is a hub id."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class Source:
    """A model in a `folder`, or as published `files` by their roles ("model", "vq", "vae").

    `variant` is that of the folder's files; `image_size` (pixels; height and width where they differ), `num_heads`,
    `text_encoder` and `ema` (whether averaged weights are taken; None: what was published) are for published files, but
    for the size, which is for folders of families with `sizes` too; `given` are components to use instead of those in
    the folder. `condition` is the kind of condition that the caller wants, "prompt" or "class", if known.
    """

    name: str
    folder: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    variant: str | None = None
    image_size: int | tuple[int, int] | None = None
    num_heads: int | None = None
    text_encoder: str | Path | None = None
    ema: bool | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    condition: str | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that were asked for, if any, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """The folder's `model_index.json`; empty if there is none. Raises `VisarError` if it is damaged."""
        return _json(self.folder / "model_index.json", Index) if self.folder is not None else {}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The folder's own `config.json`, as models of transformers have; empty if there is none."""
        return _json(self.folder / "config.json", dict[str, Any]) if self.folder is not None else {}

    @property
    def pipeline(self) -> str:
        """The pipeline class in the folder's index."""
        return str(self.index.get("_class_name", ""))

    def own_folder(self, part: str) -> Path:
        """Where this folder has what belongs to a component. Raises `VisarError` if that is a link out of it."""
        assert self.folder is not None
        return _within(self.folder, part)

    def component_folder(self, part: str) -> Path:
        """The folder of a component: in this folder, or in that of the embedded model that it is shared with.

        Raises `VisarError` for one that is anywhere else.
        """
        assert self.folder is not None
        folder, shared = self.folder, self.index.get("_parts_of", {}).get(part)
        if shared is not None:
            if not is_embedded(shared):
                raise VisarError(f"{self.folder} takes {part!r} of {shared!r}, which is no embedded model.")
            folder = embedded_folder(shared)
        return _within(folder, part)

    def component_class(self, part: str) -> str:
        """The name of a component's class in the index. Raises `VisarError` if there is none."""
        match self.index.get(part):
            case [str(), str(name)]:
                return name
        raise VisarError(f"Could not load {part!r} from {self.folder}: model_index.json does not say its class.")

    def settings(self, family: Any, components: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
        """The settings in the index, as arguments of a `family`. Raises `VisarError` for one that is not of `names`."""
        parts, known = set(components), set(names)
        found = {k: v for k, v in self.index.items() if not k.startswith("_") and k not in parts}
        for name in found:
            if name not in known:
                raise VisarError(f"{self.folder} has a setting {name!r}; known are {', '.join(sorted(known))}.")
        return checked_arguments(family.__init__, found, f"Cannot read {self.folder}/model_index.json")


def _within(folder: Path, part: str) -> Path:
    if not (folder / part).resolve().is_relative_to(folder.resolve()):
        raise VisarError(f"{folder / part} is a link out of the model's folder; put the component's files there.")
    return folder / part


def open_source(
    name: str | Path,
    *,
    vq: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    image_size: int | str | None = None,
    num_heads: int | None = None,
    ema: bool | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    hub: HubOptions = HubOptions(),
    given: Mapping[str, Any] | None = None,
    condition: str | None = None,
) -> Source:
    """The model of a name, folder, hub id or file; a file needs that of its tokenizer (`vq`) or autoencoder (`vae`).

    Raises `VisarError` for a missing model, and for options that exclude each other.
    """
    given_paths = {"vq": vq, "vae": vae, "text_encoder": text_encoder, "subfolder": subfolder}
    for what, path in {"The model": name, **{key: value for key, value in given_paths.items() if value}}.items():
        if not isinstance(path, str | Path) or "\0" in str(path):
            said = repr(path) if isinstance(path, str | Path) else f"a {type(path).__name__}"
            raise VisarError(f"{what} must be a name or a path, not {said}.")
        looked_up(what, path)
    if not str(name):
        raise VisarError("The name of the model is empty.")
    size, num_heads = checked_size(image_size), whole("num_heads", num_heads)
    if num_heads is not None and num_heads < 1:
        raise VisarError(f"num_heads must be 1 or more, not {short(num_heads)}.")
    if is_weights(name) or vq or vae:
        if isinstance(size, tuple):
            raise VisarError(f"A published file makes square images: give one number, not {image_size!r}.")
        return _files(name, vq, vae, text_encoder, size, num_heads, ema, condition)
    if any(value is not None for value in (text_encoder, num_heads, ema)):
        raise VisarError(FOR_FILES)
    folder = resolve(name)
    if isinstance(folder, str):
        folder = download(folder, hub, subfolder)
    elif hub.revision is not None:
        raise VisarError(f"{name} is not from the hub, so it has no revision {hub.revision!r}.")
    if subfolder is not None:
        folder = folder / subfolder
        if not folder.is_dir():
            raise VisarError(f"{name} has no folder {subfolder!r}.")
    return Source(str(name), folder, variant=variant, image_size=size, given=given or {}, condition=condition)


def checked_size(value: Any) -> int | tuple[int, int] | None:
    """The pixels of a square, or height and width of "WIDTHxHEIGHT". Raises `VisarError` for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str) or not (found := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)):
        raise VisarError(f'image_size is a number of pixels, or width x height as "1024x768", not {value!r}.')
    width, height = int(found[1]), int(found[2])
    return height if height == width else (height, width)


def _files(
    name: str | Path,
    vq: str | Path | None,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    image_size: int | None,
    num_heads: int | None,
    ema: bool | None,
    condition: str | None,
) -> Source:
    if vq and vae:
        raise VisarError("A file of weights goes with a tokenizer (vq) or an autoencoder (vae), not with both.")
    if not vq and not vae:
        raise VisarError(
            f"{name} is a file of weights: give the file of its tokenizer too (--vq FILE, vq= in Python), or of a "
            "MAR's autoencoder (--vae FILE, vae=)."
        )
    if vae and (text_encoder or image_size is not None):
        raise VisarError("A MAR's file takes no text encoder and no image size: both are in its weights.")
    files = {"model": Path(name), **({"vq": Path(vq)} if vq else {}), **({"vae": Path(vae)} if vae else {})}
    for kind, file in files.items():
        if not file.exists():
            alone = ", and nothing else goes with vq or vae" if kind == "model" else ""
            raise VisarError(f"There is no weights file {file}{alone}.")
    return Source(
        str(name),
        files=files,
        image_size=image_size,
        num_heads=num_heads,
        text_encoder=text_encoder,
        ema=ema,
        condition=condition,
    )


def check_condition(name: str, own: str, wanted: str | None) -> None:
    """Raise `VisarError` unless the `wanted` kind of condition, if any, is the model's `own`."""
    if wanted not in (None, own):
        flag, pipeline = ("prompts", "Text") if own == "prompt" else ("--class or --classes", "Class")
        raise VisarError(
            f"{name} is called with a {own}, not a {wanted}; give {flag} on the command line, and use "
            f"{pipeline}ToImagePipeline or visar.load in Python."
        )


def resolve(name_or_path: str | Path) -> Path | str:
    """The folder of an embedded name or an existing folder, or the hub id "owner/name" unchanged.

    Names take precedence over folders: write "./icons" for a folder. Raises `VisarError` for a published model whose
    weights are not shipped, for a file, and for an unknown name.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    known = catalogue()
    if isinstance(name_or_path, str) and (listing := known.get(name)):
        if is_embedded(name):
            return embedded_folder(name)
        raise VisarError(f"The weights of {name!r} are not shipped with visar: give {listing.needs}.")
    if path.is_dir():
        return path
    if path.is_file():
        raise VisarError(f"{name} is a file, not a model folder: give a GPT file together with its tokenizer file.")
    if path.exists():
        raise VisarError(f"{name} is neither a model folder nor a file of weights.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name
    if isinstance(name_or_path, Path) or re.search(r"[/\\]|^[.~]", name):
        raise VisarError(f"There is no model folder {name}.")
    raise unknown("model", name, known)


def download(hub_id: str, hub: HubOptions, subfolder: str | None = None) -> Path:
    """The folder of a hub id; downloads only files that visar reads. Raises `VisarError` if that fails."""
    from huggingface_hub import snapshot_download

    within = f"{subfolder}/" if subfolder else ""

    def fetched(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
                allow_patterns=[within + place + pattern for place in ("", "*/") for pattern in patterns],
            )
        )

    try:
        folder = fetched("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
        for older in (("*.bin",), ("*.pth", "*.ckpt", "*.yaml")):  # of repositories that have no safetensors
            if any(file.suffix in (".safetensors", ".bin") for file in folder.rglob("*")):
                break
            folder = fetched(*older)
        return folder
    except Exception as error:
        raise VisarError(f"Could not download {hub_id!r} from the hub: {type(error).__name__}.") from error


def unrecognised(source: Source, families: Iterable[str]) -> str:
    """The message for a model that no family recognises."""
    if source.folder is not None and not source.index and not source.config:
        return f"{source.folder} is not a saved pipeline: it has no readable model_index.json."
    what = source.pipeline or source.config.get("model_type") or "no model"
    return f"{source.name} holds {what!r}, which no family of visar loads; there are {', '.join(families)}."


def _json(file: Path, kind: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = read_json(file, kind) if file.exists() else {}
    return found


def is_weights(name: str | Path) -> bool:
    """Whether this is a file of weights, or the index of its shards, by its name."""
    path = Path(name)
    return path.name.endswith((".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".index.json")) and not path.is_dir()
