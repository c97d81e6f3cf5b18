"""Every on-policy estimator, as pure functions of log-probs, rewards and advantages.

Conventions, once for the file:
  token_logps      log pi_theta of every token of a response, float32, (B, T), zero outside it
  old_token_logps  the same numbers under the policy that sampled it: no gradient
  ref_token_logps  the same under pi_ref
  rewards          what a response earns: any real number; (P, G) for G responses to P prompts
  advantages       a reward minus what was expected: no gradient, zero outside the response
  length           what a sum over tokens is divided by: a number, or one per row, (B,)
Nothing is reduced over rows: a loss returns (B,), and the division happens in update.train_step.
A policy gradient is unlike a loss of losses.py in this: its VALUE says nothing (REINFORCE's has
mean 0), only its gradient does. Theorems: tests/test_policy_gradients.py. Letters: B rows, T
tokens, P prompts, G responses to each.
"""
import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Advantages: what a response earned beyond what was expected of it


def rloo_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the others' r_j, (P, G), G >= 2.   RLOO, arXiv 2402.14740

    The baseline does not depend on response i, so that E[A grad log pi] = grad E[r] exactly; the
    mean of all G would give (1 - 1/G) of it. A = G/(G-1) (r - mean), and sums to 0 over a group.
    """
    others = rewards_PG.shape[1] - 1
    return rewards_PG - (rewards_PG.sum(1, keepdim=True) - rewards_PG) / others


def grpo_advantages(rewards_PG: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps), (P, G), G >= 2.   GRPO, arXiv 2402.03300

    std has G - 1 below it, as TRL's, and is of the "group", of the whole "batch", or left out
    ("none": Dr. GRPO, arXiv 2503.20783). It makes A blind to the scale of r, and turns the
    direction of the gradient: prompts whose responses nearly agree weigh as much as the others.
    """
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if scale == "none":
        return centred
    std = rewards_PG.std(1, keepdim=True) if scale == "group" else rewards_PG.std()
    return centred / (std + eps)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T), from a reward per token.   GAE, arXiv 1506.02438

    delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lam A_t+1, return_t = A_t + V_t; behind
    a response there is nothing: V = A = 0. lam = 0 is the TD error, gamma = lam = 1 the sum of the
    rewards to come minus V_t.
    """
    advantages, later, value = torch.zeros_like(rewards_BT), 0.0, 0.0
    for t in reversed(range(rewards_BT.shape[1])):
        delta = rewards_BT[:, t] + gamma * value - values_BT[:, t]
        later = (delta + gamma * lam * later) * mask_BT[:, t]
        value = values_BT[:, t] * mask_BT[:, t]
        advantages[:, t] = later
    return advantages, (advantages + values_BT) * mask_BT


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the places of the mask, zero elsewhere, (B, T).

    var has one less than the number of places below it; one place alone is its mean, and gets 0.
    """
    x = x_BT[mask_BT.bool()]
    var = x.var(correction=min(1, len(x) - 1))
    return (x_BT - x.mean()) / (var + 1e-8).sqrt() * mask_BT


# Losses


