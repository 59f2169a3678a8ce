"""The caption encoder of LlamaGen's text model (Sun et al. 2024, arXiv:2406.06525): FLAN-T5-XL, left-padded.

The reference cleans a caption as PixArt-alpha does, encodes it right-padded, then moves the valid features to the end
of the slots, next to the image tokens. The cleaning is called from diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from visar.errors import VisarError
from visar.files import path_of
from visar.reading import Count, Size, read_json

FLAN_T5_XL = "google/flan-t5-xl"


def clean_caption(caption: str) -> str:
    """Lower-case text without links, markup, file names, ids and the like; applied twice, as in the reference."""
    from diffusers import PixArtAlphaPipeline as PixArt

    for _ in range(2):
        caption = PixArt._clean_caption(PixArt, caption)  # the method needs nothing of an instance
    return caption


class T5CaptionEncoder(nn.Module):
    """Captions to T5 features [B, length, features] with `length` slots, left-padded with exact zeros.

    `encoder` is a `transformers.T5EncoderModel` and `tokenizer` its tokenizer; `length` is 120 for the published text
    model, and longer captions are cut there.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int = 120):
        super().__init__()
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.length = length

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    @property
    def width(self) -> int:
        """Features of a slot."""
        return int(self.encoder.config.d_model)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [B, length, features], fp32, and the mask [B, length], bool, of the valid slots at the end."""
        tokens = self.tokenizer(
            [clean_caption(p) for p in prompts],
            max_length=self.length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        right = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])[0].float()
        valid = tokens["attention_mask"].sum(1, keepdim=True)
        slots = torch.arange(self.length, device=self.device)
        features = right.gather(1, ((slots + valid) % self.length)[..., None].expand_as(right))
        mask = slots >= self.length - valid
        return features.masked_fill(~mask[..., None], 0.0), mask

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Write encoder and tokenizer into one folder, laid out as the hub repository is."""
        folder = path_of("The folder", folder)
        self.encoder.config.caption_length = self.length
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @staticmethod
    def from_pretrained(
        source: str | Path = FLAN_T5_XL, *, length: int | None = None, dtype: torch.dtype = torch.float32, **_: object
    ) -> T5CaptionEncoder:
        """From a local folder or a hub id. The number of slots is that of the saved encoder, else 120.

        Raises `VisarError` if `source` is neither a folder with the files of the encoder nor within reach on the hub.
        """
        path = path_of("The text encoder", source)
        is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
        if not path.is_dir() and not is_hub_id:
            raise _unreachable(source)
        if path.is_dir():
            check_folder(path)
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            # Without trust_remote_code=False, transformers asks on the terminal whether to run a folder's own code.
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            encoder: Any
            encoder, told = T5EncoderModel.from_pretrained(
                source, trust_remote_code=False, weights_only=True, output_loading_info=True
            )
        except Exception as error:  # of a dozen libraries, on files that are missing, cut or changed
            raise _unreachable(source) from error
        if absent := [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]:
            raise VisarError(f"Tensor {sorted(absent)[0]!r} of the caption encoder {source} is missing or misshapen.")
        slots = length if length else int(getattr(encoder.config, "caption_length", 120))
        return T5CaptionEncoder(encoder.to(dtype), tokenizer, slots)


@dataclass
class Settings:
    """What is read of a T5's `config.json`, which has more."""

    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Count
    num_heads: Size
    vocab_size: Size
    relative_attention_num_buckets: Annotated[int, Interval(ge=1, le=4096)] = 32
    caption_length: Annotated[int, Interval(ge=1, le=4096)] = 120

    @property
    def numbers(self) -> int:
        """Parameters of the encoder."""
        inner = self.num_heads * self.d_kv
        return self.vocab_size * self.d_model + self.num_layers * self.d_model * (4 * inner + 2 * self.d_ff)


def check_folder(folder: Path) -> None:
    """Raise `VisarError` for a folder without a T5's configuration, or with smaller files than the configuration says.

    transformers would make the tensors first, and fill those that no file has with random numbers.
    """
    if not (folder / "config.json").exists():
        raise _unreachable(folder)
    numbers = read_json(folder / "config.json", Settings).numbers
    held = sum(file.stat().st_size for suffix in (".safetensors", ".bin") for file in folder.glob(f"*{suffix}"))
    if held < numbers:  # a byte for each number, at least
        raise VisarError(
            f"{folder}/config.json says that the encoder has {numbers} numbers; its files hold {held} bytes."
        )


def _unreachable(source: str | Path) -> VisarError:
    return VisarError(
        f"Cannot load the caption encoder from {source}: give a local folder with the files of {FLAN_T5_XL}, "
        "or its hub id with a connection to the hub."
    )
