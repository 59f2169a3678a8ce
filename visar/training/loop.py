"""The training loop of all trainers: AdamW, cosine schedule, EMA, mixed precision, DDP, resumable checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visar.errors import VisarError
from visar.files import append_line, check_output, is_new, locked, reason, replacing, writable_folder
from visar.host import join, torchrun

STATE = "state.pt"  # of a run, in its folder


@dataclass(frozen=True)
class TrainConfig:
    """What a run is given. It ends after `minutes` of training (over all resumptions) or `steps`, which comes first."""

    out: Path
    minutes: float = 30.0
    steps: int = 10**9
    batch: int = 64
    lr: float = 1e-3
    final_lr: float = 0.02  # fraction of lr at the end
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.999
    seed: int = 0
    save_minutes: float = 3.0
    optimizer: str = "adamw"  # or "muon": Muon for the matrices inside the blocks, AdamW for the rest; or "sgd"
    compile: bool = True
    device: str = "cpu"
    made_of: Mapping[str, Any] = field(default_factory=dict)  # plain values, by name, that a run keeps when it goes on
    held: bool = False  # whether the caller holds the folder of the run (`alone`)


def distributed(device: str = "cpu") -> tuple[int, int, torch.device]:
    """(rank, world size, this process's device); joins the process group when started by torchrun."""
    if (job := torchrun()) is None:
        return 0, 1, torch.device(device)
    own = torch.device("cpu" if device == "cpu" else f"cuda:{job.local}")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        join("nccl" if own.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), own


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the data of one step: a resumed run sees what an unbroken one would have seen."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63  # what a generator takes


Rate = Callable[[str], float]  # of the learning rate, by a parameter's name


def make_optimizers(
    model: nn.Module, config: TrainConfig, rate: Rate = lambda name: 1.0
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) over the blocks' matrices.

    Or gradient descent with a momentum of 0.9, for what must hardly change a trained model: its steps are as small as
    the gradients, while the others move every weight at the learning rate.
    Each group has the share of the learning rate that `rate` gives its parameters as `rate`.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = [n for n, p in named if p.ndim == 2 and any(part in n for part in (".layers.", ".block.", "_blocks."))]
    muon = set(inside if config.optimizer == "muon" else [])
    groups: list[dict[str, Any]] = []
    hidden: list[dict[str, Any]] = []
    for share in sorted({rate(n) for n, _ in named}, reverse=True):
        own = [(n, p) for n, p in named if rate(n) == share]
        rest = [p for n, p in own if n not in muon]
        groups += [
            {"params": [p for p in rest if p.ndim > 1], "rate": share},
            {"params": [p for p in rest if p.ndim <= 1], "rate": share, "weight_decay": 0.0},
        ]
        if matrices := [p for n, p in own if n in muon]:
            hidden.append({"params": matrices, "rate": share})
    if config.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=True)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - decay)
    for a, b in zip(ema.buffers(), model.buffers(), strict=True):
        a.copy_(b)


