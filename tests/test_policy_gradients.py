"""Theorems about the on-policy estimators, on a bandit of four answers: exact sums in float64.

pi is a softmax of LOGITS and draws its own samples; OLD is log pi, held. A loss is weighed by pi or
by the probability of a whole group, so that "mean" below is an expectation and no estimate.
g_y = grad log pi(y), d = log pi - log pi_ref, rho = pi / pi_old.
"""
import itertools
import math

import pytest
import torch
from calculus import close, minimise, real, slope
from torch.autograd import gradcheck

import losses
import objectives
import policy_gradients as pg
from config import Config
from tokens import Sampled

LOGITS = real(0.3, -0.2, 0.0, 1.0)
OLD = LOGITS.log_softmax(0)
REF = real(-1.5, 0.9, 0.1, 0.4).log_softmax(0)
REWARDS = real(1.0, -0.5, 0.3, 2.0)
PI, BETA, CLIP, EPS = OLD.exp(), 0.7, 0.2, 1e-4
GROUPS = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3): every group of three answers
TABLE = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double()  # (B, T) each
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1],
                     [1, 1, 1, 1, 1, 1]]).bool()


def mean(loss):
    """d sum_y pi(y) loss(log pi)(y) / d logits, the weight pi held."""
    return slope(lambda x: PI * loss(x.log_softmax(0)), LOGITS)


def uphill(value):
    """d value(log pi) / d logits."""
    return slope(lambda x: value(x.log_softmax(0)), LOGITS)


def earned(logps):
    """E_pi[r], whose gradient is what REINFORCE estimates."""
    return (logps.exp() * REWARDS).sum()


