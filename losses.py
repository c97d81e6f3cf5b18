"""Every offline loss, as a pure function of sequence log-probabilities.

Conventions, once for the file:
  logps            log pi_theta(y|x): the SUM over response tokens, EOS included; float32, (B,)
  ref_logps        the same numbers under pi_ref (the adapters switched off)
  mean_logps       logps divided by the number of response tokens
  rewards          the explicit feedback r in [0, 1]; a demonstration has reward 1
  chosen, rejected the two rows of each pair, shape (P,)
Nothing here is reduced: a loss returns one number per row (B,) or per pair (P,), and the division
happens in update.train_step, once. In the gradients below u = implicit_reward and s = sigmoid(u);
every dL/dlogps is derived or listed in docs/math.md and proved in tests/. Read top to bottom: each
loss uses only what stands above it.
"""
import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r_theta = beta * log(pi_theta(y|x) / pi_ref(y|x)), shape (B,).   UFT Eq. 5

    Exactly 0 while policy and reference agree; never above -beta * ref_logps.
    """
    return beta * (logps - ref_logps)


def sft(logps: Tensor) -> Tensor:
    """-log pi_theta(y|x), the sequence sum, shape (B,).   UFT Eq. 1

    dL/dlogps = -1 for every row, for ever.
    """
    return -logps


def sft_token_mean(
    token_logps: Tensor, mask: Tensor, tokens_per_row: float | None = None
) -> Tensor:
    """The field's usual SFT: the mean over rows is the mean over response tokens.   UFT Eq. 1 / |y|

    token_logps, mask: (B, T). Returns (B,): -sum_t mask * token_logps / tokens_per_row, where
    tokens_per_row is the average of the whole optimizer step (default: of this batch), so that
    micro-batches of unequal length still add up to one token mean.
    dL/dtoken_logps = -mask / tokens_per_row.
    """
    if tokens_per_row is None:
        tokens_per_row = float(mask.sum()) / len(mask)
    return -(token_logps * mask).sum(-1) / tokens_per_row


def uft(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(sigmoid(r_theta) - r)^2, shape (B,).   UFT Eq. 7; UNA Eq. 11, 13 without their minus sign

    dL/dlogps = 2 beta (s - r) s (1 - s). For r = 1 it is -2 beta s (1 - s)^2: always upwards, like
    SFT; beta/4 in size at the start; 8 beta/27 at most (s = 1/3); fading on both sides. It is zero
    where s = r, and to rounding where |u| is large: a row lost far enough is not pulled back.
    """
    return (torch.sigmoid(implicit_reward(logps, ref_logps, beta)) - rewards).square()


