"""Every check that needs a GPU, in one command: `python -m visar.eval.benchmark.gpu_check [--json PATH]`. Prints a
short table.

Runs without network and without weights of its own beyond the embedded models, and ends in less than 8 minutes: what is
not done by then is left out, and said to be. A fault of CUDA spoils all that its process does later; `--sections` gives
a doubtful section a process of its own. Timings of published sizes use random weights of the true shapes and are
labelled so: they give the time of a pass and no acceptance rate. `--dry-run` does all of it on the CPU, with tiny
shapes and under Triton's interpreter, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

# Before anything imports Triton: a dry run is under its interpreter.
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.eval.benchmark import kernel_checks, shapes
from visar.eval.benchmark.decoder_shapes import DecoderShape
from visar.eval.benchmark.llamagen_shapes import LlamaGenShape
from visar.eval.benchmark.profiling import PassProfile, profile_model, profile_text
from visar.eval.benchmark.shape import Shape
from visar.eval.benchmark.shapes import SHAPES, ShapeReport, ShapeRow, shapes_text
from visar.eval.benchmark.speed import bandwidth, compare, device_title
from visar.eval.exactness.dtype import forced_logits
from visar.eval.prompts import PROMPTS
from visar.families.hf.sizes import DecoderSize
from visar.families.llamagen.specs import GPTShape
from visar.files import replacing, writable_folder
from visar.generation.model import ImageModel
from visar.kernels.backend import backend, triton
from visar.kernels.invariant import invariant
from visar.kernels.philox import philox, philox_triton
from visar.samplers import get_sampler, samplers_for, spec_of
from visar.tables import table

MEASURED = ("ar", "sjd", "scd", "speculative", "eagle", "lantern++", "zipar")
SECONDS = 430.0  # what has not begun by then is left out
# Published shapes and batches, the most valuable first; the others come after all other sections.
FIRST_SHAPES = (("XL-384", 1), ("GLM-Image-1024", 1), ("Janus-Pro-7B", 1), ("Emu3-720", 1))
OTHER_SHAPES = (
    ("Lumina-7B-768", 1), ("Janus-Pro-1B", 1), ("3B-384", 1), ("Emu3.5-1024", 1), ("Emu3.5-1024-int8", 1),
    ("XL-384", 8), ("XL-512", 1), ("3B-384", 8), ("L-384", 1), ("L-384", 8), ("XL-512", 8), ("Janus-Pro-7B", 8),
    ("GLM-Image-1024", 8),
)  # fmt: skip
_CLASSES = LlamaGenShape("tiny", GPTShape(2, 64, 2, 96, vocab=128, classes=5), "class", 6, 4.0, 10)
_TEXTS = LlamaGenShape("tiny-text", GPTShape(2, 64, 2, 96, 6, 128, 5, 8), "text", 4, 4.0, 10)
_JANUS = DecoderSize(2, 32, 4, 4, 48, vocab=90, codes=16, tokens=16, context=256, head_dim=8, own_codes=True)
_QWEN = DecoderSize(2, 32, 4, 2, 48, vocab=90, codes=16, tokens=20, context=256, head_dim=8, line_ends=4, qk_norm=16)
_QUANTIZED = DecoderShape("tiny-int8", "qwen3", _QWEN, 5.0, 8, stored="int8")
TINY_FIRST = ((_CLASSES, 1), (DecoderShape("tiny-janus", "janus", _JANUS, 5.0, 0), 1))
TINY_OTHER = ((_CLASSES, 2), (_TEXTS, 1), (_TEXTS, 2), (_QUANTIZED, 1))


@dataclass
class Run:
    """What is run where, and the measurements that come with the checks."""

    device: torch.device
    dry: bool
    bandwidth: float = 0.0
    kernels: list[kernel_checks.Outcome] = field(default_factory=list)
    shapes: list[ShapeRow] = field(default_factory=list)
    profiles: dict[str, PassProfile] = field(default_factory=dict)
    models: dict[Any, Any] = field(default_factory=dict)

    def model(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Any:
        """An embedded model; in a dry run one whose images are of few tokens."""
        key = name, dtype, device or self.device
        if key not in self.models:
            model = ImageModel.load(name).to(device or self.device, dtype)
            if self.dry and name == "icons":
                family = model.family
                model = ImageModel(type(family).of(family.components, {**family.settings, "grid": 4}), model.folder)
            model.bar = {"disable": True}
            self.models[key] = model
        return self.models[key]

    def images(self, full: int) -> list[str]:
        return list(PROMPTS[: 1 if self.dry else full])


@dataclass(frozen=True)
class Check:
    """One line: `good` is None where a result has no right or wrong."""

    name: str
    result: str
    good: bool | None = None


T = TypeVar("T")


def each(items: Iterable[tuple[str, T]], check: Callable[[T], Check]) -> Iterator[Check]:
    """A check of each named item; one that breaks is a failed line, and must not hide the others."""
    for name, item in items:
        try:
            found = check(item)
        except Exception as error:
            found = Check(name, f"{type(error).__name__}: {error}"[:200], False)
        yield found
        if found.good is False:
            with suppress(Exception):  # a fault of CUDA stays
                torch.cuda.empty_cache()


def same_noise(run: Run) -> Iterator[Check]:
    """The noise of the CPU, of torch on the GPU and of the Triton kernel, bit for bit."""
    count = 300 if run.dry else 100_000
    words = [torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    a, b, c, d = words
    key = torch.tensor([1, 2])
    host = torch.stack(philox(key, (a, b, c, d)))
    there = (a.to(run.device), b.to(run.device), c.to(run.device), d.to(run.device))
    on_device = torch.stack(philox(key.to(run.device), there)).cpu()
    yield Check("philox, torch on the device == CPU", "bits", bool((on_device == host).all()))
    if triton is not None:
        kernel = torch.stack(philox_triton(key.to(run.device), there)).cpu()
        yield Check("philox, Triton == torch", "bits", bool((kernel == host).all()))


def kernels(run: Run) -> Iterator[Check]:
    """Each Triton kernel against its torch form, its time and the bandwidth that it reaches."""
    if triton is None:
        yield Check("kernels", "Triton is not installed: plain torch runs instead")
        return
    run.bandwidth = bandwidth(run.device, 8 if run.dry else 256)
    sizes = kernel_checks.TINY if run.dry else kernel_checks.XL
    for dtype in (torch.float32,) if run.dry else (torch.float32, torch.bfloat16):
        kind = "fp32" if dtype == torch.float32 else "bf16"

        def check(case: kernel_checks.Case, kind: str = kind) -> Check:
            o = kernel_checks.run(case, sizes, run.device, 1 if run.dry else 20)
            run.kernels.append(o)
            result = f"off by {o.difference:.1e}, {o.microseconds:.1f} us, torch {o.torch_microseconds:.1f} us"
            share = f", {o.gb_per_second:.0f} GB/s, {o.gb_per_second / run.bandwidth:.0%} of a copy"
            return Check(f"{case.name}, {kind}", result + share, o.same)

        cases = kernel_checks.cases(sizes, run.device, dtype)
        yield from each(((f"{case.name}, {kind}", case) for case in cases), check)


def same_bits(run: Run) -> Iterator[Check]:
    """In the invariant mode the logits of a position do not depend on the width of a pass and on the batch."""
    if triton is None:
        yield Check("invariant logits", "Triton is not installed: the mode is refused")
        return
    sizes = ((2, 1), (3, 2)) if run.dry else ((2, 1), (5, 1), (16, 8), (64, 8))
    count, most = (3, 2) if run.dry else (80, 8)
    model = run.model("icons", torch.float32 if run.dry else torch.bfloat16)
    tokens = torch.randint(2048, (most, count), generator=torch.Generator().manual_seed(0))
    # A dry run is of Triton's forms too.
    with invariant(), backend("triton" if run.dry else "auto"), torch.inference_mode():
        encoded = model.family.encode(list(PROMPTS[:most]))

        def logits(window: int, batch: int) -> torch.Tensor:
            first = tuple(part[:batch] for part in encoded)
            session = model.family.session(first, window=window, guidance=Guidance(1.5))
            return forced_logits(session, tokens[:batch], window)[0]

        alone = logits(1, 1)
        for window, batch in sizes:
            same = torch.equal(logits(window, batch), alone)
            yield Check(f"invariant logits, W {window} and batch {batch} == W 1 and batch 1", "bits", same)


def first_shapes(run: Run) -> Iterator[Check]:
    """The time of a pass of published shapes; random weights."""
    return shape_rows(run, TINY_FIRST if run.dry else [(SHAPES[name], batch) for name, batch in FIRST_SHAPES])


def other_shapes(run: Run) -> Iterator[Check]:
    return shape_rows(run, TINY_OTHER if run.dry else [(SHAPES[name], batch) for name, batch in OTHER_SHAPES])


def shape_rows(run: Run, chosen: Sequence[tuple[Shape, int]]) -> Iterator[Check]:
    options: dict[str, Any] = {} if not run.dry else dict(windows=(1, 4), repeats=1, passes=2)

    def check(item: tuple[Shape, int]) -> Check:
        shape, batch = item
        name = f"{shape.name}, random weights, batch {batch}"
        try:
            report = shapes.measure([shape], batches=(batch,), dtypes=(torch.bfloat16,), device=run.device, **options)
        except VisarError as error:  # too little memory
            return Check(name, str(error))
        row, run.bandwidth = report.rows[0], report.bandwidth
        run.shapes.append(row)
        ms = " / ".join(f"{t:.2f}" for t in row.ms_per_pass.values())
        windows = ", ".join(str(w) for w in row.ms_per_pass)
        result = f"{ms} ms/pass at W = {windows}, {row.of_bandwidth[1]:.0%} of bandwidth"
        stock = row.note if row.stock_ratio is None else f"stock loop {row.stock_ratio:.1f} x AR"
        return Check(name, f"{result}, AR {row.seconds_per_image:.2f} s/image, {stock}")

    yield from each(((f"{shape.name}, batch {batch}", (shape, batch)) for shape, batch in chosen), check)


def profiles(run: Run) -> Iterator[Check]:
    """Where a pass of the embedded model goes, and whether the host waits within the loop."""
    pipe = run.model("icons", torch.float32 if run.dry else torch.bfloat16)

    def check(item: tuple[str, str]) -> Check:
        name, mode = item
        sampler = get_sampler(name, window=4 if run.dry and name == "scd" else None)
        count = dict(passes=2, warm=1) if run.dry else {}
        p = profile_model(pipe, sampler, graph=Graph() if mode == ", graph" else None, **count)
        run.profiles[name + mode] = p
        shares = ", ".join(f"{group} {share:.0%}" for group, share in p.shares.items())
        # The host looks at two numbers at every fourth pass at most: whether all rows are done, and faults.
        few = None if run.device.type == "cpu" else p.waits <= 0.51
        result = f"{p.ms_per_pass:.2f} ms/pass, {p.launches:.0f} launches, {p.waits:.2f} waits; {shares}"
        return Check(f"profile of icons, {name}{mode}", result, few)

    modes = ("",) if run.dry else (", graph", ", no graph")
    every = [(name, mode) for mode in modes for name in ("ar", "scd")]
    yield from each(((f"profile of icons, {name}{mode}", (name, mode)) for name, mode in every), check)


def same_images(run: Run) -> Iterator[Check]:
    """In fp32 the GPU must generate the CPU's images; a near tie may flip a token and change what follows it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    pipes = [run.model("icons", device=d) for d in (torch.device("cpu"), run.device)]
    prompts = run.images(8)

    def check(name: str) -> Check:
        tokens = [pipe(prompts, sampler=name, output_type="tokens").tokens.cpu() for pipe in pipes]
        same = (tokens[0] == tokens[1]).all(1).sum().item()
        result = f"{same} of {len(prompts)}"
        return Check(f"icons fp32, {name}: images equal to the CPU's", result, same >= len(prompts) - 1)

    names = ("ar", "scd", "eagle") if run.dry else samplers_for("discrete")
    yield from each(((f"icons fp32, {name}", name) for name in names), check)