def divergence(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def over_groups(loss):
    """d E[mean over the group of loss(log pi of its answers)] / d logits; loss: (64, 3) -> same."""
    weights = OLD[GROUPS].sum(1).exp()[:, None] / 3
    return slope(lambda x: weights * loss(x.log_softmax(0)[GROUPS]), LOGITS)


def in_groups(advantages_PG):
    """The mean gradient of `rloo` at ratio 1 over every group of three."""
    return over_groups(lambda now: pg.rloo(now, OLD[GROUPS], advantages_PG, CLIP))


# REINFORCE, RLOO, GRPO


@pytest.mark.parametrize("baseline", (-3.0, 0.0, 0.5, 2.0))
def test_reinforce_goes_up_the_reward_whatever_the_constant_baseline(baseline):
    """sum_y pi(y) (r - b) g_y = grad E[r], because sum_y pi(y) g_y = 0.
    Red: policy_gradients.py:ppo_clip: `old_logps).exp()` -> `old_logps).exp().square()`
    Red: policy_gradients.py:ppo_clip: `return -torch` -> `return torch`"""
    close(mean(lambda logps: pg.ppo_clip(logps, OLD, REWARDS - baseline, CLIP)), -uphill(earned),
          1e-12)


def test_rloo_advantages_sum_to_zero_and_leave_their_own_reward_out_of_the_baseline():
    """A_i = r_i - mean of the others = G / (G - 1) (r_i - mean of all).
    Red: policy_gradients.py:rloo_advantages: `shape[1] - 1` -> `shape[1]`
    Red: policy_gradients.py:rloo_advantages: `keepdim=True) - rewards_PG)` -> `keepdim=True))`"""
    rewards = TABLE[0]
    advantages = pg.rloo_advantages(rewards)
    close(advantages.sum(1), 0.0, 1e-12)
    close(advantages, 6 / 5 * (rewards - rewards.mean(1, keepdim=True)), 1e-12)
    for i in range(6):
        others = torch.cat((rewards[:, :i], rewards[:, i + 1:]), 1).mean(1)
        close(advantages[:, i], rewards[:, i] - others, 1e-12)


def test_rloo_is_unbiased_over_every_group_of_three():
    """E over all 64 groups of the gradient of `rloo` at ratio 1 is -grad E[r].
    Red: policy_gradients.py:rloo_advantages: `- rewards_PG) / others` -> `) / others`
    Red: policy_gradients.py:rloo: `(logps, old_logps, adv` -> `(logps, old_logps - .1, adv`"""
    close(in_groups(pg.rloo_advantages(REWARDS[GROUPS])), -uphill(earned), 1e-12)


def test_the_mean_of_the_whole_group_gives_a_smaller_gradient_of_the_same_direction():
    """Its own reward is in the baseline: (1 - 1/G) of grad E[r]; this is GRPO without its std.
    Red: policy_gradients.py:grpo_advantages: `if scale == "none"` -> `if scale == "batch"`
    Red: policy_gradients.py:grpo_advantages: `mean(1, keepdim=True)` -> `mean()`"""
    advantages = pg.grpo_advantages(REWARDS[GROUPS], "none")
    close(in_groups(advantages), -(1 - 1 / 3) * uphill(earned), 1e-12)
    close(advantages.sum(1), 0.0, 1e-12)


def test_grpo_advantages_have_mean_0_and_variance_1_and_see_no_scale_of_the_reward():
    """eps = 0: sum A = 0, sum A^2 = G - 1, A(a r + b) = A(r), a > 0; two answers get +-.7071.
    Red: policy_gradients.py:grpo_advantages: `rewards_PG.mean(` -> `rewards_PG.amin(`
    Red: policy_gradients.py:grpo_advantages: `std(1, keep` -> `std(1, False, keep`"""
    advantages = pg.grpo_advantages(TABLE[0], eps=0)
    close(advantages.sum(1), 0.0, 1e-12)
    close(advantages.square().sum(1), 5.0, 1e-12)
    close(pg.grpo_advantages(1e-3 * TABLE[0] - 7, eps=0), advantages, 1e-9)
    assert torch.equal(pg.grpo_advantages(-TABLE[0], eps=0), -advantages)
    close(pg.grpo_advantages(real(0.1, 0.9)[None], eps=0), real(-1, 1)[None] / math.sqrt(2), 1e-12)


def test_a_group_that_agrees_teaches_grpo_nothing_and_rloo_nothing():
    """Constant rewards: A = 0, no NaN; the default eps is 1e-4.
    Red: policy_gradients.py:grpo_advantages: `eps: float = 1e-4` -> `eps: float = 0.0`
    Red: policy_gradients.py:grpo_advantages: `centred / (std +` -> `centred / (std -`"""
    constant = torch.full((2, 4), 0.5, dtype=torch.float64)
    for advantages in (pg.rloo_advantages(constant), pg.grpo_advantages(constant),
                       pg.grpo_advantages(constant, "batch"), pg.grpo_advantages(constant, "none")):
        assert torch.equal(advantages, torch.zeros_like(constant))
    close(pg.grpo_advantages(real(0, 2)[None]), real(-1, 1)[None] / (math.sqrt(2) + EPS), 1e-15)


def test_grpo_divides_by_the_std_of_the_group_or_of_the_batch_or_by_nothing():
    """"batch": one number below every row, that of all P G rewards, G P - 1 below its squares.
    Red: policy_gradients.py:grpo_advantages: `else rewards_PG.std()` -> `else rewards_PG.std(0)`
    Red: policy_gradients.py:grpo_advantages: `scale == "group" else` -> `scale == "batch" else`"""
    centred = TABLE[0] - TABLE[0].mean(1, keepdim=True)
    overall = (TABLE[0] - TABLE[0].mean()).square().sum() / 23
    close(pg.grpo_advantages(TABLE[0], "batch"), centred / (overall.sqrt() + EPS), 1e-12)
    own = (centred.square().sum(1, keepdim=True) / 5).sqrt()
    close(pg.grpo_advantages(TABLE[0], "group"), centred / (own + EPS), 1e-12)
    assert torch.equal(pg.grpo_advantages(TABLE[0], "none"), centred)


def test_the_std_below_grpo_turns_the_gradient_unless_there_are_two_rewards():
    """Cosine with grad E[r] below 1 for four rewards, 1 for a reward of 0 or 1, at any eps.
    Red: policy_gradients.py:grpo_advantages: `return centred / (std + eps)` -> `return centred`"""
    turned = -in_groups(pg.grpo_advantages(REWARDS[GROUPS]))
    cosine = torch.cosine_similarity(turned, uphill(earned), 0)
    assert 0.9 < cosine < 0.999
    won = real(0, 1, 0, 1)
    straight = -in_groups(pg.grpo_advantages(won[GROUPS]))
    close(torch.cosine_similarity(straight, uphill(lambda l: (l.exp() * won).sum()), 0), 1.0, 1e-12)


def test_the_kl_inside_the_reward_makes_rloo_climb_the_objective_of_rlhf():
    """r - beta k1, held: the mean gradient is -grad (E[r] - beta KL(pi || pi_ref)), UFT Eq. 3.
    Red: policy_gradients.py:kl: `"k1": d,` -> `"k1": d / 2,`
    Red: policy_gradients.py:rloo_advantages: `keepdim=True) - rewards_PG)` -> `keepdim=True))`"""
    rewards = REWARDS - BETA * pg.kl(OLD, REF, "k1")
    rising = uphill(lambda logps: earned(logps) - BETA * divergence(logps, REF))
    close(in_groups(pg.rloo_advantages(rewards[GROUPS])), -rising, 1e-12)
    close(mean(lambda logps: pg.rloo(logps, OLD, rewards, CLIP)), -rising, 1e-12)


# PPO


@pytest.mark.parametrize("advantage", (1.3, -1.3))
@pytest.mark.parametrize("ratio", (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0))
def test_the_clip_stops_what_has_gone_far_enough_and_nothing_else(ratio, advantage):
    """dL/dlogps = -rho A, but 0 where A > 0 and rho > 1 + clip, or A < 0 and rho < 1 - clip.
    Red: policy_gradients.py:ppo_clip: `torch.minimum(` -> `torch.maximum(`
    Red: policy_gradients.py:ppo_clip: `ratio.clamp(1 - clip, 1 + clip)` -> `ratio.clamp(1 - clip)`
    Red: policy_gradients.py:ppo_clip: `ratio.clamp(1 - clip,` -> `ratio.clamp(0,`
    Red: policy_gradients.py:ppo_clip: `(logps - old_logps).exp()` -> `(logps - old_logps + 1)`"""
    def loss(x):
        return pg.ppo_clip(x, real(-2.0), real(advantage), CLIP)

    stopped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    at = real(ratio).log() - 2
    close(slope(loss, at), 0.0 if stopped else -ratio * advantage, 1e-14)
    held = min(max(ratio, 0.8), 1.2)
    close(loss(at), -min(ratio * advantage, held * advantage), 1e-14)


def test_gae_is_the_double_sum_of_discounted_errors_inside_each_response():
    """A_t = sum_l (gamma lam)^l delta_t+l over what is left of the response, return = A + V.
    Red: policy_gradients.py:gae: `gamma * lam * later` -> `lam * later`
    Red: policy_gradients.py:gae: `rewards_BT[:, t] + gamma * value` -> `rewards_BT[:, t] + value`
    Red: policy_gradients.py:gae: `(rewards_BT), 0.0, 0.0` -> `(rewards_BT), 0.0, 1.0`
    Red: policy_gradients.py:gae: `= values_BT[:, t] * mask_BT[:, t]` -> `= values_BT[:, t]`
    Red: policy_gradients.py:gae: `later) * mask_BT[:, t]` -> `later)`"""
    rewards, values = TABLE[0], TABLE[1]
    for gamma, lam in ((0.9, 0.8), (1.0, 0.95), (0.3, 1.0)):
        advantages, returns = pg.gae(rewards, values, MASK, gamma, lam)
        for row, t in itertools.product(range(4), range(6)):
            told, inside = 0.0, [i for i in range(t, 6) if MASK[row, i]] if MASK[row, t] else []
            for i in inside:
                later = values[row, i + 1] if i + 1 in inside else 0.0
                delta = rewards[row, i] + gamma * later - values[row, i]
                told += (gamma * lam) ** (i - t) * delta
            close(advantages[row, t], told, 1e-12)
            close(returns[row, t], told + values[row, t] if inside else 0.0, 1e-12)


def test_gae_is_the_return_to_go_at_lambda_one_and_the_td_error_at_zero():
    """gamma = lam = 1: A = sum of the rewards to come - V; lam = 0: r + gamma V' - V.
    Red: policy_gradients.py:gae: `- values_BT[:, t]` -> `+ values_BT[:, t]`
    Red: policy_gradients.py:gae: `reversed(range(rewards_BT.shape[1]))` -> `range(6)`
    Red: policy_gradients.py:gae: `(advantages + values_BT)` -> `(advantages - values_BT)`"""
    rewards, values = TABLE[0] * MASK, TABLE[1] * MASK
    togo = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = pg.gae(rewards, values, MASK, 1.0, 1.0)
    close(advantages, (togo - values) * MASK, 1e-12)
    close(returns, togo * MASK, 1e-12)
    later = torch.cat((values[:, 1:], torch.zeros(4, 1)), 1)
    advantages, returns = pg.gae(rewards, values, MASK, 0.9, 0.0)
    close(advantages, (rewards + 0.9 * later - values) * MASK, 1e-12)
    close(returns, (rewards + 0.9 * later) * MASK, 1e-12)


def test_nothing_outside_a_response_or_in_another_row_moves_an_advantage():
    """Rewards and values outside the mask are not read; a row alone gives what it gives in a batch.
    Red: policy_gradients.py:gae: `later) * mask_BT[:, t]` -> `later)`
    Red: policy_gradients.py:gae: `+ values_BT) * mask_BT` -> `+ values_BT)`"""
    got = pg.gae(TABLE[0], TABLE[1], MASK, 0.9, 0.8)
    noise = TABLE[:2].masked_fill(MASK, 0) * 100
    for x, y in zip(got, pg.gae(*TABLE[:2] + noise, MASK, 0.9, 0.8), strict=True):
        assert torch.equal(x, y) and not x[~MASK].any()
    for row in range(4):
        alone = pg.gae(*(x[row:row + 1] for x in (TABLE[0], TABLE[1], MASK)), 0.9, 0.8)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, got, strict=True))


