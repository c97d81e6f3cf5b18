"""Theorems about the losses of pairs, in float64: reward model, DPO, BCO, IPO, ORPO, SimPO.

w is the chosen row and l the rejected one; D = l - l0 against the reference, u = beta D and
s = sigmoid(u) as in test_losses.py, z = u_w - u_l; m is a MEAN log-probability.
"""
import math
from decimal import Decimal, localcontext

import pytest
import torch
from calculus import BETA, LOGPS, ORIGIN, REF, ROWS, close, minimise, real, slope, slopes
from torch.nn.functional import logsigmoid

import losses

CHOSEN, REJECTED = LOGPS[::2], LOGPS[1::2]
RATIOS = LOGPS - REF
MARGINS = RATIOS[::2] - RATIOS[1::2]

# Bradley-Terry: reward model, DPO, UNA-pair


def test_reward_model_gradient_is_the_probability_of_the_wrong_order():
    """dL/dr_w = -sigmoid(r_l - r_w) = -dL/dr_l (UFT Eq. 2).
    Red: losses.py:reward_model: `chosen - rejected)` -> `rejected - chosen)`"""
    up, down = slope(losses.reward_model, CHOSEN, REJECTED)
    close(up, -torch.sigmoid(REJECTED - CHOSEN), 1e-15)
    assert torch.equal(down, -up)


@pytest.mark.parametrize(("name", "smoothing"), [("dpo", 0.0), ("dpo_smoothed", 0.1)])
def test_dpo_gradient_is_minus_beta_times_the_error_less_the_smoothing(name, smoothing):
    """dL/dl_w = -beta (sigmoid(-z) - e) (DPO Eq. 7; e > 0 is conservative DPO).
    Red: losses.py:dpo: `- (ref_chosen_logps` -> `+ (ref_chosen_logps`
    Red: losses.py:dpo: `- label_smoothing * logsigmoid(-z)` -> `+ label_smoothing * logsigmoid(-z)`
    """
    close(slopes(name)[::2], -BETA * (torch.sigmoid(-BETA * MARGINS) - smoothing), 1e-15)


def test_dpo_pulls_both_log_probs_of_a_pair_equally_and_bce_does_not():
    """dL/dl_w + dL/dl_l = 0 exactly for DPO; for BCE it is beta (s_w + s_l - 1).
    Red: losses.py:dpo: `chosen_logps - rejected_logps` -> `chosen_logps - 0.9 * rejected_logps`
    Red: losses.py:bco_pair: `- logsigmoid(-rejected)` -> `+ logsigmoid(rejected)`"""
    s = torch.sigmoid(BETA * RATIOS)
    dpo, bce = (slopes(name)[::2] + slopes(name)[1::2] for name in ("dpo", "bco_pair"))
    assert torch.equal(dpo, torch.zeros_like(dpo))
    close(bce, BETA * (s[::2] + s[1::2] - 1), 1e-15)
    assert bce.abs().min() > 1e-3


def test_smoothed_dpo_is_smallest_at_the_logit_of_one_minus_e():
    """z* = logit(1 - e): a pair is pushed apart only so far.
    Red: losses.py:dpo: `-(1 - label_smoothing)` -> `-(1 + label_smoothing)`"""
    margin = minimise(lambda x: losses.dpo(x, ORIGIN, ORIGIN, ORIGIN, 1.0, 0.1).sum(), ORIGIN)
    close(margin, math.log(0.9 / 0.1), 1e-8)


def test_una_pair_is_dpo():
    """UNA Eq. 10 with f = log sigmoid: the same values and gradients.
    Red: losses.py:una_pair: `(rejected_logps, ref_rejected_logps,` -> `(rejected_logps, 0,`"""
    dpo, una = ROWS["dpo"], ROWS["una_pair"]
    close(una(LOGPS, REF, BETA), dpo(LOGPS, REF, BETA), 1e-15)
    for got, expected in zip(slope(lambda l, l0: una(l, l0, BETA), LOGPS, REF),
                             slope(lambda l, l0: dpo(l, l0, BETA), LOGPS, REF), strict=True):
        close(got, expected, 1e-15)


