"""`visar train images | words | tokenizer | autoencoder | ar | two-way | jacobi | mar | clip | drafter | assemble`."""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visar.cli.self_generated import learning
from visar.devices import device_of
from visar.errors import VisarError
from visar.files import check_new, new_folder, writable_folder

# The components by what a model's folder calls them: module and class.
PARTS = {
    "vq": ("visar.families.llamagen.vq", "VQModel"),
    "vae": ("visar.families.mar.autoencoder", "KLAutoencoder"),
    "text_encoder": ("visar.text_encoders.words", "WordEncoder"),
    "gpt": ("visar.families.llamagen.loading", "LlamaGen"),
    "mar": ("visar.families.mar.transformer", "MAR"),
}
# Options that may change when a run goes on; of the data, what is in it must not.
MAY_CHANGE = {"parser", "data", "out", "minutes", "batch", "lr", "no_compile", "device", "stored_as"}


def images(options: argparse.Namespace) -> int:
    from visar.training.images import build_images

    count = build_images(
        Path(options.out), options.size, tuple(options.styles), tones=options.tones, flags=options.flags
    )
    print(f"{count} images in {options.out}")
    return 0


def words(options: argparse.Namespace) -> int:
    from visar.training.data import ImageSet
    from visar.training.words import build_word_encoder

    with new_folder(options.out) as out:  # before the work; models are trained on a table and need it as it is
        data = ImageSet(options.data)
        texts = [t for r in data.records for t in (r.caption, " ".join(r.tags), r.style)]
        encoder = build_word_encoder(texts)
        encoder.save_pretrained(out)
    print(f"{len(encoder.words)} words in {options.out}")
    return 0


@contextmanager
def _run(options: argparse.Namespace, **extra: Any) -> Iterator[tuple[Any, Any]]:
    """The image set and the training configuration that the options ask for, while the folder is held."""
    from visar.training.data import ImageSet
    from visar.training.loop import TrainConfig, alone, check_state

    with alone(out := writable_folder(options.out)):  # before the images are read
        data = ImageSet(options.data, tuple(options.styles), tuple(options.without_groups))
        if not data.indices("train"):
            raise VisarError(f"{options.data} has no images for training: all are held out.")
        config = TrainConfig(
            out=out, minutes=options.minutes, batch=options.batch, lr=options.lr,
            seed=options.seed, compile=not options.no_compile, device=str(device_of(options.device)),
            made_of=_made_of(options) | {"data": data.mark()}, held=True, **extra,
        )  # fmt: skip
        check_state(out, config.made_of)  # before the images are prepared
        print(f"{len(data.records)} images, {len(data.indices('train'))} for training", file=sys.stderr)
        yield data, config


def _made_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a run keeps when it goes on; a part that it reads counts by its content."""
    found = {name: value for name, value in vars(options).items() if name not in MAY_CHANGE}
    for name in ("tokenizer", "autoencoder", "words"):
        if name in found and Path(found[name]).is_dir():
            found[name] = _content(Path(found[name]))
    if found.get("init"):  # it may be in the run's own folder, and only its start counts
        found["init"] = str(Path(found["init"]).resolve())
    return found


def _content(folder: Path) -> str:
    """A hash of the files in the folder of a part."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:12]