def test_whitened_advantages_have_mean_0_and_variance_1_and_are_zero_elsewhere():
    """Over the places of the mask, which need not all be read; one place alone gets 0, no NaN.
    Red: policy_gradients.py:whiten: `x_BT[mask_BT.bool()]` -> `x_BT.flatten()`
    Red: policy_gradients.py:whiten: `(x_BT - x.mean())` -> `x_BT`
    Red: policy_gradients.py:whiten: `.sqrt() * mask_BT` -> `.sqrt()`
    Red: policy_gradients.py:whiten: `1e-8).sqrt()` -> `1e-8)`
    Red: policy_gradients.py:whiten: `min(1, len(x) - 1)` -> `1`"""
    white = pg.whiten(3 * TABLE[0] + 5, MASK)
    close(white[MASK].mean(), 0.0, 1e-12)
    close(white[MASK].var(), 1.0, 1e-8)
    assert not white[~MASK].any()
    close(pg.whiten(TABLE[0].masked_fill(~MASK, 1e6), MASK), pg.whiten(TABLE[0], MASK), 1e-12)
    close(pg.whiten(TABLE[0], MASK & (torch.arange(4) == 1)[:, None])[1, 1:3].var(), 1.0, 1e-6)
    alone = pg.whiten(TABLE[0], MASK & (torch.arange(4) == 2)[:, None])
    assert torch.equal(alone, torch.zeros_like(alone))


