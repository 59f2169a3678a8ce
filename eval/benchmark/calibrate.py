"""Trees from measured acceptance: which drafts are worth testing (as Sequoia, Chen et al. 2024, asks).

Run as `python -m visar.eval.benchmark.calibrate`; the paths that it prints are a `tree` for samplers that draft a
static one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visar.engine.tree import MOST_NODES
from visar.errors import VisarError
from visar.eval.prompts import PROMPTS
from visar.generation.model import ImageModel
from visar.samplers import TreeSpeculative
from visar.samplers.tree_verification import ChildRule, VerifiedTree
from visar.samplers.trees import TREES, best_tree, expected_tokens, named_tree
from visar.samplers.verification import StepNoise
from visar.tables import table


@dataclass(frozen=True)
class Watched(TreeSpeculative):
    """A tree sampler that counts, per depth, the passes that got there and the rank of the child that was accepted.

    For images one at a time: rows that are done go on drafting until the last one is.
    """

    reached: list[int] = field(default_factory=list, compare=False)
    taken: list[list[int]] = field(default_factory=list, compare=False)

    def verify(
        self, p: Tensor, q: Tensor, tokens: Tensor, children: Tensor, noise: StepNoise, rule: ChildRule
    ) -> VerifiedTree:
        verified = super().verify(p, q, tokens, children, noise, rule)
        alive = torch.ones(len(p), dtype=torch.bool, device=p.device)
        node = torch.zeros(len(p), dtype=torch.long, device=p.device)
        for depth, nodes in enumerate(verified.path.unbind(1)):
            if depth == len(self.reached):
                self.reached.append(0)
                self.taken.append([0] * children.shape[-1])
            self.reached[depth] += int(alive.sum())
            alive = nodes >= 0
            rank = (children[0, node] == nodes[:, None]).long().argmax(1)
            for r in rank[alive].tolist():
                self.taken[depth][r] += 1
            node = torch.where(alive, nodes, node)
        return verified

    def acceptance(self) -> list[list[float]]:
        """How often the child of each rank was accepted, per depth, of the nodes that had such a child."""
        return [[n / max(total, 1) for n in taken] for total, taken in zip(self.reached, self.taken, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--drafter", help="folder of a drafter, where none is next to the model")
    parser.add_argument("--kind", default="eagle", help="eagle, medusa, hydra or model")
    parser.add_argument("--children", type=int, default=5, help="of each node that is watched")
    parser.add_argument("--levels", type=int, default=2, help="that are watched; deeper ones count as the last")
    parser.add_argument("--depth", type=int, default=6, help="of the trees at most")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 25, 40])
    options = parser.parse_args()
    try:
        if min(options.nodes) < 1 or max(options.nodes) >= MOST_NODES:
            raise VisarError(f"--nodes must be 1 to {MOST_NODES - 1} drafts.")
        if not 1 <= options.levels <= options.depth or not 1 <= options.images <= len(PROMPTS):
            raise VisarError(f"--levels must be 1 to --depth, and --images 1 to {len(PROMPTS)}.")
        watched = Watched(tree="x".join([str(options.children)] * options.levels), drafter=options.kind)
        model = ImageModel.load(options.model)
        model.bar = {"disable": True}
        if options.drafter:
            model.load_drafter(options.drafter)
        for prompt in PROMPTS[: options.images]:
            model.generate(prompt, sampler=watched, output_type="tokens")
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    rates = watched.acceptance()
    print(
        table(
            ("DEPTH", "REACHED", "ACCEPTED BY RANK"),
            [
                (i, n, "  ".join(f"{a:.3f}" for a in r))
                for i, (n, r) in enumerate(zip(watched.reached, rates, strict=True), start=1)
            ],
        )
    )
    rates += [rates[-1]] * (options.depth - len(rates))
    trees = [*TREES, *(best_tree(rates, nodes) for nodes in options.nodes)]
    shapes = {name: named_tree(name) for name in trees}
    rows = [(n, len(shape.parents) - 1, f"{expected_tokens(shape, rates):.2f}") for n, shape in shapes.items()]
    print(table(("TREE", "DRAFTS", "EXPECTED TOKENS/PASS"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
