"""Decoders of transformers with random weights in published sizes, and the stock `generate` of each.

What a pass runs has its true size. What it does not run, the encoders of images and decoders of pixels, is as small as
the classes allow, so that the memory is for the decoder. Prompts are random ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.component import unfilled
from visar.engine.quantization import QuantizedLinear
from visar.families.hf.decoder import ImageDecoder
from visar.families.hf.sizes import CODE_DIM, DecoderSize

PAD, FIRST, START = 0, 1, 2  # ids that pad a prompt, begin it, and begin the image
CODE = 4  # the first code of a Chameleon
LEAST = dict(base_channels=32, num_res_blocks=1)  # of image tokenizers, whose norms have 32 groups


@dataclass(frozen=True)
class Kind:
    """How a kind of decoder is made: its `model` in a size, and what decodes its image tokens."""

    model: Callable[[DecoderSize], Any]
    decoder: Callable[[Any, DecoderSize], ImageDecoder]


def text_sizes(size: DecoderSize, **more: Any) -> dict[str, Any]:
    """As configurations of transformers name them. No id ends a text, so that `generate` never stops early."""
    return dict(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=size.ffn, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=size.context,
        pad_token_id=PAD, bos_token_id=FIRST, eos_token_id=None,
    ) | more  # fmt: skip


def _janus(size: DecoderSize) -> Any:
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    side = math.isqrt(size.tokens)
    model: Any = JanusForConditionalGeneration(JanusConfig(
        text_config=LlamaConfig(**text_sizes(size, head_dim=size.head_dim)),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16 * side, patch_size=16,
            mlp_ratio=2, projection_dim=size.dim, num_image_tokens=size.tokens,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=CODE_DIM, num_embeddings=size.codes, latent_channels=32, channel_multiplier=[1] * 5,
            num_patches=side, projection_dim=size.dim, image_token_embed_dim=size.dim, **LEAST,
        ),
        image_token_id=size.vocab - 1,
    ))  # fmt: skip
    model.generation_config.generation_kwargs = {"boi_token_id": START}
    return model


def _glm(size: DecoderSize) -> Any:
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageTextConfig,
        GlmImageVisionConfig,
        GlmImageVQVAEConfig,
    )

    turned = size.head_dim // 4  # half of a head's dimensions are turned, in pairs
    sections = [turned // 4, turned * 3 // 8, turned - turned // 4 - turned * 3 // 8]
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=sections)
    return GlmImageForConditionalGeneration(GlmImageConfig(
        text_config=GlmImageTextConfig(**text_sizes(size, vision_vocab_size=size.head, rope_parameters=rope)),
        vision_config=GlmImageVisionConfig(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=16, patch_size=16, image_size=64
        ),
        vq_config=GlmImageVQVAEConfig(embed_dim=8, num_embeddings=size.codes, latent_channels=16),
        image_token_id=size.vocab - 1, image_start_token_id=size.codes, image_end_token_id=size.codes + 1,
    ))  # fmt: skip


def _emu3(size: DecoderSize) -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

    return Emu3ForConditionalGeneration(Emu3Config(
        text_config=Emu3TextConfig(**text_sizes(size)),
        vq_config=Emu3VQVAEConfig(
            codebook_size=size.codes, embed_dim=4, latent_channels=4, channel_multiplier=[1] * 4, attn_resolutions=[3],
            hidden_size=32, **LEAST,
        ),
        vocabulary_map={"<image>": 3},
    ))  # fmt: skip


def _qwen3(size: DecoderSize) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**text_sizes(size, head_dim=size.head_dim, tie_word_embeddings=False)))


def _chameleon(size: DecoderSize) -> Any:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vq = dict(embed_dim=8, num_embeddings=size.codes, latent_channels=32, channel_multiplier=[1] * 5, **LEAST)
    words = {"<image>": 3} | {f"IMGIMG{n}Z": CODE + n for n in range(size.codes)}
    return ChameleonForConditionalGeneration(ChameleonConfig(**text_sizes(size), vq_config=vq, vocabulary_map=words))


def _of_janus(model: Any, size: DecoderSize) -> ImageDecoder:
    from visar.families.hf.janus import JanusDecoder

    return JanusDecoder(model)


def glm_grids(size: DecoderSize) -> list[tuple[int, int]]:
    """Of a square image, whose draft has a quarter of its tokens."""
    side = math.isqrt(size.tokens * 4 // 5)
    return [(side // 2, side // 2), (side, side)]


def _of_glm(model: Any, size: DecoderSize) -> ImageDecoder:
    from visar.families.hf.glm_image import GlmDecoder

    return GlmDecoder(model, size.codes, glm_grids(size))


def _of_grid(model: Any, size: DecoderSize) -> ImageDecoder:
    from visar.families.hf.grid import GridDecoder

    return GridDecoder(model, range(size.vocab - size.codes, size.vocab), size.vocab - size.codes - 1)


def _of_chameleon(model: Any, size: DecoderSize) -> ImageDecoder:
    from visar.families.hf.chameleon import ChameleonDecoder, LuminaDecoder

    codes = range(CODE, CODE + size.codes)
    return LuminaDecoder(model, codes, size.vocab - 1) if size.line_ends else ChameleonDecoder(model, codes)


KINDS = {
    "janus": Kind(_janus, _of_janus), "glm": Kind(_glm, _of_glm), "emu3": Kind(_emu3, _of_grid),
    "qwen3": Kind(_qwen3, _of_grid), "chameleon": Kind(_chameleon, _of_chameleon),
}  # fmt: skip


def random_decoder(
    kind: str, size: DecoderSize, dtype: torch.dtype, device: torch.device, stored: str = "native"
) -> ImageDecoder:
    """A decoder, whose `model` is transformers' own, made in its dtype on its device without a copy in another.

    With layers `stored` in 8 bits it begins on the meta device, where it stays if that is its device, and each matrix
    is rounded as it is made: memory never holds two in their dtype. Buffers of parts that no pass runs stay there.
    """
    before, small = torch.get_default_dtype(), stored != "native" and device.type != "meta"
    torch.set_default_dtype(dtype)
    try:
        with unfilled("meta" if small else device):
            model = KINDS[kind].model(size)
        if small:
            _remake_rotary(model, device)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0) if device.type != "meta" else None
    layers = [module for module in model.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    for name, p in list(model.named_parameters()):
        above, _, own = name.rpartition(".")
        module = model.get_submodule(above)
        if small:
            p = nn.Parameter(torch.empty_like(p, device=device), requires_grad=False)
            setattr(module, own, p)
        # So wide that greedy tokens differ clearly, and norms and biases as they begin.
        wide = 1.5 * math.sqrt(3 / p[0].numel()) if p.ndim > 1 else 0.0
        with torch.no_grad():
            p.uniform_(-wide, wide, generator=generator) if wide else p.fill_(0.0 if own == "bias" else 1.0)
        if small and own == "weight" and any(module is layer for layer in layers):
            parent, _, child = above.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, stored))
    if small:
        model.tie_weights()
    model.eval().requires_grad_(False)
    decoder = KINDS[kind].decoder(model, size)
    decoder.model = model  # type: ignore[attr-defined]
    return decoder


def _remake_rotary(model: Any, device: torch.device) -> None:
    """Give the frequencies of rotary positions, which are no parameters, their values."""
    for module in list(model.modules()):
        if (rotary := getattr(module, "rotary_emb", None)) is not None:
            module.rotary_emb = type(rotary)(config=rotary.config).to(device)


def prompt_of(batch: int, ids: int, device: torch.device) -> Tensor:
    """Ids [B, n] of prompts that begin an image."""
    found = torch.randint(4, 60, (batch, ids), generator=torch.Generator().manual_seed(0))
    found[:, 0], found[:, -1] = FIRST, START
    return found.to(device)


def unconditional(ids: Tensor) -> Tensor:
    """As Janus's: the ids of a prompt that are words are padding."""
    return torch.where((ids == FIRST) | (ids == START), ids, PAD)


