"""Post-training a GPT with two-way heads (FlashAR, Zhou et al. 2026, arXiv:2605.09430), in two stages.

Stage 1 trains the branch and the gate on a frozen trunk, stage 2 all of it, the trunk at a fifth of the learning rate.
The loss is the cross-entropy of the mixed logits under the mask of the diagonals. The result is another model than the
trunk, with a distribution of its own; the log has the cross-entropy of both.
"""

from __future__ import annotations

from collections.abc import Mapping

from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.two_way import Mixing, TwoWayLlamaGen, is_branch, two_way
from visar.families.llamagen.vq import VQModel
from visar.text_encoders.words import WordEncoder
from visar.training.ar import ARLoss, TokenBatches
from visar.training.data import ImageSet
from visar.training.loop import TrainConfig, distributed, fit

TRUNK = 0.2  # of the learning rate, in stage 2


def check_stage(start: LlamaGen, stage: int) -> None:
    """Raise `VisarError` for a GPT that the stage does not begin with."""
    if stage == 2 and not isinstance(start, TwoWayLlamaGen):
        raise VisarError("Stage 2 goes on from stage 1, and this GPT has no two-way heads: give --stage 1 first.")
    if stage == 1 and isinstance(start, TwoWayLlamaGen):
        raise VisarError("This GPT has two-way heads already: give --stage 2 to train all of it.")
    if start.scan == "any":
        raise VisarError("This GPT samples in any order; two-way heads are for one that samples in raster order.")


def train_two_way(
    data: ImageSet,
    size: int,
    config: TrainConfig,
    vq: VQModel,
    encoder: WordEncoder,
    start: LlamaGen,
    *,
    stage: int = 1,
    layers: int = 1,
    mixing: Mixing = "gate",
    variants: int = 0,
    weights: Mapping[str, float] | None = None,
) -> TwoWayLlamaGen:
    """Train on the `train` split; saves `gpt/` in diffusers layout in `config.out`; returns the EMA.

    In stage 1 `start` is the trunk, and the branch has so many `layers`; in stage 2 it is what stage 1 has saved.
    `variants` and `weights` are those of `TokenBatches`.
    Raises `VisarError` for a `start` of the other stage, or of another tokenizer, text encoder or size.
    """
    check_stage(start, stage)
    c = start.config
    for what, own, its in (
        ("codes", c.vocab_size, vq.sizes.codebook_size),
        ("cells along a side", c.grid, size // vq.sizes.downsample),
        ("caption slots", c.condition_length if c.condition == "text" else 0, encoder.length),
        ("features of a word", c.caption_features if c.condition == "text" else 0, encoder.table.shape[1]),
    ):
        if own != its:
            raise VisarError(f"The GPT has {own} {what}, and the tokenizer, the size or the words have {its}.")
    batches = TokenBatches(data, size, config, vq, encoder, variants=variants, weights=weights, light=True)
    gpt = start.float() if isinstance(start, TwoWayLlamaGen) else two_way(start, layers, mixing)
    device = distributed(config.device)[2]
    before = {f"trunk-{name}": value for name, value in batches.cross_entropy(gpt.trunk.to(device).eval()).items()}
    loss = ARLoss(gpt)

    def rate(name: str) -> float:
        return 1.0 if is_branch(name.removeprefix("gpt."), c.num_layers) else TRUNK

    for name, parameter in loss.named_parameters():
        parameter.requires_grad_(stage == 2 or rate(name) == 1)

    def evaluate(ema: ARLoss) -> dict[str, float]:
        batches.save(ema.gpt)
        return batches.cross_entropy(ema.gpt) | before

    found = fit(loss, batches, config, evaluate, rate=rate).gpt
    assert isinstance(found, TwoWayLlamaGen)
    return found
