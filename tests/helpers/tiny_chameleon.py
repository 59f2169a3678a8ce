"""Tiny random Chameleons of transformers' own class, as Anole and as Lumina-mGPT, and a plain loop of greedy ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny_hf import PROMPTS, WORDS, spread
from tests.helpers.tiny_vqgan import tiny_vqgan

WIDTHS = (32, 32, 32, 32, 64)  # of an image decoder of cells of 16 pixels
LETTERS = "ABCDEFGHIJ"
SPECIAL = ("<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08707>", "<image>", "<reserved08799>")
MORE = ("Generate", "an", "image", "of", "according", "to", "the", "following", "prompt:", "x", *"0123456789")


def code_name(code: int) -> str:
    return "IMGIMG" + "".join(LETTERS[int(digit)] for digit in str(code)) + "Z"


def vocabulary(codes: int) -> dict[str, int]:
    """Ids by token: the codes follow one another after the first four, as in the published models."""
    sizes = [f"<reserved{8800 + n:05d}>" for n in (*range(1, 9), 16, 24)]
    names = ("<s>", "<pad>", "</s>", "<unk>", *map(code_name, range(codes)), *SPECIAL, *sizes, *WORDS, *MORE)
    return {name: n for n, name in enumerate(dict.fromkeys(names))}


def chameleon_tokenizer(codes: int = 16) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = vocabulary(codes)
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.add_special_tokens([AddedToken(name, special=True) for name in known if name.startswith("<")])
    split = pre_tokenizers.Split(Regex(r"(?<=[0-9x])(?=[0-9x])"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        sep_token="<reserved08706>", padding_side="left",
    )  # fmt: skip


def tiny_chameleon(codes: int = 16, lumina: bool = False, seed: int = 17, **text: Any) -> Any:
    """Cells of 16 pixels; the images of an Anole have 3 x 3 of them."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    known = vocabulary(codes)
    sizes = dict(
        vocab_size=len(known), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    vq = dict(
        embed_dim=8, num_embeddings=codes, latent_channels=32, base_channels=32, channel_multiplier=[1] * 5,
        num_res_blocks=1, resolution=48,
    )  # fmt: skip
    more = {"mask_image_logits": False} if lumina else {}
    model = spread(
        ChameleonForConditionalGeneration(
            ChameleonConfig(**sizes | text, **more, vq_config=vq, vocabulary_map=known)  # type: ignore[arg-type]
        ),
        seed=seed,
    )
    for name, weight in model.named_parameters():  # norms of queries and keys that differ by head
        if "q_norm" in name or "k_norm" in name:
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    return model


def save(path: Path, lumina: bool) -> None:
    """A folder in the published form, with Meta's file of the image decoder."""
    tiny_chameleon(lumina=lumina, max_position_embeddings=4096).save_pretrained(path)
    chameleon_tokenizer().save_pretrained(path)
    (path / "tokenizer").mkdir()
    torch.save({"state_dict": tiny_vqgan(16, WIDTHS, attention=False)}, path / "tokenizer" / "vqgan.ckpt")


@functools.cache
def chameleon(lumina: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer, made once."""
    return tiny_chameleon(lumina=lumina), chameleon_tokenizer()


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[list[int]], others: Sequence[list[int]], length: int, scale: float, stride: int = 0
) -> Tensor:
    """Greedy ids [B, length], one prompt after another and without a cache: `model.model`, all of its `lm_head`, the
    two batches of guidance, then everything but codes masked; with `stride` each row of the image ends in a token."""
    known = model.model.vocabulary_mapping.vocab_map
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[[n for name, n in known.items() if name.startswith("IMGIMG")]] = True
    out = []
    for ids, other in zip(prompts, others, strict=True):
        found: list[int] = []
        for n in range(length):
            if stride and (n + 1) % stride == 0:
                found.append(known["<reserved08799>"])
                continue
            c, u = (model.lm_head(model.model(torch.tensor([p + found]))[0][0, -1]) for p in (ids, other))
            guided = (u + scale * (c - u)).masked_fill(~allowed, -torch.inf)
            found.append(int(guided.argmax()))
        out.append(found)
    return torch.tensor(out)


def ids_of(text: str, codes: int = 16) -> list[int]:
    """Of words and tokens with blanks between them."""
    return [vocabulary(codes)[word] for word in text.split()]


def prompts_of(lumina: bool, side: tuple[int, int] = (64, 96)) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of `PROMPTS` and of the unconditional batch, written out; `side` is height and width."""
    if not lumina:
        return [ids_of(f"<s> {text} <reserved08706> <racm3:break>") for text in PROMPTS], [
            ids_of("<s> <racm3:break>")
        ] * len(PROMPTS)
    height, width = side
    image = f"<racm3:break> <reserved{8800 + height // 32:05d}> <reserved{8800 + width // 32:05d}>"
    size = " ".join(f"{width}x{height}")
    ask = f"<s> Generate an image of {size} according to the following prompt:"
    return [ids_of(f"{ask} {text} <reserved08706> {image}") for text in PROMPTS], [ids_of(image)] * len(PROMPTS)
