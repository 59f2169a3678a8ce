"""A small CLIP of captioned images (Radford et al. 2021, arXiv:2103.00020), built of open_clip's own classes.

What it is for: saying offline whether an image of a small drawn set shows what its prompt says. Its words are those of
the set, so that a caption is a handful of ids; their vectors start as those of a word encoder, so that words that only
hold-outs have lie where words of like meaning lie.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visar.dtypes import COMPUTED, checked_dtype
from visar.engine.component import fill, read_tensors, unfilled
from visar.engine.memory import check_training
from visar.engine.packed import PACKED, packed
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.reading import Count, Size, read_json
from visar.text_encoders.spelling import words_of
from visar.text_encoders.words import WordEncoder
from visar.training.data import SPLITS, ImageSet, Record, to_unit
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed

PADDING, UNKNOWN = 0, 1
HIGHEST_SCALE = math.log(100)  # of the logits, as in the paper


@dataclass
class Vision:
    """Sizes of the image tower, as open_clip calls them."""

    image_size: Annotated[int, Interval(ge=1, le=4096)]
    patch_size: Annotated[int, Interval(ge=1, le=4096)]
    width: Size
    layers: Count
    head_width: Size
    patch_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0


@dataclass
class Text:
    """Sizes of the text tower."""

    context_length: Annotated[int, Interval(ge=2, le=4096)]
    vocab_size: Size
    width: Size
    heads: Size
    layers: Count


@dataclass
class Sizes:
    """`config.json` of a CLIP."""

    embed_dim: Size
    vision: Vision
    text: Text


class CaptionWords:
    """Captions to ids: padding is 0, an unknown word 1, the words follow, and the end has the highest id of all.

    open_clip's text tower reads a caption's features where its highest id stands.
    """

    def __init__(self, words: Sequence[str], length: int = 16):
        self.words, self.length = list(words), length
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        self.end = len(self.words) + 2

    @staticmethod
    def of(texts: Iterable[str], length: int = 16) -> CaptionWords:
        """All words of the texts in alphabetical order."""
        return CaptionWords(sorted({word for text in texts for word in words_of(text)}), length)

    def knows(self, caption: str) -> bool:
        """Whether at least one word of the caption has an id of its own."""
        return any(word in self._ids for word in words_of(caption))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids [B, length]; of a longer caption the first words count."""
        out = torch.full((len(captions), self.length), PADDING)
        for row, caption in zip(out, captions, strict=True):
            ids = [self._ids.get(word, UNKNOWN) for word in words_of(caption)][: self.length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, self.end])
        return out


def build_clip(sizes: dict[str, Any]) -> Any:
    """`open_clip.model.CLIP` of these sizes: `embed_dim`, and the fields of open_clip's `vision` and `text` towers."""
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise VisarError(
            f"A CLIP's networks need the extra `eval`: uv sync --extra eval, or pip install 'visar[eval]' ({error})."
        ) from error
    return CLIP(sizes["embed_dim"], CLIPVisionCfg(**sizes["vision"]), CLIPTextCfg(**sizes["text"]))