@torch.inference_mode()
def generate(
    kind: str, decoder: Any, size: DecoderSize, ids: Tensor, count: int, scale: float, **sampling: Any
) -> Tensor:
    """The first `count` tokens [B, count] by the stock `generate`, as ids of the model. Greedy without `sampling`.

    Nothing keeps it to codes, which would cost it time.
    """
    model = decoder.model
    call: dict[str, Any] = dict(attention_mask=torch.ones_like(ids), do_sample=bool(sampling), **sampling)
    if kind == "janus":  # it decodes a whole image, whatever is asked
        own = model.model.vision_model.config
        whole, own.num_image_tokens = own.num_image_tokens, count
        try:
            found: Tensor = model.generate(
                inputs=ids, generation_mode="image", guidance_scale=scale, max_length=ids.shape[1] + whole, **call
            )
        finally:
            own.num_image_tokens = whole
        return found
    if kind == "glm":
        ids = torch.where(ids == START, size.codes, ids)
        grids = torch.tensor([(1, *grid) for grid in reversed(glm_grids(size))], device=ids.device)
        call |= dict(image_grid_thw=grids.repeat(len(ids), 1), images_per_sample=torch.full((len(ids),), 2))
    elif scale != 1:
        call |= dict(guidance_scale=scale, negative_prompt_ids=unconditional(ids))
        call |= dict(negative_prompt_attention_mask=torch.ones_like(ids))
    found = model.generate(ids, max_new_tokens=count, **call)
    return found[:, ids.shape[1] :]
