"""Several updates of one weight become one: task arithmetic and TIES, on dense deltas.

PAFT, arXiv 2406.17923: theta = theta_pre + f(delta_SFT, delta_DPO), trained side by side on one
base, f = `linear` or `ties`. All deltas of a call have one shape; w are their factors.
"""
import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def trim(delta: Tensor, density: float) -> Tensor:
    """delta's max(1, round(density n)) largest of n entries by magnitude, exactly; the rest is 0.

    Of equal magnitudes the first in row-major order stay.
    """
    size, kept = delta.abs().flatten(), max(1, round(density * delta.numel()))
    if kept >= size.numel():
        return delta
    least = size.kthvalue(size.numel() - kept + 1).values
    keep = size > least
    keep[(size == least).nonzero()[:kept - int(keep.sum()), 0]] = True
    return torch.where(keep.view_as(delta), delta, 0)


def linear(deltas: Sequence[Tensor], factors: Sequence[float], density: float = 1.0) -> Tensor:
    """sum_k w_k trim(delta_k).   Task arithmetic, arXiv 2212.04089; one delta of w = 1 is itself"""
    each = (w * trim(d, density) for w, d in zip(factors, deltas, strict=True))
    return functools.reduce(torch.add, each)  # sum() begins with 0, which makes -0.0 0.0


def ties(deltas: Sequence[Tensor], factors: Sequence[float], density: float = 1.0) -> Tensor:
    """mean of {v_k : sgn v_k = s}, entry by entry; v_k = w_k trim(delta_k), s = sgn(sum_k v_k).

    TIES, arXiv 2306.01708, of the deltas w_k delta_k: a factor counts in the vote and in the mean,
    which divides by how many agree, not by their factors, so equal ones are the paper's lambda.
    Zeros never agree: a zero delta changes nothing. Where s = 0 all cancel, and the mean is 0.
    PEFT's add_weighted_adapter merges A with A and B with B, another result than on the deltas.
    """
    v = torch.stack([w * trim(d, density) for w, d in zip(factors, deltas, strict=True)])
    agree = v.sign() == v.sum(0).sign()
    return (v * agree).sum(0) / agree.sum(0).clamp(min=1)


METHODS = {"linear": linear, "ties": ties}