def una_reward(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(r_theta - r)^2 with r any real number, nothing squashed, (B,).   UNA 2.3, g = MSE, f = c = 0

    dL/dlogps = 2 beta (u - r). On the policy's own samples its mean gradient is -2 beta grad J, J
    being RLHF's objective (UFT Eq. 3). On samples of neither the policy nor pi* it is at rest at
    pi* only where Z(x) = 1.
    """
    return (implicit_reward(logps, ref_logps, beta) - rewards).square()


def uft_bce(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """-r log s - (1 - r) log(1 - s), soft labels, shape (B,).   UNA Eq. 12 when r is 0 or 1

    dL/dlogps = beta (s - r): the same fixed point s = r as `uft`, but it never gives a row up.
    """
    u = implicit_reward(logps, ref_logps, beta)
    return -rewards * logsigmoid(u) - (1 - rewards) * logsigmoid(-u)


def reward_model(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) on explicit scores, (P,).   UFT Eq. 2, Bradley-Terry

    dL/dchosen = -sigmoid(r_rejected - r_chosen) = -dL/drejected.
    """
    return -logsigmoid(chosen - rejected)


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z), z = u_chosen - u_rejected, shape (P,).   DPO Eq. 7

    dL/dchosen_logps = -beta (sigmoid(-z) - e) = -dL/drejected_logps: only the difference is
    driven, and both log-probs may fall. e = label_smoothing; with e > 0 (conservative DPO) the
    optimum is z = logit(1 - e).
    """
    margin = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    z = beta * margin
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """(h - 1 / (2 beta))^2, h = the log-ratio margin in SUMS, (P,).   IPO Eq. 17 (beta is its tau)

    dL/dchosen_logps = 2 (h - 1 / (2 beta)) = -dL/drejected_logps; minimum at h = 1 / (2 beta).
    """
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (h - 1 / (2 * beta)).square()


def una_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """-log sigmoid(r_theta(chosen) - r_theta(rejected)), (P,).   UNA Eq. 10 with f = log sigmoid

    Equal to `dpo`. As printed, without the log sigmoid, Eq. 10 is linear and has no minimum.
    dL/dchosen_logps = -beta sigmoid(-(u_w - u_l)) = -dL/drejected_logps.
    """
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return reward_model(chosen, rejected)


def bco_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """-log sigmoid(u_w) - log sigmoid(-u_l), (P,).   UNA Eq. 12 on a pair; BCO without its shift

    dL/dchosen_logps = -beta (1 - s_w); dL/drejected_logps = beta s_l. Never below `dpo`.
    """
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def kto_z0(mismatched_logps: Tensor, mismatched_ref_logps: Tensor) -> Tensor:
    """max(0, mean log-ratio) over responses with OTHER prompts, a scalar.   KTO, arXiv 2402.01306

    Stands in for KL(pi_theta || pi_ref), with bias: the responses are the data's, not the policy's.
    It carries no gradient.
    """
    return (mismatched_logps - mismatched_ref_logps).mean().clamp(min=0).detach()


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    z0: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigmoid(+-(u - beta z0))), + for desirable rows, (B,).   KTO, arXiv 2402.01306

    labels: (B,) booleans. dL/dlogps = -w beta v (1 - v) on desirable rows and +w beta v (1 - v) on
    undesirable ones, v the sigmoid above: w beta / 4 at most, where the log-ratio equals z0.
    """
    advantage = implicit_reward(logps, ref_logps, beta) - beta * z0
    desirable = desirable_weight * (1 - torch.sigmoid(advantage))
    undesirable = undesirable_weight * (1 - torch.sigmoid(-advantage))
    return torch.where(labels.bool(), desirable, undesirable)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation.   Maechler (2012), Eq. 7

    Two exact forms meet at -log 2; each is fed only values it can take, so no gradient is NaN.
    """
    near = x > -math.log(2)
    close = torch.where(near, x, -math.log(2))
    far = torch.where(near, -math.log(2), x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def orpo(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, weight: float) -> Tensor:
    """-m_w - weight * log sigmoid(logodds(m_w) - logodds(m_l)), (P,).   ORPO Eq. 6, 7

    m are MEAN log-probs, logodds(m) = m - log(1 - exp(m)); the NLL is the response's alone.
    With q = sigmoid(-(logodds_w - logodds_l)): dL/dm_w = -1 - weight q / (1 - exp m_w),
    dL/dm_l = weight q / (1 - exp m_l). A probability of exactly 1 is held one epsilon below it.
    """
    ceiling = -torch.finfo(chosen_mean_logps.dtype).eps
    chosen, rejected = chosen_mean_logps.clamp(max=ceiling), rejected_mean_logps.clamp(max=ceiling)
    logodds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen_mean_logps - weight * logsigmoid(logodds_ratio)


def simpo(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float, gamma: float
) -> Tensor:
    """-log sigmoid(beta (m_w - m_l) - gamma) on MEAN log-probs, shape (P,).   SimPO Eq. 6

    gamma is the margin itself, not the ratio gamma/beta that some code takes.
    With z the argument above: dL/dm_w = -beta sigmoid(-z) = -dL/dm_l.
    """
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def dro(logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, beta: float) -> Tensor:
    """(r - V(x) - r_theta)^2 / 2, (B,).   DRO, arXiv 2405.19107 (beta is its tau)

    rewards is any real score here, values (B,) the learned V(x); both may be trained.
    dL/dlogps = -beta (r - V - u); dL/dvalues = -(r - V - u).
    """
    return (rewards - values - implicit_reward(logps, ref_logps, beta)).square() / 2
