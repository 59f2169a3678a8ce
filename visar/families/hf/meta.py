"""Chameleon in the layout of Meta's own code (facebookresearch/chameleon), which Anole shares (GAIR/Anole-7b-v0.1).

A folder has `models/7b`, with `params.json` and `consolidated.pth` or, of a model that was trained in several parts,
`consolidated.00.pth` and so on; and `tokenizer`, with `text_tokenizer.json`, `vqgan.yaml` and `vqgan.ckpt`. The weights
become those of transformers' `ChameleonForConditionalGeneration`:

- Meta's code turns pairs of numbers that lie next to each other, transformers one half against the other: rows of
  queries and keys, and their norms, change places;
- a norm of queries or keys is one for all heads of a part, and in transformers there is one for each head;
- embeddings and the matrices that give to the sum of all parts are cut by columns, the others by rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor

from visar.engine.component import fill, missing, unfilled
from visar.errors import VisarError
from visar.families.hf.loading import check_room, unreadable
from visar.families.source import Source
from visar.families.weights import count, load_state, shape_of
from visar.reading import Count, Positive, Size, checked_arguments, read_json
from visar.texts import read_text

WHOLE, PARTS = "consolidated.pth", "consolidated.*.pth"
WORDS, PIXELS, PIXELS_CONFIG = "text_tokenizer.json", "vqgan.ckpt", "vqgan.yaml"
CONTEXT = 4096  # positions, in Meta's code
CUT = {  # the dimension along which parts are joined, by the name in a layer
    "tok_embeddings": 1, "output": 0, "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
}  # fmt: skip
KEYS = (  # in turn, from a name in transformers' layout to Meta's
    (r"^model\.vqmodel\.", ""),
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^lm_head\.", "output."),
    (r"^model\.(layers|norm)\.", r"\1."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.self_attn\.([qk])_norm\.", r".attention.\1_normalization."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
)


@dataclass(frozen=True)
class Params:
    """What is read of `params.json` and `consolidate_params.json`, with the defaults of Meta's code."""

    dim: Size = 512
    n_layers: Count = 8
    n_heads: Size = 8
    n_kv_heads: Size | None = None
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e4
    swin_norm: bool = False
    model_parallel_size: Annotated[int, Interval(ge=1, le=64)] = 1

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


def is_meta(source: Source) -> bool:
    """Whether a folder, or one of weights in such a folder, is in Meta's layout, complete or not."""
    folder = source.folder
    if folder is None or source.index:
        return False
    if any(folder.glob("consolidated*.pth")):
        return _tokenizer(folder).is_dir() and not any(folder.glob("*.safetensors"))
    named = any((folder / "tokenizer" / name).exists() for name in (WORDS, PIXELS))
    return not source.config and (named or any(folder.glob("models/*/consolidated*.pth")))


def meta_folders(source: Source) -> tuple[Path, Path]:
    """The folders of the weights and of the tokenizers. Raises `VisarError` where one of their files is missing."""
    folder = source.folder
    assert folder is not None
    if any(folder.glob("consolidated*.pth")):
        weights, tokenizer = folder, _tokenizer(folder)
    else:
        found = sorted({file.parent for file in folder.glob("models/*/consolidated*.pth")})
        if not found:
            raise VisarError(
                f"{source.name} has no weights: neither a config.json, as transformers' layout has, nor a "
                f"models/7b/{WHOLE}, as Meta's has."
            )
        if len(found) > 1:
            raise VisarError(f"{source.name} holds two models or more; give one of them, such as {found[0]}.")
        weights, tokenizer = found[0], folder / "tokenizer"
    for file in (weights / "params.json", *(tokenizer / name for name in (WORDS, PIXELS_CONFIG, PIXELS))):
        if not file.is_file():
            raise VisarError(f"There is no {file}, which Meta's layout of a Chameleon has.")
    return weights, tokenizer


def _tokenizer(weights: Path) -> Path:
    return weights.resolve().parent.parent / "tokenizer"