def ppo_clip(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(rho A, clamp(rho, 1 - clip, 1 + clip) A), rho = pi / pi_old, one per entry, any shape.

    PPO, arXiv 1707.06347, Eq. 7. At rho = 1 its gradient is REINFORCE's, -A grad logps; it is zero
    where A > 0 and rho > 1 + clip, or A < 0 and rho < 1 - clip, and nowhere else.
    """
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl(token_logps: Tensor, ref_token_logps: Tensor, estimator: str = "k3") -> Tensor:
    """An estimate of KL(pi || pi_ref) from each entry of samples of pi, any shape.

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman's names).
    k1 and k3 have mean KL, k3 is never negative. As a LOSS on those samples k1 does nothing (mean
    gradient 0), k2 gives grad KL(pi || pi_ref), and k3 grad KL(pi_ref || pi): of responses where
    the entries are, and where they are tokens that of the next token's KL alone, as if the tokens
    before it had not been pi's choice.
    """
    d = token_logps - ref_token_logps
    return {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[estimator]


def rloo(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """`ppo_clip` on whole responses, (B,): one ratio each, of the sums.   RLOO, arXiv 2402.14740

    The KL is inside the reward: r - beta sum_t (log pi_old - log pi_ref), see rollouts.py.
    """
    return ppo_clip(logps, old_logps, advantages, clip)


def grpo(
    token_logps: Tensor, old_token_logps: Tensor, ref_token_logps: Tensor, advantages: Tensor,
    clip: float, beta: float, length: Tensor | float,
) -> Tensor:
    """sum_t (ppo_clip + beta k3) / length, (B,); advantages (B, T).   GRPO, arXiv 2402.03300, Eq. 3

    length: the row's own tokens (GRPO), the batch's mean (DAPO, arXiv 2503.14476: every token
    weighs the same), or a constant (Dr. GRPO).
    """
    each = ppo_clip(token_logps, old_token_logps, advantages, clip)
    return (each + beta * kl(token_logps, ref_token_logps, "k3")).sum(-1) / length


def value_clip(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V held within clip of V_old - R)^2) / 2, one per entry, any shape."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (held - returns).square()) / 2


def ppo(
    token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, values: Tensor,
    old_values: Tensor, returns: Tensor, clip: float, value_weight: float, length: Tensor | float,
) -> Tensor:
    """sum_t (ppo_clip + value_weight value_clip) / length, (B,).   PPO, arXiv 1707.06347, Eq. 9

    All (B, T), zero outside the response. The KL is inside the rewards that gae was given: k1 per
    token, with a fixed beta, so that its sum is beta times the sequence log-ratio.
    """
    policy = ppo_clip(token_logps, old_token_logps, advantages, clip)
    return (policy + value_weight * value_clip(values, old_values, returns, clip)).sum(-1) / length


# UFT of Liu et al.: a part of the solution is given away as a hint, less and less of it


def hint_probability(step: int, low: float, high: float, horizon: int) -> float:
    """low + (high - low) (1 + cos(pi step / horizon)) / 2 up to the horizon, then 0.

    UFT of Liu et al., arXiv 2505.16984, Eq. B.1; there low = .05, high = .95, horizon = 300.
    """
    if step > horizon or not horizon:
        return 0.0
    return low + (high - low) * (1 + math.cos(math.pi * step / horizon)) / 2


def hint_length(tokens: int, parts: int, probability: float, generator: torch.Generator) -> int:
    """How many of a solution's tokens are given: those of the first l of `parts` equal parts.

    l ~ Binomial(parts, probability), so that probability 0 gives none and 1 all of them, the end
    token too.   UFT of Liu et al., arXiv 2505.16984
    """
    drawn = int((torch.rand(parts, generator=generator) < probability).sum())
    return round(tokens * drawn / parts)


def uft_hint(
    token_logps: Tensor, old_token_logps: Tensor, ref_token_logps: Tensor, advantages: Tensor,
    hint_mask: Tensor, clip: float, beta: float, length: Tensor | float, hint_weight: float,
) -> Tensor:
    """`grpo` behind the hint, -hint_weight sum_t log pi on it, (B,).   UFT of Liu et al., Eq. 3.3

    hint_mask (B, T). Without hints it is `grpo`; where the hint is the whole solution it is
    hint_weight * sft. The paper sums over the hint, its code averages: this is the sum.
    """
    said = token_logps.masked_fill(hint_mask, 0)
    old, ref = (x.masked_fill(hint_mask, 0) for x in (old_token_logps, ref_token_logps))
    learned = grpo(said, old, ref, advantages.masked_fill(hint_mask, 0), clip, beta, length)
    return learned - hint_weight * (token_logps * hint_mask).sum(-1)


# UniAPL, arXiv 2509.25148: our reading of its abstract, which is all that could be read


def discriminator(logits: Tensor, teacher: Tensor) -> Tensor:
    """-log sigmoid(d) on the teacher's responses, -log sigmoid(-d) on the policy's, (B,).

    teacher (B,) booleans. The best logit is d* = log pi_teacher - log pi, so that a policy whose
    reward is d*, held fixed, goes down grad KL(pi || pi_teacher).
    """
    return -logsigmoid(torch.where(teacher, logits, -logits))


def uniapl(
    logps: Tensor, policy: Tensor, logits: Tensor, teacher: Tensor, sft_weight: float
) -> Tensor:
    """Demonstrations and rollouts in one batch, (B,).   UniAPL, arXiv 2509.25148, our reading

    -sft_weight logps on the teacher's rows and `policy`, the row's GRPO loss under the reward
    r + weight d, on the others; on both the discriminator's loss, whose logits see no policy.
    """
    told = torch.where(teacher, -sft_weight * logps, policy)
    return told + discriminator(logits, teacher)
