"""Theorems about losses.py, in float64: what is exact algebra is tested to the last digits.

l is a sequence log-probability, l0 the reference's, D = l - l0, u = beta D, s = sigmoid(u);
w and l as indices are the chosen and the rejected row; m is a MEAN log-probability.
"""
import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid

import losses


def real(*values):
    """A float64 vector."""
    return tensor(values, dtype=torch.float64)


BETA = 0.3
BETAS = (0.01, 0.1, 1.0)
LOGPS = real(-7.3, -4.1, -2.2, -9.6, -0.8, -5.5)
REF = real(-5.1, -6.4, -2.0, -8.8, -3.9, -5.9)
RATINGS = real(1.0, 0.0, 0.25, 0.5, 0.9, 0.6)
LABELS = tensor([True, False, True, False, False, True])
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = LOGPS[::2], LOGPS[1::2], REF[::2], REF[1::2]
GRID = torch.linspace(-100, 100, 401, dtype=torch.float64)  # values of D
ORIGIN = real(0)


def on_pairs(loss, *more):
    """A pair loss as a function of rows: even rows are chosen, odd rows rejected."""
    return lambda l, l0, b: loss(l[::2], l[1::2], l0[::2], l0[1::2], b, *more)


ROWS = {  # every loss as a function of (logps, ref_logps, beta); ORPO and SimPO read means
    "sft": lambda l, l0, b: losses.sft(l),
    "uft": lambda l, l0, b: losses.uft(l, l0, RATINGS.to(l), b),
    "uft_bce": lambda l, l0, b: losses.uft_bce(l, l0, RATINGS.to(l), b),
    "reward_model": lambda l, l0, b: losses.reward_model(b * l[::2], b * l[1::2]),
    "dpo": on_pairs(losses.dpo),
    "dpo_smoothed": on_pairs(losses.dpo, 0.1),
    "ipo": on_pairs(losses.ipo),
    "una_pair": on_pairs(losses.una_pair),
    "bco_pair": on_pairs(losses.bco_pair),
    "kto": lambda l, l0, b: losses.kto(l, l0, LABELS, 0.4 * torch.ones_like(l[0]), b, 1.5, 0.5),
    "orpo": lambda l, l0, b: losses.orpo(l[::2], l[1::2], b),
    "simpo": lambda l, l0, b: losses.simpo(l[::2], l[1::2], b, 0.5),
    "dro": lambda l, l0, b: losses.dro(l, l0, RATINGS.to(l), l0 / 10, b),
}


def rated(loss, r=1.0, beta=BETA):
    """uft or uft_bce as a function of D alone."""
    return lambda d: loss(d, torch.zeros_like(d), torch.full_like(d, r), beta)


def slope(loss, *inputs):
    """dL/dinput of the summed loss: one tensor, or one per input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(loss(*inputs).sum(), inputs)
    return grads[0] if len(grads) == 1 else grads


def curvature(loss, x):
    """d2L/dx2, row by row."""
    x = x.detach().clone().requires_grad_()
    first = torch.autograd.grad(loss(x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first.sum(), x)[0]


def close(actual, expected, atol, rtol=0.0):
    """Asserts |actual - expected| <= atol + rtol |expected| everywhere; NaN never is."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol)


def minimise(objective, start):
    """The x, downhill from `start`, where objective(x) is smallest, by L-BFGS."""
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=1e-14, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = objective(x)
        value.backward()
        return value

    solver.step(closure)
    return x.detach()


# Every loss


@pytest.mark.parametrize("name", ROWS)
def test_every_gradient_is_that_of_finite_differences(name):
    """(L(l + h) - L(l - h)) / 2h = dL/dl for every row, h = 1e-6.

    Red: losses.py:reward_model: `- rejected)` -> `- rejected.detach())`
    Red: losses.py:log1mexp: `-math.log(2), x)` -> `-math.log(2), x.detach())`
    Red: losses.py:kto: `torch.sigmoid(advantage)` -> `torch.sigmoid(advantage.detach())`
    """
    assert gradcheck(lambda l: ROWS[name](l, REF, BETA), LOGPS.clone().requires_grad_(),
                     eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"sft"}))