def load_meta(weights: Path, tokenizer: Path) -> tuple[Any, Any]:
    """The model of the folders, in the dtype of its files, on the CPU, in evaluation mode, and its tokenizer of text.

    Raises `VisarError` for files that cannot be read, parts that do not fit together, and for tensors that are missing,
    misshapen or unknown.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    params = read_params(weights)
    files = parts(weights, params.model_parallel_size)
    check_room(weights, files)
    words, vocabulary = load_words(tokenizer / WORDS)
    pixels = load_state(tokenizer / PIXELS)
    read = ("encoder.", "quantize.embedding.", "quant_conv.", "post_quant_conv.")
    image = image_config(pixels, tokenizer)
    state = joined(files, params)
    rows, layers = shape_of(state, "tok_embeddings.weight", weights)[0], count(state, "layers.")
    if layers != params.n_layers:
        raise VisarError(f"{weights}/params.json says {params.n_layers} layers, and the weights have {layers}.")
    if (most := max(vocabulary.values(), default=0)) >= rows:
        raise VisarError(
            f"{tokenizer / WORDS} has ids up to {most}, and {weights} embeddings of {rows}: they are not one model's."
        )
    state |= {key: value for key, value in pixels.items() if key.startswith(read)}
    try:
        config = ChameleonConfig(
            vocab_size=rows, hidden_size=params.dim, num_hidden_layers=params.n_layers,
            intermediate_size=shape_of(state, "layers.0.feed_forward.w1.weight", weights)[0],
            num_attention_heads=params.n_heads, num_key_value_heads=params.kv_heads, rms_norm_eps=params.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
            max_position_embeddings=CONTEXT, swin_norm=params.swin_norm, model_parallel_size=len(files),
            vq_config=image, vocabulary_map=vocabulary,
        )  # fmt: skip
        with unfilled():
            model: Any = ChameleonForConditionalGeneration(config)
    except VisarError:
        raise
    except Exception as error:  # of sizes that transformers does not take
        raise unreadable("the configuration", weights, error) from error
    dtype = state["tok_embeddings.weight"].dtype
    fill(model, state, weights, {key: meta_key(key) for key in model.state_dict()})
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its frequencies are in no file
    return model.to(dtype), words


def meta_key(key: str) -> str:
    """The name in Meta's files of a tensor of transformers' layout."""
    for pattern, name in KEYS:
        key = re.sub(pattern, name, key)
    return key


def read_params(weights: Path) -> Params:
    """Raises `VisarError` for values that cannot be, or not together."""
    path = weights / "params.json"
    found = read_json(path, dict[str, Any])
    if isinstance(inner := found.get("model"), dict):
        found |= inner
    if (more := weights / "consolidate_params.json").exists():
        found |= read_json(more, dict[str, Any])
    known = {field.name for field in fields(Params)}
    given = {name: value for name, value in found.items() if name in known}
    made = Params(**checked_arguments(Params.__init__, given, f"Cannot read {path}"))
    if made.dim % (2 * made.n_heads) or made.n_heads % made.kv_heads or made.kv_heads % made.model_parallel_size:
        raise VisarError(
            f"{path} describes no decoder: {made.dim} numbers in {made.n_heads} heads, {made.kv_heads} of keys, in "
            f"{made.model_parallel_size} parts."
        )
    return made


def parts(weights: Path, number: int) -> list[Path]:
    """The files of the weights. Raises `VisarError` unless they are so many."""
    whole = weights / WHOLE
    found = [whole] if whole.exists() else sorted(weights.glob(PARTS))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(number)]
    if found != [whole] * number and [file.name for file in found] != wanted:
        raise VisarError(
            f"{weights} has {', '.join(file.name for file in found)}, and by its params.json it is in "
            f"{number} part{'s' * (number > 1)}: {', '.join(wanted) if number > 1 else WHOLE}."
        )
    return found


def joined(files: list[Path], params: Params) -> dict[str, Tensor]:
    """The tensors of all parts by Meta's names, rows of queries and keys in transformers' order.

    Raises `VisarError` for parts without the tensors of the others, or with others of their size.
    """
    read = [_apart(load_state(file, dtype=None), params) for file in files]
    state = {}
    for key in list(read[0]):
        for part, file in zip(read, files, strict=True):
            if key not in part:
                raise missing(key, file)
            if part[key].shape != read[0][key].shape:
                own, first = list(part[key].shape), list(read[0][key].shape)
                raise VisarError(f"Tensor {key!r} of {file} has shape {own}, and {first} in {files[0].name}.")
        pieces = [part.pop(key) for part in read]
        if "_normalization." in key and pieces[0].shape != (head_dim := params.dim // params.n_heads,):
            found = list(pieces[0].shape)
            raise VisarError(f"Tensor {key!r} of {files[0]} has shape {found}, expected {[head_dim]}.")
        state[key] = _join(key, pieces, params)
    for part, file in zip(read, files, strict=True):
        if part:
            raise VisarError(f"{file} has a tensor {next(iter(part))!r} that {files[0].name} does not.")
    return state


def _apart(state: dict[str, Tensor], params: Params) -> dict[str, Tensor]:
    """The tensors of a part, those that Meta's code joins for its products taken apart."""
    head_dim = params.dim // params.n_heads
    q, kv = (heads // params.model_parallel_size * head_dim for heads in (params.n_heads, params.kv_heads))
    for key in list(state):
        if key.endswith(".attention.wqkv.weight") and state[key].shape[:1] == (q + 2 * kv,):
            own = zip("qkv", state.pop(key).split([q, kv, kv]), strict=True)
            state |= {key.replace("wqkv", f"w{name}"): value for name, value in own}
        elif key.endswith(".feed_forward.w13.weight") and state[key].ndim == 2 and len(state[key]) % 2 == 0:
            own = zip("13", state.pop(key).chunk(2), strict=True)
            state |= {key.replace("w13", f"w{name}"): value for name, value in own}
    return state


def _join(key: str, pieces: list[Tensor], params: Params) -> Tensor:
    """A tensor of its pieces, of equal shapes. Matrices of a wrong shape stay as they are."""
    name, kind = re.sub(r"^layers\.\d+\.", "", key).rsplit(".", 1) if "." in key else (key, "")
    head_dim = params.dim // params.n_heads
    heads = params.kv_heads if name in ("attention.wk", "attention.k_normalization") else params.n_heads
    if name.endswith("_normalization"):
        return torch.stack([half_split(piece, 1) for piece in pieces]).repeat_interleave(heads // len(pieces), 0)
    if name in CUT and kind == "weight":
        if pieces[0].ndim != 2:
            return pieces[0]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, CUT[name])
        turned = name in ("attention.wq", "attention.wk") and len(whole) == heads * head_dim
        return half_split(whole, heads) if turned else whole
    # Norms of the whole width, one in each part. transformers takes the mean of them too.
    same = all(torch.equal(piece, pieces[0]) for piece in pieces)
    return pieces[0] if same else torch.stack([p.float() for p in pieces]).mean(0).to(pieces[0].dtype)


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] whose pairs lie next to each other, with the first of all pairs before the second."""
    return rearrange(rows, "(h d two) ... -> (h two d) ...", h=heads, two=2)


def load_words(path: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer in the file, and its vocabulary as transformers' configuration has it. Raises `VisarError`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        raw = Tokenizer.from_file(str(path))
    except Exception as error:
        raise unreadable("the tokenizer", path, error) from error
    vocabulary = raw.get_vocab()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = {name: token for name, token in named.items() if token in vocabulary}
    words = PreTrainedTokenizerFast(tokenizer_object=raw, **own)
    if (held := vocabulary.pop("<reserved08707>", None)) is not None:  # where transformers puts an image in a text
        vocabulary.setdefault("<image>", held)
    return words, vocabulary


def image_config(state: dict[str, Tensor], tokenizer: Path) -> dict[str, Any]:
    """The configuration in transformers of an image tokenizer: sizes by its weights, pixels by its `vqgan.yaml`."""
    path = tokenizer / PIXELS
    levels = count(state, "encoder.down.")
    if not levels:
        raise VisarError(f"{path} holds no encoder of images, as Meta's file does.")
    base = shape_of(state, "encoder.conv_in.weight", path, 4)[0]
    widths = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", path, 4)[0] for i in range(levels)]
    codes, dim = shape_of(state, "quantize.embedding.weight", path)
    latent = shape_of(state, "post_quant_conv.weight", path, 4)[0]
    side, cell = resolution(tokenizer / PIXELS_CONFIG), 2 ** (levels - 1)
    if side % cell:
        raise VisarError(f"{tokenizer / PIXELS_CONFIG} says images of {side} pixels, and a code is {cell} of them.")
    return dict(
        resolution=side, embed_dim=dim, num_embeddings=codes, latent_channels=latent, base_channels=base,
        channel_multiplier=[width // base for width in widths], num_res_blocks=count(state, "encoder.down.0.block."),
        attn_resolutions=[side >> i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state],
        double_latent=shape_of(state, "encoder.conv_out.weight", path, 4)[0] == 2 * latent,
    )  # fmt: skip


def resolution(path: Path) -> int:
    """The side of the images in pixels by a `vqgan.yaml`. Raises `VisarError` for a file without it."""
    import yaml

    try:
        found = yaml.safe_load(read_text(path))
        side = found["model"]["params"]["ddconfig"]["resolution"]
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise VisarError(f"Cannot read {path}: it has no model.params.ddconfig.resolution.") from error
    if type(side) is not int or not 1 <= side <= 2**14:
        raise VisarError(f"Cannot read {path}: its resolution is no number of pixels.")
    return side
