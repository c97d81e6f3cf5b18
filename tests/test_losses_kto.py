"""Theorems about KTO, its reference point z0, and DRO, in float64.

D = l - l0 and s = sigmoid(beta D) as in test_losses.py; v = sigmoid(+-beta (D - z0)), + for
desirable rows, w the weight of the row's kind; V is DRO's learned value of the prompt.
"""
import torch
from calculus import (
    BETA,
    GRID,
    LABELS,
    LOGPS,
    ORIGIN,
    RATINGS,
    REF,
    close,
    rated,
    real,
    slope,
    slopes,
)

import losses


def kto(z0=0.0, label=1.0, weight=1.0):
    """KTO as a function of D alone; every row is desirable, or with label 0 none."""
    return lambda d: losses.kto(d, torch.zeros_like(d), torch.full_like(d, label), real(z0)[0],
                                BETA, weight, weight)


def test_kto_gradient_is_w_beta_v_times_one_minus_v():
    """dL/dl = -w beta v (1 - v) on desirable rows, up on the others; w = 1.5 or 0.5, z0 = 0.4.
    Red: losses.py:kto: `torch.sigmoid(-advantage)` -> `torch.sigmoid(advantage)`
    Red: losses.py:kto: `= desirable_weight *` -> `= undesirable_weight *`"""
    v = torch.sigmoid(BETA * (LOGPS - REF - 0.4))
    close(slopes("kto"), torch.where(LABELS, real(-1.5), real(0.5)) * BETA * v * (1 - v), 1e-15)


def test_kto_weighs_both_kinds_by_1_unless_told_otherwise():
    """Half a row's weight at the start.
    Red: losses.py:kto: ` desirable_weight: float = 1.0` -> ` desirable_weight: float = 2.0`
    Red: losses.py:kto: `undesirable_weight: float = 1.0` -> `undesirable_weight: float = 2.0`"""
    z0 = torch.zeros(())
    close(losses.kto(REF, REF, LABELS, z0, BETA), 0.5, 0)


def test_kto_pulls_hardest_at_z0_and_fades_alike_on_both_sides():
    """|dL/dl| <= w beta / 4, reached at D = z0, symmetric around it.
    Red: losses.py:kto: `- beta * z0` -> `- z0`"""
    for label in (0.0, 1.0):
        size = slope(kto(2.5, label, 2.0), 2.5 + GRID).abs()
        close(size, size.flip(0), 1e-15)
        close(size.max(), 2.0 * BETA / 4, 1e-15)
        assert GRID[size.argmax()] == 0


def test_kto_and_uft_pull_a_demonstration_alike_at_the_start():
    """D = z0 = 0: both gradients are -beta / 4.
    Red: losses.py:kto: `torch.sigmoid(advantage)` -> `torch.sigmoid(2 * advantage)`"""
    assert slope(kto(), ORIGIN).item() == slope(rated(losses.uft), ORIGIN).item() == -BETA / 4


def test_uft_on_a_demonstration_is_the_square_of_kto_with_z0_of_zero():
    """(1 - s)^2 = (1 - s) squared, so the gradients differ by the factor 2 (1 - s).
    Red: losses.py:kto: `(1 - torch.sigmoid(advantage))` -> `(1 - torch.sigmoid(2 * advantage))`"""
    close(rated(losses.uft)(GRID), kto()(GRID).square(), 1e-15)
    weight = 2 * (1 - torch.sigmoid(BETA * GRID))
    close(slope(rated(losses.uft), GRID), weight * slope(kto(), GRID), 1e-15)


def test_kto_z0_is_a_clamped_mean_without_gradient():
    """max(0, mean of the mismatched D): 0 at the start, where each D is 0, and for negative means.
    Red: losses.py:kto_z0: `.clamp(min=0)` -> ``
    Red: losses.py:kto_z0: `.detach()` -> ``
    Red: losses.py:kto_z0: `.mean()` -> `.sum()`"""
    mean = losses.kto_z0(LOGPS.clone().requires_grad_(), REF)
    close(mean, 2.6 / 6, 1e-15)  # (-2.2 + 2.3 - 0.2 - 0.8 + 3.1 + 0.4) / 6
    assert mean.shape == () and not mean.requires_grad
    assert losses.kto_z0(REF, REF) == 0
    assert losses.kto_z0(REF, LOGPS) == 0 and (REF - LOGPS).max() > 0


def test_kto_is_unchanged_by_a_shift_that_z0_shares_unless_the_clamp_bites():
    """D + f with z0 + f is D with z0; neither a mean below 0 nor an f(x) that varies is absorbed.
    Red: losses.py:kto: `- beta * z0` -> `+ beta * z0`
    Red: losses.py:kto_z0: `.clamp(min=0)` -> `.clamp(min=1)`"""
    def loss(shift):
        z0 = losses.kto_z0(REF + 0.5 + shift, REF)
        return losses.kto(LOGPS + shift, REF, LABELS, z0, BETA)

    close(loss(0.3), loss(0.0), 1e-15)
    for shift in (-3.0, real(1, -1, 2, -2, 3, -3)):
        assert (loss(shift) - loss(0.0)).abs().min() > 1e-3


def test_dro_moves_policy_and_value_by_the_same_error():
    """e = r - V - u: dL/dl = -beta e and dL/dV = -e.
    Red: losses.py:dro: `- values` -> `- values.detach() + 0 * values`
    Red: losses.py:dro: `.square() / 2` -> `.square()`"""
    values = RATINGS.flip(0) / 3
    error = RATINGS - values - BETA * (LOGPS - REF)
    policy, value = slope(lambda l, v: losses.dro(l, REF, RATINGS, v, BETA), LOGPS, values)
    close(policy, -BETA * error, 1e-15)
    close(value, -error, 1e-15)
