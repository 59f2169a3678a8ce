"""A model of one's own: the page's example is verified, and each usual mistake of wrapping one is named and counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from visar.engine.callable_session import CallableSession
from visar.engine.loop import Decoded, decode
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.exactness.joint import MUTANT_LIMIT
from visar.eval.exactness.own_model import joint_rows, subject_of, verify_session
from visar.samplers import Target, get_sampler

DOCS = Path(__file__).parents[3] / "docs"
BLOCKS = re.findall(r"^```python\n(.*?)^```", (DOCS / "own-model.md").read_text(), flags=re.S | re.M)
MODEL = next(b for b in BLOCKS if b.startswith("# my_model.py"))
TREES = next(b for b in BLOCKS if "class TreeSession" in b)
SOURCE = MODEL + "\n\n" + TREES
ROW_ABOVE = re.findall(r"^```python\n(.*?)^```", (DOCS / "own-sampler.md").read_text(), flags=re.S | re.M)[0]
SEQUENCES = 8192


def world(*changes: tuple[str, str]) -> dict[str, Any]:
    """The names that the page's code makes, after changes of its text."""
    source = SOURCE
    for old, new in changes:
        assert old in source, f"the page has no {old!r} to spoil"
        source = source.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(source, "page", "exec"), names)
    return names


PLAIN = world()


def failed(names: dict[str, Any], make: str = "make", reference: Callable[[Tensor], Tensor] | None = None) -> str:
    """The check that fails, and its sentence; empty if none does."""
    reference = reference or PLAIN["logits"]
    checks, _ = verify_session(names[make], reference, [], SEQUENCES)
    return "".join(f"{c.check}: {c.message}" for c in checks if not c.passed)


def joint_z(names: dict[str, Any], make: str, sampler: str) -> float:
    """The joint distribution of a sampler with a window of 3, without any plain check."""
    with torch.inference_mode():
        return next(joint_rows(subject_of(names[make], PLAIN["logits"]), sampler, SEQUENCES, 0)).z


def test_the_example_is_short() -> None:
    """It is what a reader has to understand; the model is half of it."""
    session = MODEL[MODEL.index("class MySession") :]
    assert len([line for line in MODEL.splitlines() if line.strip()]) < 50
    assert len([line for line in session.splitlines() if line.strip()]) < 25


@pytest.mark.slow
def test_trees_of_the_page_are_right() -> None:
    checks, rows = verify_session(PLAIN["make_tree"], PLAIN["logits"], ["speculative-tree"], SEQUENCES)
    assert checks[-1].check == "trees" and all(c.passed for c in checks)
    assert [row.sampler for row in rows] == ["speculative-tree"] and all(row.passed for row in rows)
    assert all(row.tokens_per_pass > 1.2 for row in rows)


WRITES = "self.keys[layer, self.rows, slots], self.values[layer, self.rows, slots] = k, v"
ONCE = "old = (self.keys[layer, self.rows, slots] != 0); k = torch.where(old, self.keys[layer, self.rows, slots], k); "
SEEN = "return self.slots <= slots[..., None]"
HIGH = (
    "self.high = torch.maximum(getattr(self, 'high', slots[:, -1:]), slots[:, -1:]); "
    "return (self.slots <= slots[..., None]) | ((self.slots > slots[:, -1:]) & (self.slots <= self.high))[:, None]"
)
SLOTS = "slots = self.follows(tokens.shape[1], None, first)"
PLACES = "places = self.follows(tokens.shape[1], tree, first)"
CONDITION = "torch.where((slots == 0)[..., None], self.condition, self.model.tokens(tokens))"

