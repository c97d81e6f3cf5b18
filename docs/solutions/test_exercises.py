"""Solutions of docs/exercises.md, in float64, each named after what it finds.

    .venv/bin/python -m pytest docs/solutions

tests/test_math.py runs them with the suite. u = beta (logps - ref_logps), s = sigmoid(u).
"""
import math

import torch
from torch import Tensor

import losses
import policy_gradients
from lab import optimum

ZERO = torch.zeros(1, dtype=torch.float64)
GRID = torch.linspace(-8, 8, 3201, dtype=torch.float64)


def slope(loss, x: Tensor) -> Tensor:
    """dL/dx of the summed loss, differentiable once more."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x, create_graph=True)[0]


def rated(loss, r: float = 1.0, beta: float = 1.0):
    """uft or uft_bce as a function of the gain D alone."""
    return lambda d: loss(d, torch.zeros_like(d), torch.full_like(d, r), beta)


# Derive


def test_1_the_hardest_pull_is_32_27_of_the_first():
    """c(s) = 2 beta s (1 - s)^2, c' = 2 beta (1 - s) (1 - 3s): s = 1/3, u = -log 2."""
    weight = slope(rated(losses.uft), GRID) / slope(rated(losses.uft), ZERO)
    assert abs(weight.max().item() - 32 / 27) < 1e-5
    assert abs(GRID[weight.argmax()].item() + math.log(2)) < 0.005


def test_2_eq_7_holds_a_score_less_stiffly_than_cross_entropy():
    """At s = r: 2 beta^2 r^2 (1 - r)^2 over beta^2 r (1 - r) is 2 r (1 - r), a half at most."""
    for r in (0.1, 0.5, 0.9):
        met = torch.tensor([math.log(r / (1 - r))], dtype=torch.float64).requires_grad_()
        mse, bce = (torch.autograd.grad(slope(rated(loss, r), met), met)[0]
                    for loss in (losses.uft, losses.uft_bce))
        assert abs((mse / bce).item() - 2 * r * (1 - r)) < 1e-12


def test_3_cross_entropy_centres_a_pair_on_the_reference():
    """(1 + e^-a) (1 + e^b) = 1 + e^-z + e^(-z/2) (e^t + e^-t), t the shift: least at t = 0."""
    zero = torch.zeros_like(GRID)
    for z in (-2.0, 0.0, 3.0):
        value = losses.bco_pair(GRID + z / 2, GRID - z / 2, zero, zero, 1.0)
        assert GRID[value.argmin()].abs() < 1e-12
        assert abs(value.min().item() - 2 * math.log(1 + math.exp(-z / 2))) < 1e-12


# Predict, then run


def test_4_half_the_beta_at_twice_the_rate_changes_rows_that_have_gained():
    """The first step is the same; a row 20 nats ahead is pulled 4.2 times as hard."""
    def step(beta: float, rate: float, gain: float) -> float:
        return -rate * slope(rated(losses.uft, beta=beta), ZERO + gain).item()

    assert step(0.1, 1.0, 0.0) == step(0.05, 2.0, 0.0)
    assert round(step(0.05, 2.0, 20.0) / step(0.1, 1.0, 20.0), 1) == 4.2


def test_5_constant_scores_are_sft_on_the_data_or_its_reverse():
    """All answers alike score .6 or .4: pi nears their frequencies, or leaves them."""
    def away(x: Tensor) -> float:
        return (x.softmax(0) - optimum.UNIFORM).abs().sum().item() / 2

    for score, nearer in ((0.6, True), (0.4, False)):
        x = optimum.REF_LOGPS
        objective = optimum.expected(losses.uft, torch.full_like(x, score), optimum.UNIFORM)
        for _ in range(20):
            before, x = x, x - optimum.slope(objective, x.clone().requires_grad_()).detach()
            assert (away(x) < away(before)) == nearer


def test_6_grpo_cannot_tell_a_large_difference_from_a_small_one():
    """Two rewards: +-.707 for .1 and .9, still +-.697 for .50 and .51; RLOO: +-.8 and +-.01."""
    rewards = torch.tensor([[0.1, 0.9], [0.50, 0.51]], dtype=torch.float64)
    grpo = policy_gradients.grpo_advantages(rewards)[:, 1]
    rloo = policy_gradients.rloo_advantages(rewards)[:, 1]
    assert [round(x, 3) for x in grpo.tolist()] == [0.707, 0.697]
    assert [round(x, 3) for x in rloo.tolist()] == [0.8, 0.01]