def tokenizer(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from visar.training.tokenizer import SMALL_VQ, train_tokenizer

    start = _component("vq", options.init) if options.init else None
    with _run(options, warmup=100, weight_decay=0.0, ema=0.998) as (data, config):
        sizes = replace(SMALL_VQ, patch=options.patch, background=0 if options.varied else -1)
        how = options.perceptual, options.varied, options.decoder_only
        train_tokenizer(data, options.size, config, sizes, start, *how)
    return 0


def autoencoder(options: argparse.Namespace) -> int:
    from visar.training.autoencoder import SMALL_KL, train_autoencoder

    start = _component("vae", options.init) if options.init else None
    with _run(options, warmup=100, weight_decay=0.0, ema=0.998) as (data, config):
        sizes = {**SMALL_KL, "patch": options.patch}
        how = {"perceptual": options.perceptual, "varied": options.varied, "decoder_only": options.decoder_only}
        train_autoencoder(data, options.size, config, sizes, start, **how)
    return 0


def mar(options: argparse.Namespace) -> int:
    from visar.training.mar import train_mar

    if options.dim % options.heads:
        raise VisarError("--dim must be a multiple of --heads.")
    with _run(options, warmup=100, optimizer="muon", ema=0.998) as (data, config):
        vae = _component("vae", options.autoencoder).eval()
        encoder = _component("text_encoder", options.words)
        start = _component("mar", options.init) if options.init else None
        train_mar(
            data, options.size, config, vae, encoder, options.dim, options.layers, options.heads, options.head_width,
            options.head_layers, varied=options.varied, weights=options.weigh, start=start,
        )  # fmt: skip
    return 0


def clip(options: argparse.Namespace) -> int:
    import torch

    from visar.training.clip import train_clip

    if options.batch < 2:
        raise VisarError(f"--batch must be 2 or more, not {options.batch}: a CLIP compares the images of a batch.")
    with _run(options, warmup=100, ema=0.998) as (data, config):
        encoder = _component("text_encoder", options.words)
        train_clip(
            data, options.size, config, encoder, options.dim, options.layers, options.text_layers, options.heads,
            getattr(torch, options.stored_as),
        )  # fmt: skip
    return 0


def ar(options: argparse.Namespace) -> int:
    from visar.training.ar import train_ar

    if options.dim % options.heads or options.dim // options.heads % 4:
        raise VisarError("--dim must be a multiple of --heads, and their ratio a multiple of 4.")
    with _run(options, warmup=100, optimizer="muon", ema=0.997) as (data, config):
        vq = _component("vq", options.tokenizer).eval()
        encoder = _component("text_encoder", options.words)
        start = _component("gpt", options.init) if options.init else None
        train_ar(
            data, options.size, config, vq, encoder, options.dim, options.layers, options.heads, options.ffn,
            variants=options.variants, weights=options.weigh, start=start, any_order=options.any_order,
        )  # fmt: skip
    return 0


def two_way(options: argparse.Namespace) -> int:
    from visar.training.two_way import check_stage, train_two_way

    if options.stage == 2 and options.layers is not None:
        raise VisarError("--layers are those of stage 1; in stage 2 the heads have them already.")
    options.layers = options.layers or 1
    start = _component("gpt", options.init)
    check_stage(start, options.stage)  # before the images are read
    with _run(options, warmup=100, optimizer="muon", ema=0.997) as (data, config):
        vq = _component("vq", options.tokenizer).eval()
        encoder = _component("text_encoder", options.words)
        train_two_way(
            data, options.size, config, vq, encoder, start, stage=options.stage, layers=options.layers,
            variants=options.variants, weights=options.weigh,
        )  # fmt: skip
    return 0


def drafter(options: argparse.Namespace) -> int:
    import torch

    from visar.drafters import drafter_kind
    from visar.training.acceptance import acceptance_run_of, train_acceptance
    from visar.training.drafter import check_drafter, run_of, train_drafter

    kind = drafter_kind(options.drafter_kind)
    kind.checked_layers(options.layers, 10**9)
    if options.acceptance and options.layers is not None:
        raise VisarError("--layers are those of a new drafter, and --acceptance is for one that there is.")
    if options.depth is not None and kind.default_layers(1) is not None:
        raise VisarError(f"A drafter of the kind {kind.name!r} learns the next token alone: it has no --depth.")
    run = acceptance_run_of(kind.name) if options.acceptance else run_of(kind.name)
    why = "A MAR has no drafter of its own to train; its draft model is a smaller MAR, of `train mar`."

    def check(out: Path) -> None:
        if not options.acceptance:
            check_drafter(out, kind.name)

    with learning(options, why, run, check) as source:
        out, model, target = source.out, source.model, source.model.family.drafting
        if target is None:
            raise VisarError(f"{options.model} takes no drafter.")
        kind.check_target(target)
        kind.checked_layers(options.layers, target.model.config.num_layers)
        trained: Any = None
        if options.acceptance:
            if (out / kind.name / "config.json").exists():
                model.load_drafter(out / kind.name)
            if (trained := model.drafters.find(kind.name)) is None:
                raise VisarError(f"Neither {out} nor {options.model} has a drafter {kind.name!r}; train one first.")
            if options.depth not in (None, own := trained.config.get("depth", options.depth)):
                raise VisarError(f"The drafter drafts {own} tokens deep, not the {options.depth} of --depth.")
        options.depth = options.depth or 3
        tokens = source.sampled(sampler="ar").tokens  # a large batch is bound by arithmetic, drafts waste some of it
        shared = source.encoded, tokens, source.config(warmup=50, optimizer="muon"), *source.how()
        stored_as = getattr(torch, options.stored_as)
        if trained is not None:
            train_acceptance(kind.name, trained, target, *shared, depth=options.depth, stored_as=stored_as)
        else:
            train_drafter(kind.name, target, *shared, depth=options.depth, layers=options.layers, stored_as=stored_as)
    print(out / kind.name)
    return 0


def jacobi(options: argparse.Namespace) -> int:
    from visar.families.llamagen.drafting import LlamaGenTarget
    from visar.training.ar import continued
    from visar.training.jacobi import tune_jacobi
    from visar.training.loop import STATE, check_parts

    start = _component("gpt", options.init) if options.init else None
    why = "A MAR has no windows of tokens; `train jacobi` tunes a GPT."
    with learning(options, why, ".", lambda out: check_parts(out, STATE, "gpt")) as source:
        teacher = source.model.family.drafting
        if not isinstance(teacher, LlamaGenTarget):
            raise VisarError(f"{options.model} is no LlamaGen that samples in raster order, and no other GPT is tuned.")
        if start is not None:  # the windows are then its own
            start = continued(start, copy.deepcopy(teacher.model))
            source.model.family.replace("gpt", start.to(teacher.model.output.weight))
        images = source.sampled(sampler="scd", window=options.window)
        config = source.config(warmup=20, optimizer="sgd", weight_decay=0.0)
        tune_jacobi(teacher, source.encoded, images, config, *source.how(), start=start, hold=options.hold)
    print(source.out / "gpt")
    return 0


def assemble(options: argparse.Namespace) -> int:
    import torch

    from visar.families.catalogue import is_embedded
    from visar.families.registry import family_of_components
    from visar.generation.model import ImageModel
    from visar.generation.saving import save

    given = (options.gpt, options.tokenizer), (options.mar, options.autoencoder)
    if not (all(given[0]) and not any(given[1])) and not (all(given[1]) and not any(given[0])):
        raise VisarError("Give --gpt and --tokenizer, or --mar and --autoencoder.")
    if (options.gpt and options.draft) or (options.mar and (options.top_k or options.gpt_dtype)):
        raise VisarError("--draft goes with --mar, and --top-k and --gpt-dtype with --gpt.")
    if options.draft_dtype and not options.draft:
        raise VisarError("--draft-dtype is that of the --draft, which is not given.")
    check_new(options.out)
    writable_folder(options.out)  # before the work
    dtype = getattr(torch, options.dtype)
    named = {"text_encoder": options.words, "vq": options.tokenizer}
    shared = {part: name for part, name in named.items() if name is not None and is_embedded(name)}
    parts: dict[str, Any] = {}
    settings: dict[str, Any] = {"guidance_scale": options.guidance_scale}
    if options.gpt:
        parts["gpt"] = _component("gpt", options.gpt)
        parts["vq"] = _component("vq", options.tokenizer)
        settings["top_k"] = options.top_k
    else:
        parts["mar"] = _component("mar", options.mar)
        parts["vae"] = _component("vae", options.autoencoder)
    encoder = _component("text_encoder", options.words)
    # The embedded model knows other things.
    parts["text_encoder"] = encoder.knowing(None) if "text_encoder" in shared else encoder
    model = ImageModel(family_of_components(parts).of(parts, settings))
    if options.draft:
        model.load_drafter(options.draft)
    dtypes = dict.fromkeys(model.family.components, dtype)
    if options.gpt_dtype:
        dtypes["gpt"] = getattr(torch, options.gpt_dtype)
    if options.draft:
        dtypes["draft"] = getattr(torch, options.draft_dtype or "float16")
    save(model, options.out, dtypes=dtypes, parts_of=shared)
    print(options.out)
    return 0


def _component(part: str, path: str) -> Any:
    """A component from its folder, or that of an embedded model by its name."""
    import importlib

    from visar.families.catalogue import embedded_folder, is_embedded
    from visar.families.weights import load_part

    module, name = PARTS[part]
    folder = embedded_folder(path) / part if is_embedded(path) else Path(path)
    if not (folder / "config.json").exists():
        raise VisarError(f"{folder} is not a saved component: it has no config.json.")
    return load_part(getattr(importlib.import_module(module), name), folder, name)
