"""Theorems about SFT, UFT and BCE, then about every loss, in float64: algebra to the last digits.

l is a sequence log-probability, l0 the reference's, D = l - l0, u = beta D and s = sigmoid(u).
Pairs are in test_losses_pairs.py, KTO and DRO in test_losses_kto.py.
"""
import math

import pytest
import torch
from calculus import (
    BETA,
    GRID,
    LABELS,
    LOGPS,
    ORIGIN,
    RATINGS,
    REF,
    ROWS,
    close,
    curvature,
    minimise,
    rated,
    real,
    slope,
)
from torch.autograd import gradcheck, gradgradcheck

import losses

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()  # 4 response tokens in 2 rows: 2 a row
TOKENS = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# SFT


def test_sft_is_the_negative_sum_and_pulls_every_row_alike():
    """L = -l and dL/dl = -1 (UFT Eq. 1).
    Red: losses.py:sft: `return -logps` -> `return -logps / logps.detach().abs()`"""
    assert torch.equal(losses.sft(LOGPS), -LOGPS)
    close(slope(losses.sft, LOGPS), -1.0, 0)


def test_sft_token_mean_weighs_every_response_token_alike():
    """The mean over rows is the mean over response tokens; dL/dl_t = -mask / tokens_per_row.
    Red: losses.py:sft_token_mean: `float(mask.sum()) / len(mask)` -> `mask.sum(-1)`
    Red: losses.py:sft_token_mean: `(token_logps * mask)` -> `token_logps`"""
    close(losses.sft_token_mean(TOKENS, MASK).mean(), -TOKENS[MASK].mean(), 1e-15)
    close(slope(lambda t: losses.sft_token_mean(t, MASK), TOKENS), MASK / -2, 0)


def test_sft_token_mean_of_micro_batches_is_that_of_the_batch():
    """Told the step's tokens_per_row, rows of 3 tokens and of 1 may be split anywhere.
    Red: losses.py:sft_token_mean: `if tokens_per_row is None` -> `if True`"""
    parts = [losses.sft_token_mean(TOKENS[[i]], MASK[[i]], 2.0) for i in range(2)]
    assert torch.equal(torch.cat(parts), losses.sft_token_mean(TOKENS, MASK))


# UFT; a demonstration has r = 1


def test_uft_starts_at_exactly_one_quarter():
    """r = 1, D = 0: sigmoid(0) is exactly 1/2, hence L = 1/4 and dL/dl = -beta / 4.
    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps + 1e-9, ref_logps, beta)`"""
    assert (losses.uft(REF, REF, torch.ones_like(REF), BETA) == 0.25).all()
    close(slope(rated(losses.uft), ORIGIN), -BETA / 4, 1e-17)


@pytest.mark.parametrize("r", (0.0, 0.25, 0.5, 1.0))
@pytest.mark.parametrize("beta", (0.01, 0.1, 1.0))
def test_uft_gradient_is_two_beta_s_minus_r_times_s_times_one_minus_s(beta, r):
    """dL/dl = 2 beta (s - r) s (1 - s) (UFT Eq. 7), for r = 1 -2 beta s (1 - s)^2; |D| <= 300.
    Red: losses.py:uft: `- rewards` -> `+ rewards`
    Red: losses.py:uft: `).square()` -> `).abs()`
    Red: losses.py:implicit_reward: `return beta *` -> `return 2 * beta *`"""
    s = torch.sigmoid(beta * 3 * GRID)
    close(slope(rated(losses.uft, r, beta), 3 * GRID), 2 * beta * (s - r) * s * (1 - s), 1e-15)


def test_uft_never_pushes_a_demonstration_down():
    """r = 1: dL/dl < 0 for every |u| <= 10, so no gradient points back to the reference.
    Red: losses.py:uft: `- rewards` -> `- 0.99 * rewards`"""
    assert (slope(rated(losses.uft, beta=0.1), GRID) < 0).all()


def test_uft_pulls_a_demonstration_by_at_most_eight_beta_over_27():
    """max |dL/dl| = 8 beta / 27, at s = 1/3, where D = -log(2) / beta.
    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps, ref_logps, 1.01 * beta)`"""
    d = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    size = slope(rated(losses.uft), d).abs()
    assert size.max() <= 8 * BETA / 27 + 1e-15
    close(d[size.argmax()], -math.log(2) / BETA, 1e-4)
    close(slope(rated(losses.uft), ORIGIN - math.log(2) / BETA), -8 * BETA / 27, 1e-15)