# name: (what is changed, the check that names it, words of its sentence, the sampler whose joint distribution shows it
# or none)
MISTAKES: dict[str, tuple[tuple[str, str], str, str, str]] = {
    "positions off by one": (
        ("self.model.places(places.clamp_max(self.length - 1))",
         "self.model.places(places.add(places > 0) % self.length)"),
        "passes of one token", "positions off by one", "scd",
    ),
    "a condition that got lost": (
        ("model.classes(labels)[:, None]", "0 * model.classes(labels)[:, None]"),
        "passes of one token", "is the condition fed in the first pass", "ar",
    ),
    "a token in the condition's place": (
        (CONDITION, "self.model.tokens(tokens)"), "condition comes first", "is to be ignored", "sjd",
    ),
    "the cache of row 0 for all": (
        ("F.scaled_dot_product_attention(q, self.keys[layer], self.values[layer], seen)",
         "F.scaled_dot_product_attention(q, self.keys[layer][:1], self.values[layer][:1], seen)"),
        "rows are apart", "it depends on the other rows", "ar",
    ),
    "a window that sees itself to the end": (
        (SEEN, "return self.slots <= slots[:, -1:, None]"), "passes of W tokens", "causal mask", "scd",
    ),
    "one position for a whole window": (
        (PLACES, "places = self.lengths[:, None].expand_as(slots)"),
        "passes of W tokens", "at its own position", "scd",
    ),
    "slots that are written once": (
        (WRITES, ONCE + WRITES), "rejected drafts", "leaves a trace", "scd",
    ),
    "rejected drafts that are seen": ((SEEN, HIGH), "rejected drafts", "leaves a trace", ""),  # if windows shrink
    "the length of row 0 for all": (
        (SLOTS, SLOTS + "[:1].expand_as(tokens)"), "rows at their own pace", "row by row", "scd",
    ),
    "the longest row's positions for all": (
        (PLACES, "places = self.lengths.max() + torch.arange(tokens.shape[1]).expand_as(slots)"),
        "rows at their own pace", "row by row", "scd",
    ),
    "a first that is not heeded": (
        (SLOTS, "slots = self.follows(tokens.shape[1], None, 0)"), "passes in parts", "first > 0", "",
    ),
    "siblings that are seen": (
        ("tree.ancestor_mask(first, slots.shape[1], nodes)", "((nodes >= 0) & (nodes <= 4))[:, None]"),
        "trees", "the nodes above it", "speculative-tree",
    ),
    "a path that is not moved": (
        ("cache[:, self.rows, to] = cache[:, self.rows, source]", "cache[:, self.rows, to] = cache[:, self.rows, to]"),
        "trees", "After keep(path)", "speculative-tree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    change, check, words, _ = MISTAKES[name]
    found = failed(world(change), "make_tree" if check == "trees" else "make")
    assert found.startswith(f"{check}: ") and words in found
    assert (
        re.search(r"total variation 0\.\d+|\d\.\d+\)", found) and found.count(". ") == 0
    )  # one sentence, with a figure


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if mistake[-1] == "speculative-tree" else [])
        for name, mistake in MISTAKES.items()
        if mistake[-1]
    ],
)
def test_mistakes_show_in_the_joint_distribution(name: str) -> None:
    change, check, _, sampler = MISTAKES[name]
    make = "make_tree" if check == "trees" else "make"
    assert joint_z(world(change), make, sampler) > MUTANT_LIMIT


@pytest.mark.slow
def test_without_a_reference_what_all_passes_share_is_not_seen() -> None:
    """And the page says so; the other mistakes are."""
    lost, sees_ahead = (
        world(MISTAKES[n][0])["make"] for n in ("a condition that got lost", "a window that sees itself to the end")
    )
    checks, rows = verify_session(lost, None, ["scd"], SEQUENCES)
    assert all(c.passed for c in checks) and all(row.passed for row in rows) and len(rows) == 2
    assert "passes of one token" not in [c.check for c in checks]
    assert "causal mask" in verify_session(sees_ahead, None, ["scd"])[0][-1].message


# The function of tokens


def run(session: Session, sampler: str, seed: int = 3) -> Decoded:
    made = get_sampler(sampler, window=None if sampler == "ar" else 4)
    return decode(session, made, Target(0.9, top_p=0.95), Noise(seed, torch.arange(session.batch)))


