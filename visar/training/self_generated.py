"""Images that a model draws itself, as tokens: what its drafter learns from. An interrupted run goes on."""

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


def draw_tokens(
    model: Any,
    conditions: Sequence[Any],
    count: int,
    file: Path,
    batch: int = 32,
    report: Callable[[int], None] = lambda done: None,
    draws: bool = True,
    **settings: Any,
) -> Tensor:
    """Tokens [count, N] of images of the conditions, in turn: all of them once, then once more with other noise.

    What is drawn is kept in `file`; `settings` go to the model's call. Of several processes only one `draws`, and the
    others wait for it. Raises `VisarError` where the file is damaged, or was made otherwise.
    """
    made_of = (fingerprint(model.family.model), model.family.layout.rows, list(conditions), sorted(settings.items()))
    mark = hashlib.sha256(repr(made_of).encode()).hexdigest()

    def drawn_before() -> Tensor:
        if not file.exists():
            return torch.empty(0, model.family.layout.length, dtype=torch.long)
        try:
            with safe_open(file, "pt") as saved:
                done, found = saved.get_tensor("tokens").long()[:count], saved.metadata()["of"]
        except Exception as error:
            raise VisarError(f"{file} is damaged; delete it to have the images drawn anew.") from error
        if found != mark:
            raise VisarError(f"{file} holds images of another model or other settings; give another folder.")
        return done

    done = drawn_before()
    while not draws and len(done) < count:
        time.sleep(1)
        done = drawn_before()
    while len(done) < count:
        turn, start = divmod(len(done), len(conditions))
        part = list(conditions[start : start + min(batch, count - len(done))])
        drawn = model.generate(part, first_image=turn, output_type="tokens", **settings).tokens.cpu()
        done = torch.cat([done, drawn])
        with replacing(file) as temporary:
            save_file({"tokens": done.int()}, temporary, {"of": mark})
        report(len(done))
    return done
