"""Every check that needs a GPU, in one command: `python -m visar.eval.gpu_check [--json PATH]`. Prints a short table.

Runs without network and without weights of its own beyond the embedded model. Timings of published sizes use random
weights of the true shapes and are labelled so: they say what a pass costs, not what is accepted.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.model_session import ModelSession
from visar.engine.rng import Noise
from visar.eval.speed import PROMPTS, bandwidth, compare
from visar.files import replacing, writable_folder
from visar.kernels.philox import philox, philox_triton
from visar.models.llamagen import LlamaGen
from visar.models.specs import MODELS, gpt_arguments
from visar.pipelines import TextToImagePipeline
from visar.samplers import CONTINUOUS, SAMPLERS, Autoregressive, Sampler, SpeculativeJacobi, Target, get_sampler
from visar.tables import table

MEASURED = ("ar", "sjd", "scd", "speculative", "eagle", "lantern++", "zipar")


@dataclass(frozen=True)
class Check:
    """One line: `good` is None where a figure has no right or wrong."""

    name: str
    figure: str
    good: bool | None = None


def same_noise() -> Iterator[Check]:
    """The noise of the CPU, of torch on the GPU and of the Triton kernel, bit for bit."""
    words = [torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    a, b, c, d = words
    key = torch.tensor([1, 2])
    host = torch.stack(philox(key, (a, b, c, d)))
    on_gpu = (a.cuda(), b.cuda(), c.cuda(), d.cuda())
    yield Check(
        "philox, torch on GPU == CPU", "bits", bool((torch.stack(philox(key.cuda(), on_gpu)).cpu() == host).all())
    )
    kernel = torch.stack(philox_triton(key.cuda(), on_gpu)).cpu()
    yield Check("philox, Triton == torch", "bits", bool((kernel == host).all()))


def same_pictures(devices: tuple[str, str] = ("cpu", "cuda")) -> Iterator[Check]:
    """In fp32 the GPU must draw what the CPU draws; a near tie may flip a token and change what follows it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    pipes = [TextToImagePipeline.from_pretrained("icons").to(d, torch.float32) for d in devices]
    for name in SAMPLERS:
        tokens = []
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
            tokens.append(pipe(list(PROMPTS[:8]), sampler=name, output_type="tokens").tokens.cpu())
        same = (tokens[0] == tokens[1]).all(1).sum().item()
        yield Check(f"icons fp32, {name}: pictures equal to the CPU's", f"{same} of 8", same >= 7)


def same_continuous_pictures(devices: tuple[str, str] = ("cpu", "cuda")) -> Iterator[Check]:
    """The same of continuous tokens, which rounding moves a little and a flipped test by more."""
    pipes = [TextToImagePipeline.from_pretrained("icons-mar").to(d, torch.float32) for d in devices]
    for name in CONTINUOUS:
        tokens = []
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
            tokens.append(pipe(list(PROMPTS[:8]), sampler=name, output_type="tokens").tokens.cpu())
        same = int(((tokens[0] - tokens[1]).abs().amax((1, 2)) < 0.05).sum())
        yield Check(f"icons-mar fp32, {name}: pictures within 0.05 of the CPU's", f"{same} of 8", same >= 6)


def continuous_speed() -> Iterator[Check]:
    """The embedded MAR: head rounds, and time against plain decoding."""
    pipe = TextToImagePipeline.from_pretrained("icons-mar").to("cuda", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    samplers = {"mar": get_sampler("mar")} | {f"draft {n}": get_sampler("mar-headspec", draft=n) for n in (4, 8, 16)}
    for batch in (1, 8):
        for r in compare(pipe, samplers, batch=batch, images=8, repeats=1).rows:
            assert r.head is not None
            figure = f"{r.head.rounds_per_pass:.1f} head rounds/pass, {r.seconds_per_image:.3f} s/image"
            yield Check(f"icons-mar, batch {batch}, {r.sampler}", f"{figure}, {r.time_ratio:.2f} of mar's time")


def icons_speed() -> Iterator[Check]:
    """The embedded model, trained: real acceptance."""
    pipe = TextToImagePipeline.from_pretrained("icons").to("cuda", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for batch in (1, 8):
        report = compare(pipe, {n: get_sampler(n) for n in MEASURED}, batch=batch, images=16)
        for r in report.rows:
            figure = (
                f"{r.nfe:.0f} NFE, {r.ms_per_pass:.2f} ms/pass, {r.seconds_per_image:.3f} s/image, {r.time_ratio:.2f}"
            )
            yield Check(f"icons, batch {batch}, {r.sampler}", figure + " of AR's time")


def pass_cost(name: str, windows: tuple[int, ...] = (1, 16, 32, 64), passes: int = 24) -> Iterator[Check]:
    """Milliseconds per pass of a published size with random weights, bf16, guidance on, batch 1."""
    spec = MODELS[name]
    with torch.device("cuda"):
        model = LlamaGen(**gpt_arguments(spec)).to(torch.bfloat16).eval()
    weights = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n) * 2
    peak = bandwidth(torch.device("cuda"))
    condition = torch.zeros(1, dtype=torch.long) if spec.condition == "class" else torch.zeros(
        1, model.config.condition_length, model.config.caption_features)  # fmt: skip
    for window in windows:
        sampler: Sampler = Autoregressive() if window == 1 else SpeculativeJacobi(window=window, coupling="maximal")
        times = []
        for _ in range(3):
            session = ModelSession(model, condition, length=passes, window=window, guidance=Guidance(4.0))
            out = decode(session, sampler, Target(top_k=spec.top_k), Noise(0, torch.zeros(1, device="cuda")))
            times.append(out.seconds / out.passes)
        ms = statistics.median(times) * 1e3
        share = weights / (ms / 1e3) / 1e9 / peak
        yield Check(f"{name}, random weights, W {window}", f"{ms:.2f} ms/pass, weights at {share:.0%} of bandwidth")
    del model
    torch.cuda.empty_cache()


def checks() -> Iterator[Callable[[], Iterator[Check]]]:
    yield same_noise
    yield same_pictures
    yield icons_speed
    yield same_continuous_pictures
    yield continuous_speed
    for name in ("llamagen-b", "llamagen-xl", "llamagen-3b", "llamagen-t2i-xl"):
        yield functools.partial(pass_cost, name)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", metavar="PATH")
    path = options.parse_args().json
    if path:
        writable_folder(Path(path).parent)
    if not torch.cuda.is_available():
        print("visar: error: there is no CUDA device here; nothing was checked.", file=sys.stderr)
        return 2
    rows: list[Check] = []
    for check in checks():
        try:
            rows.extend(check())
        except Exception as error:  # one broken check must not hide the others
            rows.append(Check(getattr(check, "__name__", "check"), f"{type(error).__name__}: {error}"[:200], False))
    verdict = {True: "ok", False: "FAILED", None: ""}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(table(("CHECK", "FIGURE", ""), [(r.name, r.figure, verdict[r.good]) for r in rows]))
    if path:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    return 1 if any(r.good is False for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
