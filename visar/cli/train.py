"""`visar train pictures | words | tokenizer | autoencoder | ar | mar | clip | drafter | assemble`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from visar.cli.common import device_of
from visar.errors import VisarError
from visar.files import writable_folder


def pictures(options: argparse.Namespace) -> int:
    from visar.training.pictures import build_pictures

    count = build_pictures(
        Path(options.out), options.size, tuple(options.styles), tones=options.tones, flags=options.flags
    )
    print(f"{count} pictures in {options.out}")
    return 0


def words(options: argparse.Namespace) -> int:
    from visar.training.data import PictureSet
    from visar.training.words import build_word_encoder

    data = PictureSet(options.data)
    texts = [t for r in data.records for t in (r.caption, " ".join(r.tags), r.style)]
    encoder = build_word_encoder(texts)
    encoder.save_pretrained(options.out)
    print(f"{len(encoder.words)} words in {options.out}")
    return 0


def _run(options: argparse.Namespace, **extra: Any) -> tuple[Any, Any]:
    """The picture set and the training configuration that the options ask for."""
    from visar.training.data import PictureSet
    from visar.training.loop import TrainConfig

    if options.minutes <= 0 or options.batch < 1 or options.size < 8 or options.lr <= 0:
        raise VisarError("--minutes and --lr must be above 0, --batch 1 or more, and --size 8 or more.")
    data = PictureSet(options.data, tuple(options.styles), tuple(options.without_groups))
    if not data.indices("train"):
        raise VisarError(f"{options.data} has no pictures for training: all are held out.")
    config = TrainConfig(
        out=writable_folder(options.out), minutes=options.minutes, batch=options.batch, lr=options.lr,
        seed=options.seed, compile=not options.no_compile, device=str(device_of(options.device)), **extra,
    )  # fmt: skip
    print(f"{len(data.records)} pictures, {len(data.indices('train'))} for training", file=sys.stderr)
    return data, config


def tokenizer(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from visar.training.tokenizer import SMALL_VQ, train_tokenizer

    if options.patch < 1 or options.perceptual < 0:
        raise VisarError("--patch must be 1 or more, and --perceptual not below 0.")
    start = _component("vq.VQModel", options.init).float() if options.init else None
    data, config = _run(options, warmup=100, weight_decay=0.0, ema=0.998)
    sizes = replace(SMALL_VQ, patch=options.patch, background=0 if options.varied else -1)
    train_tokenizer(data, options.size, config, sizes, start, options.perceptual, options.varied, options.decoder_only)
    return 0


def autoencoder(options: argparse.Namespace) -> int:
    from visar.training.autoencoder import train_autoencoder

    data, config = _run(options, warmup=100, weight_decay=0.0, ema=0.998)
    train_autoencoder(data, options.size, config)
    return 0


def mar(options: argparse.Namespace) -> int:
    from visar.training.mar import train_mar

    if options.dim % options.heads:
        raise VisarError("--dim must be a multiple of --heads.")
    data, config = _run(options, warmup=100, optimizer="muon", ema=0.998)
    vae = _component("autoencoder.AutoencoderKL", options.autoencoder).eval()
    encoder = _component("words.WordEncoder", options.words)
    train_mar(
        data, options.size, config, vae, encoder, options.dim, options.layers, options.heads, options.head_width,
        options.head_layers,
    )  # fmt: skip
    return 0


def clip(options: argparse.Namespace) -> int:
    import torch

    from visar.models.specs import MODELS, resolve_model
    from visar.training.clip import train_clip

    if min(options.dim, options.layers, options.text_layers, options.heads) < 1 or options.batch < 2:
        raise VisarError("--dim, --layers, --text-layers and --heads must be 1 or more, and --batch 2 or more.")
    data, config = _run(options, warmup=100, ema=0.998)
    home = Path(resolve_model(options.words)) / "text_encoder" if options.words in MODELS else options.words
    encoder = _component("words.WordEncoder", home)
    train_clip(
        data, options.size, config, encoder, options.dim, options.layers, options.text_layers, options.heads,
        getattr(torch, options.stored_as),
    )  # fmt: skip
    return 0


def ar(options: argparse.Namespace) -> int:
    from visar.models.vq import VQModel
    from visar.models.words import WordEncoder
    from visar.training.ar import train_ar

    if options.dim % options.heads or options.dim // options.heads % 4:
        raise VisarError("--dim must be a multiple of --heads, and their ratio a multiple of 4.")
    if options.variants < 0:
        raise VisarError("--variants must be 0 or more.")
    data, config = _run(options, warmup=100, optimizer="muon", ema=0.997)
    vq = VQModel.from_pretrained(_folder(options.tokenizer), low_cpu_mem_usage=False).eval()
    encoder = WordEncoder.from_pretrained(_folder(options.words))
    start = _component("llamagen.LlamaGen", options.init) if options.init else None
    train_ar(
        data, options.size, config, vq.float(), encoder, options.dim, options.layers, options.heads, options.ffn,
        variants=options.variants, weights=options.weigh, start=start,
    )  # fmt: skip
    return 0


def _conditions(options: argparse.Namespace, classes: int) -> list[Any]:
    """The captions or class ids to draw, `classes` being 0 for text: lines of a file, or prompts of a picture set."""
    pictures = (
        not classes
        and options.captions
        and (Path(options.captions).is_dir() or Path(options.captions).suffix == ".zip")
    )
    if (options.styles or options.without_groups) and not pictures:
        raise VisarError("--styles and --without-groups choose from a picture set, and --captions is none.")
    if not options.captions:
        if classes:
            return list(range(classes))
        raise VisarError("A text model needs --captions: a file with a caption in each line, or a picture set.")
    path = Path(options.captions)
    if pictures:
        from visar.training.data import PictureSet

        data = PictureSet(path, tuple(options.styles), tuple(options.without_groups))
        return list(dict.fromkeys(data.records[i].prompt() for i in data.indices("train")))
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise VisarError(f"Cannot read captions from {path}.") from error
    found: list[Any] = [line for line in lines if line]
    if not found:
        raise VisarError(f"{path} holds no captions.")
    if classes:
        for line in found:
            if not line.isdecimal() or int(line) >= classes:
                raise VisarError(f"{path} must hold a class id from 0 to {classes - 1} in each line, not {line!r}.")
        found = [int(line) for line in found]
    return list(dict.fromkeys(found))  # drawn in turns: a caption that stood twice would give one picture twice


def drafter(options: argparse.Namespace) -> int:
    import torch

    from visar.cli.common import is_masked, load_pipeline
    from visar.engine.guidance import Guidance
    from visar.pipelines import TextToImagePipeline
    from visar.samplers import Target
    from visar.training.drafter import checked_layers, train_drafter
    from visar.training.loop import TrainConfig, distributed
    from visar.training.self_generated import draw_tokens

    if options.minutes is not None and options.steps is not None:
        raise VisarError("Give --minutes or --steps, not both.")
    if is_masked(options):
        raise VisarError("A MAR has no drafter of its own to train; its draft model is a smaller MAR, of `train mar`.")
    minutes = 25.0 if options.minutes is None else options.minutes
    steps = 10**9 if options.steps is None else options.steps
    if minutes <= 0 or options.lr <= 0 or options.pictures < 2 or min(options.batch, options.depth, steps) < 1:
        raise VisarError(
            "--minutes and --lr must be above 0, --batch, --depth and --steps 1 or more, --pictures 2 or more."
        )
    temperature = 1.0 if options.temperature is None else options.temperature
    Target(temperature, options.top_k or 0, options.top_p)  # before the weights are read
    checked_layers(options.drafter_kind, options.layers, 10**9)
    rank, _, own = distributed(str(device_of(options.device)))
    options.device = str(own)
    if own.type == "cpu" and options.dtype is None:
        options.dtype = "float32"  # small updates are lost in bfloat16
    pipe: Any = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    checked_layers(options.drafter_kind, options.layers, pipe.gpt.config.num_layers)
    text = isinstance(pipe, TextToImagePipeline)
    conditions = _conditions(options, 0 if text else pipe.gpt.config.classes)
    scale = pipe.config.guidance_scale if options.guidance_scale is None else options.guidance_scale
    law = Target(temperature, pipe.config.top_k if options.top_k is None else options.top_k, options.top_p)
    out = writable_folder(options.out)
    tokens = draw_tokens(
        pipe, conditions, options.pictures, out / "pictures.safetensors", options.batch,
        lambda done: print(f"{done} of {options.pictures} pictures drawn", file=sys.stderr),
        draws=rank == 0, sampler="ar", seed=options.seed, guidance_scale=scale, temperature=law.temperature,
        top_k=law.top_k, top_p=law.top_p,
    )  # fmt: skip  # "ar", because a large batch is bound by arithmetic, of which drafts waste some

    def of(rows: list[int]) -> tuple[Any, Any]:
        chosen = [conditions[i % len(conditions)] for i in rows]
        return pipe.text_encoder.encode(chosen) if text else (torch.tensor(chosen), torch.ones(len(chosen), 1))

    config = TrainConfig(
        out, minutes=math.inf if options.steps else minutes, steps=steps, batch=options.batch, lr=options.lr,
        seed=options.seed, warmup=50, ema=0.99, optimizer="muon", compile=not options.no_compile,
        device=str(pipe.gpt.device),
    )  # fmt: skip
    train_drafter(
        options.drafter_kind, pipe.gpt, of, tokens, config, Guidance(scale), law, depth=options.depth,
        layers=options.layers, grid=pipe.grid, stored_as=getattr(torch, options.stored_as),
    )  # fmt: skip
    print(out / options.drafter_kind)
    return 0


def assemble(options: argparse.Namespace) -> int:
    import torch
    from diffusers.utils import logging

    from visar.models.specs import MODELS, resolve_model
    from visar.pipelines import MaskedTextToImagePipeline, TextToImagePipeline

    logging.set_verbosity_error()
    given = (options.gpt, options.tokenizer), (options.mar, options.autoencoder)
    if not (all(given[0]) and not any(given[1])) and not (all(given[1]) and not any(given[0])):
        raise VisarError("Give --gpt and --tokenizer, or --mar and --autoencoder.")
    if (options.gpt and options.draft) or (options.mar and options.top_k):
        raise VisarError("--draft goes with --mar, and --top-k with --gpt.")
    dtype = getattr(torch, options.dtype)
    shared = {"text_encoder": options.words} if options.words in MODELS else {}
    home = Path(resolve_model(options.words)) / "text_encoder" if shared else options.words
    pipe: Any
    if options.gpt:
        parts = (_component("llamagen.LlamaGen", options.gpt), _component("vq.VQModel", options.tokenizer))
        encoder = _component("words.WordEncoder", home)
        pipe = TextToImagePipeline(*parts, encoder, guidance_scale=options.guidance_scale, top_k=options.top_k)
    else:
        parts = (_component("mar.MAR", options.mar), _component("autoencoder.AutoencoderKL", options.autoencoder))
        encoder = _component("words.WordEncoder", home)
        pipe = MaskedTextToImagePipeline(*parts, encoder, guidance_scale=options.guidance_scale)
        if options.draft:
            pipe.load_drafter(options.draft)
    dtypes = dict.fromkeys(pipe.stored_parts(), dtype) | {"draft": getattr(torch, options.draft_dtype)}
    pipe.save_pretrained(options.out, dtypes=dtypes, parts_of=shared)
    print(options.out)
    return 0


def _component(kind: str, path: str | Path) -> Any:
    """A part of `visar.models` from a folder, by the name of its module and class."""
    import importlib

    from visar.models.loading import load_part

    module, name = kind.split(".")
    return load_part(getattr(importlib.import_module(f"visar.models.{module}"), name), _folder(path), name)


def _folder(path: str | Path) -> Path:
    if not (Path(path) / "config.json").exists():
        raise VisarError(f"{path} is not a saved component: it has no config.json.")
    return Path(path)