def clip_sizes(words: CaptionWords, size: int, dim: int, layers: int, text_layers: int, heads: int) -> dict[str, Any]:
    """Sizes of a CLIP for images of `size` pixels in 8 x 8 patches; both towers are `dim` wide."""
    if size % 8:
        raise VisarError(f"The size must be a multiple of 8 pixels, not {size}.")
    if dim % heads:
        raise VisarError(f"The width of {dim} must be a multiple of the {heads} heads.")
    vision = {"image_size": size, "patch_size": 8, "width": dim, "layers": layers, "head_width": dim // heads}
    text = {"context_length": words.length, "vocab_size": words.end + 1, "width": dim, "heads": heads}
    # Half of the patches are left out in training (Li et al. 2022, arXiv:2212.00794): twice the images in the time.
    return {"embed_dim": 64, "vision": vision | {"patch_dropout": 0.5}, "text": text | {"layers": text_layers}}


def save_clip(clip: Any, words: CaptionWords, sizes: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json`, `words.json` and `model.safetensors`; matrices in `dtype`, the rest in float16 at least."""
    folder = writable_folder(folder)
    own = torch.float16 if dtype in PACKED else dtype
    tensors = {
        name: tensor.detach().cpu().to(own if tensor.ndim < 2 or dtype not in PACKED else None).contiguous()
        for name, tensor in clip.state_dict().items()
    }
    if dtype in PACKED:
        tensors = packed(tensors, dtype)
    with replacing(folder / "model.safetensors") as part:
        save_file(tensors, part)
    with replacing(folder / "words.json") as part:
        part.write_text(json.dumps(words.words) + "\n", encoding="utf-8")
    with replacing(folder / "config.json") as part:
        part.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def load_clip(folder: str | Path) -> tuple[Any, CaptionWords]:
    """The model in float32, evaluated, and its words; `VisarError` for a folder that does not hold them whole."""
    folder = Path(folder)
    try:
        sizes = asdict(read_json(folder / "config.json", Sizes))
        known = read_json(folder / "words.json", list[str])
        words = CaptionWords(known, sizes["text"]["context_length"])
        state = read_tensors(file := folder / "model.safetensors")
        if max(sizes[tower]["layers"] for tower in ("vision", "text")) > len(state):
            raise VisarError(f"{folder / 'config.json'} has more layers than {file.name} has tensors.")
        with unfilled():  # nothing of these sizes is made before the file is known to have them
            fill(build_clip(sizes), state, file)
        clip = build_clip(sizes)
        clip.load_state_dict(state)
    except VisarError as error:
        raise VisarError(f"{folder} holds no whole CLIP of `visar train clip`: {error}") from error
    except Exception as error:  # a file that is missing, cut, or of another model: each library has its own error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise VisarError(f"{folder} holds no whole CLIP of `visar train clip`: {reason}") from error
    if words.end + 1 != sizes["text"]["vocab_size"]:
        raise VisarError(f"{folder} has {len(words.words)} words, and a text tower for another number of them.")
    return clip.eval().requires_grad_(False), words


class ClipObjective(nn.Module):
    """A CLIP with its training loss, open_clip's `ClipLoss`: each image finds its caption in the batch, and back."""

    def __init__(self, clip: Any):
        super().__init__()
        from open_clip.loss import ClipLoss

        self.clip = clip
        self.contrast = ClipLoss()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Scalar loss for images [B, 3, H, W] in [-1, 1] and caption ids [B, length]."""
        with sdpa_kernel(SDPBackend.MATH):  # over so few tokens a CPU is half as fast again as with the fused kernel
            images, texts, scale = self.clip(x, ids)
        return self.contrast(images.float(), texts.float(), scale)


@torch.no_grad()
def start_words(clip: Any, words: CaptionWords, encoder: WordEncoder) -> None:
    """Give known words the encoder's vectors, the first numbers of which matter most, and all words the length 1.

    Words that the encoder lacks keep the direction they have, and are told apart by it.
    """
    table = clip.token_embedding.weight
    table.copy_(F.normalize(table, dim=1))
    vectors = encoder.table.float() * encoder.scale.float()[:, None]
    width = min(table.shape[1], vectors.shape[1])
    for i, word in enumerate(words.words):
        rows, _ = encoder.ids(word)
        if rows:
            table[i + 2] = 0.0
            table[i + 2, :width] = F.normalize(vectors[rows[0], :width], dim=0)


def moved(x: Tensor, g: torch.Generator, shift: float = 0.12, zoom: float = 0.15) -> Tensor:
    """Images [B, 3, H, W] shifted by up to `shift` of half their side and zoomed by up to `zoom`, each its own way.

    Nothing is flipped: letters, arrows and "left" would be something else.
    """
    amount = torch.rand(len(x), 3, generator=g) * 2 - 1
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 + zoom * amount[:, 0]
    matrix[:, :, 2] = shift * amount[:, 1:]
    grid = F.affine_grid(matrix, [*x.shape], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def hide_words(ids: Tensor, end: int, g: torch.Generator, share: float = 0.05) -> Tensor:
    """Ids with a share of the words made unknown, so that the id of unknown words is trained too."""
    hidden = (torch.rand(ids.shape, generator=g) < share) & (ids > UNKNOWN) & (ids < end)
    return ids.masked_fill(hidden, UNKNOWN)


@torch.no_grad()
def image_features(clip: Any, pixels: Tensor, batch: int = 128) -> Tensor:
    """Features [n, D] of length 1, float32 on the CPU, of uint8 pixels [n, 3, H, W] of the model's size."""
    device = clip.logit_scale.device
    parts = [clip.encode_image(to_unit(p.to(device)), normalize=True).float().cpu() for p in pixels.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def text_features(clip: Any, ids: Tensor, batch: int = 512) -> Tensor:
    """Features [n, D] of length 1, float32 on the CPU, of caption ids [n, length]."""
    device = clip.logit_scale.device
    parts = [clip.encode_text(p.to(device), normalize=True).float().cpu() for p in ids.split(batch)]
    return torch.cat(parts)


def retrieval(
    clip: Any, words: CaptionWords, pixels: Tensor, records: Sequence[Record], captions: Sequence[str]
) -> dict[str, float]:
    """How often the right caption is first, or among five, of all `captions`, each given the image's own style.

    `pixels` [n, 3, H, W] are of the `records`. `chance` is what a guess would reach as first.
    """
    names = list(dict.fromkeys(captions))
    at = {name: i for i, name in enumerate(names)}
    images = image_features(clip, pixels)
    first = among = 0
    for style in sorted({r.style for r in records}):
        rows = [i for i, r in enumerate(records) if r.style == style]
        texts = text_features(clip, words([Record("", name, style).prompt() for name in names]))
        nearest = (images[rows] @ texts.T).topk(min(5, len(names)), dim=1).indices
        right = nearest == torch.tensor([at[records[i].caption] for i in rows])[:, None]
        first, among = first + int(right[:, 0].sum()), among + int(right.any(1).sum())
    shares = {"top1": first / len(records), "top5": among / len(records), "chance": 1 / len(names)}
    return {name: round(share, 4) for name, share in shares.items()}


def train_clip(
    data: ImageSet, size: int, config: TrainConfig, encoder: WordEncoder, dim: int = 96, layers: int = 4,
    text_layers: int = 2, heads: int = 3, dtype: torch.dtype = torch.float16,
) -> tuple[Any, CaptionWords]:  # fmt: skip
    """Train on the `train` split at `size` pixels; saves `clip/` in `config.out`, matrices in `dtype`.

    Returns the EMA and its words. Under several processes each contrasts the images of its own batch. Raises
    `VisarError` for float8, which has no scale.
    """
    checked_dtype("dtype", dtype, (*COMPUTED, *PACKED))
    check_parts(config.out, STATE, "clip")
    words = CaptionWords.of(text for r in data.records for text in (r.caption, r.style, *r.tags))
    sizes = clip_sizes(words, size, dim, layers, text_layers, heads)
    torch.manual_seed(config.seed)
    clip = check_training(partial(build_clip, sizes), config.device)
    start_words(clip, words, encoder)
    pixels = data.pixels(size)
    split = {name: data.indices(name) for name in SPLITS}
    train = split["train"]
    looked_at = {name: rows[:: max(1, len(rows) // 256)] for name, rows in split.items() if rows}

    def batch_at(step: int, rank: int) -> tuple[Tensor, Tensor]:
        seed = step_seed(config.seed, step, rank)
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        rows = [train[rng.randrange(len(train))] for _ in range(config.batch)]
        ids = words([data.records[i].prompt(rng) for i in rows])
        return moved(to_unit(pixels[rows]), g), hide_words(ids, words.end, g)

    def after_step(module: ClipObjective, step: int) -> None:
        with torch.no_grad():
            module.clip.logit_scale.clamp_(0, HIGHEST_SCALE)

    def evaluate(ema: ClipObjective) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, rows in looked_at.items():
            records = [data.records[i] for i in rows]
            found = retrieval(ema.clip, words, pixels[rows], records, [data.records[i].caption for i in split[name]])
            out |= {f"{name}_{key}": share for key, share in found.items()}
        return out

    ema = fit(ClipObjective(clip), batch_at, config, evaluate, after_step)
    if distributed()[0] == 0:
        save_clip(ema.clip, words, sizes, config.out / "clip", dtype)
    return ema.clip, words