def continuous(run: Run, name: str) -> Any:
    """A sampler of continuous tokens, in a dry run of few passes and steps."""
    few = {"steps": 2, "head_steps": 4} if run.dry else {}
    return get_sampler(name, **{k: v for k, v in few.items() if k in spec_of(name).parameters()})


def same_continuous_images(run: Run) -> Iterator[Check]:
    """As `same_images`, for continuous tokens, which rounding moves a little and a flipped test by more."""
    pipes = [run.model("icons-mar", device=d) for d in (torch.device("cpu"), run.device)]
    prompts = run.images(8)

    def check(name: str) -> Check:
        sampler = continuous(run, name)
        tokens = [pipe(prompts, sampler=sampler, output_type="tokens").tokens.cpu() for pipe in pipes]
        same = int(((tokens[0] - tokens[1]).abs().amax((1, 2)) < 0.05).sum())
        result = f"{same} of {len(prompts)}"
        return Check(f"icons-mar fp32, {name}: images within 0.05 of the CPU's", result, same >= len(prompts) - 2)

    names = ("mar", "mar-headspec") if run.dry else samplers_for("continuous")
    yield from each(((f"icons-mar fp32, {name}", name) for name in names), check)


def icons_speed(run: Run) -> Iterator[Check]:
    """The embedded model, trained: real acceptance."""
    pipe = run.model("icons")
    names = ("ar", "scd") if run.dry else MEASURED
    for batch in (1,) if run.dry else (1, 8):
        report = compare(
            pipe, {n: get_sampler(n) for n in names}, batch=batch, images=1 if run.dry else max(batch, 4), repeats=1
        )
        for r in report.rows:
            result = f"{r.nfe:.0f} NFE, {r.ms_per_pass:.2f} ms/pass, {r.seconds_per_image:.3f} s/image"
            yield Check(f"icons, batch {batch}, {r.sampler}", f"{result}, {r.time_ratio:.2f} of AR's time")