def test_uft_is_convex_exactly_where_s_is_at_least_one_third():
    """r = 1: d2L/dl2 = -2 beta^2 s (1 - s)^2 (1 - 3s).
    Red: losses.py:uft: `).square()` -> `).pow(4)`"""
    s = torch.sigmoid(BETA * GRID)
    got = curvature(rated(losses.uft), GRID)
    close(got, -2 * BETA**2 * s * (1 - s)**2 * (1 - 3 * s), 1e-15)
    assert torch.equal(got > 0, s > 1 / 3)


def test_uft_gives_up_a_lost_demonstration_and_bce_never_does():
    """|dL/dl| -> 2 beta e^(-2u) for u -> inf, 2 beta e^u for u -> -inf; BCE keeps beta there.
    Red: losses.py:uft: `torch.sigmoid(implicit_reward(` -> `logsigmoid(implicit_reward(`
    Red: losses.py:uft_bce: `-rewards * logsigmoid(u)` -> `-rewards * torch.sigmoid(u)`"""
    low, high = ORIGIN - 20 / BETA, ORIGIN + 20 / BETA
    close(slope(rated(losses.uft), low) / (2 * BETA * math.exp(-20)), -1, 1e-6)
    close(slope(rated(losses.uft), high) / (2 * BETA * math.exp(-40)), -1, 1e-6)
    close(slope(rated(losses.uft_bce), low), -BETA, 1e-8)


def test_uft_cannot_fall_below_the_square_of_sigmoid_beta_ref_logps():
    """u <= -beta l0, so inf L = (1 - sigmoid(-beta l0))^2 > 0: pi = 1 is as far as it goes.
    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps + ref_logps)`"""
    ones = torch.ones_like(REF)
    assert (losses.implicit_reward(LOGPS, REF, BETA) <= -BETA * REF).all()
    floor = losses.uft(torch.zeros_like(REF), REF, ones, BETA)
    close(floor, torch.sigmoid(BETA * REF).square(), 1e-15)
    assert (losses.uft(LOGPS, REF, ones, BETA) > floor).all() and (floor > 0).all()


def test_uft_with_a_small_beta_is_sft_up_to_a_constant():
    """(4 / beta) (L - 1/4) = -D + beta D^2 / 4 + O(beta^2).
    Red: losses.py:uft: `).square()` -> `).abs()`"""
    d = real(3.0, -2.0)
    for beta in (1e-2, 1e-3, 1e-4):
        distance = (4 / beta) * (rated(losses.uft, beta=beta)(d) - 0.25) + d
        close(distance / beta, d.square() / 4, 3 * beta)


def test_uft_with_a_large_beta_counts_the_rows_below_the_reference():
    """L -> 1 where D < 0, 1/4 where D = 0, 0 where D > 0.
    Red: losses.py:implicit_reward: `beta * (` -> `beta * 0.001 * (`"""
    close(rated(losses.uft, beta=1e6)(real(-3, -1e-3, 0, 1e-3, 3)), real(1, 1, 0.25, 0, 0), 1e-12)


@pytest.mark.parametrize(("beta", "expected"), [
    (1e-4, (0.700, 0.300)), (0.1, (0.677, 0.323)), (1.0, (0.445, 0.555)), (5.0, (0.285, 0.715))])
def test_uft_fits_the_data_distribution_only_as_beta_vanishes(beta, expected):
    """Responses seen .7 and .3 of the time under pi_ref (.1, .3, .6): SFT would fit (.7, .3, 0).
    Red: losses.py:implicit_reward: `- ref_logps` -> `- 0.5 * ref_logps`"""
    data, ref = real(0.7, 0.3, 0.0), real(0.1, 0.3, 0.6).log()

    def objective(logits):
        loss = losses.uft(logits.log_softmax(0), ref, torch.ones(3), beta)
        return (data * (loss - 0.25)).sum() * 4 / min(beta, 1.0)

    close(minimise(objective, ref).softmax(0), real(*expected, 0), 1e-3)


# Scores and binary labels, by MSE (uft) and by cross-entropy (uft_bce)


@pytest.mark.parametrize("r", (0.0, 0.25, 0.5, 1.0))
@pytest.mark.parametrize("beta", (0.01, 0.1, 1.0))
def test_bce_gradient_is_beta_times_s_minus_r(beta, r):
    """dL/dl = beta (s - r).
    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1 + rewards)`"""
    s = torch.sigmoid(beta * GRID)
    close(slope(rated(losses.uft_bce, r, beta), GRID), beta * (s - r), 1e-15)


def test_binary_labels_give_the_binary_losses():
    """r = 1: (1 - s)^2 and -log s; r = 0: s^2 and -log(1 - s) (UNA Eq. 11, 12).
    Red: losses.py:uft_bce: `logsigmoid(-u)` -> `logsigmoid(u)`
    Red: losses.py:uft: `- rewards` -> `- (1 - rewards)`"""
    d = GRID / 10
    s = torch.sigmoid(BETA * d)
    close(rated(losses.uft, 1.0)(d), (1 - s).square(), 0)
    close(rated(losses.uft, 0.0)(d), s.square(), 0)
    close(rated(losses.uft_bce, 1.0)(d), -s.log(), 1e-15)
    close(rated(losses.uft_bce, 0.0)(d), -(1 - s).log(), 1e-14)


