"""Seeded damage: to the bytes of a file, to a JSON value, and to tensors by name."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 1.5, 16.0, 10**6, 10**9, 2**31, 2**63, -(10**12), 10**40, 1e308, -0.0, "",
    "x", "3", "../x", "/etc/passwd", "a\0b", "x" * 5000, "1e9", [], {}, [1], [1, 2, 3], ["a", "b"], {"a": 1}, [[]],
    [10**9] * 3,
)  # fmt: skip


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, lengthened, zeroed or moved bytes; more often near the start and the end, where headers are."""
    data = bytearray(content)
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "insert", "drop", "extend", "random"))
    spread = rng.choice((16, 200, 2000, max(1, len(data))))
    at = rng.randrange(min(spread, max(1, len(data))))
    at = len(data) - 1 - at if rng.random() < 0.3 else at
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 20))):
            i = min(len(data) - 1, max(0, at + rng.randrange(-20, 20)))
            data[i] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 16))
    elif kind == "drop":
        del data[at : at + rng.randrange(1, 16)]
    elif kind == "extend":
        data += rng.randbytes(rng.randrange(1, 100))
    else:
        data = bytearray(rng.randbytes(rng.randrange(0, 300)))
    return bytes(data)


def damaged_value(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value replaced, dropped, repeated, scaled or moved."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(at: Any) -> None:
        for key in at if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ():
            places.append((at, key))
            walk(at[key])

    walk(value)
    if not places or rng.random() < 0.05:
        return rng.choice(VALUES)
    at, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "drop", "scale", "add", "wrap", "swap"))
    if kind == "drop":
        del at[key]
    elif kind == "scale" and isinstance(at[key], int | float):
        at[key] *= rng.choice((-1, 0, 2, 3, 0.5, 1000, 10**9))
    elif kind == "add" and isinstance(at, dict):
        at[rng.choice(("x", "", "_parts_of", "__proto__", "layers", "file", "../x"))] = rng.choice(VALUES)
    elif kind == "wrap":
        at[key] = rng.choice(([at[key]], {"a": at[key]}, str(at[key])))
    elif kind == "swap":
        other, name = rng.choice(places)
        at[key] = copy.deepcopy(other[name])
    else:
        at[key] = rng.choice(VALUES)
    return value


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file, or a line of a JSON Lines file, with a value or its text damaged."""
    text = content.decode()
    lines = text.splitlines() if text.count("\n") > 1 and text.startswith("{") and "\n}" not in text else [text]
    i = rng.randrange(len(lines))
    line = lines[i]
    kind = rng.choice(("value",) * 8 + ("twice", "nan", "deep", "mark", "latin", "bytes"))
    if kind == "value":
        lines[i] = json.dumps(damaged_value(json.loads(line), rng))
    elif kind == "twice":
        lines[i] = line.replace("{", '{"length": 1, "length": 2, ', 1)
    elif kind == "nan":
        lines[i] = line.replace(": ", rng.choice((": NaN, ", ": -Infinity, ", ": 1e999, ")), 1).replace(": ", ":", 1)
    elif kind == "deep":
        lines[i] = rng.choice(("[", '{"a":')) * rng.choice((100, 1000, 100_000))
    elif kind == "mark":
        lines[i] = "\ufeff" + line
    made = "\n".join(lines).encode()
    if kind == "latin":
        return made.replace(b'"', b'"\xe9', 1)
    return damaged_bytes(made, rng) if kind == "bytes" else made


def damaged_state(state: dict[str, Tensor], rng: random.Random) -> Any:
    """Tensors by name with a name, a shape, a dtype, a value or the nesting changed."""
    state = {key: value.clone() for key, value in state.items()}
    key = rng.choice(list(state))
    new: dict[str, Callable[[Tensor], Any]] = {
        "shape": lambda t: t[None],
        "flat": lambda t: t.flatten(),
        "short": lambda t: t[: len(t) // 2] if t.ndim else t,
        "empty": lambda t: t[:0] if t.ndim else t,
        "long": lambda t: torch.zeros(1).expand(10**11),
        "int": lambda t: t.int(),
        "complex": lambda t: t.to(torch.complex64),
        "bool": lambda t: t.bool(),
        "half": lambda t: t.half(),
        "eight": lambda t: t.float().to(torch.float8_e4m3fn),
        "double": lambda t: t.double() * 1e300,
        "nan": lambda t: t.float() * float("nan"),
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "number": lambda t: 3,
        "text": lambda t: "x",
        "none": lambda t: None,
        "list": lambda t: [t],
        "dict": lambda t: {"a": t},
    }
    kind = rng.choice((*new, "drop", "rename", "index", "more", "prefix", "nest"))
    if kind in new:
        return {**state, key: new[kind](state[key])}
    if kind == "drop":
        state.pop(key)
    elif kind == "rename":
        state[key + rng.choice((".x", "é", "", "."))] = state.pop(key)
    elif kind == "index":
        name = key.replace(".0.", rng.choice((".99999999999.", ".-1.", ".².", ".x.", "..")), 1)
        state[name] = state.pop(key)
    elif kind == "more":
        return {**state, rng.choice(("x", 3, None, ("a",), "layers.7.x", "a.lora_A.b", "n_averaged")): torch.ones(2)}
    elif kind == "prefix":
        return {rng.choice(("module.", "_orig_mod.", "model.", "x.")) + k: v for k, v in state.items()}
    else:
        return rng.choice(
            ([state], {"model": {"state_dict": state}}, {"ema": state}, {"x": state}, {"model": 3}, 3, None)
        )
    return state
