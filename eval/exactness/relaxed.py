"""How far relaxed samplers move the distribution: total variation of the *joint* distribution, on models small enough
to enumerate.

Run as `python -m visar.eval.exactness.relaxed`; it prints the table of `docs/relaxed.md`. The toy models are small and
their drafts good, so the results show how a parameter acts and what it does not bound, not its effect on a large
model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np

from visar.errors import VisarError
from visar.eval.exactness.joint import Case, configured, expected, measure, values
from visar.eval.report.plots import Point, check, draw
from visar.samplers import (
    BeamTree,
    CoolSD,
    GroupedJacobi,
    Lantern,
    LanternPlusPlus,
    Sampler,
    Speculative,
    TreeSpeculative,
    Typical,
)
from visar.samplers.speculative import Children
from visar.tables import table

TREE = "3x2x1"
BEAMS: tuple[tuple[int, Children], ...] = ((1, "chosen"), (3, "chosen"), (3, "sampled"))
# What is drafted, what is relaxed, and by how much ("" is exact)
SWEEP: tuple[tuple[str, str, Sampler], ...] = (
    ("tree, sampled", "", TreeSpeculative(tree=TREE, drafter="model")),
    ("beam of 3, chosen", "", BeamTree(beam=3, depth=3, nodes=9, drafter="model")),
    ("beam of 3, sampled", "", BeamTree(beam=3, depth=3, nodes=0, children="sampled", drafter="model")),
    *(
        (f"lantern, beam of {beam}, {children}", f"delta {delta}", Lantern(
            beam=beam, depth=3, nodes=0 if children == "sampled" else 3 * beam, children=children, drafter="model", k=4,
            delta=delta,
        ))
        for beam, children in BEAMS
        for delta in (0.05, 0.1, 0.2, 0.4)
    ),
    *(
        ("lantern++, tree, sampled, k 3", f"lambda {lam}", LanternPlusPlus(tree=TREE, drafter="model", k=3, lam=lam))
        for lam in (1, 2, 5, 10)
    ),
    ("tree, most likely", "", TreeSpeculative(tree=TREE, children="chosen", drafter="model")),
    *(
        ("typical, tree, most likely", f"epsilon {e}", Typical(tree=TREE, drafter="model", epsilon=e, delta=3 * e))
        for e in (0.6, 0.3, 0.09)
    ),
    ("chain of 3", "", Speculative(gamma=3)),
    *(("cool-sd, chain of 3", f"omega {w}", CoolSD(gamma=3, drafter="model", omega=w)) for w in (1.1, 1.5, 2.0, 4.0)),
    *(("bild, chain of 3", f"omega {w}", CoolSD(gamma=3, drafter="model", omega=w, nu=0)) for w in (1.1, 2.0)),
    *(("gsd", f"group {g}", GroupedJacobi(group=g, gap=1.0)) for g in (1, 2, 3, 5)),
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """`distance` is the total variation of the joint distribution, `noise` that of as many exact samples."""

    distance: float
    noise: float
    tokens_per_pass: float


def distance(sampler: Sampler, case: Case, sequences: int, seed: int = 0) -> Moved:
    """Total variation between what a sampler gives and the target distribution, over all V**N sequences."""
    _, speed, tokens = measure(sampler, case, sequences, seed)
    wanted = expected(case)
    found = np.bincount(values(tokens, case.vocab), minlength=len(wanted)) / sequences
    exact = np.random.default_rng(seed).multinomial(sequences, wanted) / sequences
    return Moved(float(abs(found - wanted).sum() / 2), float(abs(exact - wanted).sum() / 2), speed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=131072)
    parser.add_argument("--plot", help="also plot them into this file; needs the extra `eval`")
    options = parser.parse_args()
    try:
        if options.plot:
            check(options.plot)
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    case = Case("relaxed", vocab=5, length=4, window=4)
    rows = []
    for family, amount, sampler in SWEEP:
        moved = distance(configured(sampler, case), case, options.sequences)
        rows.append((family, amount, moved))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(
        table(
            ("SAMPLER", "RELAXED BY", "TV OF THE JOINT DISTRIBUTION", "OF AN EXACT SAMPLE", "TOKENS/PASS"),
            [
                (family, amount or "exact", f"{m.distance:.3f}", f"{m.noise:.3f}", f"{m.tokens_per_pass:.2f}")
                for family, amount, m in rows
            ],
        )
    )
    if options.plot:
        points = [Point(f, amount, m.tokens_per_pass, m.distance, exact=not amount) for f, amount, m in rows]
        floor = rows[0][2].noise
        draw(points, options.plot, x="tokens per pass", y="total variation of the joint distribution", floor=floor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