@pytest.mark.parametrize("loss", (losses.uft, losses.uft_bce))
def test_a_score_is_met_where_s_equals_r_and_nowhere_else(loss):
    """dL/dl has the sign of s - r: 0 at D = logit(r) / beta, for r = 1/2 exactly at the start.
    Red: losses.py:uft: `- rewards` -> `- 0.9 * rewards`
    Red: losses.py:uft: `- rewards` -> `- rewards * 1.001`
    Red: losses.py:uft_bce: `-rewards *` -> `-0.9 * rewards *`
    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1.001 - rewards)`"""
    for r in (0.1, 0.25, 0.5, 0.9):
        target = ORIGIN + math.log(r / (1 - r)) / BETA
        close(slope(rated(loss, r), target), 0.0, 1e-15)
        sign = slope(rated(loss, r), target + GRID / 2).sign()
        assert torch.equal(sign[GRID != 0], GRID.sign()[GRID != 0])
    assert slope(rated(loss, 0.5), ORIGIN).item() == 0.0


@pytest.mark.parametrize("loss", (losses.uft, losses.uft_bce))
def test_every_descent_step_brings_s_closer_to_the_score(loss):
    """50 SGD steps on a softmax over 5 responses; UNA Eq. 11-13 as printed would climb.
    Red: losses.py:uft: `return (` -> `return -(`
    Red: losses.py:uft_bce: `-rewards * logsigmoid(u) -` -> `rewards * logsigmoid(u) +`"""
    ref = real(0.3, -0.2, 0.0, 1.0, -1.0).log_softmax(0)
    for r in real(0.0, 0.3, 1.0):
        logits, distances = ref, []
        for _ in range(50):
            distances.append((torch.sigmoid(0.7 * (logits.log_softmax(0) - ref)[0]) - r).abs())
            step = slope(lambda x, r=r: loss(x.log_softmax(0)[0], ref[0], r, 0.7), logits)
            logits = logits - 0.1 * step
        assert (torch.stack(distances).diff() < 0).all()


def test_mse_pulls_at_most_half_as_hard_as_bce():
    """Their gradients' ratio is 2 s (1 - s) <= 1/2, whatever the score.
    Red: losses.py:uft: `).square()` -> `).square() / 2`"""
    s = torch.sigmoid(BETA * GRID)
    for r in (0.0, 0.3, 1.0):
        mse, bce = (slope(rated(loss, r), GRID) for loss in (losses.uft, losses.uft_bce))
        close(mse, 2 * s * (1 - s) * bce, 1e-15)
        assert (mse.abs() <= bce.abs() / 2 + 1e-17).all()


def test_curvature_where_the_score_is_met_is_smaller_for_mse():
    """At s = r: d2L/dl2 = 2 beta^2 r^2 (1 - r)^2 for MSE, beta^2 r (1 - r) for BCE.
    Red: losses.py:uft: `).square()` -> `).square() / 2`
    Red: losses.py:uft_bce: `return -rewards` -> `return -2 * rewards`"""
    for r in (0.1, 0.25, 0.5, 0.9):
        target = ORIGIN + math.log(r / (1 - r)) / BETA
        close(curvature(rated(losses.uft, r), target), 2 * BETA**2 * r**2 * (1 - r)**2, 1e-12)
        close(curvature(rated(losses.uft_bce, r), target), BETA**2 * r * (1 - r), 1e-12)


def test_bce_of_a_hopeless_row_is_its_distance():
    """u = -800, r = 1: L = 800 exactly, where log(sigmoid(u)) is -inf; float32 likewise at -120.
    Red: losses.py:uft_bce: `rewards * logsigmoid(u)` -> `rewards * torch.sigmoid(u).log()`
    Red: losses.py:uft_bce: `* logsigmoid(-u)` -> `* (1 - torch.sigmoid(u)).log()`"""
    for dtype, u in ((torch.float64, 800.0), (torch.float32, 120.0), (torch.float32, 800.0)):
        d = torch.full((1,), u, dtype=dtype)
        assert rated(losses.uft_bce, 1.0, 1.0)(-d).item() == u
        assert rated(losses.uft_bce, 0.0, 1.0)(d).item() == u
        assert torch.sigmoid(-d).log().item() == -math.inf


# Every loss


