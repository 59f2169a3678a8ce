"""visar against the `generate` of transformers, on a Janus of random weights: time per token, and equality of ids.

    python -m visar.eval.benchmark.stock --dtype bfloat16

The model has the architecture of Janus-Pro at 0.15 billion parameters, so a CPU can run it. One image is decoded
greedily with guidance at batch 1, by all in turns in one process. Random weights make no difference to the time of a
pass, but their draft tokens are seldom accepted. It imports transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.eval.benchmark.decoder_shapes import DECODERS, DecoderShape
from visar.eval.benchmark.random_decoders import generate, prompt_of
from visar.families.hf.decoder import ImageDecoder
from visar.files import replacing
from visar.host import synchronize
from visar.samplers import Target, get_sampler
from visar.tables import table

PROMPT = 24  # ids
SHAPE = DECODERS["Janus-0.15B"]


@dataclass(frozen=True)
class Row:
    """Medians over the repeats: milliseconds per token, and the time of `generate` over this one's, by pairs.

    `passes` are those of an image, and `equal` is the share of its ids that are those of `generate`.
    """

    name: str
    ms_per_token: float
    passes: int
    ratio: float
    equal: float


@dataclass(frozen=True)
class AgainstStock:
    model: str
    dtype: str
    device: str
    threads: int
    parameters: int
    tokens: int
    rows: list[Row]
    weights: str = "random"

    def __str__(self) -> str:
        head = ("DECODED BY", "MS/TOKEN", "PASSES", "MS/PASS", "GENERATE'S TIME", "EQUAL IDS")
        lines = [
            (r.name, f"{r.ms_per_token:.1f}", r.passes, f"{r.ms_per_token * self.tokens / r.passes:.1f}",
             f"{r.ratio:.2f} x", f"{100 * r.equal:.0f}%")
            for r in self.rows
        ]  # fmt: skip
        return (
            f"{table(head, lines)}\n{self.model}, random weights, {self.dtype}, {self.device}, {self.threads} threads, "
            f"batch 1 with guidance, {self.tokens} tokens, prefill included; medians of repeats in turns."
        )


def measure(
    dtype: torch.dtype, device: str = "cpu", side: int = 8, repeats: int = 5, window: int = 16,
    shape: DecoderShape = SHAPE,
) -> AgainstStock:  # fmt: skip
    """An image of `side` x `side` tokens by all, in turns, after a run of each that is not counted."""
    where = torch.device(device)
    shape = replace(shape, size=replace(shape.size, tokens=side**2))
    decoder, ids = shape.make(dtype, where), prompt_of(1, PROMPT, where)
    runs: dict[str, Callable[[], tuple[Tensor, int]]] = {
        "generate": lambda: (generate(shape.kind, decoder, shape.size, ids, side**2, shape.guidance), side**2)
    }
    for name in ("ar", "scd"):
        runs[name] = partial(ours, shape, decoder, name, window)
    first = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(where)
            start = time.perf_counter()
            run()
            synchronize(where)
            seconds[name].append(time.perf_counter() - start)
    rows = [
        Row(
            name, 1e3 * statistics.median(taken) / side**2, first[name][1],
            statistics.median(a / b for a, b in zip(seconds["generate"], taken, strict=True)),
            float((first[name][0] == first["generate"][0]).float().mean()),
        )
        for name, taken in seconds.items()
    ]  # fmt: skip
    kind = str(dtype).removeprefix("torch.")
    return AgainstStock(shape.name, kind, device, torch.get_num_threads(), shape.parameters, side**2, rows)


def ours(shape: DecoderShape, decoder: ImageDecoder, name: str, window: int) -> tuple[Tensor, int]:
    """Greedy ids [1, N] by a sampler, and the passes that it took."""
    sampler = get_sampler(name, window=None if name == "ar" else window)
    noise = Noise(0, torch.zeros(1, dtype=torch.long, device=decoder.device))
    out = decode(shape.session(decoder, 1, sampler.window, PROMPT), sampler, Target(top_k=1), noise)
    return out.tokens, out.passes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--device", default="cpu")
    options.add_argument("--side", type=int, default=8, help="tokens along one side of the image (default: 8)")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    given = options.parse_args()
    found = measure(getattr(torch, given.dtype), given.device, given.side, given.repeats)
    print(found)
    if given.json:
        with replacing(given.json) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