def test_una_equation_10_as_printed_is_linear_and_has_no_minimum():
    """L = -(u_w - u_l) without log sigmoid: L(2D) = 2 L(D), so any negative value doubles.
    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps - ref_logps).tanh()`"""
    def printed(d):
        u = losses.implicit_reward(d, torch.zeros_like(d), BETA)
        return u[1::2] - u[::2]

    close(printed(2 * LOGPS), 2 * printed(LOGPS), 1e-15)
    close(slope(printed, LOGPS), real(*[-BETA, BETA] * 3), 1e-15)


# BCE on both rows: BCO


def test_bco_pair_is_binary_bce_on_both_rows():
    """-log s_w - log(1 - s_l); dL/dl_w = -beta (1 - s_w), dL/dl_l = beta s_l.
    Red: losses.py:bco_pair: `-logsigmoid(chosen)` -> `-2 * logsigmoid(chosen)`
    Red: losses.py:bco_pair: `logsigmoid(-rejected)` -> `logsigmoid(rejected)`"""
    labels = real(*[1, 0] * 3)
    rows = losses.uft_bce(LOGPS, REF, labels, BETA)
    close(ROWS["bco_pair"](LOGPS, REF, BETA), rows[::2] + rows[1::2], 1e-15)
    close(slopes("bco_pair"), BETA * (torch.sigmoid(BETA * RATIOS) - labels), 1e-15)


def test_bco_pair_is_never_below_dpo():
    """(1 + e^-a) (1 + e^b) > 1 + e^(b - a) for every a and b.
    Red: losses.py:bco_pair: `-logsigmoid(chosen)` -> `-0.9 * logsigmoid(chosen)`"""
    d = 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros_like(d)
    assert (ROWS["bco_pair"](d, zero, 1.0) > ROWS["dpo"](d, zero, 1.0)).all()


def test_a_prompt_shift_leaves_the_pair_losses_alone_and_moves_the_others():
    """Adding f(x) to both D of a pair cancels in DPO, UNA-pair and IPO, nowhere else.
    Red: losses.py:ipo: `- (rejected_logps - ref_rejected_logps)` -> `- rejected_logps`
    Red: losses.py:una_pair: `(chosen, rejected)` -> `(chosen, rejected / 2)`"""
    shifted = LOGPS + real(0.7, -1.9, 3.1).repeat_interleave(2)
    for name in ("dpo", "dpo_smoothed", "una_pair", "ipo"):
        close(ROWS[name](shifted, REF, BETA), ROWS[name](LOGPS, REF, BETA), 1e-12)
        close(ROWS[name](shifted, shifted, BETA), ROWS[name](LOGPS, LOGPS, BETA), 1e-12)
    for name in ("uft", "uft_bce", "bco_pair", "kto", "dro"):
        assert (ROWS[name](shifted, REF, BETA) - ROWS[name](LOGPS, REF, BETA)).abs().min() > 1e-3


# IPO


def test_ipo_gradient_vanishes_at_a_margin_of_one_over_two_tau():
    """dL/dl_w = 2 (h - 1 / (2 tau)) = -dL/dl_l, h = D_w - D_l (IPO Eq. 17).
    Red: losses.py:ipo: `(2 * beta)).square()` -> `(3 * beta)).square()`"""
    close(slopes("ipo")[::2], 2 * (MARGINS - 1 / (2 * BETA)), 1e-14)
    assert torch.equal(slopes("ipo")[1::2], -slopes("ipo")[::2])
    target = ORIGIN + 1 / (2 * BETA)
    assert slope(lambda w: losses.ipo(w, ORIGIN, ORIGIN, ORIGIN, BETA), target).item() == 0.0


def test_ipo_spreads_log_ratios_by_the_difference_of_win_rates():
    """Over all pairs: D_i - D_j = (p_i - p_j) / tau, p_i = mean_j P(i beats j), P(i, i) = 1/2.
    Red: losses.py:ipo: `(2 * beta)).square()` -> `beta).square()`"""
    scores = real(0.0, 0.5, -1.0, 2.0, 0.3)
    wins = torch.sigmoid(scores[:, None] - scores + 0.2 * torch.sin(scores[:, None] * scores))
    wins = (wins + 1 - wins.T) / 2
    ref = real(0.3, -0.2, 0.0, 1.0, -1.0).log_softmax(0)

    def objective(logits):
        logps = logits.log_softmax(0)
        return (wins * losses.ipo(logps[:, None], logps, ref[:, None], ref, 0.7)).sum()

    ratios, rates = minimise(objective, ref).log_softmax(0) - ref, wins.mean(1)
    close(ratios[:, None] - ratios, (rates[:, None] - rates) / 0.7, 1e-9)


