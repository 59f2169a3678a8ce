"""Text encoders: a caption to features. Several families use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.errors import VisarError


def load_text_encoder(kind: str, folder: Path) -> Any:
    """The encoder of a saved folder by the name of its class. Raises `VisarError` for one that cannot be loaded."""
    from visar.families.weights import load_part
    from visar.text_encoders.t5 import T5CaptionEncoder
    from visar.text_encoders.words import WordEncoder

    classes: dict[str, Any] = {"WordEncoder": WordEncoder, "T5CaptionEncoder": T5CaptionEncoder}
    if kind not in classes:
        raise VisarError(f"{folder} holds a {kind}; text encoders are {' and '.join(classes)}.")
    return load_part(classes[kind], folder, "'text_encoder'")