def test_every_loss_has_its_known_value_where_policy_and_reference_agree():
    """D = 0: (1/2 - r)^2, log 2, 2 log 2, 1 / (4 tau^2), (r - V)^2 / 2, w / 2, and -l for SFT.
    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `logps`
    Red: losses.py:ipo: `(h - 1 / (2 * beta)).square()` -> `(h - 1 / beta).square()`
    Red: losses.py:bco_pair: `-logsigmoid(chosen) -` -> `-logsigmoid(chosen) +`
    Red: losses.py:kto: `= undesirable_weight *` -> `= desirable_weight *`"""
    start = {name: loss(REF, REF, BETA) for name, loss in ROWS.items()}
    close(start["sft"], -REF, 0)
    close(start["uft"], (0.5 - RATINGS).square(), 0)
    for name in ("uft_bce", "dpo", "dpo_smoothed", "una_pair"):
        close(start[name], math.log(2), 1e-15)
    close(start["bco_pair"], 2 * math.log(2), 1e-15)
    close(start["ipo"], 1 / (4 * BETA**2), 1e-14)
    close(start["dro"], (RATINGS - REF / 10).square() / 2, 1e-15)
    close(losses.kto(REF, REF, LABELS, ORIGIN[0], BETA, 1.5, 0.5), 0.25 + LABELS / 2, 0)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_changes_its_own_loss_and_no_other(name):
    """One number per row or per pair; nothing is reduced.
    Red: losses.py:ipo: `.square()` -> `.square().mean().expand_as(h)`
    Red: losses.py:kto: `- beta * z0` -> `- beta * (logps - ref_logps).mean()`
    Red: losses.py:simpo: `return -logsigmoid(` -> `return -gamma - 0 * logsigmoid(`"""
    value = ROWS[name](LOGPS, REF, BETA)
    for row in range(6):
        moved = ROWS[name](LOGPS - torch.eye(6)[row], REF, BETA) != value
        assert moved.nonzero().flatten().tolist() == [row * len(value) // 6]


def test_every_row_is_compared_with_its_own_rating():
    """A batch is its rows one by one, to the bit; permuting the ratings changes the loss.
    Red: losses.py:uft: `- rewards)` -> `- rewards.flatten()[0])`
    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1 - rewards.flatten()[0])`"""
    for loss in (losses.uft, losses.uft_bce):
        value = loss(LOGPS, REF, RATINGS, BETA)
        rows = [loss(LOGPS[i], REF[i], RATINGS[i], BETA) for i in range(6)]
        assert torch.equal(torch.stack(rows), value)
        assert (loss(LOGPS, REF, RATINGS.flip(0), BETA).sum() - value.sum()).abs() > 0.01


@pytest.mark.parametrize("name", ROWS)
def test_every_gradient_is_that_of_finite_differences(name):
    """(L(l + h) - L(l - h)) / 2h = dL/dl for every row, h = 1e-6.
    Red: losses.py:reward_model: `- rejected)` -> `- rejected.detach())`
    Red: losses.py:log1mexp: `-math.log(2), x)` -> `-math.log(2), x.detach())`
    Red: losses.py:kto: `torch.sigmoid(advantage)` -> `torch.sigmoid(advantage.detach())`"""
    assert gradcheck(lambda l: ROWS[name](l, REF, BETA), LOGPS.clone().requires_grad_(),
                     eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"sft"}))
def test_every_second_derivative_is_that_of_finite_differences(name):
    """d2L/dl2 for every pair of rows; `sft` is linear and has none.
    Red: losses.py:orpo: `log1mexp(chosen)` -> `log1mexp(chosen.detach())`"""
    assert gradgradcheck(lambda l: ROWS[name](l, REF, BETA), LOGPS.clone().requires_grad_(),
                         eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_loss_and_gradient_is_finite_at_u_of_800(name, dtype):
    """u = +-800, beyond exp in float64; a mean log-prob of 0 is p = 1 exactly.
    Red: losses.py:uft_bce: `logsigmoid(u)` -> `torch.sigmoid(u).log()`
    Red: losses.py:dpo: `* logsigmoid(z)` -> `* torch.sigmoid(z).log()`
    Red: losses.py:reward_model: `- rejected)` -> `- rejected).exp().log()`
    Red: losses.py:bco_pair: `logsigmoid(chosen)` -> `torch.sigmoid(chosen).log()`
    Red: losses.py:orpo: `chosen_mean_logps.clamp(max=ceiling)` -> `chosen_mean_logps`"""
    mixed = torch.tensor([0, -1600, -1600, 0, 0, -1600], dtype=dtype)
    for logps in (mixed, mixed.flip(0), torch.zeros_like(mixed), torch.full_like(mixed, -1600)):
        logps.requires_grad_()
        value = ROWS[name](logps, torch.full_like(mixed, -800), 1.0)
        value.sum().backward()
        assert value.dtype == dtype and value.isfinite().all() and logps.grad.isfinite().all()
