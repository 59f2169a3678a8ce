"""Text encoders: a caption to features. Several families use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.errors import VisarError


def load_text_encoder(kind: str, folder: Path, own: Path) -> Any:
    """The encoder of a saved folder by the name of its class. Raises `VisarError` for one that cannot be loaded.

    `own` is another folder than that if the model shares the encoder of an embedded one: words are shared, and what
    was in training is not, so the list of it is read there.
    """
    from visar.families.weights import load_part
    from visar.text_encoders.concepts import Concepts
    from visar.text_encoders.t5 import T5CaptionEncoder
    from visar.text_encoders.words import WordEncoder

    classes: dict[str, Any] = {"WordEncoder": WordEncoder, "T5CaptionEncoder": T5CaptionEncoder}
    if kind not in classes:
        raise VisarError(f"{folder} holds a {kind}; text encoders are {' and '.join(classes)}.")
    encoder = load_part(classes[kind], folder, "'text_encoder'")
    if isinstance(encoder, WordEncoder) and own != folder:
        encoder.concepts = Concepts.find(own)
    return encoder
