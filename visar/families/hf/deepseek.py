"""Janus and Janus-Pro in DeepSeek's own layout (deepseek-ai/Janus-Pro-1B and -7B), which needs their code elsewhere.

The weights become those of transformers' `JanusForConditionalGeneration`, without the parts that look at images. Keys
of the two layouts differ in names alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visar.engine.component import unfilled
from visar.errors import VisarError
from visar.families.hf.loading import check_room, load_tokenizer, unreadable
from visar.families.source import Source
from visar.families.weights import count, load_state, shape_of

MODEL_TYPE = "multi_modality"
PAD = "<｜▁pad▁｜>"
UNUSED = ("vision_model.", "aligner.", "gen_vision_model.quantize.codebook_used", "language_model.lm_head.")
VQ = "gen_vision_model."
KEYS = (  # in turn, in each key
    (r"^language_model\.model\.", "model.language_model."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (rf"^{re.escape(VQ)}", "model.vqmodel."),
    (r"\.encoder\.conv_blocks\.", ".encoder.down."),
    (r"\.decoder\.conv_blocks\.", ".decoder.up."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"\.res\.(\d)", r".block.\1"),
)


def load_deepseek(source: Source) -> tuple[Any, Any]:
    """The model, in the dtype of its files, on the CPU, in evaluation mode, and the tokenizer of its prompts.

    Raises `VisarError` for files that cannot be read, and for tensors that are missing, misshapen or unknown.
    """
    from transformers import JanusForConditionalGeneration

    assert source.folder is not None
    check_room(source.folder, (file for end in ("*.bin", "*.safetensors") for file in source.folder.glob(end)))
    given = load_state(source.folder, dtype=None)
    state = {key: value for key, value in given.items() if not key.startswith(UNUSED)}
    tokenizer = load_tokenizer(source.folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = PAD
    try:
        with unfilled():
            model: Any = JanusForConditionalGeneration(configuration(source, state))
    except VisarError:
        raise
    except Exception as error:  # of sizes that transformers does not take
        raise unreadable("the configuration", source.folder, error) from error
    inner = model.model
    inner.vision_model = inner.aligner = None
    model.lm_head = None  # of words
    own = {transformers_key(key): value for key, value in state.items()}
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    if odd := sorted(own.keys() ^ wanted.keys()):
        raise VisarError(f"Tensor {odd[0]!r} of {source.name} is {'unknown' if odd[0] in own else 'missing'}.")
    for key, shape in wanted.items():
        if own[key].shape != shape:
            raise VisarError(f"Tensor {key!r} of {source.name} has shape {list(own[key].shape)}, not {list(shape)}.")
    model.load_state_dict(own, assign=True)
    language = inner.language_model
    language.rotary_emb = type(language.rotary_emb)(config=language.config)  # its frequencies are in no file
    return model.eval().requires_grad_(False), tokenizer


def transformers_key(key: str) -> str:
    """The name of a tensor in transformers' layout."""
    for pattern, name in KEYS:
        key = re.sub(pattern, name, key)
    return key


def configuration(source: Source, state: Mapping[str, Tensor]) -> Any:
    """The `JanusConfig` of DeepSeek's configuration; sizes of the image tokenizer are those of its weights."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    language: Any = source.config.get("language_config")
    if not isinstance(language, dict):
        raise VisarError(f"{source.name}/config.json has no language_config.")
    path = source.folder or source.name
    levels = count(state, VQ + "encoder.conv_blocks.")
    widths = [shape_of(state, f"{VQ}encoder.conv_blocks.{i}.res.0.conv1.weight", path, 4)[0] for i in range(levels)]
    base = shape_of(state, VQ + "encoder.conv_in.weight", path, 4)[0]
    codes, dim = shape_of(state, VQ + "quantize.embedding.weight", path)
    embedded = shape_of(state, "gen_aligner.layers.0.weight", path)[0]
    head = shape_of(state, "gen_head.output_mlp_projector.weight", path)[0]
    vq = JanusVQVAEConfig(
        embed_dim=dim, num_embeddings=codes, latent_channels=shape_of(state, VQ + "post_quant_conv.weight", path, 4)[0],
        base_channels=base, channel_multiplier=[width // base for width in widths],
        num_res_blocks=count(state, VQ + "encoder.conv_blocks.0.res."), projection_dim=embedded,
        image_token_embed_dim=head,
    )  # fmt: skip
    seen, side = source.config.get("vision_config"), 384
    if isinstance(seen, dict) and isinstance(given := seen.get("params"), dict):
        side = int(given.get("image_size", side))
    cell = 2 ** (levels - 1)
    vision = JanusVisionConfig(image_size=side, patch_size=cell, num_image_tokens=(side // cell) ** 2)
    return JanusConfig(text_config=LlamaConfig(**language), vision_config=vision, vq_config=vq)