class Batches:
    """The batches of the steps from `first` on. With `ahead` a thread makes each while the one before is in use."""

    def __init__(self, made: Callable[[int], list[Tensor]], first: int, ahead: torch.device | None = None):
        self.made, self.step = made, first
        # A new thread would launch kernels on the first device.
        start = (torch.cuda.set_device, (ahead,)) if ahead is not None and ahead.type == "cuda" else (None, ())
        self.pool = None if ahead is None else ThreadPoolExecutor(1, "batches", *start)
        self.coming = None if self.pool is None else self.pool.submit(made, first)

    def next(self) -> list[Tensor]:
        if self.pool is None or self.coming is None:
            found = self.made(self.step)
        else:
            found = self.coming.result()
            self.coming = self.pool.submit(self.made, self.step + 1)
        self.step += 1
        return found

    def wait(self) -> None:
        """Until no batch is being made, which may write what is to be saved."""
        if self.coming is not None:
            wait([self.coming])

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def check_same(out: Path, made_of: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise `VisarError` where a run would go on as another: it would learn something else, or start from nothing."""
    pairs = [(name, before[name], now) for name, now in made_of.items() if name in before]
    if differing := [f"{name} was {old}, now {now}" for name, old, now in pairs if old != now]:
        said = "; ".join(differing)
        raise VisarError(f"{out} holds a run with other settings: {said}; give another folder, or delete this one.")


def check_state(out: Path, made_of: Mapping[str, Any]) -> None:
    """Raise `VisarError` where a run in the folder is another one, or cannot be read; for asking before the work."""
    if (file := out / STATE).exists():
        check_same(out, made_of, _state(file, torch.device("cpu"), mmap=True).get("made_of", {}))


def _state(file: Path, device: torch.device, mmap: bool = False) -> dict[str, Any]:
    """What a run has saved. Raises `VisarError` where it cannot be read."""
    try:
        return dict(torch.load(file, map_location=device, weights_only=True, mmap=mmap))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise VisarError(f"Cannot read {file}: {reason(error)}.") from error
    except Exception as error:
        raise _unusable(file) from error


def _unusable(file: Path) -> VisarError:
    return VisarError(f"{file} is damaged or of a run with other sizes; give an empty folder.")


def _resumed(
    state_file: Path, device: torch.device, config: TrainConfig, parts: Mapping[str, Any]
) -> tuple[int, float]:
    """Load the parts of a run by name; returns its steps and minutes. Raises `VisarError` where that cannot be."""
    saved = _state(state_file, device)
    check_same(config.out, config.made_of, saved.get("made_of", {}))
    try:
        step, spent = saved["step"], saved["spent"]
        if type(step) is not int or step < 0 or not 0 <= spent < math.inf:
            raise ValueError("no such steps or minutes")
        for name in ("model", "ema"):
            parts[name].load_state_dict(saved[name])
        for optimizer, its in zip(parts["optimizers"], saved["optimizers"], strict=True):
            optimizer.load_state_dict(its)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unusable(state_file) from error
    return step, spent


def alone(out: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run, in the first of its processes: two runs at once would save over each other.

    Raises `VisarError` if one is there.
    """
    if (job := torchrun()) is not None and job.rank:
        return nullcontext()
    return locked(out / ".lock", f"Another run trains in {out}; wait until it ends, or give another folder.", False)


def check_parts(out: Path, mark: str, *parts: str) -> None:
    """Raise `VisarError` where a run would save over what it did not make, or cannot save its parts.

    `mark` is what a run leaves in its folder before the first part.
    """
    for folder in (out / part for part in parts):
        if is_new(folder):
            continue
        if not (out / mark).exists():
            raise VisarError(f"{folder} is not of a run that can resume, which has a {mark}; give another folder.")
        writable_folder(folder)


M = TypeVar("M", bound=nn.Module)


def fit(
    model: M,
    batch_at: Callable[[int, int], tuple[Tensor, ...]],
    config: TrainConfig,
    evaluate: Callable[[M], dict[str, float]],
    after_step: Callable[[M, int], None] | None = None,
    rate: Rate = lambda name: 1.0,
) -> M:
    """Train `model`, whose `forward(*batch)` returns a scalar loss, and return its EMA.

    `batch_at(step, rank)` gives the tensors of a step; for a GPU a thread calls it, one step ahead. `evaluate(ema)` is
    called at each save; its figures go to `log.jsonl` beside `state.pt` in `config.out`. A run started again in the
    same folder goes on where it was. `rate` gives a parameter's share of the learning rate; those without gradients
    stay as they are. Raises `VisarError` while another run trains there.
    """
    writable_folder(config.out)
    with nullcontext() if config.held else alone(config.out):
        return _fit(model, batch_at, config, evaluate, after_step, rate)


def _fit(
    model: M,
    batch_at: Callable[[int, int], tuple[Tensor, ...]],
    config: TrainConfig,
    evaluate: Callable[[M], dict[str, float]],
    after_step: Callable[[M, int], None] | None,
    rate: Rate,
) -> M:
    rank, world, device = distributed(config.device)
    state_file, log = config.out / STATE, config.out / "log.jsonl"
    if rank == 0:
        for file in (state_file, log):
            check_output(file)  # before minutes of work
        for left in config.out.glob(".state.*.partial.pt"):  # of a run that was killed while it saved
            left.unlink(missing_ok=True)
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, config, rate)
    step, spent = 0, 0.0
    if state_file.exists():
        parts = {"model": model, "ema": ema, "optimizers": optimizers}
        step, spent = _resumed(state_file, device, config, parts)
        if rank == 0 and (step >= config.steps or spent >= config.minutes):
            warnings.warn(
                f"{config.out} has trained {spent:.2f} minutes and {step} steps: it learns no more.", stacklevel=3
            )

    net: nn.Module = model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])
    run = torch.compile(net) if config.compile else net
    started, saved_at, first = time.monotonic(), time.monotonic(), step
    total = torch.zeros((), device=device)
    since = 0

    def elapsed() -> float:
        """Minutes trained; rank 0's clock for all, or ranks would differ in schedule and stop apart."""
        minutes = spent + (time.monotonic() - started) / 60
        if world == 1:
            return minutes
        now = torch.tensor(minutes, device=device)
        dist.broadcast(now, 0)
        return now.item()

    def save(minutes: float) -> None:
        if not (math.isfinite(summed := total.item()) and all(bool(p.isfinite().all()) for p in ema.parameters())):
            raise VisarError(f"The loss or the weights are no numbers after {step} steps; give a smaller --lr.")
        if rank:
            return
        with replacing(state_file) as temporary:
            torch.save(
                {
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "spent": minutes,
                    "made_of": dict(config.made_of),
                },
                temporary,
            )
        speed = (step - first) * config.batch * world / max(time.monotonic() - started, 1e-9)
        row = {
            "step": step,
            "minutes": round(minutes, 2),
            "samples_per_second": round(speed, 1),
            "loss": round(summed / since, 4) if since else None,
            **evaluate(ema),
        }
        append_line(log, json.dumps(row))
        print(json.dumps(row), flush=True)

    def made(step: int) -> list[Tensor]:
        return [t.to(device) for t in batch_at(step, rank)]

    # While a GPU learns from a batch, the host makes the next one; on a CPU both would want the same cores.
    with Batches(made, step, ahead=None if device.type == "cpu" else device) as batches:
        while step < config.steps and (minutes := elapsed()) < config.minutes:
            progress = min(1.0, max(minutes / config.minutes, step / config.steps))
            lr = config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * min(1.0, (step + 1) / config.warmup) * group.get("rate", 1.0)
            batch = batches.next()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = run(*batch)
            model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)))
            if after_step is not None:
                after_step(model, step)
            total += loss.detach()
            since += 1
            if time.monotonic() - saved_at > config.save_minutes * 60:
                batches.wait()
                save(minutes)
                saved_at, since = time.monotonic(), 0
                total.zero_()
    save(elapsed())
    return ema
