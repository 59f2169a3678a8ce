"""The settings of sampling that a model of transformers has in its `generation_config`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visar.errors import VisarError
from visar.params import SamplingParams

TAKEN = ("guidance_scale", "temperature", "top_k", "top_p")
# What else changes the ids of the stock `generate`, with the values that do not.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "min_p": (0,), "typical_p": (1,), "top_h": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,), "num_return_sequences": (1,), "bad_words_ids": (), "sequence_bias": (),
    "exponential_decay_length_penalty": (), "watermarking_config": (),
}  # fmt: skip


def configured(generation: Any, defaults: SamplingParams, codes: int, guided: bool) -> SamplingParams:
    """The defaults, with what the model's `generation_config` says instead.

    Raises `VisarError` for a setting there that visar does not have.
    """
    for name, neutral in NOT_DONE.items():
        if (value := getattr(generation, name, None)) is not None and value not in neutral:
            raise VisarError(
                f"The model's generation_config has {name}={value!r}, which visar does not do; set it to None."
            )
    own = {name: value for name in TAKEN if (value := getattr(generation, name, None)) is not None}
    if not guided:
        own.pop("guidance_scale", None)
    if isinstance(top_k := own.get("top_k"), int) and top_k >= codes:
        own["top_k"] = 0
    return replace(defaults, **own)