@pytest.mark.parametrize("sampler", ["ar", "jacobi", "sjd", "scd", "scd-gumbel", "gsd"])
def test_a_function_decodes_as_a_session_with_a_cache_does(sampler: str) -> None:
    model = PLAIN["Transformer"](vocab=24, length=12).requires_grad_(False)

    def logits(tokens: Tensor) -> Tensor:
        names = {**PLAIN, "MODEL": model}
        exec(MODEL[MODEL.index("def logits") : MODEL.index("class MySession")], names)
        return names["logits"](tokens)

    cached = run(PLAIN["MySession"](model, torch.full((6,), PLAIN["CLASS"]), 4), sampler)
    plain = run(CallableSession(logits, 6, 12, 24), sampler)
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.commit_pass, plain.commit_pass)
    assert len(plain.tokens.unique(dim=0)) == (1 if sampler == "jacobi" else 6)
    assert (plain.passes == 12) if sampler == "ar" else (plain.passes <= 12)


def test_a_function_is_verified_by_a_sampler_that_uses_rows(tmp_path: Path) -> None:
    """The session has no layout, so its images are one column wide, and the row above is the token before."""

    def make(batch: int, window: int) -> Session:
        return CallableSession(PLAIN["logits"], batch, 5, 4)

    (own := tmp_path / "my_sampler.py").write_text(ROW_ABOVE)
    checks, rows = verify_session(make, PLAIN["logits"], [f"{own}:small"], SEQUENCES)
    assert all(c.passed for c in checks) and len(rows) == 2 and all(row.passed for row in rows)
    assert all(row.tokens_per_pass > 1.1 for row in rows)
    with pytest.raises(VisarError, match="needs a session with a layout"):
        decode(make(6, 4), get_sampler(f"{own}:small"), Target(), Noise(0, torch.arange(6)))


def test_ten_tokens_of_two_values_are_verified() -> None:
    """The longest window is then fed nine tokens past the end. Equal logits: greedy decoding may take either token."""
    table = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])

    def logits(tokens: Tensor) -> Tensor:
        return table[torch.cat([torch.full((len(tokens), 1), 2), tokens], dim=1)]

    def broken_ties(tokens: Tensor) -> Tensor:
        return logits(tokens) + torch.tensor([0.0, 1e-6])

    def make(batch: int, window: int) -> Session:
        return CallableSession(broken_ties, batch, 10, 2)

    checks, rows = verify_session(make, logits, ["jacobi"])
    assert len(checks) == 7 and all(c.passed for c in checks)
    assert [row.case for row in rows] == ["window 3", "window 12"] and all(row.passed for row in rows)


def test_a_function_that_sees_ahead_is_noticed() -> None:
    def bag(tokens: Tensor) -> Tensor:
        """Every distribution depends on all tokens."""
        total = torch.zeros(len(tokens), 4).scatter_add(1, tokens, torch.ones(tokens.shape))
        return total[:, None].expand(-1, tokens.shape[1] + 1, -1)

    def make(batch: int, window: int) -> Session:
        return CallableSession(bag, batch, 4, 4)

    assert "causal mask" in verify_session(make, None, ["sjd"])[0][-1].message
    with pytest.raises(VisarError, match="reference's logits of position 0 depend on tokens from that position on"):
        verify_session(make, bag)


def test_a_function_of_wrong_shape_or_without_distributions() -> None:
    def short(tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), tokens.shape[1], 4)

    def empty(tokens: Tensor) -> Tensor:
        return torch.full((len(tokens), tokens.shape[1] + 1, 4), torch.nan)

    with pytest.raises(VisarError, match=r"gave \[2, 0, 4\] for tokens \[2, 0\]; it must give \[B, n \+ 1, V\]"):
        run(CallableSession(short, 2, 6, 4), "ar")
    with pytest.raises(VisarError, match="not finite in float32"):
        run(CallableSession(empty, 2, 6, 4), "ar")
    session = CallableSession(PLAIN["logits"], 2, 5, 4)
    session.drafter = object()  # type: ignore[assignment]
    with pytest.raises(VisarError, match="has no trees"):
        session.forward(torch.zeros(2, 3, dtype=torch.long), get_sampler("speculative-tree").tables[0])