def test_every_second_derivative_is_that_of_finite_differences(name):
    """d2L/dl2 for every pair of rows; `sft` is linear and has none.

    Red: losses.py:orpo: `log1mexp(chosen)` -> `log1mexp(chosen.detach())`
    """
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
    Red: losses.py:orpo: `chosen_mean_logps.clamp(max=ceiling)` -> `chosen_mean_logps`
    """
    mixed = tensor([0, -1600, -1600, 0, 0, -1600], dtype=dtype)
    for logps in (mixed, mixed.flip(0), torch.zeros_like(mixed), torch.full_like(mixed, -1600)):
        logps.requires_grad_()
        value = ROWS[name](logps, torch.full_like(mixed, -800), 1.0)
        value.sum().backward()
        assert value.dtype == dtype and value.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_changes_its_own_loss_and_no_other(name):
    """One number per row or per pair; nothing is reduced.

    Red: losses.py:ipo: `.square()` -> `.square().mean().expand_as(h)`
    Red: losses.py:kto: `- beta * z0` -> `- beta * (logps - ref_logps).mean()`
    Red: losses.py:simpo: `return -logsigmoid(` -> `return -gamma - 0 * logsigmoid(`
    """
    value = ROWS[name](LOGPS, REF, BETA)
    for row in range(6):
        changed = LOGPS.clone()
        changed[row] -= 1
        moved = ROWS[name](changed, REF, BETA) != value
        assert moved.nonzero().flatten().tolist() == [row * len(value) // 6]


def test_every_row_is_compared_with_its_own_rating():
    """A batch is its rows one by one, to the bit; permuting the ratings changes the loss.

    Red: losses.py:uft: `- rewards)` -> `- rewards.flatten()[0])`
    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1 - rewards.flatten()[0])`
    """
    for loss in (losses.uft, losses.uft_bce):
        value = loss(LOGPS, REF, RATINGS, BETA)
        rows = [loss(LOGPS[i], REF[i], RATINGS[i], BETA) for i in range(6)]
        assert torch.equal(torch.stack(rows), value)
        assert (loss(LOGPS, REF, RATINGS.flip(0), BETA).sum() - value.sum()).abs() > 0.01


def test_every_loss_has_its_known_value_where_policy_and_reference_agree():
    """D = 0: (1/2 - r)^2, log 2, 2 log 2, 1 / (4 tau^2), (r - V)^2 / 2, w / 2, and -l for SFT.

    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `logps`
    Red: losses.py:ipo: `(h - 1 / (2 * beta)).square()` -> `(h - 1 / beta).square()`
    Red: losses.py:bco_pair: `-logsigmoid(chosen) -` -> `-logsigmoid(chosen) +`
    Red: losses.py:kto: `= undesirable_weight *` -> `= desirable_weight *`
    """
    start = {name: loss(REF, REF, BETA) for name, loss in ROWS.items()}
    start["kto"] = losses.kto(REF, REF, LABELS, ORIGIN[0], BETA, 1.5, 0.5)
    close(start["sft"], -REF, 0)
    close(start["uft"], (0.5 - RATINGS).square(), 0)
    for name in ("uft_bce", "dpo", "dpo_smoothed", "una_pair"):
        close(start[name], math.log(2), 1e-15)
    close(start["bco_pair"], 2 * math.log(2), 1e-15)
    close(start["ipo"], 1 / (4 * BETA**2), 1e-14)
    close(start["dro"], (RATINGS - REF / 10).square() / 2, 1e-15)
    close(start["kto"], torch.where(LABELS, real(0.75), real(0.25)), 0)


# UFT against SFT


def test_sft_is_the_negative_sum_and_pulls_every_row_alike():
    """L = -l and dL/dl = -1 (UFT Eq. 1).

    Red: losses.py:sft: `return -logps` -> `return -logps / logps.detach().abs()`
    """
    assert torch.equal(losses.sft(LOGPS), -LOGPS)
    close(slope(losses.sft, LOGPS), -1.0, 0)


def test_sft_token_mean_weighs_every_response_token_alike():
    """The mean over rows is the mean over response tokens; dL/dl_t = -mask / tokens_per_row.

    Red: losses.py:sft_token_mean: `float(mask.sum()) / len(mask)` -> `mask.sum(-1)`
    Red: losses.py:sft_token_mean: `(token_logps * mask)` -> `token_logps`
    """
    mask = tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()  # 4 tokens in 2 rows: 2 a row
    tokens = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(losses.sft_token_mean(tokens, mask).mean(), -tokens[mask].mean(), 1e-15)
    close(slope(lambda t: losses.sft_token_mean(t, mask), tokens), mask / -2, 0)


def test_sft_token_mean_of_micro_batches_is_that_of_the_batch():
    """Told the step's tokens_per_row, rows of 3 tokens and of 1 may be split anywhere.

    Red: losses.py:sft_token_mean: `if tokens_per_row is None` -> `if True`
    """
    mask = tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    tokens = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [losses.sft_token_mean(tokens[[i]], mask[[i]], 2.0) for i in range(2)]
    assert torch.equal(torch.cat(parts), losses.sft_token_mean(tokens, mask))


@pytest.mark.parametrize("r", (0.0, 0.25, 0.5, 1.0))
@pytest.mark.parametrize("beta", BETAS)
def test_uft_gradient_is_two_beta_s_minus_r_times_s_times_one_minus_s(beta, r):
    """dL/dl = 2 beta (s - r) s (1 - s) (UFT Eq. 7).

    Red: losses.py:uft: `- rewards` -> `+ rewards`
    Red: losses.py:implicit_reward: `return beta *` -> `return 2 * beta *`
    """
    s = torch.sigmoid(beta * GRID)
    close(slope(rated(losses.uft, r, beta), GRID), 2 * beta * (s - r) * s * (1 - s), 1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_uft_gradient_on_a_demonstration_is_minus_two_beta_s_times_one_minus_s_squared(beta):
    """r = 1: dL/dl = -2 beta s (1 - s)^2, also at |D| = 300.

    Red: losses.py:uft: `).square()` -> `).abs()`
    """
    s = torch.sigmoid(beta * 3 * GRID)
    close(slope(rated(losses.uft, 1.0, beta), 3 * GRID), -2 * beta * s * (1 - s)**2, 1e-15)


def test_uft_never_pushes_a_demonstration_down():
    """r = 1: dL/dl < 0 for every |u| <= 10, so no gradient points back to the reference.

    Red: losses.py:uft: `- rewards` -> `- 0.99 * rewards`
    """
    assert (slope(rated(losses.uft, beta=0.1), GRID) < 0).all()


def test_uft_starts_at_exactly_one_quarter():
    """r = 1, D = 0: sigmoid(0) is exactly 1/2, hence L = 1/4 and dL/dl = -beta / 4.

    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps + 1e-9, ref_logps, beta)`
    """
    assert (losses.uft(REF, REF, torch.ones_like(REF), BETA) == 0.25).all()
    close(slope(rated(losses.uft), ORIGIN), -BETA / 4, 1e-17)


def test_uft_pulls_a_demonstration_by_at_most_eight_beta_over_27():
    """max |dL/dl| = 8 beta / 27, at s = 1/3, where D = -log(2) / beta.

    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps, ref_logps, 1.01 * beta)`
    """
    d = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    size = slope(rated(losses.uft), d).abs()
    assert size.max() <= 8 * BETA / 27 + 1e-15
    close(d[size.argmax()], -math.log(2) / BETA, 1e-4)
    close(slope(rated(losses.uft), ORIGIN - math.log(2) / BETA), -8 * BETA / 27, 1e-15)


def test_uft_gives_up_a_lost_demonstration_and_bce_never_does():
    """|dL/dl| -> 2 beta e^(-2u) for u -> inf, 2 beta e^u for u -> -inf; BCE keeps beta there.

    Red: losses.py:uft: `torch.sigmoid(implicit_reward(` -> `logsigmoid(implicit_reward(`
    Red: losses.py:uft_bce: `-rewards * logsigmoid(u)` -> `-rewards * torch.sigmoid(u)`
    """
    low, high = ORIGIN - 20 / BETA, ORIGIN + 20 / BETA
    close(slope(rated(losses.uft), low) / (2 * BETA * math.exp(-20)), -1, 1e-6)
    close(slope(rated(losses.uft), high) / (2 * BETA * math.exp(-40)), -1, 1e-6)
    close(slope(rated(losses.uft_bce), low), -BETA, 1e-8)


def test_uft_is_convex_exactly_where_s_is_at_least_one_third():
    """r = 1: d2L/dl2 = -2 beta^2 s (1 - s)^2 (1 - 3s).

    Red: losses.py:uft: `).square()` -> `).pow(4)`
    """
    s = torch.sigmoid(BETA * GRID)
    got = curvature(rated(losses.uft), GRID)
    close(got, -2 * BETA**2 * s * (1 - s)**2 * (1 - 3 * s), 1e-15)
    assert torch.equal(got > 0, (s > 1 / 3))


def test_uft_with_a_small_beta_is_sft_up_to_a_constant():
    """(4 / beta) (L - 1/4) = -D + beta D^2 / 4 + O(beta^2).

    Red: losses.py:uft: `).square()` -> `).abs()`
    """
    d = real(3.0, -2.0)
    for beta in (1e-2, 1e-3, 1e-4):
        distance = (4 / beta) * (rated(losses.uft, beta=beta)(d) - 0.25) + d
        close(distance / beta, d.square() / 4, 3 * beta)


def test_uft_with_a_large_beta_counts_the_rows_below_the_reference():
    """L -> 1 where D < 0, 1/4 where D = 0, 0 where D > 0.

    Red: losses.py:implicit_reward: `beta * (` -> `beta * 0.001 * (`
    """
    d = real(-3.0, -1e-3, 0.0, 1e-3, 3.0)
    close(rated(losses.uft, beta=1e6)(d), real(1, 1, 0.25, 0, 0), 1e-12)


def test_uft_cannot_fall_below_the_square_of_sigmoid_beta_ref_logps():
    """u <= -beta l0, so inf L = (1 - sigmoid(-beta l0))^2 > 0: pi = 1 is as far as it goes.

    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps + ref_logps)`
    """
    ones = torch.ones_like(REF)
    assert (losses.implicit_reward(LOGPS, REF, BETA) <= -BETA * REF).all()
    floor = losses.uft(torch.zeros_like(REF), REF, ones, BETA)
    close(floor, torch.sigmoid(BETA * REF).square(), 1e-15)
    assert (losses.uft(LOGPS, REF, ones, BETA) > floor).all() and (floor > 0).all()


@pytest.mark.parametrize(("beta", "expected"), [
    (1e-4, (0.700, 0.300)), (0.1, (0.677, 0.323)), (1.0, (0.445, 0.555)), (5.0, (0.285, 0.715))])
def test_uft_fits_the_data_distribution_only_as_beta_vanishes(beta, expected):
    """Responses seen .7 and .3 of the time under pi_ref (.1, .3, .6): SFT would fit (.7, .3, 0).

    Red: losses.py:implicit_reward: `- ref_logps` -> `- 0.5 * ref_logps`
    """
    data = real(0.7, 0.3, 0.0)
    ref = real(0.1, 0.3, 0.6).log()

    def objective(logits):
        loss = losses.uft(logits.log_softmax(0), ref, torch.ones(3), beta)
        return (data * (loss - 0.25)).sum() * 4 / min(beta, 1.0)

    close(minimise(objective, ref).softmax(0), real(*expected, 0), 1e-3)


def test_uft_on_a_demonstration_is_the_square_of_kto_with_z0_of_zero():
    """(1 - s)^2 = (1 - s) squared, so the gradients differ by the factor 2 (1 - s).

    Red: losses.py:kto: `(1 - torch.sigmoid(advantage))` -> `(1 - torch.sigmoid(2 * advantage))`
    """
    def kto(d):
        return losses.kto(d, torch.zeros_like(d), torch.ones_like(d), ORIGIN[0], BETA)

    close(rated(losses.uft)(GRID), kto(GRID).square(), 1e-15)
    weight = 2 * (1 - torch.sigmoid(BETA * GRID))
    close(slope(rated(losses.uft), GRID), weight * slope(kto, GRID), 1e-15)


# Scores and binary labels


@pytest.mark.parametrize("r", (0.0, 0.25, 0.5, 1.0))
@pytest.mark.parametrize("beta", BETAS)
def test_bce_gradient_is_beta_times_s_minus_r(beta, r):
    """dL/dl = beta (s - r).

    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1 + rewards)`
    """
    close(slope(rated(losses.uft_bce, r, beta), GRID), beta * (torch.sigmoid(beta * GRID) - r),
          1e-15)


@pytest.mark.parametrize("loss", (losses.uft, losses.uft_bce))
def test_a_score_is_met_where_s_equals_r_and_nowhere_else(loss):
    """dL/dl = 0 at D = logit(r) / beta and has the sign of s - r elsewhere.

    Red: losses.py:uft: `- rewards` -> `- 0.9 * rewards`
    Red: losses.py:uft_bce: `-rewards *` -> `-0.9 * rewards *`
    """
    for r in (0.1, 0.25, 0.5, 0.9):
        target = ORIGIN + math.log(r / (1 - r)) / BETA
        close(slope(rated(loss, r), target), 0.0, 1e-15)
        sign = slope(rated(loss, r), target + GRID / 2).sign()
        assert torch.equal(sign[GRID != 0], GRID.sign()[GRID != 0])


def test_curvature_where_the_score_is_met_is_smaller_for_mse():
    """At s = r: d2L/dl2 = 2 beta^2 r^2 (1 - r)^2 for MSE, beta^2 r (1 - r) for BCE.

    Red: losses.py:uft: `).square()` -> `).square() / 2`
    Red: losses.py:uft_bce: `return -rewards` -> `return -2 * rewards`
    """
    for r in (0.1, 0.25, 0.5, 0.9):
        target = ORIGIN + math.log(r / (1 - r)) / BETA
        mse, bce = (curvature(rated(loss, r), target) for loss in (losses.uft, losses.uft_bce))
        close(mse, 2 * BETA**2 * r**2 * (1 - r)**2, 1e-12)
        close(bce, BETA**2 * r * (1 - r), 1e-12)


def test_mse_pulls_at_most_half_as_hard_as_bce():
    """Their gradients' ratio is 2 s (1 - s) <= 1/2, whatever the score.

    Red: losses.py:uft: `).square()` -> `).square() / 2`
    """
    s = torch.sigmoid(BETA * GRID)
    for r in (0.0, 0.3, 1.0):
        mse, bce = (slope(rated(loss, r), GRID) for loss in (losses.uft, losses.uft_bce))
        close(mse, 2 * s * (1 - s) * bce, 1e-15)
        assert (mse.abs() <= bce.abs() / 2 + 1e-17).all()


@pytest.mark.parametrize("loss", (losses.uft, losses.uft_bce))
def test_a_score_of_one_half_has_exactly_no_gradient_at_the_start(loss):
    """D = 0 and r = 1/2: s - r is exactly 0.

    Red: losses.py:uft: `- rewards` -> `- rewards * 1.001`
    Red: losses.py:uft_bce: `(1 - rewards)` -> `(1.001 - rewards)`
    """
    assert slope(rated(loss, 0.5), ORIGIN).item() == 0.0


@pytest.mark.parametrize("loss", (losses.uft, losses.uft_bce))
def test_every_descent_step_brings_s_closer_to_the_score(loss):
    """50 SGD steps on a softmax over 5 responses; UNA Eq. 11-13 as printed would climb.

    Red: losses.py:uft: `return (` -> `return -(`
    Red: losses.py:uft_bce: `-rewards * logsigmoid(u) -` -> `rewards * logsigmoid(u) +`
    """
    ref = real(0.3, -0.2, 0.0, 1.0, -1.0).log_softmax(0)
    for r in (0.0, 0.3, 1.0):
        logits, last = ref.clone().requires_grad_(), math.inf
        for _ in range(50):
            logps = logits.log_softmax(0)[0]
            distance = (torch.sigmoid(0.7 * (logps - ref[0])) - r).abs().item()
            assert distance < last
            last = distance
            step = torch.autograd.grad(loss(logps, ref[0], tensor(r), 0.7), logits)[0]
            logits = (logits - 0.1 * step).detach().requires_grad_()


def test_binary_labels_give_the_binary_losses():
    """r = 1: (1 - s)^2 and -log s; r = 0: s^2 and -log(1 - s) (UNA Eq. 11, 12).

    Red: losses.py:uft_bce: `logsigmoid(-u)` -> `logsigmoid(u)`
    Red: losses.py:uft: `- rewards` -> `- (1 - rewards)`
    """
    d = GRID / 10
    s = torch.sigmoid(BETA * d)
    close(rated(losses.uft, 1.0)(d), (1 - s).square(), 0)
    close(rated(losses.uft, 0.0)(d), s.square(), 0)
    close(rated(losses.uft_bce, 1.0)(d), -s.log(), 1e-15)
    close(rated(losses.uft_bce, 0.0)(d), -(1 - s).log(), 1e-14)


def test_bce_of_a_hopeless_row_is_its_distance():
    """u = -800, r = 1: L = 800 exactly, where log(sigmoid(u)) is -inf; float32 likewise at -120.

    Red: losses.py:uft_bce: `rewards * logsigmoid(u)` -> `rewards * torch.sigmoid(u).log()`
    Red: losses.py:uft_bce: `* logsigmoid(-u)` -> `* (1 - torch.sigmoid(u)).log()`
    """
    for dtype, u in ((torch.float64, 800.0), (torch.float32, 120.0), (torch.float32, 800.0)):
        d = torch.full((1,), u, dtype=dtype)
        assert rated(losses.uft_bce, 1.0, 1.0)(-d).item() == u
        assert rated(losses.uft_bce, 0.0, 1.0)(d).item() == u
        assert torch.sigmoid(-d).log().item() == -math.inf


# Pairs


def test_reward_model_gradient_is_the_probability_of_the_wrong_order():
    """dL/dr_w = -sigmoid(r_l - r_w) = -dL/dr_l (UFT Eq. 2).

    Red: losses.py:reward_model: `chosen - rejected)` -> `rejected - chosen)`
    """
    up, down = slope(losses.reward_model, CHOSEN, REJECTED)
    close(up, -torch.sigmoid(REJECTED - CHOSEN), 1e-15)
    assert torch.equal(down, -up)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_dpo_gradient_is_minus_beta_times_the_error_less_the_smoothing(smoothing):
    """dL/dl_w = -beta (sigmoid(-z) - e), z = u_w - u_l (DPO Eq. 7).

    Red: losses.py:dpo: `- (ref_chosen_logps` -> `+ (ref_chosen_logps`
    Red: losses.py:dpo: `- label_smoothing * logsigmoid(-z)` -> `+ label_smoothing * logsigmoid(-z)`
    """
    z = BETA * (CHOSEN - REF_CHOSEN - REJECTED + REF_REJECTED)
    up, _ = slope(lambda w, l: losses.dpo(w, l, REF_CHOSEN, REF_REJECTED, BETA, smoothing),
                  CHOSEN, REJECTED)
    close(up, -BETA * (torch.sigmoid(-z) - smoothing), 1e-15)


def test_dpo_cannot_change_the_likelihood_of_a_pair_and_bce_can():
    """dL/dl_w + dL/dl_l = 0 exactly for DPO; for BCE it is beta (s_w + s_l - 1).

    Red: losses.py:dpo: `chosen_logps - rejected_logps` -> `chosen_logps - 0.9 * rejected_logps`
    Red: losses.py:bco_pair: `- logsigmoid(-rejected)` -> `+ logsigmoid(rejected)`
    """
    sums = []
    for loss in (losses.dpo, losses.bco_pair):
        up, down = slope(lambda w, l, f=loss: f(w, l, REF_CHOSEN, REF_REJECTED, BETA),
                         CHOSEN, REJECTED)
        sums.append(up + down)
    s_w, s_l = (torch.sigmoid(BETA * d) for d in (CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED))
    assert torch.equal(sums[0], torch.zeros(3, dtype=torch.float64))
    close(sums[1], BETA * (s_w + s_l - 1), 1e-15)
    assert sums[1].abs().min() > 1e-3


def test_smoothed_dpo_is_smallest_at_the_logit_of_one_minus_e():
    """z* = logit(1 - e): a pair is pushed apart only so far.

    Red: losses.py:dpo: `-(1 - label_smoothing)` -> `-(1 + label_smoothing)`
    """
    margin = minimise(lambda x: losses.dpo(x, ORIGIN, ORIGIN, ORIGIN, 1.0, 0.1).sum(), ORIGIN)
    close(margin, math.log(0.9 / 0.1), 1e-8)


def test_una_pair_is_dpo():
    """UNA Eq. 10 with f = log sigmoid: the same values and gradients.

    Red: losses.py:una_pair: `(rejected_logps, ref_rejected_logps,` -> `(rejected_logps, 0,`
    """
    dpo, una = ROWS["dpo"], ROWS["una_pair"]
    close(una(LOGPS, REF, BETA), dpo(LOGPS, REF, BETA), 1e-15)
    for got, expected in zip(slope(lambda l, l0: una(l, l0, BETA), LOGPS, REF),
                             slope(lambda l, l0: dpo(l, l0, BETA), LOGPS, REF), strict=True):
        close(got, expected, 1e-15)


def test_una_equation_10_as_printed_is_linear_and_has_no_minimum():
    """L = -(u_w - u_l) without log sigmoid: L(2D) = 2 L(D), so any negative value doubles.

    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps - ref_logps).tanh()`
    """
    def printed(d):
        u = losses.implicit_reward(d, torch.zeros_like(d), BETA)
        return u[1::2] - u[::2]

    close(printed(2 * LOGPS), 2 * printed(LOGPS), 1e-15)
    close(slope(printed, LOGPS), real(*[-BETA, BETA] * 3), 1e-15)


def test_bco_pair_is_binary_bce_on_both_rows():
    """-log s_w - log(1 - s_l); dL/dl_w = -beta (1 - s_w), dL/dl_l = beta s_l.

    Red: losses.py:bco_pair: `-logsigmoid(chosen)` -> `-2 * logsigmoid(chosen)`
    Red: losses.py:bco_pair: `logsigmoid(-rejected)` -> `logsigmoid(rejected)`
    """
    labels, s = real(*[1, 0] * 3), torch.sigmoid(BETA * (LOGPS - REF))
    rows = losses.uft_bce(LOGPS, REF, labels, BETA)
    close(ROWS["bco_pair"](LOGPS, REF, BETA), rows[::2] + rows[1::2], 1e-15)
    close(slope(lambda l: ROWS["bco_pair"](l, REF, BETA), LOGPS), BETA * (s - labels), 1e-15)


def test_bco_pair_is_never_below_dpo():
    """(1 + e^-a) (1 + e^b) > 1 + e^(b - a) for every a and b.

    Red: losses.py:bco_pair: `-logsigmoid(chosen)` -> `-0.9 * logsigmoid(chosen)`
    """
    d = 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros_like(d)
    assert (ROWS["bco_pair"](d, zero, 1.0) > ROWS["dpo"](d, zero, 1.0)).all()


def test_a_prompt_shift_leaves_the_pair_losses_alone_and_moves_the_others():
    """Adding f(x) to both D of a pair cancels in DPO, UNA-pair and IPO, nowhere else.

    Red: losses.py:ipo: `- (rejected_logps - ref_rejected_logps)` -> `- rejected_logps`
    Red: losses.py:una_pair: `(chosen, rejected)` -> `(chosen, rejected / 2)`
    """
    shifted = LOGPS + real(0.7, -1.9, 3.1).repeat_interleave(2)
    for name in ("dpo", "dpo_smoothed", "una_pair", "ipo"):
        close(ROWS[name](shifted, REF, BETA), ROWS[name](LOGPS, REF, BETA), 1e-12)
        close(ROWS[name](shifted, shifted, BETA), ROWS[name](LOGPS, LOGPS, BETA), 1e-12)
    for name in ("uft", "uft_bce", "bco_pair", "kto", "dro"):
        assert (ROWS[name](shifted, REF, BETA) - ROWS[name](LOGPS, REF, BETA)).abs().min() > 1e-3


def test_ipo_gradient_vanishes_at_a_margin_of_one_over_two_tau():
    """dL/dl_w = 2 (h - 1 / (2 tau)) = -dL/dl_l (IPO Eq. 17).

    Red: losses.py:ipo: `(2 * beta)).square()` -> `(3 * beta)).square()`
    """
    up, down = slope(lambda w, l: losses.ipo(w, l, REF_CHOSEN, REF_REJECTED, BETA),
                     CHOSEN, REJECTED)
    h = CHOSEN - REF_CHOSEN - REJECTED + REF_REJECTED
    close(up, 2 * (h - 1 / (2 * BETA)), 1e-14)
    assert torch.equal(down, -up)
    target = ORIGIN + 1 / (2 * BETA)
    assert slope(lambda w: losses.ipo(w, ORIGIN, ORIGIN, ORIGIN, BETA), target).item() == 0.0


def test_ipo_spreads_log_ratios_by_the_difference_of_win_rates():
    """Over all pairs: D_i - D_j = (p_i - p_j) / tau, p_i = mean_j P(i beats j), P(i, i) = 1/2.

    Red: losses.py:ipo: `(2 * beta)).square()` -> `beta).square()`
    """
    scores = real(0.0, 0.5, -1.0, 2.0, 0.3)
    wins = torch.sigmoid(scores[:, None] - scores + 0.2 * torch.sin(scores[:, None] * scores))
    wins = (wins + 1 - wins.T) / 2
    ref = real(0.3, -0.2, 0.0, 1.0, -1.0).log_softmax(0)

    def objective(logits):
        logps = logits.log_softmax(0)
        return (wins * losses.ipo(logps[:, None], logps, ref[:, None], ref, 0.7)).sum()

    ratios, rates = minimise(objective, ref).log_softmax(0) - ref, wins.mean(1)
    close(ratios[:, None] - ratios, (rates[:, None] - rates) / 0.7, 1e-9)


# KTO


def test_kto_gradient_is_w_beta_v_times_one_minus_v():
    """Down for desirable, up for undesirable rows, v = sigmoid(+-beta (D - z0)).

    Red: losses.py:kto: `torch.sigmoid(-advantage)` -> `torch.sigmoid(advantage)`
    Red: losses.py:kto: `= desirable_weight *` -> `= undesirable_weight *`
    """
    v = torch.sigmoid(BETA * (LOGPS - REF - 0.4))
    weight = torch.where(LABELS, real(-1.5), real(0.5))
    close(slope(lambda l: ROWS["kto"](l, REF, BETA), LOGPS), weight * BETA * v * (1 - v), 1e-15)


def test_kto_pulls_hardest_at_z0_and_fades_alike_on_both_sides():
    """|dL/dl| <= w beta / 4, reached at D = z0, symmetric around it.

    Red: losses.py:kto: `- beta * z0` -> `- z0`
    """
    z0 = tensor(2.5, dtype=torch.float64)
    for label in (0.0, 1.0):
        size = slope(lambda d, y=label: losses.kto(
            d, torch.zeros_like(d), torch.full_like(d, y), z0, BETA, 2.0, 2.0), z0 + GRID).abs()
        close(size, size.flip(0), 1e-15)
        close(size.max(), 2.0 * BETA / 4, 1e-15)
        assert GRID[size.argmax()] == 0


def test_kto_z0_is_a_clamped_mean_without_gradient():
    """max(0, mean of the mismatched D): 0 at the start, where each D is 0, and for negative means.

    Red: losses.py:kto_z0: `.clamp(min=0)` -> ``
    Red: losses.py:kto_z0: `.detach()` -> ``
    Red: losses.py:kto_z0: `.mean()` -> `.sum()`
    """
    logps = LOGPS.clone().requires_grad_()
    mean = losses.kto_z0(logps, REF)  # (-2.2 + 2.3 - 0.2 - 0.8 + 3.1 + 0.4) / 6 = 2.6 / 6
    close(mean, 2.6 / 6, 1e-15)
    assert mean.shape == () and not mean.requires_grad
    assert losses.kto_z0(REF, REF) == 0
    assert losses.kto_z0(REF, LOGPS) == 0 and (REF - LOGPS).max() > 0


def test_kto_is_unchanged_by_a_shift_that_z0_shares_unless_the_clamp_bites():
    """D + f with z0 + f is D with z0; neither a mean below 0 nor an f(x) that varies is absorbed.

    Red: losses.py:kto: `- beta * z0` -> `+ beta * z0`
    Red: losses.py:kto_z0: `.clamp(min=0)` -> `.clamp(min=1)`
    """
    def loss(shift):
        z0 = losses.kto_z0(REF + 0.5 + shift, REF)
        return losses.kto(LOGPS + shift, REF, LABELS, z0, BETA)

    close(loss(0.3), loss(0.0), 1e-15)
    for shift in (-3.0, real(1, -1, 2, -2, 3, -3)):
        assert (loss(shift) - loss(0.0)).abs().min() > 1e-3


def test_kto_and_uft_pull_a_demonstration_alike_at_the_start():
    """D = z0 = 0: both gradients are -beta / 4.

    Red: losses.py:kto: `torch.sigmoid(advantage)` -> `torch.sigmoid(2 * advantage)`
    """
    kto = slope(lambda d: losses.kto(d, 0 * d, torch.ones(1), ORIGIN[0], BETA), ORIGIN)
    assert kto.item() == slope(rated(losses.uft), ORIGIN).item() == -BETA / 4


# ORPO, SimPO, DRO


def test_log1mexp_agrees_with_arbitrary_precision_arithmetic():
    """log(1 - e^x), where the naive form has no digit left near 0 or below -37.

    Red: losses.py:log1mexp: `torch.log(-torch.expm1(close))` -> `torch.log(1 - torch.exp(close))`
    Red: losses.py:log1mexp: `torch.log1p(-torch.exp(far))` -> `torch.log(1 - torch.exp(far))`
    """
    values = [-1e-300, -1e-10, -1e-3, -0.5, -math.log(2), -0.7, -3.0, -60.0, -700.0]
    with localcontext() as context:
        context.prec = 400
        exact = [float((1 - Decimal(x).exp()).ln()) for x in values]
    close(losses.log1mexp(real(*values)), real(*exact), 0, rtol=1e-15)


def test_log1mexp_has_a_finite_gradient_on_both_sides_of_its_seam():
    """d/dx log(1 - e^x) = -1 / (e^-x - 1), never NaN.

    Red: losses.py:log1mexp: `far = torch.where(near, -math.log(2), x)` -> `far = x + 1e-9`
    """
    x = -torch.logspace(-15, 2.8, 200, dtype=torch.float64)
    close(slope(losses.log1mexp, x), -1 / torch.expm1(-x), 0, rtol=1e-14)


def test_orpo_is_the_likelihood_plus_the_weighted_log_odds_ratio():
    """-m_w - weight log sigmoid(log(p_w / (1 - p_w)) - log(p_l / (1 - p_l))) (ORPO Eq. 6, 7).

    Red: losses.py:orpo: `- (rejected - log1mexp(rejected))` -> `- rejected`
    Red: losses.py:orpo: `- weight * logsigmoid` -> `+ weight * logsigmoid`
    """
    odds = [m.exp() / (1 - m.exp()) for m in (CHOSEN, REJECTED)]
    ratio = odds[0] / odds[1]
    close(losses.orpo(CHOSEN, REJECTED, 0.1), -CHOSEN - 0.1 * (ratio / (1 + ratio)).log(), 1e-14)


def test_orpo_gradient_grows_with_the_odds_that_remain():
    """dL/dm_w = -1 - weight q / (1 - p_w), dL/dm_l = weight q / (1 - p_l), q = sigmoid(-z).

    Red: losses.py:orpo: `(chosen - log1mexp(chosen))` -> `chosen`
    Red: losses.py:orpo: `return -chosen_mean_logps -` -> `return -`
    """
    m = -torch.logspace(-6, math.log10(60), 30, dtype=torch.float64)
    chosen, rejected = (x.flatten() for x in torch.meshgrid(m, m, indexing="ij"))
    left = [-torch.expm1(x) for x in (chosen, rejected)]  # 1 - p
    q = torch.sigmoid(rejected - left[1].log() - chosen + left[0].log())
    up, down = slope(lambda w, l: losses.orpo(w, l, 0.1), chosen, rejected)
    close(up, -1 - 0.1 * q / left[0], 1e-12, rtol=1e-12)
    close(down, 0.1 * q / left[1], 1e-12, rtol=1e-12)


def test_simpo_gradient_is_beta_times_the_error_of_the_margin_less_gamma():
    """dL/dm_w = -beta sigmoid(-z) = -dL/dm_l, z = beta (m_w - m_l) - gamma (SimPO Eq. 6).

    Red: losses.py:simpo: `_logps) - gamma)` -> `_logps) + gamma)`
    """
    z = BETA * (CHOSEN - REJECTED) - 0.5
    up, down = slope(lambda w, l: losses.simpo(w, l, BETA, 0.5), CHOSEN, REJECTED)
    close(up, -BETA * torch.sigmoid(-z), 1e-15)
    assert torch.equal(down, -up)


def test_simpo_gamma_is_the_margin_and_not_the_ratio():
    """gamma = beta * ratio: gamma is the loss's own offset, ratio that of the mean log-probs.

    Red: losses.py:simpo: `_logps) - gamma)` -> `_logps) - beta * gamma)`
    """
    ratio = 0.8
    expected = -logsigmoid(BETA * (CHOSEN - REJECTED - ratio))
    close(losses.simpo(CHOSEN, REJECTED, BETA, BETA * ratio), expected, 1e-15)


def test_dro_moves_policy_and_value_by_the_same_error():
    """e = r - V - u: dL/dl = -beta e and dL/dV = -e.

    Red: losses.py:dro: `- values` -> `- values.detach() + 0 * values`
    Red: losses.py:dro: `.square() / 2` -> `.square()`
    """
    values = RATINGS.flip(0) / 3
    error = RATINGS - values - BETA * (LOGPS - REF)
    policy, value = slope(lambda l, v: losses.dro(l, REF, RATINGS, v, BETA), LOGPS, values)
    close(policy, -BETA * error, 1e-15)
    close(value, -error, 1e-15)
