"""How far relaxed samplers move the law: total variation of the *joint* law, on models small enough to enumerate.

Run as `python -m visar.eval.relaxed`; it prints the table of `docs/relaxed.md`. The toy models are small and their
drafts good, so the figures say how a parameter acts and what it does not bound, not what it costs on a large model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from visar.eval.exactness import Case, configured, measure, values
from visar.eval.tabular import joint
from visar.samplers import CoolSD, GroupedJacobi, Lantern, LanternPlusPlus, Sampler, Speculative, TreeSpeculative
from visar.tables import table

TREE = "3x2x1"
SWEEP: tuple[tuple[str, Sampler], ...] = (
    ("exact, drawn children", TreeSpeculative(tree=TREE, drafter="model")),
    ("exact, chosen children", TreeSpeculative(tree=TREE, children="chosen", drafter="model")),
    *(
        (f"lantern, delta {delta}, {children} children {tree}", Lantern(
            tree=tree, children="chosen" if children == "chosen" else "drawn", drafter="model", k=4, delta=delta
        ))
        for children, tree in (("chosen", "1x1x1"), ("chosen", TREE), ("drawn", TREE))
        for delta in (0.05, 0.1, 0.2, 0.4)
    ),
    *(
        (f"lantern++, lambda {lam}, k 3", LanternPlusPlus(tree=TREE, drafter="model", k=3, lam=lam))
        for lam in (1, 2, 5, 10)
    ),
    ("exact chain", Speculative(gamma=3)),
    *((f"cool-sd, omega {w}", CoolSD(gamma=3, drafter="model", omega=w)) for w in (1.1, 1.5, 2.0, 4.0)),
    *((f"gsd, group {g}", GroupedJacobi(group=g, gap=1.0)) for g in (1, 2, 3, 5)),
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """`distance` is the total variation of the joint law, `noise` that of as many exact draws."""

    distance: float
    noise: float
    tokens_per_pass: float


def distance(sampler: Sampler, case: Case, sequences: int, seed: int = 0) -> Moved:
    """Total variation between what a sampler draws and the target law, over all V**N sequences."""
    _, speed, tokens = measure(sampler, case, sequences, seed)
    wanted = joint(case.build(), case.law)
    found = np.bincount(values(tokens, case.vocab), minlength=len(wanted)) / sequences
    exact = np.random.default_rng(seed).multinomial(sequences, wanted) / sequences
    return Moved(float(abs(found - wanted).sum() / 2), float(abs(exact - wanted).sum() / 2), speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=131072)
    options = parser.parse_args()
    case = Case("relaxed", vocab=5, length=4, window=4)
    rows = []
    for name, sampler in SWEEP:
        moved = distance(configured(sampler, case), case, options.sequences)
        rows.append((name, f"{moved.distance:.3f}", f"{moved.noise:.3f}", f"{moved.tokens_per_pass:.2f}"))
    print(table(("SAMPLER", "TV OF THE JOINT LAW", "OF AN EXACT SAMPLE", "TOKENS/PASS"), rows))


if __name__ == "__main__":
    main()