def test_masked_tokens_are_never_sampled() -> None:
    def masked(tokens: Tensor) -> Tensor:
        return torch.tensor([0.0, -torch.inf, 1.0, 0.0]).expand(len(tokens), tokens.shape[1] + 1, 4)

    out = run(CallableSession(masked, 32, 8, 4), "scd")
    assert set(out.tokens.unique().tolist()) == {0, 2, 3}


def by_hand(session: Any = None, sampler: Any = "scd", target: Any = None, noise: Any = None) -> Decoded:
    made = session or CallableSession(lambda t: torch.zeros(len(t), t.shape[1] + 1, 3), 4, 5, 3)
    given = Noise(0, torch.arange(4)) if noise is None else noise
    return decode(made, get_sampler(sampler) if sampler in ("scd", "mar") else sampler, target or Target(), given)


def flat(**sizes: Any) -> CallableSession:
    return CallableSession(lambda t: torch.zeros(1), **{"batch": 4, "length": 5, "vocab": 3, **sizes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_hand(sampler="sjd"), r"decode takes a sampler such as get_sampler\('scd'\), not a str"),
        (lambda: by_hand(sampler=None), "decode takes a sampler such as"),
        (lambda: by_hand(sampler="mar"), "'mar' is for continuous tokens, and those of this session are discrete"),
        (lambda: by_hand(noise=3), "decode takes the Noise of 4 rows, as the session has, not int"),
        (lambda: by_hand(noise=Noise(0, torch.arange(1))), "the Noise of 4 rows, as the session has, not of 1 rows"),
        (lambda: Noise([1], torch.arange(4)), "There are 1 seeds for 4 rows"),
        (lambda: Noise(0, None), "Image indices are whole numbers from 0"),  # type: ignore[arg-type]
        (lambda: Noise(0, torch.zeros(1, 4)), "Image indices are whole numbers from 0"),
        (lambda: flat(batch=0), "batch must be a whole number from 1 to 2147483647, not 0"),
        (lambda: flat(length=2.5), "length must be a whole number, not 2.5"),
        (lambda: flat(vocab=None), "vocab must be a whole number from 1 to 2147483647, not null"),
        (lambda: flat(vocab=True), "vocab must be a whole number, not True"),
        (lambda: Target(temperature="1"), "temperature must be a number, not '1'"),  # type: ignore[arg-type]
        (lambda: Target(top_p=None), "top_p must be a number, not None"),  # type: ignore[arg-type]
        (lambda: Target(forced="x"), "forced_tokens must be a tensor or a list"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_decoded(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        call()


def test_a_session_decodes_once() -> None:
    """A second time it gave zeros: its rows were done, or begun, and the state of the call knew nothing of that."""
    session = CallableSession(lambda t: torch.zeros(len(t), t.shape[1] + 1, 3), 4, 5, 3)
    by_hand(session)
    with pytest.raises(VisarError, match="This session has decoded before; make a new one"):
        by_hand(session)

    def stop(_: Any) -> None:
        raise KeyError

    half = CallableSession(lambda t: torch.zeros(len(t), t.shape[1] + 1, 3), 4, 5, 3)
    with pytest.raises(KeyError):
        decode(half, get_sampler("ar"), Target(), Noise(0, torch.arange(4)), stop)
    with pytest.raises(VisarError, match="This session has decoded before"):
        by_hand(half)


def test_numbers_of_other_kinds_by_hand() -> None:
    plain = by_hand()
    assert torch.equal(by_hand(noise=Noise(torch.tensor([0] * 4), range(4))).tokens, plain.tokens)
    forced = by_hand(target=Target(1, forced=[-1, 2, -1, -1, 1])).tokens
    assert forced[:, 1].tolist() == [2] * 4 and forced[:, 4].tolist() == [1] * 4
