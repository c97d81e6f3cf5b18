"""--loss NAME: which units a loss reads, whether it needs pi_ref, and its value, one line each."""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import losses
from config import Config


class Terms(NamedTuple):
    """What a loss may read of one micro-batch, and the two constants of the whole step."""

    logps: Tensor  # (B,)
    ref_logps: Tensor | None  # (B,)
    token_logps: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    rewards: Tensor  # (B,)
    kinds: Sequence[str]  # B of "sft", "chosen", "rejected", "scored"
    z0: Tensor  # scalar, KTO's reference point
    tokens_per_row: float  # response tokens, averaged over the rows of the step
    config: Config


class Objective(NamedTuple):
    """A loss by name: which units it reads, whether it needs pi_ref, and its value per unit."""

    reads: str  # see data.units
    reference: bool
    loss: Callable[[Terms], Tensor]
    start: Callable[[Tensor, Config], Tensor | float] | None  # its value at policy == reference


def sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of rows that alternate."""
    return x[0::2], x[1::2]


def pair(t: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    return *sides(t.logps), *sides(t.ref_logps), t.config.beta


def row(t: Terms) -> tuple[Tensor, Tensor, Tensor, float]:
    return t.logps, t.ref_logps, t.rewards, t.config.beta


def means(t: Terms) -> tuple[Tensor, Tensor]:
    return sides(t.logps / t.mask.sum(-1))


LOSSES = {
    "uft": Objective("rows", True, lambda t: losses.uft(*row(t)),
                     lambda r, c: (0.5 - r).square()),
    "uft_bce": Objective("rows", True, lambda t: losses.uft_bce(*row(t)), lambda r, c: math.log(2)),
    "una_binary": Objective("labels", True, lambda t: losses.uft(*row(t)),
                            lambda r, c: (0.5 - r).square()),
    "una_pair": Objective("pairs", True, lambda t: losses.una_pair(*pair(t)),
                          lambda r, c: math.log(2)),
    "sft": Objective("demonstrations", False, lambda t: losses.sft(t.logps), None),
    "sft_token_mean": Objective(
        "demonstrations", False,
        lambda t: losses.sft_token_mean(t.token_logps, t.mask, t.tokens_per_row), None),
    "dpo": Objective("pairs", True, lambda t: losses.dpo(*pair(t), t.config.label_smoothing),
                     lambda r, c: math.log(2)),
    "ipo": Objective("pairs", True, lambda t: losses.ipo(*pair(t)),
                     lambda r, c: 1 / (2 * c.beta)**2),
    "bco_pair": Objective("pairs", True, lambda t: losses.bco_pair(*pair(t)),
                          lambda r, c: 2 * math.log(2)),
    "kto": Objective(
        "labels", True,
        lambda t: losses.kto(t.logps, t.ref_logps, t.rewards > 0.5, t.z0, t.config.beta,
                             t.config.desirable_weight, t.config.undesirable_weight),
        lambda r, c: torch.where(r > 0.5, c.desirable_weight, c.undesirable_weight) / 2),
    "orpo": Objective("pairs", False, lambda t: losses.orpo(*means(t), t.config.orpo_weight), None),
    "simpo": Objective(
        "pairs", False,
        lambda t: losses.simpo(*means(t), t.config.beta, t.config.simpo_gamma), None),
}