@pytest.mark.parametrize(("value", "loss", "push"), [
    (0.1, 0.405, -0.9), (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (3.0, 2.0, 2.0), (1.0, 0.32, 0.0)])
def test_a_value_is_held_near_the_old_one_where_that_is_the_worse(value, loss, push):
    """R = 1, V_old = 0, clip = .2: half the larger square, and its slope V - R, or 0 where held.
    Red: policy_gradients.py:value_clip: `torch.maximum(` -> `torch.minimum(`
    Red: policy_gradients.py:value_clip: `.clamp(-clip, clip)` -> `.clamp(-clip)`
    Red: policy_gradients.py:value_clip: `old_values + (values` -> `old_values - (values`
    Red: policy_gradients.py:value_clip: `.square()) / 2` -> `.square())`"""
    def clipped(v):
        return pg.value_clip(v, real(0), real(1), CLIP)

    close(clipped(real(value)), loss, 1e-15)
    close(slope(clipped, real(value)), push, 1e-15)
    shifted = pg.value_clip(real(value) + 5, real(5), real(6), CLIP)
    close(shifted, loss, 1e-12)


def test_ppo_is_the_clipped_policy_plus_the_weighted_values_over_the_length():
    """dL/dlogps = -A / length at ratio 1, dL/dV = weight (V - R) / length near V_old.
    Red: policy_gradients.py:ppo: `policy + value_weight *` -> `policy - value_weight *`
    Red: policy_gradients.py:ppo: `.sum(-1) / length` -> `.sum(-1)`
    Red: policy_gradients.py:ppo: `logps, advantages, clip)` -> `logps, returns, clip)`"""
    now, advantages, values, returns = (x * MASK for x in TABLE[:4])
    length = real(3, 2, 1, 6)

    def loss(x, v):
        return pg.ppo(x, now, advantages, v, values, returns, CLIP, 0.1, length)

    policy, value = slope(loss, now, values)
    close(policy, -advantages / length[:, None], 1e-15)
    close(value, 0.1 * (values - returns) / length[:, None], 1e-15)
    each = -advantages + 0.05 * (values - returns).square()
    close(loss(now, values), each.sum(1) / length, 1e-14)


# KL


def test_k1_and_k3_have_the_divergence_as_their_mean_and_k2_has_not():
    """Samples of pi: E[k1] = E[k3] = KL(pi || pi_ref); E[k2] = E[d^2] / 2.
    Red: policy_gradients.py:kl: `(-d) + d}` -> `(-d)}`
    Red: policy_gradients.py:kl: `"k3": torch.expm1(-d) + d` -> `"k3": torch.expm1(d) - d`
    Red: policy_gradients.py:kl: `d.square() / 2` -> `d`"""
    means = {name: (PI * pg.kl(OLD, REF, name)).sum() for name in ("k1", "k2", "k3")}
    close(means["k1"], divergence(OLD, REF), 1e-12)
    close(means["k3"], divergence(OLD, REF), 1e-12)
    close(means["k2"], (PI * (OLD - REF).square()).sum() / 2, 1e-12)
    assert (means["k2"] - means["k1"]).abs() > 0.01


def test_k3_of_the_reversed_ratio_is_another_number():
    """E_pi[exp(d) - d - 1] = chi^2(pi || pi_ref) - KL(pi || pi_ref): the orientation matters.
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(-d) * d`"""
    chi2 = (PI.square() / REF.exp()).sum() - 1
    close((PI * pg.kl(REF, OLD)).sum(), chi2 - divergence(OLD, REF), 1e-12)
    assert (chi2 - 2 * divergence(OLD, REF)).abs() > 0.01


def test_k3_is_never_negative_and_exact_where_the_policies_nearly_agree():
    """exp(-d) + d - 1 = d^2 / 2 - d^3 / 6 + ...: expm1 keeps the digits that cancel.
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.exp(-d) + d - 1`
    Red: policy_gradients.py:kl: `estimator: str = "k3"` -> `estimator: str = "k1"`"""
    d = torch.cat((torch.linspace(-30, 30, 601, dtype=torch.float64), real(1e-9, -1e-9, 1e-6)))
    k3 = pg.kl(d, torch.zeros_like(d))
    assert (k3 >= 0).all() and pg.kl(OLD, OLD).eq(0).all()
    small = real(1e-4, -1e-4, 1e-5)
    close(pg.kl(small, 0 * small), small.square() / 2 - small**3 / 6, 0, rtol=1e-7)


def test_as_losses_k1_does_nothing_and_k2_and_k3_go_down_opposite_divergences():
    """E[grad k1] = 0, E[grad k2] = grad KL(pi || pi_ref), E[grad k3] = grad KL(pi_ref || pi).
    Red: policy_gradients.py:kl: `"k1": d,` -> `"k1": d.square(),`
    Red: policy_gradients.py:kl: `d.square() / 2` -> `d.square()`
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d}` -> `torch.expm1(d) - d}`"""
    got = {name: mean(lambda logps, name=name: pg.kl(logps, REF, name))
           for name in ("k1", "k2", "k3")}
    reverse = uphill(lambda logps: divergence(logps, REF))
    forward = uphill(lambda logps: divergence(REF, logps))
    close(got["k1"], 0.0, 1e-12)
    close(got["k2"], reverse, 1e-12)
    close(got["k3"], forward, 1e-12)
    assert torch.cosine_similarity(reverse, forward, 0) < 0.99


def test_the_log_ratios_of_the_tokens_add_up_to_that_of_the_response():
    """sum_t k1_t = log pi(y) - log pi_ref(y), so KL per token in PPO is KL per response in RLOO.
    Red: policy_gradients.py:kl: `d = token_logps -` -> `d = token_logps +`"""
    now, ref = TABLE[0] * MASK, TABLE[1] * MASK
    close(pg.kl(now, ref, "k1").sum(1), now.sum(1) - ref.sum(1), 1e-12)
    togo = pg.gae(-BETA * pg.kl(now, ref, "k1"), 0 * now, MASK, 1.0, 1.0)[0]
    first = MASK.int().argmax(1, keepdim=True)
    close(togo.gather(1, first)[:, 0], -BETA * (now.sum(1) - ref.sum(1)), 1e-12)


# GRPO


def test_grpo_pushes_every_token_by_its_advantage_and_back_to_the_reference():
    """dL/dlogp_t = (-A_t + beta (1 - exp(-d_t))) / length at ratio 1; L = beta k3 - A there.
    Red: policy_gradients.py:grpo: `+ beta * kl` -> `- beta * kl`
    Red: policy_gradients.py:grpo: `kl(token_logps,` -> `kl(-token_logps,`
    Red: policy_gradients.py:grpo: `.sum(-1) / length` -> `.sum(-1)`
    Red: policy_gradients.py:grpo: `old_token_logps, adv` -> `ref_token_logps, adv`"""
    now, ref, advantages = (x * MASK for x in TABLE[:3])
    length = real(3, 2, 1, 6)

    def loss(x):
        return pg.grpo(x, now, ref, advantages, CLIP, BETA, length)

    push = -advantages + BETA * (1 - (ref - now).exp())
    close(slope(loss, now), push / length[:, None], 1e-14)
    assert loss(now).shape == (4,)
    each = (ref - now).exp() + (now - ref) - 1
    close(loss(now), (BETA * each - advantages).sum(1) / length, 1e-14)


def test_the_mean_gradient_of_grpo_climbs_the_reward_against_the_forward_divergence():
    """Without the std: -((1 - 1/G) grad E[r] - beta grad KL(pi_ref || pi)), not UFT Eq. 3.
    Red: policy_gradients.py:grpo: `"k3")).sum` -> `"k2")).sum`
    Red: policy_gradients.py:grpo: `each + beta *` -> `each + 2 * beta *`"""
    advantages = pg.grpo_advantages(REWARDS[GROUPS], "none")
    got = over_groups(lambda now: pg.grpo(
        now[..., None], OLD[GROUPS][..., None], REF[GROUPS][..., None], advantages[..., None],
        CLIP, BETA, 1.0))
    rising = uphill(lambda l: 2 / 3 * earned(l) - BETA * divergence(REF, l))
    close(got, -rising, 1e-12)


def terms(**changes):
    """What objectives.py hands a loss: tokens of TABLE, the first of each response a hint."""
    now, old, ref, advantages, _ = (x * MASK for x in TABLE)
    given = torch.zeros_like(now).scatter(1, MASK.int().argmax(1, keepdim=True), 1)
    sampled = Sampled(old, ref, advantages, 0 * now, 0 * now, given)
    return objectives.Terms(now.sum(1), None, now, MASK, None, sampled, REWARDS, ["sampled"] * 4,
                            REWARDS[0], 3.0, Config(model="m", data=("d",), **changes))


@pytest.mark.parametrize(("length", "below"), [
    ("row", (2, 1, 1, 5)), ("batch", (3, 3, 3, 3)), ("constant", (64, 64, 64, 64))])
def test_grpo_divides_by_the_rows_drawn_tokens_or_the_batchs_mean_or_a_constant(length, below):
    """12 response tokens in 4 rows, and --response_tokens 64; a row that is all hint divides by 1.
    Red: objectives.py:length: `(t.mask * (1 - t.sampled.given))` -> `t.mask`
    Red: objectives.py:length: `.clamp(min=1)` -> `.clamp(min=0)`
    Red: objectives.py:length: `"batch": t.tokens_per_row` -> `"batch": drawn`
    Red: objectives.py:length: `t.config.response_tokens}` -> `t.tokens_per_row}`"""
    t = terms(grpo_length=length)
    now, old, ref, advantages = objectives.token_ratios(t)
    whole = pg.grpo(now, old, ref, advantages, t.config.clip, t.config.beta, 1.0)
    close(objectives.grpo(t), whole / real(*below), 1e-14)


# UFT of Liu et al.


def test_the_share_of_hints_falls_as_a_cosine_and_ends():
    """p(0) = high, p(T) = low, halfway between at T / 2, 0 behind T; never up; T = 0 gives none.
    Red: policy_gradients.py:hint_probability: `step > horizon` -> `step >= horizon`
    Red: policy_gradients.py:hint_probability: `return low + (high - low)` -> `return low + high`
    Red: policy_gradients.py:hint_probability: `(1 + math.cos` -> `(1 - math.cos`
    Red: policy_gradients.py:hint_probability: `or not horizon` -> ``"""
    p = [pg.hint_probability(t, 0.05, 0.95, 300) for t in range(303)]
    close(real(p[0], p[150], p[300]), real(0.95, 0.5, 0.05), 1e-15)
    close(torch.tensor(p[75]), 0.05 + 0.9 * (1 + math.sqrt(0.5)) / 2, 1e-6)
    assert p[301:] == [0.0, 0.0] and all(a > b for a, b in itertools.pairwise(p[:302]))
    assert [pg.hint_probability(t, 0.1, 0.9, 0) for t in (0, 1)] == [0.0, 0.0]
    close(real(pg.hint_probability(1, 0.1, 0.9, 1)), 0.1, 1e-15)


def lengths(tokens, probability, draws=1):
    """Hint lengths of `draws` draws in five parts."""
    generator = torch.Generator().manual_seed(0)
    return [pg.hint_length(tokens, 5, probability, generator) for _ in range(draws)]


def test_a_hint_is_a_binomial_number_of_equal_parts():
    """E[l] = p L, its variance p (1 - p) L^2 / parts, within 4 sigma over 4000 draws.
    Red: policy_gradients.py:hint_length: `< probability` -> `< probability / 2`
    Red: policy_gradients.py:hint_length: `torch.rand(parts,` -> `torch.rand(1,`
    Red: policy_gradients.py:hint_length: `tokens * drawn / parts` -> `drawn`"""
    said = lengths(20, 0.3, 4000)
    assert set(said) == {0, 4, 8, 12, 16, 20}
    drawn, variance = real(*said), 0.3 * 0.7 * 20**2 / 5
    assert (drawn.mean() - 6).abs() < 4 * math.sqrt(variance / 4000)
    assert (drawn.var() / variance - 1).abs() < 4 * math.sqrt(2.2 / 4000)
    assert set(lengths(7, 0.5, 500)) == {0, 1, 3, 4, 6, 7}  # parts of 7/5 tokens, rounded


def test_probability_zero_hints_nothing_and_one_gives_the_whole_solution(monkeypatch):
    """Whatever the number of tokens, the end token included, and though a draw be exactly 0.
    Red: policy_gradients.py:hint_length: `< probability)` -> `<= probability)`
    Red: policy_gradients.py:hint_length: `< probability)` -> `<= probability - 1)`
    Red: policy_gradients.py:hint_length: `< probability)` -> `>= probability)`"""
    for tokens in (1, 2, 3, 7, 20):
        assert set(lengths(tokens, 0.0, 50)) == {0} and set(lengths(tokens, 1.0, 50)) == {tokens}
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.zeros(size))
    assert lengths(20, 0.0) == [0] and lengths(20, 1e-9) == [20]