# Mean log-probs and no reference: ORPO, SimPO


def test_log1mexp_agrees_with_arbitrary_precision_arithmetic():
    """log(1 - e^x), where the naive form has no digit left near 0 or below -37.
    Red: losses.py:log1mexp: `torch.log(-torch.expm1(close))` -> `torch.log(1 - torch.exp(close))`
    Red: losses.py:log1mexp: `torch.log1p(-torch.exp(far))` -> `torch.log(1 - torch.exp(far))`"""
    values = [-1e-300, -1e-10, -1e-3, -0.5, -math.log(2), -0.7, -3.0, -60.0, -700.0]
    with localcontext() as context:
        context.prec = 400
        exact = [float((1 - Decimal(x).exp()).ln()) for x in values]
    close(losses.log1mexp(real(*values)), real(*exact), 0, rtol=1e-15)


def test_log1mexp_has_a_finite_gradient_on_both_sides_of_its_seam():
    """d/dx log(1 - e^x) = -1 / (e^-x - 1), never NaN.
    Red: losses.py:log1mexp: `far = torch.where(near, -math.log(2), x)` -> `far = x + 1e-9`"""
    x = -torch.logspace(-15, 2.8, 200, dtype=torch.float64)
    close(slope(losses.log1mexp, x), -1 / torch.expm1(-x), 0, rtol=1e-14)


def test_orpo_is_the_likelihood_plus_the_weighted_log_odds_ratio():
    """-m_w - weight log sigmoid(log(p_w / (1 - p_w)) - log(p_l / (1 - p_l))) (ORPO Eq. 6, 7).
    Red: losses.py:orpo: `- (rejected - log1mexp(rejected))` -> `- rejected`
    Red: losses.py:orpo: `- weight * logsigmoid` -> `+ weight * logsigmoid`"""
    odds = LOGPS.exp() / (1 - LOGPS.exp())
    ratio = odds[::2] / odds[1::2]
    close(losses.orpo(CHOSEN, REJECTED, 0.1), -CHOSEN - 0.1 * (ratio / (1 + ratio)).log(), 1e-14)


def test_orpo_gradient_grows_with_the_odds_that_remain():
    """dL/dm_w = -1 - weight q / (1 - p_w), dL/dm_l = weight q / (1 - p_l), q = sigmoid(-z).
    Red: losses.py:orpo: `(chosen - log1mexp(chosen))` -> `chosen`
    Red: losses.py:orpo: `return -chosen_mean_logps -` -> `return -`"""
    m = -torch.logspace(-6, math.log10(60), 30, dtype=torch.float64)
    chosen, rejected = (x.flatten() for x in torch.meshgrid(m, m, indexing="ij"))
    left = [-torch.expm1(x) for x in (chosen, rejected)]  # 1 - p
    q = torch.sigmoid(rejected - left[1].log() - chosen + left[0].log())
    up, down = slope(lambda w, l: losses.orpo(w, l, 0.1), chosen, rejected)
    close(up, -1 - 0.1 * q / left[0], 1e-12, rtol=1e-12)
    close(down, 0.1 * q / left[1], 1e-12, rtol=1e-12)


def test_simpo_gradient_is_beta_times_the_error_of_the_margin_less_gamma():
    """dL/dm_w = -beta sigmoid(-z) = -dL/dm_l, z = beta (m_w - m_l) - gamma (SimPO Eq. 6).
    Red: losses.py:simpo: `_logps) - gamma)` -> `_logps) + gamma)`"""
    up, down = slope(lambda w, l: losses.simpo(w, l, BETA, 0.5), CHOSEN, REJECTED)
    close(up, -BETA * torch.sigmoid(0.5 - BETA * (CHOSEN - REJECTED)), 1e-15)
    assert torch.equal(down, -up)


def test_simpo_gamma_is_the_margin_and_not_the_ratio():
    """gamma = beta * ratio: gamma is the loss's own offset, ratio that of the mean log-probs.
    Red: losses.py:simpo: `_logps) - gamma)` -> `_logps) - beta * gamma)`"""
    ratio = 0.8
    expected = -logsigmoid(BETA * (CHOSEN - REJECTED - ratio))
    close(losses.simpo(CHOSEN, REJECTED, BETA, BETA * ratio), expected, 1e-15)
