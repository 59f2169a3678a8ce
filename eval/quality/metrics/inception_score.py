"""Inception score (Salimans et al. 2016, arXiv:1606.03498) as the ADM evaluator takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.errors import VisarError

SPLIT = 5000


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp E KL(p(y|x) || p(y)) of logits [n, C]: the mean over splits of 5,000 images, in the order given.

    The last split may be shorter, as it is there. ADM's logits leave out the bias of the last layer.
    """
    if logits.ndim != 2 or len(logits) < 2:
        raise VisarError(f"The Inception score needs logits [n, C] of 2 or more images, not {[*logits.shape]}.")
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).nan_to_num(0.0).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