def hinted(mask, length=1.0):
    """uft_hint on the rows of TABLE, as a function of their log-probs."""
    _, old, ref, advantages, _ = (x * MASK for x in TABLE)
    return lambda now: pg.uft_hint(now, old, ref, advantages, mask, CLIP, BETA, length, 0.3)


def test_without_hints_uft_hint_is_grpo_and_with_nothing_else_it_is_sft():
    """Values and gradients: equal to the bit, and -hint_weight log pi(y), finite.
    Red: policy_gradients.py:uft_hint: `* hint_mask).sum` -> `).sum`
    Red: policy_gradients.py:uft_hint: `- hint_weight *` -> `+ hint_weight *`
    Red: policy_gradients.py:uft_hint: `token_logps.masked_fill(hint_mask, 0)` -> `token_logps`
    Red: policy_gradients.py:uft_hint: `(x.masked_fill(hint_mask, 0) for` -> `(x for`"""
    now, old, ref, advantages, _ = (x * MASK for x in TABLE)
    empty = hinted(torch.zeros_like(MASK), real(3, 2, 1, 6))

    def grpo(x):
        return pg.grpo(x, old, ref, advantages, CLIP, BETA, real(3, 2, 1, 6))

    assert torch.equal(empty(now), grpo(now)) and torch.equal(slope(empty, now), slope(grpo, now))
    close(hinted(MASK)(now), 0.3 * losses.sft(now.sum(1)), 1e-14)
    close(slope(hinted(MASK), now)[MASK], -0.3, 0)