def continuous_speed(run: Run) -> Iterator[Check]:
    """The embedded MAR: denoiser calls, and time against plain decoding."""
    pipe = run.model("icons-mar")
    plain, spec = continuous(run, "mar"), continuous(run, "mar-headspec")
    samplers = {"mar": plain} | {f"draft {n}": get_sampler(spec, draft=n) for n in ((2,) if run.dry else (4, 8, 16))}
    for batch in (1,) if run.dry else (1, 8):
        for r in compare(pipe, samplers, batch=batch, images=1 if run.dry else max(batch, 2), repeats=1).rows:
            assert r.head is not None
            result = f"{r.head.calls_per_pass:.1f} denoiser calls/pass, {r.seconds_per_image:.3f} s/image"
            yield Check(f"icons-mar, batch {batch}, {r.sampler}", f"{result}, {r.time_ratio:.2f} of mar's time")


# In this order, so that what is left out where time is short is what matters least.
SECTIONS: dict[str, Callable[[Run], Iterator[Check]]] = {
    "noise": same_noise, "kernels": kernels, "invariant": same_bits, "shapes": first_shapes, "profiles": profiles,
    "speed of icons": icons_speed, "images of icons": same_images, "speed of icons-mar": continuous_speed,
    "images of icons-mar": same_continuous_images, "more shapes": other_shapes,
}  # fmt: skip


