"""Properties of losses.py and of the schedule: closed forms in plain floats, symmetries, limits."""
import math

import torch
from calculus import ROWS, real, slope
from hypothesis import assume, given
from hypothesis import strategies as st

import losses
import train
from config import Config

logps = st.floats(-300, -1e-3)
ratios = st.floats(-200, 200)
parts = st.floats(0, 1)
betas = st.floats(1e-3, 2)
smooth = st.floats(0, 0.49)
six = st.lists(st.floats(-1e4, -2**-7, width=32), min_size=6, max_size=6)
PAIRED = (losses.dpo, losses.ipo, losses.una_pair, losses.bco_pair)
NEUTRAL = ("uft", "uft_bce", "dpo", "dpo_smoothed", "ipo", "una_pair", "bco_pair", "kto")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """-log sigmoid(-x), without overflow."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def near(tensor, number: float, share: float = 1e-12) -> bool:
    return math.isclose(tensor.item(), number, rel_tol=share, abs_tol=share)


@given(logps, ratios, parts, betas)
def test_the_losses_of_rows_are_their_formulas_in_plain_floats(l0, d, r, beta):
    """(s - r)^2 and -r log s - (1 - r) log(1 - s), s = sigmoid(beta D).
    Red: losses.py:uft: `- rewards` -> `+ rewards`
    Red: losses.py:uft_bce: `(1 - rewards) * logsigmoid(-u)` -> `(1 - rewards) * logsigmoid(u)`"""
    given_ = real(l0 + d), real(l0), real(r)
    u = beta * ((l0 + d) - l0)
    assert near(losses.uft(*given_, beta), (sigmoid(u) - r)**2)
    assert near(losses.uft_bce(*given_, beta), r * softplus(-u) + (1 - r) * softplus(u))


@given(ratios, ratios, betas, smooth)
def test_the_losses_of_pairs_are_their_formulas_in_plain_floats(w, l, beta, e):
    """With the references at 0, z = beta (w - l).
    Red: losses.py:dpo: `label_smoothing * logsigmoid(-z)` -> `label_smoothing * logsigmoid(z)`
    Red: losses.py:ipo: `1 / (2 * beta)).square()` -> `1 / beta).square()`
    Red: losses.py:bco_pair: `logsigmoid(-rejected)` -> `logsigmoid(rejected)`
    Red: losses.py:simpo: `logps) - gamma)` -> `logps) + gamma)`"""
    z, zero, pair = beta * (w - l), real(0), (real(w), real(l))
    refs = zero, zero, beta
    assert near(losses.dpo(*pair, *refs, e), (1 - e) * softplus(-z) + e * softplus(z))
    assert near(losses.ipo(*pair, *refs), (w - l - 1 / (2 * beta))**2)
    assert near(losses.bco_pair(*pair, *refs), softplus(-beta * w) + softplus(beta * l))
    assert near(losses.simpo(*pair, beta, e), softplus(e - z))
    assert near(losses.reward_model(*pair), softplus(l - w))


@given(ratios, st.booleans(), st.floats(0, 50), betas, st.floats(0, 3), st.floats(0, 3))
def test_kto_is_its_formula_and_stays_between_0_and_its_weight(d, label, z0, beta, good, bad):
    """w (1 - sigmoid(+-(beta D - beta z0))).
    Red: losses.py:kto: `- beta * z0` -> `- z0`
    Red: losses.py:kto: `undesirable_weight * (1` -> `desirable_weight * (1`"""
    loss = losses.kto(real(d), real(0), torch.tensor([label]), real(z0)[0], beta, good, bad)
    u, weight = beta * (d - z0), good if label else bad
    assert near(loss, weight * sigmoid(-u if label else u)) and 0 <= loss.item() <= weight


@given(st.floats(-30, -1e-3), st.floats(-30, -1e-3), st.floats(0, 2))
def test_orpo_is_its_formula_in_plain_floats(w, l, weight):
    """-m_w - weight log sigmoid of the log odds ratio.
    Red: losses.py:orpo: `(rejected - log1mexp(rejected))` -> `rejected`
    Red: losses.py:orpo: `weight * logsigmoid` -> `logsigmoid`"""
    odds = [m - math.log(-math.expm1(m)) for m in (w, l)]
    loss = losses.orpo(real(w), real(l), weight)
    assert near(loss, -w + weight * softplus(odds[1] - odds[0]), 1e-11)


@given(ratios, ratios, parts, st.floats(-9, 9), betas)
def test_dro_is_its_formula_and_is_blind_to_its_sign(d, l0, r, value, beta):
    """(r - V - u)^2 / 2 is the same for the opposite of all three.
    Red: losses.py:dro: `rewards - values` -> `rewards + values`"""
    def loss(sign):
        return losses.dro(sign * real(d), real(0), sign * real(r), sign * real(value), beta)

    assert near(loss(1), (r - value - beta * d)**2 / 2) and loss(1) == loss(-1)


@given(st.floats(-700, -1e-300))
def test_log1mexp_is_log_of_1_minus_exp_everywhere_below_0(x):
    """To a relative 1e-13, with a finite gradient 1 - 1 / (1 - e^x).
    Red: losses.py:log1mexp: `torch.where(near, torch.log` -> `torch.where(~near, torch.log`"""
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert math.isclose(losses.log1mexp(real(x)).item(), exact, rel_tol=1e-13)
    steep = slope(losses.log1mexp, real(x)).item()
    assert math.isclose(steep, 1 / math.expm1(-x) * -1, rel_tol=1e-12) or x < -690


@given(logps, ratios, parts, betas)
def test_uft_pulls_the_reward_to_the_feedback_and_never_past_4_27_of_2_beta(l0, d, r, beta):
    """dL/dl has the sign of s - r, |dL/dl| <= beta / 2, and 0 <= L <= 1.
    Red: losses.py:uft: `.square()` -> `.pow(3)`"""
    loss, pull = (f.item() for f in (
        losses.uft(real(l0 + d), real(l0), real(r), beta),
        slope(lambda l: losses.uft(l, real(l0), real(r), beta), real(l0 + d))))
    gap = sigmoid(beta * ((l0 + d) - l0)) - r
    assert 0 <= loss <= 1 and abs(pull) <= beta / 2 * 1.000001
    assert pull * gap >= 0


@given(six, st.floats(-50, 50), betas)
def test_only_the_ratio_to_the_reference_counts(values, shift, beta):
    """Adding one number to logps and ref_logps changes no loss that has a reference.
    Red: losses.py:implicit_reward: `logps - ref_logps` -> `logps - 0.9 * ref_logps`
    Red: losses.py:ipo: `rejected_logps - ref_rejected_logps` -> `rejected_logps`"""
    one = real(*values) / 50
    two = one.flip(0)
    for name in NEUTRAL:
        torch.testing.assert_close(ROWS[name](one + shift, two + shift, beta),
                                   ROWS[name](one, two, beta), rtol=1e-9, atol=1e-9)


@given(six, six, betas, st.permutations(range(3)))
def test_no_row_or_pair_looks_at_another(one, two, beta, places):
    """The losses of rows in another order are the same losses in that order.
    Red: losses.py:uft: `return (torch` -> `return 0 * logps.mean() + (torch`
    Red: losses.py:simpo: `- rejected_mean_logps)` -> `- rejected_mean_logps.flip(0))`"""
    l, l0, p = real(*one), real(*two), torch.tensor(places)
    rewards = real(0.1, 0.5, 0.9)
    for loss in (losses.uft, losses.uft_bce):
        given_ = l[:3], l0[:3], rewards
        whole, alone = loss(*given_, beta), [loss(*(x[[i]] for x in given_), beta) for i in places]
        assert torch.equal(whole[p], torch.cat(alone))
    pairs = l[:3], l[3:], l0[:3], l0[3:]
    for loss in PAIRED:
        assert torch.equal(loss(*pairs, beta)[p], loss(*(x[p] for x in pairs), beta))
    means = losses.simpo(l[:3], l[3:], beta, 0.5), losses.simpo(l[:3][p], l[3:][p], beta, 0.5)
    assert torch.equal(means[0][p], means[1])


@given(ratios, ratios, ratios, ratios, betas)
def test_turning_a_pair_round_turns_its_loss_round(w, l, rw, rl, beta):
    """L(w, l) - L(l, w) = -z for DPO and UNA; IPO's two sum to 2 (h^2 + 1 / (4 beta^2)).
    Red: losses.py:dpo: `(ref_chosen_logps - ref_rejected_logps)` -> `ref_chosen_logps`
    Red: losses.py:reward_model: `-logsigmoid(chosen - rejected)` -> `-logsigmoid(chosen)`"""
    h = (w - l) - (rw - rl)
    one = (real(w), real(l), real(rw), real(rl))
    two = (one[1], one[0], one[3], one[2])
    for loss in (losses.dpo, losses.una_pair):
        assert near(loss(*one, beta) - loss(*two, beta), -beta * h, 1e-9)
    both = losses.ipo(*one, beta) + losses.ipo(*two, beta)
    assert near(both, 2 * (h * h + 1 / (2 * beta)**2), 1e-9)


@given(ratios, ratios, ratios, ratios, betas)
def test_una_pair_is_dpo_and_bco_never_falls_below_it(w, l, rw, rl, beta):
    """-log s_w - log(1 - s_l) >= -log sigmoid(u_w - u_l).
    Red: losses.py:una_pair: `(rejected_logps, ref_rejected_logps` -> `(rejected_logps, 0`
    Red: losses.py:bco_pair: `-logsigmoid(chosen) -` -> `-logsigmoid(chosen + 9) -`"""
    rows = (real(w), real(l), real(rw), real(rl), beta)
    dpo, una, bco = (loss(*rows).item() for loss in (losses.dpo, losses.una_pair, losses.bco_pair))
    assert math.isclose(una, dpo, rel_tol=1e-9, abs_tol=1e-9) and bco >= dpo - 1e-9


@given(ratios, ratios, betas, smooth)
def test_smoothing_by_e_is_a_mixture_of_the_pair_and_its_reverse(w, l, beta, e):
    """L_e = (1 - e) L(w, l) + e L(l, w); DPO is never below its entropy.
    Red: losses.py:dpo: `-(1 - label_smoothing) *` -> `-1 *`"""
    zero = real(0)
    one, two = (losses.dpo(a, b, zero, zero, beta) for a, b in (
        (real(w), real(l)), (real(l), real(w))))
    loss = losses.dpo(real(w), real(l), zero, zero, beta, e)
    assert near(loss, ((1 - e) * one + e * two).item())
    entropy = -sum(p * math.log(p) for p in (e, 1 - e) if p)
    assert loss.item() >= entropy - 1e-12


@given(six, six, st.sampled_from((1e-3, 0.1, 1.0)))
def test_every_loss_and_gradient_is_finite_for_logps_down_to_minus_1e4_in_float32(one, two, beta):
    """Also where a sigmoid is 0 or 1 to rounding. SFT and DRO have no limit but float32's.
    Red: losses.py:uft_bce: `logsigmoid(u)` -> `torch.log(torch.sigmoid(u))`
    Red: losses.py:reward_model: `logsigmoid(chosen - rejected)` -> `(chosen - rejected).exp()`
    """
    l, l0 = torch.tensor(one), torch.tensor(two)
    for name, loss in ROWS.items():
        value, grad = loss(l, l0, beta), slope(lambda x, f=loss: f(x, l0, beta), l)
        assert value.dtype == torch.float32 and value.isfinite().all(), name
        assert grad.isfinite().all(), name


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.integers(0, 99))
def test_z0_is_the_mean_log_ratio_cut_at_0_and_teaches_nothing(ratio, shift):
    """Red: losses.py:kto_z0: `.clamp(min=0)` -> `.abs()`
    Red: losses.py:kto_z0: `.detach()` -> ``"""
    l = (real(*ratio) + shift).requires_grad_()
    z0 = losses.kto_z0(l, torch.full_like(l, shift))
    assert near(z0, max(0, sum(ratio) / len(ratio)), 1e-9) and not z0.requires_grad


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any), st.integers(1, 4))
def test_a_token_mean_in_parts_is_the_token_mean(lengths, size):
    """However the rows are cut, given the step's tokens_per_row.
    Red: losses.py:sft_token_mean: `.sum(-1) / tokens_per_row` -> `.mean(-1)`"""
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    values = -torch.arange(1.0, 4 * len(lengths) + 1).view(-1, 4).double()
    whole = losses.sft_token_mean(values, mask)
    cut = [losses.sft_token_mean(v, m, sum(lengths) / len(lengths))
           for v, m in zip(values.split(size), mask.split(size), strict=True)]
    assert near(whole.mean(), -values[mask].mean().item()) and torch.equal(torch.cat(cut), whole)


@given(st.floats(-9, -0.01), st.floats(-9, -0.01), st.floats(0.01, 1), betas)
def test_a_better_chosen_answer_never_costs_more(w, l, more, beta):
    """DPO, UNA, BCO, SimPO, ORPO and the reward model all fall as log pi(chosen) rises.
    Red: losses.py:simpo: `beta * (chosen_mean_logps -` -> `-beta * (chosen_mean_logps -`
    Red: losses.py:orpo: `return -chosen_mean_logps -` -> `return chosen_mean_logps -`"""
    assume(w + more < -1e-3)
    zero = real(0)
    found = [[loss(real(chosen), real(l)).item() for loss in (
        losses.reward_model, lambda a, b: losses.simpo(a, b, beta, 0.5),
        lambda a, b: losses.orpo(a, b, beta), lambda a, b: losses.dpo(a, b, zero, zero, beta),
        lambda a, b: losses.bco_pair(a, b, zero, zero, beta))] for chosen in (w, w + more)]
    assert all(after < before for before, after in zip(*found, strict=True))


spans = st.tuples(st.integers(1, 300), st.floats(0, 1), st.floats(1e-6, 1))


@given(spans, st.integers(0, 300))
def test_the_learning_rate_stays_between_0_and_its_peak(span, step):
    """Above 0 before the last step, for every number of steps and share of warm-up.
    Red: train.py:learning_rate: `max(1, round(config.warmup * steps))` -> `round(config.warmup)`
    Red: train.py:learning_rate: `(step + 1) / ramp` -> `(step + 2) / ramp`"""
    steps, warmup, lr = span
    setup = Config("m", ("d",), lr=lr, warmup=warmup)
    assume(step < steps)
    assert 0 < train.learning_rate(step, steps, setup) <= lr * (1 + 1e-12)


@given(spans)
def test_the_learning_rate_climbs_once_and_falls_once(span):
    """It reaches lr at the end of its warm-up and never climbs again.
    Red: train.py:learning_rate: `math.pi * (step - ramp)` -> `2 * math.pi * (step - ramp)`
    Red: train.py:learning_rate: `if step < ramp` -> `if step < ramp - 1`"""
    steps, warmup, lr = span
    setup = Config("m", ("d",), lr=lr, warmup=warmup)
    rates = [round(train.learning_rate(s, steps, setup) / lr, 12) for s in range(steps)]
    peak = max(1, round(warmup * steps)) - 1
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak] == 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