def test_a_part_given_is_learned_by_sft_and_the_rest_by_grpo():
    """dL/dlogp = -hint_weight on the hint, whatever the advantage; GRPO's behind it.
    Red: policy_gradients.py:uft_hint: `advantages.masked_fill(hint_mask, 0)` -> `advantages`
    Red: policy_gradients.py:uft_hint: `old, ref = (` -> `ref, old = (`"""
    now, old, ref, advantages, _ = (x * MASK for x in TABLE)
    hint = MASK & (torch.arange(6) < 3)
    push = slope(hinted(hint), now)
    close(push[hint], -0.3, 0)
    behind = slope(lambda x: pg.grpo(x, old, ref, advantages, CLIP, BETA, 1.0), now)
    assert torch.equal(push[~hint], behind[~hint])
    want = pg.grpo(*(x * ~hint for x in (now, old, ref, advantages)), CLIP, BETA, 1.0)
    close(hinted(hint)(now), want - 0.3 * (now * hint).sum(1), 1e-14)


# UniAPL


def test_the_best_discriminator_is_the_log_ratio_of_teacher_and_policy():
    """d* = log pi_T - log pi; dL/dd = -sigmoid(-d) on the teacher's rows, sigmoid(d) on others.
    Red: policy_gradients.py:discriminator: `logits, -logits)` -> `-logits, logits)`
    Red: policy_gradients.py:discriminator: `-logsigmoid(` -> `-2 * logsigmoid(`"""
    yes, no = torch.ones(4).bool(), torch.zeros(4).bool()
    best = minimise(lambda d: (REF.exp() * pg.discriminator(d, yes)
                               + PI * pg.discriminator(d, no)).sum(), torch.zeros(4).double())
    close(best, REF - OLD, 1e-6)
    push = slope(lambda d: pg.discriminator(d, yes ^ (torch.arange(4) > 1)), LOGITS)
    s = torch.sigmoid(LOGITS)
    close(push, torch.cat((s[:2] - 1, s[2:])), 1e-15)


