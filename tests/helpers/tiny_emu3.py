"""Tiny random Emu3 models of transformers' own classes, their processors, and the stock `generate` as documented."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tests.helpers.tiny_hf import WORDS, spread
from visar.families.hf.emu3 import NEGATIVE

SPECIAL = (
    "<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<|extra_200|>", "<|extra_201|>", "<|image start|>",
    "<|image end|>", "<|image token|>", "<image>", "<|extra_100|>",
)  # fmt: skip
MORE = ("*", *"0123456789", "You", "are", "assistant.", "USER:", "ASSISTANT:", "lowres,", "blurry.")


def vocabulary(codes: int) -> dict[str, int]:
    """Ids by token: the codes come last and follow one another, as in the published models."""
    names = (*SPECIAL, *WORDS, *MORE, *(f"<|visual token {n:06d}|>" for n in range(codes)))
    return {name: n for n, name in enumerate(names)}


def emu3_tokenizer(codes: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = vocabulary(codes)
    raw = Tokenizer(models.WordLevel(known, unk_token="<|endoftext|>"))
    raw.add_special_tokens([AddedToken(name, special=True) for name in known if name.startswith("<")])
    split = pre_tokenizers.Split(Regex(r"[0-9*]"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|extra_203|>", eos_token="<|extra_204|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", padding_side="left",
        model_specific_special_tokens=dict(
            image_token="<image>", boi_token="<|image start|>", eoi_token="<|image end|>",
            image_wrapper_token="<|image token|>", eof_token="<|extra_201|>",
        ),
    )  # fmt: skip


def tiny_emu3(codes: int = 16, **text: Any) -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

    known = vocabulary(codes)
    sizes = dict(
        vocab_size=len(known), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = Emu3Config(
        text_config=Emu3TextConfig(**sizes | text),
        vq_config=Emu3VQVAEConfig(
            codebook_size=codes, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1] * 4,
            num_res_blocks=1, attn_resolutions=[3], hidden_size=32,
        ),
        vocabulary_map=known,
    )  # fmt: skip
    return spread(Emu3ForConditionalGeneration(config), seed=7)


def emu3_processor(codes: int = 16, ratio: str = "3:4", area: int = 768) -> Any:
    """By default for images of 4 rows of 3 codes."""
    from transformers import Emu3ImageProcessor, Emu3Processor

    made = Emu3Processor(Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3), emu3_tokenizer(codes))
    made.ratio, made.image_area = ratio, area
    return made


@functools.cache
def emu3() -> tuple[Any, Any]:
    """The model and its processor, made once."""
    return tiny_emu3(), emu3_processor()


def row_rule(processor: Any, rows: int, columns: int, codes: list[int]) -> Callable[[int, Tensor], Any]:
    """The `prefix_allowed_tokens_fn` of transformers' documentation."""
    t = processor.tokenizer
    line_end, frame_end = t.convert_tokens_to_ids(["<|extra_200|>", "<|extra_201|>"])
    last = (columns + 1) * rows
    after = {last + 1: frame_end, last + 2: t.eoi_token_id, last + 3: t.eos_token_id}

    def allowed(_: int, ids: Tensor) -> Any:
        offset = len(ids) - int((ids == t.image_wrapper_token_id).nonzero()[0])
        return codes if offset < last and offset % (columns + 1) else [after.get(offset, line_end)]

    return allowed


def stock_emu3(model: Any, processor: Any, prompts: Sequence[str], scale: float = 3.0) -> Tensor:
    """Greedy ids [B, n] after the prompts, by the stock `generate`."""
    call = dict(return_tensors="pt", padding=True, return_for_image_generation=True)
    inputs = processor(text=list(prompts), **call)
    negative = processor(text=[NEGATIVE] * len(prompts), **call)
    rows, columns = (int(n) for n in inputs.pop("image_sizes")[0])
    ids: Tensor = model.generate(
        **inputs, do_sample=False, max_new_tokens=(columns + 1) * rows + 3, guidance_scale=scale,
        prefix_allowed_tokens_fn=row_rule(processor, rows, columns, model.vocabulary_mapping.image_tokens),
        negative_prompt_ids=negative["input_ids"], negative_prompt_attention_mask=negative["attention_mask"],
    )  # fmt: skip
    return ids[:, inputs["input_ids"].shape[1] :]


def tiny_qwen3(codes: int = 16) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        vocab_size=len(vocabulary(codes)), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=8192, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    return spread(Qwen3ForCausalLM(Qwen3Config(**sizes)), seed=13)