def carry_out(run: Run, seconds: float = SECONDS, sections: Sequence[str] = ()) -> dict[str, list[Check]]:
    """The checks of the sections, by default all; one that breaks is a failed line, and must not hide the others."""
    rows: dict[str, list[Check]] = {}
    start = time.perf_counter()
    for name in sections or SECTIONS:
        rows[name] = []
        try:
            late = time.perf_counter() - start > seconds
            for check in () if late else SECTIONS[name](run):
                rows[name].append(check)
                since = time.perf_counter() - start
                print(f"{since:4.0f} s, {check.name}: {check.result}", file=sys.stderr, flush=True)
                if late := time.perf_counter() - start > seconds:
                    break
        except Exception as error:
            rows[name].append(Check(name, f"{type(error).__name__}: {error}"[:200], False))
        if late:
            rows[name].append(Check(name, f"the rest was left out after {seconds:.0f} s"))
    return rows


def report_text(run: Run, rows: dict[str, list[Check]]) -> str:
    """The checks, then the tables of shapes and profiles."""
    said = {True: "ok", False: "FAILED", None: ""}
    lines = [(s, r.name, r.result, said[r.good]) for s, checks in rows.items() for r in checks]
    title = f"{device_title(run.device)}, torch {torch.__version__}"
    parts = [title + (", dry run: results mean nothing" if run.dry else "")]
    parts.append(table(("SECTION", "CHECK", "RESULT", ""), lines))
    if run.profiles:
        parts.append(profile_text(list(run.profiles.items()), ("ICONS",)))
    if run.shapes:
        parts.append(shapes_text(_shape_report(run)))
    bad = sum(r.good is False for checks in rows.values() for r in checks)
    good = sum(r.good is True for checks in rows.values() for r in checks)
    return "\n\n".join([*parts, f"{good} checks passed, {bad} FAILED."])


def _shape_report(run: Run) -> ShapeReport:
    return ShapeReport(
        device_title(run.device),
        torch.__version__,
        torch.get_num_threads(),
        1 if run.dry else 3,
        run.bandwidth,
        run.shapes,
    )


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", metavar="PATH")
    options.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes: tests this script")
    options.add_argument("--seconds", type=float, default=SECONDS, help="leave out what has not begun by then")
    options.add_argument("--sections", metavar="NAMES", default="", help=f"some of: {', '.join(SECTIONS)}")
    given = options.parse_args(arguments)
    sections = list(dict.fromkeys(name.strip() for name in given.sections.split(",") if name.strip()))
    if wrong := next((name for name in sections if name not in SECTIONS), None):
        print(f"visar: error: there is no section {wrong!r}; there are {', '.join(SECTIONS)}.", file=sys.stderr)
        return 2
    if given.json:
        writable_folder(Path(given.json).parent)
    if not given.dry_run and not torch.cuda.is_available():
        print("visar: error: there is no CUDA device here; nothing was checked.", file=sys.stderr)
        return 2
    run = Run(torch.device("cpu" if given.dry_run else "cuda"), given.dry_run)
    start = time.perf_counter()
    rows = carry_out(run, given.seconds, sections)
    print(report_text(run, rows))
    print(f"{time.perf_counter() - start:.0f} s.")
    if given.json:
        found = {
            "device": device_title(run.device),
            "torch": torch.__version__,
            "dry_run": run.dry,
            "checks": {s: [asdict(r) for r in checks] for s, checks in rows.items()},
            "kernels": [asdict(o) for o in run.kernels],
            "shapes": asdict(_shape_report(run)),
            "profiles": {n: asdict(p) for n, p in run.profiles.items()},
        }
        with replacing(given.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if any(r.good is False for checks in rows.values() for r in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
