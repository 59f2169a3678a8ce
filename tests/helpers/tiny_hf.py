"""Tiny random models of transformers' own classes, with weights that are large enough for every token to matter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WORDS = ("a", "red", "blue", "heart", "star", "cat", "dog", "on", "two", "of", "them", "wide", "tall", "sky")
PROMPTS = ("a red heart", "two of them on a wide blue sky", "cat")  # of unlike lengths


def spread(model: nn.Module, seed: int = 0, scale: float = 1.5) -> Any:
    """Random weights by which distributions are neither flat nor one token; norms stay."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=scale * p[0].numel() ** -0.5)
    return model.eval()


def word_tokenizer(special: Sequence[str], **named: str) -> Any:
    """A fast tokenizer of `WORDS`, of which the first ids are the `special` tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate((*special, *WORDS, ":", "User", "Assistant"))}
    raw = Tokenizer(models.WordLevel(known, unk_token=named["unk_token"]))
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = named["bos_token"]
    raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, known[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named)


def tiny_janus(vocab: int = 50, side: int = 4, **text: Any) -> Any:
    """A Janus of `side` x `side` tokens."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = JanusConfig(
        text_config=LlamaConfig(**sizes | dict(num_key_value_heads=4, max_position_embeddings=512) | text),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16 * side, patch_size=16,
            mlp_ratio=2, projection_dim=32, num_image_tokens=side**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=vocab, latent_channels=32, base_channels=32, channel_multiplier=[1] * 5,
            num_res_blocks=1, projection_dim=32, image_token_embed_dim=32,
        ),
        image_token_id=63,
    )  # fmt: skip
    model = spread(JanusForConditionalGeneration(config))
    own = model.generation_config
    own.bos_token_id, own.pad_token_id, own.eos_token_id = 1, 0, 3
    own.generation_kwargs = {"boi_token_id": 2}
    return model


def janus_processor() -> Any:
    from transformers import JanusImageProcessor, JanusProcessor

    tokenizer = word_tokenizer(
        ("<pad>", "<bos>", "<begin_of_image>", "<eos>", "<image>", "<end_of_image>", "<unk>"),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", boi_token="<begin_of_image>",
        image_token="<image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    template = (
        "{% for m in messages %}User : {{ m['content'][0]['text'] }} {% endfor %}"
        "{% if add_generation_prompt %}Assistant : {% endif %}"
    )
    images = JanusImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # as published
    return JanusProcessor(images, tokenizer, chat_template=template, num_image_tokens=16)


@functools.cache
def janus(vocab: int = 50, side: int = 4) -> tuple[Any, Any]:
    """The model and its processor, made once."""
    return tiny_janus(vocab, side), janus_processor()


def stock_janus(model: Any, processor: Any, prompts: Sequence[str], scale: float = 5.0) -> Tensor:
    """Greedy ids [B, N] of the stock `generate`, as its documentation has it."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    ids: Tensor = model.generate(
        inputs=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_mode="image", do_sample=False,
        guidance_scale=scale, max_length=512,
    )  # fmt: skip
    return ids
