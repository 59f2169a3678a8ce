"""Which of several forms of an operation is the fastest on this machine: measured at first use, and kept in a file.

The file is `products-....json` in the cache folder (`visar.files.cache_folder`), one for each processor, version of
torch and number of threads. A file that is damaged is measured again, and one that cannot be written is done without.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from visar.files import cache_folder, replacing
from visar.host import processor

GAIN = 0.95  # another form is taken only where it takes less than this share of the first one's time
MOST_TURNS, LEAST_TURNS, SECONDS = 15, 4, 2e-3  # a form is timed so often, but no longer than that
_lock = threading.Lock()


def fastest(what: str, names: Collection[str], forms: Callable[[], Mapping[str, Callable[[int], object]]]) -> str:
    """One of `names`: the fastest form of the operation `what`.

    `forms()` makes those that are to be timed, the library's own first. Each is called with 0, 1, 2, ... and may work
    with other memory each time, so that it is timed with cold caches.
    """
    with _lock:  # what another process chose meanwhile stays in the file
        known = _known(file := _file())
        if known.get(what) not in names:
            known[what] = _measured(forms())
            _save(file, known | {what: name for what, name in _read(file).items() if name in names})
        return known[what]


def _measured(forms: Mapping[str, Callable[[int], object]]) -> str:
    times = dict.fromkeys(forms, float("inf"))
    for run in forms.values():
        run(0)  # libraries compile a kernel for a new shape
    start = time.perf_counter()
    for turn in range(1, 1 + MOST_TURNS):
        if turn > LEAST_TURNS and time.perf_counter() - start > SECONDS * len(forms):
            break
        for name, run in forms.items():  # in turns, as the speed of a machine changes
            begun = time.perf_counter()
            run(turn)
            times[name] = min(times[name], time.perf_counter() - begun)
    first, best = next(iter(times)), min(times, key=lambda name: times[name])
    return best if times[best] < GAIN * times[first] else first


def _machine() -> dict[str, str | int]:
    """On what a choice depends."""
    return {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def _file() -> Path:
    mark = hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()[:12]
    return cache_folder() / f"products-{mark}.json"


@functools.cache
def _known(file: Path) -> dict[str, str]:
    """The choices in a file, to which this process adds its own."""
    return _read(file)


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())["forms"]
        return {what: name for what, name in found.items() if isinstance(name, str)}
    except Exception:  # not there, cut off, or another file: measured again
        return {}


def _save(file: Path, known: dict[str, str]) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({**_machine(), "forms": known}, indent=1) + "\n")
