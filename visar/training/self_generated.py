"""Images that a model generates itself, as tokens, and what was drafted meanwhile. An interrupted run goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visar.drafters import fingerprint
from visar.errors import VisarError
from visar.files import locked, replacing
from visar.generation.model import ImageModel
from visar.generation.progress import Progress


class Generated(NamedTuple):
    """`tokens` [n, N] of images, and what the window drafted while each was decoded: `drafts` [n, N, W - 1].

    `drafts[i, k]` are the drafts of the positions from k on, when k tokens of image i were committed; -1 where no pass
    began there, or past the end of the image. W is 1 where a sampler without a window made the images.
    """

    tokens: Tensor
    drafts: Tensor


def generate_tokens(
    model: Any,
    conditions: Sequence[Any],
    count: int,
    file: Path,
    batch: int = 32,
    report: Callable[[int], None] = lambda done: None,
    waits: bool = False,
    window: int = 1,
    **settings: Any,
) -> Generated:
    """Images of the conditions, in turn: `count` in all, each condition once, then once more with other noise.

    They are kept in `file`; `settings` go to the model's call. With a `window` above 1 the sampler has such a one, and
    its drafts are recorded. Of several processes all but one only `waits`. Raises `VisarError` where the file is
    damaged or was made otherwise, and while another run samples it.
    """
    model = ImageModel.of(model)
    length = model.family.layout.length
    if window > 1:
        settings["window"] = window
    made_of = (
        fingerprint(model.family.drafting.model),
        model.family.layout.rows,
        list(conditions),
        sorted(settings.items()),
    )
    mark = hashlib.sha256(repr(made_of).encode()).hexdigest()

    def saved() -> Generated:
        if not file.exists():
            empty = torch.empty(0, length, dtype=torch.long)
            return Generated(empty, empty[:, :, None].expand(-1, -1, window - 1))
        try:
            with safe_open(file, "pt") as stored:
                found, its = {name: stored.get_tensor(name).long()[:count] for name in stored.keys()}, stored.metadata()  # noqa: SIM118
                done = Generated(found["tokens"], found.get("drafts", found["tokens"].new_empty(0)))
        except Exception as error:
            raise VisarError(f"{file} is damaged; delete it to have the images generated again.") from error
        if (its or {}).get("of") != mark:
            raise VisarError(f"{file} holds images of another model or other settings; give another folder.")
        return done

    done = saved()
    while waits and len(done.tokens) < count:
        time.sleep(1)
        done = saved()
    if len(done.tokens) == count:
        return done
    with locked(file.with_name(f".{file.name}.lock"), f"Another run samples {file}; wait until it ends.", False):
        done = saved()  # another run may have added some
        while len(done.tokens) < count:
            turn, start = divmod(len(done.tokens), len(conditions))
            part = list(conditions[start : start + min(batch, count - len(done.tokens))])
            windows = Windows(len(part), length, window)
            made = model.generate(
                part, first_image=turn, output_type="tokens", callback=windows if window > 1 else None, **settings
            )
            new = Generated(made.tokens.cpu(), windows.drafts)
            done = Generated(*(torch.cat(both) for both in zip(done, new, strict=True)))
            tensors: Mapping[str, Tensor] = done._asdict() if window > 1 else {"tokens": done.tokens}
            with replacing(file) as temporary:
                save_file({name: x.int() for name, x in tensors.items()}, temporary, {"of": mark})
            report(len(done.tokens))
    return done


class Windows:
    """A callback that records the drafts of every pass but the first, whose drafts are noise: those of `Generated`."""

    def __init__(self, batch: int, length: int, window: int):
        self.drafts = torch.full((batch, length, window - 1), -1)

    def __call__(self, now: Progress) -> None:
        batch, length, ahead = self.drafts.shape
        at = now.lengths.cpu()[:, None] + torch.arange(ahead)
        drafts = now.tokens.cpu().gather(1, at.clamp_max(length - 1)).masked_fill(at >= length, -1)
        rows = torch.arange(batch)[now.lengths.cpu() < length]
        self.drafts[rows, now.lengths.cpu()[rows]] = drafts[rows]