# Break a test


def test_7_a_reference_point_with_a_gradient_pushes_rows_the_wrong_way():
    """Without .detach() a desirable row gains by lowering z0, the log-probs of other rows."""
    other = torch.full((1,), 0.5, dtype=torch.float64)

    def attached(mismatched: Tensor) -> Tensor:
        z0 = mismatched.mean().clamp(min=0)
        return losses.kto(ZERO, ZERO, torch.ones(1), z0, 1.0)

    assert slope(attached, other).item() > 0
    assert not losses.kto_z0(other.requires_grad_(), ZERO).requires_grad


def test_8_doubling_beta_inside_dpo_keeps_every_value_at_the_start():
    """-log sigma(0) is log 2 for any beta; the slope beta / 2 is not."""
    def dpo(beta: float):
        return lambda w: losses.dpo(w, ZERO, ZERO, ZERO, beta)

    assert dpo(0.3)(ZERO).item() == dpo(0.6)(ZERO).item() == -math.log(0.5)
    assert slope(dpo(0.6), ZERO).item() == 2 * slope(dpo(0.3), ZERO).item()


def test_9_a_square_does_not_know_the_order_of_a_difference():
    """(s - r)^2 and (r - s)^2: the same bits, and so are their gradients."""
    for r in (0.0, 0.3, 1.0):
        turned = slope(lambda d, r=r: (r - torch.sigmoid(d)).square(), GRID)
        assert torch.equal((r - torch.sigmoid(GRID)).square(), rated(losses.uft, r)(GRID))
        assert torch.equal(turned, slope(rated(losses.uft, r), GRID))


# Add a loss


def apo_zero(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor, beta: float,
) -> Tensor:
    """1 - s_w + s_l, shape (P,).   APO-zero of Anchored Preference Optimization

    dL/dchosen_logps = -beta s_w (1 - s_w); dL/drejected_logps = beta s_l (1 - s_l).
    """
    chosen = losses.implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = losses.implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def test_10_apo_zero_is_kto_on_both_rows_with_z0_of_zero():
    """1 - sigma(u_w) and 1 - sigma(-u_l); its gradient is the one that its docstring states."""
    zero, none, s = torch.zeros_like(GRID), torch.zeros(()), torch.sigmoid(GRID)
    kto = [losses.kto(GRID, zero, zero + label, none, 1.0) for label in (1, 0)]
    torch.testing.assert_close(apo_zero(GRID, GRID, zero, zero, 1.0), sum(kto))
    up = slope(lambda w: apo_zero(w, zero, zero, zero, 1.0), GRID)
    down = slope(lambda l: apo_zero(zero, l, zero, zero, 1.0), GRID)
    torch.testing.assert_close(up, -s * (1 - s))
    torch.testing.assert_close(down, s * (1 - s))


def uft_shifted(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, shift: Tensor, beta: float
) -> Tensor:
    """(sigmoid(r_theta + shift) - r)^2, shape (B,): UFT Eq. 7 with an offset for each prompt.

    dL/dlogps = 2 beta (s - r) s (1 - s), s the sigmoid above.
    """
    u = losses.implicit_reward(logps, ref_logps, beta)
    return (torch.sigmoid(u + shift) - rewards).square()


def test_11_an_offset_of_beta_log_z_brings_uft_to_the_optimum():
    """At pi* r_theta + beta log Z = r, so each row of the bandit can be met; without it none is."""
    log_z, best = optimum.log_normaliser(optimum.REWARDS), optimum.optimum(optimum.REWARDS)

    def shifted(now, ref, rewards, beta):
        return uft_shifted(now, ref, rewards, beta * log_z, beta)

    for loss, reaches in ((shifted, True), (losses.uft, False)):
        objective = optimum.expected(loss, torch.sigmoid(optimum.REWARDS), optimum.UNIFORM)
        end = optimum.settle(objective, optimum.REF_LOGPS).softmax(0)
        assert ((end - best.exp()).abs().sum().item() < 1e-8) == reaches