def test_a_policy_rewarded_by_the_best_discriminator_goes_down_its_divergence_from_the_teacher():
    """d* held: the gradient of -E_pi[d*] is grad KL(pi || pi_T), pi_T here pi_ref.
    Red: policy_gradients.py:ppo_clip: `1 + clip) * adv` -> `1 + clip) * -adv`"""
    down = mean(lambda logps: pg.ppo_clip(logps, OLD, REF - OLD, CLIP))
    close(down, uphill(lambda logps: divergence(logps, REF)), 1e-12)


def test_uniapl_teaches_demonstrations_by_sft_and_rollouts_by_their_policy_loss():
    """Rows of one kind see one term, and its discriminator; dL of the other terms is 0.
    Red: policy_gradients.py:uniapl: `torch.where(teacher,` -> `torch.where(~teacher,`
    Red: policy_gradients.py:uniapl: `told + discriminator(logits, teacher)` -> `told`
    Red: policy_gradients.py:uniapl: `-sft_weight * logps` -> `-logps`"""
    policy, logits = 2 * REF, LOGITS
    for teacher in (torch.ones(4).bool(), torch.zeros(4).bool(), torch.arange(4) > 1):
        def loss(l, p, d, teacher=teacher):
            return pg.uniapl(l, p, d, teacher, 0.1)

        want = torch.where(teacher, 0.1 * losses.sft(OLD), policy)
        close(loss(OLD, policy, logits), want + pg.discriminator(logits, teacher), 1e-15)
        l, p, d = slope(loss, OLD, policy, logits)
        close(l, -0.1 * teacher.double(), 1e-15)
        close(p, (~teacher).double(), 0)
        close(d, torch.sigmoid(logits) - teacher.double(), 1e-15)


