"""Where the time of a pass goes: attention, linear layers, the rest of the model, sampling and verification, waiting.

torch.profiler over steady passes of the real loop. Named ranges are put around the session's pass, guidance, the target
distribution and the sampler's step from outside while it runs, so that the engine carries none of this. Times are those
of operators on a CPU and of kernels on a GPU; what they do not fill of a pass, timed without the profiler, is launch
gaps and Python. Passes that are replayed from a CUDA graph have no operators: their kernels are told apart by name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from visar.engine.drafter import Timed
from visar.engine.graphs import Graph
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.benchmark.steady import steady
from visar.host import synchronize
from visar.samplers import Target
from visar.tables import table

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr that it starts and stops

ATTENTION, GEMM, MODEL, SAMPLING, HOST = "attention", "gemm", "model", "sampling", "host"
TITLES = {
    ATTENTION: "ATTENTION",
    GEMM: "GEMM",
    MODEL: "NORM+ELEMENTWISE",
    SAMPLING: "SAMPLING+VERIFICATION",
    HOST: "GAPS/HOST",
}
WINDOW, MODEL_RANGE, TARGET_PROBS, VERIFY = "visar::window", "visar::model", "visar::target_probs", "visar::verify"

# Operators below a model's range, outermost first; linear layers call some of the others inside.
_LINEAR_OPS = re.compile(r"linear|addmm|::_?mm$|_mm$|mkldnn.*pointwise|onednn", re.I)
_ATTENTION_OPS = re.compile(r"scaled_dot_product|::b?matmul|::bmm|baddbmm|softmax|attention|einsum", re.I)
# Kernels, where a graph hides what launched them.
_ATTENTION_KERNELS = re.compile(r"fmha|flash|attention|attend|_split_kv|_join", re.I)
_LINEAR_KERNELS = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|matmul|_mm_|_linear", re.I)
_SAMPLING_KERNELS = re.compile(
    r"target_probs|guide|_sample|verify|noise|uniforms|exponential|_pool|philox|softmax|topk|top_k|radix|sort|scan|cumsum|searchsorted|multinomial|argmax|"
    r"gather|scatter|aggregate",
    re.I,
)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class PassProfile:
    """A mean pass. `ms_per_pass` is timed without the profiler; `shares` of it by group sum to 1.

    `launches`: kernels on a GPU (a graph's too), operators called by Python on a CPU. Per pass, within the loop:
    `host_reads` of a tensor's value by Python, `waits` of the host for the GPU, `copies_to_host`. `kernels` are the
    slowest, by name, ms per pass.
    """

    sampler: str
    window: int
    ms_per_pass: float
    passes: int
    shares: dict[str, float]
    launches: float
    host_reads: float
    waits: float
    copies_to_host: float
    kernels: dict[str, float] = field(default_factory=dict)


def profile_passes(
    session: Session,
    sampler: Any,
    target: Target,
    noise: Any,
    *,
    passes: int = 24,
    warm: int = 8,
    graph: Graph | None = None,
) -> PassProfile:
    """Profile `passes` passes of `sampler` in the middle of a fresh session's image."""
    if (schedule := getattr(sampler, "turns", None)) is not None:  # a fixed one, after which passes do nothing
        passes = min(passes, (len(schedule) - warm) // 2)
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    tracer = profile(activities=activities, acc_events=True)

    @contextmanager
    def traced() -> Iterator[None]:
        with tracer:
            with record_function(WINDOW):
                yield
            synchronize(session.device)

    with ranges(session, sampler):
        timed = steady(session, sampler, target, noise, passes=passes, warm=warm, traced=traced, graph=graph)
    events = list(tracer.events() or [])
    window = next((e for e in events if e.name == WINDOW and e.device_type == DeviceType.CPU), None)
    if window is None:
        raise VisarError("The profiler of this build of torch recorded nothing.")
    inside = [e for e in events if e.device_type == DeviceType.CPU and _within(e, window)]
    names = Counter(e.name for e in inside)
    copies = sum("Memcpy DtoH" in e.name for e in events if e.device_type == DeviceType.CUDA)
    times = Counter[str]()
    if cuda:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("visar::")]
        shares, launches = _gpu_shares(inside, kernels, timed.ms_per_pass * timed.passes), float(len(kernels))
        for e in kernels:
            times[e.name] += e.device_time_total
    else:
        shares = _cpu_shares(inside, timed.ms_per_pass * timed.passes)
        launches = float(sum(_is_op(e) and not _is_op(e.cpu_parent) for e in inside))
        for e in inside:
            times[e.name] += e.self_cpu_time_total if _is_op(e) else 0
    n = timed.passes
    return PassProfile(
        sampler.name, sampler.window, timed.ms_per_pass, n, shares, launches / n,
        names["aten::_local_scalar_dense"] / n, sum(names[w] for w in _WAITS) / n, copies / n,
        {name: us / 1e3 / n for name, us in times.most_common(12) if us > 0},
    )  # fmt: skip


def profile_model(
    model: Any, sampler: Any, *, passes: int = 24, warm: int = 8, graph: Graph | None = None, **call: Any
) -> PassProfile:
    """As `profile_passes`, for one image of a model, with the drafter of its sampler; `call` goes to its call."""
    from visar.eval.prompts import conditions
    from visar.generation.model import ImageModel
    from visar.params import DISCRETE

    model = ImageModel.of(model)
    if model.family.tokens != DISCRETE:
        raise VisarError("Passes of models of continuous tokens are not profiled; give a model of discrete tokens.")
    taken: list[tuple[Any, ...]] = []

    class Taken(Exception):
        pass

    def take(session: Any, method: Any, target: Any, noise: Any, *_: Any, **__: Any) -> None:
        taken.append((session, method, target, noise))
        raise Taken

    with _replaced(model, "run", take), suppress(Taken):
        model.generate(conditions(model, 1), sampler=sampler, output_type="tokens", **call)
    return profile_passes(*taken[0], passes=passes, warm=warm, graph=graph)


def profile_text(rows: Sequence[tuple[Any, ...]], header: tuple[str, ...]) -> str:
    """A table of profiles, the last of each row, after the columns that `header` names."""
    lines = []
    for *names, p in rows:
        shares = [f"{100 * p.shares[group]:.0f}%" for group in TITLES]
        counts = [f"{n:.{0 if n >= 10 else 2}f}" for n in (p.launches, p.host_reads, p.waits)]
        lines.append((*names, p.window, f"{p.ms_per_pass:.2f}", *shares, *counts))
    counted = ("LAUNCHES/PASS", "HOST READS/PASS", "WAITS/PASS")
    return table((*header, "W", "MS/PASS", *TITLES.values(), *counted), lines)


@contextmanager
def ranges(session: Session, sampler: Any) -> Iterator[None]:
    """Name what runs: passes of models and drafters, guidance, the target distribution, and the sampler's own step."""
    named = (
        (type(sampler), "step", VERIFY),
        (type(session), "guided", TARGET_PROBS),
        (Target, "probs", TARGET_PROBS),
        (type(session), "forward", MODEL_RANGE),
        (type(session), "forward_at", MODEL_RANGE),
        (type(session), "forward_diagonal", MODEL_RANGE),
        (Timed, "root", MODEL_RANGE),
        (Timed, "extend", MODEL_RANGE),
    )
    with ExitStack() as stack:
        for owner, method, name in named:
            if hasattr(owner, method):
                stack.enter_context(_replaced(owner, method, _ranged(getattr(owner, method), name)))
        yield


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def _within(event: Any, window: Any) -> bool:
    return window.time_range.start <= event.time_range.start and event.time_range.end <= window.time_range.end


def _is_op(event: Any) -> bool:
    return event is not None and not event.name.startswith("visar::") and not event.name.startswith(("cuda", "cu"))


def group_of_operator(event: Any) -> str:
    """The group of a CPU event by the innermost range around it and the operators between the two."""
    names = []
    while event is not None and not event.name.startswith("visar::"):
        names.append(event.name)
        event = event.cpu_parent
    around = WINDOW if event is None else event.name
    if not names:
        return HOST  # a range's own time: Python
    if around != MODEL_RANGE:
        return SAMPLING
    for name in reversed(names):
        if _LINEAR_OPS.search(name):
            return GEMM
        if _ATTENTION_OPS.search(name):
            return ATTENTION
    return MODEL


def group_of_kernel(name: str, otherwise: str = MODEL) -> str:
    """The group of a kernel by its name alone."""
    groups = ((_ATTENTION_KERNELS, ATTENTION), (_LINEAR_KERNELS, GEMM), (_SAMPLING_KERNELS, SAMPLING))
    return next((group for pattern, group in groups if pattern.search(name)), otherwise)


def _cpu_shares(events: list[Any], milliseconds: float) -> dict[str, float]:
    totals = dict.fromkeys(TITLES, 0.0)
    for e in events:
        if (group := group_of_operator(e)) != HOST:
            totals[group] += e.self_cpu_time_total
    return _filled(totals, milliseconds)


def _gpu_shares(operators: list[Any], kernels: list[Any], milliseconds: float) -> dict[str, float]:
    """A kernel belongs to the operator that launched it, or by its name to what it is."""
    totals = dict.fromkeys(TITLES, 0.0)
    unattributed = Counter[str]()  # launched by no operator of the profile: by a graph
    for e in kernels:
        unattributed[e.name] += e.device_time_total
    for e in operators:
        for kernel in e.kernels:
            totals[group_of_launch(e, kernel.name)] += kernel.duration
            unattributed[kernel.name] -= kernel.duration
    for name, left in unattributed.items():
        totals[group_of_kernel(name)] += max(left, 0.0)
    return _filled(totals, milliseconds)


def group_of_launch(event: Any, kernel: str) -> str:
    """The group of a kernel that a CPU event launched: an operator, or a range within which Python launched it."""
    if _is_op(event):
        group = group_of_operator(event)
    else:
        group = MODEL if event.name == MODEL_RANGE else SAMPLING if event.name in (TARGET_PROBS, VERIFY) else HOST
        if group == HOST:
            return group_of_kernel(kernel)
    if group == MODEL:  # one of our own kernels, which is no operator of torch
        named = group_of_kernel(kernel)
        group = MODEL if named == SAMPLING else named
    return group


def _filled(totals: dict[str, float], milliseconds: float) -> dict[str, float]:
    """Shares of the time without the profiler, which is slower with it; what nothing fills is the host's."""
    known = sum(totals.values())
    whole = max(milliseconds * 1e3, known) or 1.0
    totals[HOST] = whole - known
    return {group: t / whole for group, t in totals.items()}
