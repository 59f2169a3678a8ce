"""A tiny random GLM-Image of transformers' and diffusers' own classes, and its stock ways to decode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_hf import WORDS, spread
from visar.families.hf import glm_image

CODES = 40
DRAFT = 4
TEMPLATE = "{% for m in messages %}user {% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
GREEDY = {"do_sample": False, "temperature": None, "top_p": None}


def tiny_glm(codes: int = CODES, seed: int = 0, **text: Any) -> Any:
    """The decoder: ids are `codes`, the image's start and end, 6 more that are never codes, and words."""
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageTextConfig,
        GlmImageVisionConfig,
        GlmImageVQVAEConfig,
    )

    sizes = dict(
        vocab_size=codes + 60, vision_vocab_size=codes + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=codes + 9,
        eos_token_id=codes + 1,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "mrope_section": [1, 1, 1],
        },
    )  # fmt: skip
    config = GlmImageConfig(
        text_config=GlmImageTextConfig(**sizes | text),
        vision_config=GlmImageVisionConfig(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=16, patch_size=16, image_size=64
        ),
        vq_config=GlmImageVQVAEConfig(embed_dim=8, num_embeddings=codes, latent_channels=16),
        image_token_id=codes + 8, image_start_token_id=codes, image_end_token_id=codes + 1,
    )  # fmt: skip
    model = spread(GlmImageForConditionalGeneration(config), seed, scale=2.5)
    own = model.generation_config
    own.eos_token_id, own.pad_token_id, own.temperature, own.top_p = codes + 1, codes + 9, 0.9, 0.75
    own.do_sample = True
    return model


def glm_processor(codes: int = CODES) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GlmImageProcessor, PreTrainedTokenizerFast
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    vision = [f"<code-{i}>" for i in range(codes)] + ["<start>", "<end>"] + [f"<none-{i}>" for i in range(6)]
    special = [*vision, "<|image|>", "<pad>", "<sop>", "<eop>", "<unk>"]
    known = {word: i for i, word in enumerate((*special, *WORDS, "user", *map(str, range(1, 33))))}
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, padding_side="left", pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unk>", image_token="<|image|>", grid_bos_token="<sop>", grid_eos_token="<eop>",
    )  # fmt: skip
    return GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=TEMPLATE)


def small_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft of a square image gets `DRAFT` rows, in visar and in transformers, and not 16."""
    from transformers import GlmImageProcessor

    whole = GlmImageProcessor._get_target_shape

    def smaller(self: Any, height: int, width: int) -> tuple[int, int, int, int]:
        rows, columns, *_ = whole(self, height, width)
        return rows, columns, int((rows / columns) ** 0.5 * DRAFT), int((columns / rows) ** 0.5 * DRAFT)

    monkeypatch.setattr(GlmImageProcessor, "_get_target_shape", smaller)
    monkeypatch.setattr(glm_image, "DRAFT", DRAFT)


@functools.cache
def glm() -> tuple[Any, Any]:
    """The decoder and its processor, made once."""
    return tiny_glm(), glm_processor()


def stock_inputs(processor: Any, prompts: Sequence[str], height: int, width: int) -> Any:
    """As `GlmImagePipeline.generate_prior_tokens` makes them."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
    own = {"padding": len(prompts) > 1, "target_h": height, "target_w": width}
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=own
    )


def stock_glm(
    model: Any, processor: Any, prompts: Sequence[str], height: int, width: int, suppress: bool = True, **more: Any
) -> Tensor:
    """Greedy ids [B, N] of the stock `generate`, without the ids that are no codes unless `suppress` is false."""
    inputs = stock_inputs(processor, prompts, height, width)
    length = sum(h * w for _, h, w in inputs["image_grid_thw"][:2].tolist())
    codes, every = model.config.vq_config.num_embeddings, model.config.text_config.vision_vocab_size
    banned = list(range(codes, every)) if suppress else None
    out: Tensor = model.generate(**inputs, max_new_tokens=length, suppress_tokens=banned, **GREEDY | more)
    return out[:, inputs["input_ids"].shape[1] :]


def tiny_pipeline(model: Any = None, processor: Any = None) -> Any:
    """A `GlmImagePipeline` whose other parts are tiny, too."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    own, prompts = glm()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformer = GlmImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=CODES,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 4, 8, 8), norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
            )
        )
    made = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(), processor=processor or prompts, text_encoder=encoder.eval(),
        vision_language_encoder=model or own, vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made