# Every gradient


def smooth():
    """{name: a function of (B, T) log-probs or values}; random ratios avoid the clip's corners."""
    _, old, ref, advantages, other = (x * MASK for x in TABLE)
    hint, teacher, length = MASK & (torch.arange(6) < 3), torch.arange(4) > 1, real(3, 2, 1, 6)
    return {
        "ppo_clip": lambda x: pg.ppo_clip(x, old, advantages, CLIP),
        "k1": lambda x: pg.kl(x, ref, "k1"),
        "k2": lambda x: pg.kl(x, ref, "k2"),
        "k3": lambda x: pg.kl(x, ref, "k3"),
        "rloo": lambda x: pg.rloo(x.sum(1), old.sum(1), advantages.sum(1), CLIP),
        "grpo": lambda x: pg.grpo(x, old, ref, advantages, CLIP, BETA, length),
        "value_clip": lambda x: pg.value_clip(x, old, advantages, CLIP),
        "ppo": lambda x: pg.ppo(x, old, advantages, x, ref, other, CLIP, 0.1, length),
        "uft_hint": lambda x: pg.uft_hint(x, old, ref, advantages, hint, CLIP, BETA, length, 0.3),
        "discriminator": lambda x: pg.discriminator(x.sum(1), teacher),
        "uniapl": lambda x: pg.uniapl(x[:, 0], x[:, 1].square(), x[:, 2], teacher, 0.3),
    }


@pytest.mark.parametrize("name", smooth())
def test_every_policy_gradient_is_that_of_finite_differences(name):
    """(L(x + h) - L(x - h)) / 2h = dL/dx, h = 1e-6, away from the clip's corners.
    Red: policy_gradients.py:ppo_clip: `ratio = (logps` -> `ratio = (logps.detach()`
    Red: policy_gradients.py:kl: `d = token_logps` -> `d = token_logps.detach()`
    Red: policy_gradients.py:value_clip: `(values - returns)` -> `(values.detach() - returns)`
    Red: policy_gradients.py:discriminator: `-logits)` -> `-logits.detach())`"""
    x = (TABLE[0] + 0.05).requires_grad_()
    assert gradcheck(smooth()[name], x, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_nothing_is_reduced_over_rows():
    """A row of a batch is that row alone, to the bit, also without its axis.
    Red: policy_gradients.py:grpo: `.sum(-1) / length` -> `.sum() / length`
    Red: policy_gradients.py:ppo: `.sum(-1) / length` -> `.sum() / length`"""
    now, old, ref, advantages, other = (x * MASK for x in TABLE)
    length = real(3, 2, 1, 6)
    whole = (pg.grpo(now, old, ref, advantages, CLIP, BETA, length),
             pg.ppo(now, old, advantages, now, ref, other, CLIP, 0.1, length),
             hinted(MASK & (torch.arange(6) < 3))(now))
    for i in range(4):
        now_i, old_i, ref_i, advantages_i, other_i = (
            x[i] for x in (now, old, ref, advantages, other))
        hint = MASK[i] & (torch.arange(6) < 3)
        alone = (pg.grpo(now_i, old_i, ref_i, advantages_i, CLIP, BETA, length[i]),
                 pg.ppo(now_i, old_i, advantages_i, now_i, ref_i, other_i, CLIP, 0.1, length[i]),
                 pg.uft_hint(now_i, old_i, ref_i, advantages_i, hint, CLIP, BETA, 1.0, 0.3))
        assert all(torch.equal(a, w[i]) for a, w in zip(alone, whole, strict=True))
