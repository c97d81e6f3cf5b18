"""--loss NAME: what a loss reads, what it needs beside the policy, and its value, one line each."""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import losses
import policy_gradients
from config import Config
from tokens import Sampled


class Terms(NamedTuple):
    """What a loss may read of one micro-batch, and the two constants of the whole step."""

    logps: Tensor  # (B,); of a reward model its scores stand here
    ref_logps: Tensor | None  # (B,)
    token_logps: Tensor | None  # (B, T)
    mask: Tensor | None  # (B, T)
    heads: Tensor | None  # values (B, T), or a discriminator's logits (B,)
    sampled: Sampled | None  # (B, T) each, of rollouts
    rewards: Tensor  # (B,)
    kinds: Sequence[str]  # B of "sft", "chosen", "rejected", "scored", "sampled"
    z0: Tensor  # scalar, KTO's reference point
    tokens_per_row: float  # response tokens, averaged over the rows of the step
    config: Config


class Objective(NamedTuple):
    """A loss by name: which units it reads, what it needs, and its value per unit."""

    reads: str  # see data.units
    reference: bool  # whether it needs pi_ref
    loss: Callable[[Terms], Tensor]
    start: Callable[[Tensor, Config], Tensor | float] | None  # its value at policy == reference
    online: bool = False  # whether its rows are sampled from the policy, see rollouts.py
    head: str = ""  # the head it trains beside the adapters, see heads.py


def sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of rows that alternate."""
    return x[0::2], x[1::2]


def pair(t: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    return *sides(t.logps), *sides(t.ref_logps), t.config.beta


def row(t: Terms) -> tuple[Tensor, Tensor, Tensor, float]:
    return t.logps, t.ref_logps, t.rewards, t.config.beta


def means(t: Terms) -> tuple[Tensor, Tensor]:
    return sides(t.logps / t.mask.sum(-1))


def scored(t: Terms) -> Tensor:
    """reward_model, and center_rewards times the square of the pair's sum, which BT leaves free."""
    chosen, rejected = sides(t.logps)
    centre = t.config.center_rewards * (chosen + rejected).square()
    return losses.reward_model(chosen, rejected) + centre


def dro(t: Terms) -> Tensor:
    """V(x) is what the head says before the first response token."""
    first = t.mask.int().argmax(1, keepdim=True)
    return losses.dro(*row(t)[:3], t.heads.gather(1, first)[:, 0], t.config.beta)


def una_online(t: Terms) -> Tensor:
    return (losses.uft if t.config.una_target == "score" else losses.una_reward)(*row(t))


def token_ratios(t: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_logps, old, ref, advantages)."""
    return t.token_logps, t.sampled.old_logps, t.sampled.ref_logps, t.sampled.advantages


def length(t: Terms) -> Tensor | float:
    """What grpo divides a row's sum over tokens by; of its own tokens a hint is not counted."""
    drawn = (t.mask * (1 - t.sampled.given)).sum(-1).clamp(min=1)
    return {"row": drawn, "batch": t.tokens_per_row,
            "constant": t.config.response_tokens}[t.config.grpo_length]


def grpo(t: Terms) -> Tensor:
    return policy_gradients.grpo(*token_ratios(t), t.config.clip, t.config.beta, length(t))


def rloo(t: Terms) -> Tensor:
    """One advantage a response: any of its tokens', for they are alike."""
    return policy_gradients.rloo(t.logps, t.sampled.old_logps.sum(-1),
                                 t.sampled.advantages.sum(-1) / t.mask.sum(-1), t.config.clip)


def ppo(t: Terms) -> Tensor:
    token_logps, old, _, advantages = token_ratios(t)
    return policy_gradients.ppo(
        token_logps, old, advantages, t.heads, t.sampled.values, t.sampled.returns, t.config.clip,
        t.config.ppo_value_weight, t.tokens_per_row)


def uft_hint(t: Terms) -> Tensor:
    return policy_gradients.uft_hint(*token_ratios(t), t.sampled.given.bool(), t.config.clip,
                                     t.config.beta, length(t), t.config.hint_weight)


def uniapl(t: Terms) -> Tensor:
    teacher = torch.tensor([kind != "sampled" for kind in t.kinds], device=t.logps.device)
    drawn = grpo(t) if t.sampled else t.logps  # a batch may hold nothing but demonstrations
    return policy_gradients.uniapl(t.logps, drawn, t.heads, teacher, t.config.sft_weight)


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
    "dro": Objective("rows", True, dro, lambda r, c: r.square() / 2, head="value"),
    "reward_model": Objective("pairs", False, scored, lambda r, c: math.log(2), head="score"),
    "una_online": Objective(
        "prompts", True, una_online,
        lambda r, c: (r - 0.5 * (c.una_target == "score")).square(), online=True),
    "rloo": Objective("prompts", True, rloo, None, online=True),
    "grpo": Objective("prompts", True, grpo, None, online=True),
    "ppo": Objective("prompts", True, ppo, None, online=True, head="value"),
    "uft_hint": Objective("demonstrations", True, uft_hint, None, online=True),
    "uniapl": Objective("demonstrations", True, uniapl, None, online=True, head="discriminator"),
}
CHOICES = {"loss": tuple(LOSSES), "anchor": ("ref", "old"), "una_target": ("score", "reward"),
           "grpo_scale": ("group", "batch", "none"), "grpo_length": ("row", "batch", "constant")}


def weights(objective: Objective, terms: Terms) -> Tensor:
    """|dL/dlogps| of every row by autograd, (B,); NaN where the loss reads single tokens.

    The graph of `terms` is left alone: its log-probs are taken as they are.
    """
    read = [t.detach().requires_grad_() for t in (terms.logps, terms.token_logps) if t is not None]
    given = terms._replace(**dict(zip(("logps", "token_logps"), read, strict=False)))
    with torch.enable_grad():
        total = objective.loss(given).sum()
    of_row, *of_token = torch.autograd.grad(total, read, allow_unused=True)
    if any(g is not None for g in of_token):
        return torch.full_like(terms.logps, math.nan)
    return of_row.abs()
