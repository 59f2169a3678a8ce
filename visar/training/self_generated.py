"""Images that a model generates itself, as tokens: what its drafter learns from. An interrupted run goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visar.drafters import fingerprint
from visar.errors import VisarError
from visar.files import replacing
from visar.generation.model import ImageModel


def generate_tokens(
    model: Any,
    conditions: Sequence[Any],
    count: int,
    file: Path,
    batch: int = 32,
    report: Callable[[int], None] = lambda done: None,
    waits: bool = False,
    **settings: Any,
) -> Tensor:
    """Tokens [count, N] of images of the conditions, in turn: all of them once, then once more with other noise.

    They are kept in `file`; `settings` go to the model's call. Of several processes all but one only `waits`. Raises
    `VisarError` where the file is damaged, or was made otherwise.
    """
    model = ImageModel.of(model)
    made_of = (
        fingerprint(model.family.drafting.model),
        model.family.layout.rows,
        list(conditions),
        sorted(settings.items()),
    )
    mark = hashlib.sha256(repr(made_of).encode()).hexdigest()

    def saved() -> Tensor:
        if not file.exists():
            return torch.empty(0, model.family.layout.length, dtype=torch.long)
        try:
            with safe_open(file, "pt") as stored:
                done, found = stored.get_tensor("tokens").long()[:count], stored.metadata()["of"]
        except Exception as error:
            raise VisarError(f"{file} is damaged; delete it to have the images generated again.") from error
        if found != mark:
            raise VisarError(f"{file} holds images of another model or other settings; give another folder.")
        return done

    done = saved()
    while waits and len(done) < count:
        time.sleep(1)
        done = saved()
    while len(done) < count:
        turn, start = divmod(len(done), len(conditions))
        part = list(conditions[start : start + min(batch, count - len(done))])
        made = model.generate(part, first_image=turn, output_type="tokens", **settings).tokens.cpu()
        done = torch.cat([done, made])
        with replacing(file) as temporary:
            save_file({"tokens": done.int()}, temporary, {"of": mark})
        report(len(done))
    return done
