"""Theorems about what each loss converges to, on the five-armed bandit of lab/optimum.py.

Exact sums in float64. u = r_theta, s = sigmoid(u), pi* = pi_ref exp(r / beta) / Z.
"""
import json

import pytest
import torch
from calculus import close, real

import losses
from lab import optimum
from lab.optimum import BETA, HIGH, REF_LOGPS, REWARDS, UNIFORM, K, expected, policy

SCORES = torch.sigmoid(REWARDS)
LOGITS = real(0.3, -0.2, 0.0, 1.0, -1.0)  # a policy that is neither pi_ref nor pi*
BEST = optimum.optimum(REWARDS)
V = BETA * optimum.log_normaliser(REWARDS)
ZEROS = ("reward MSE, on-policy", "DPO", "DRO with V, uniform")
CONTROLS = ("UFT, uniform, Z = 1", "BCE, uniform, Z = 1")


@pytest.fixture(scope="module")
def rows():
    """{name: row} of a fresh table."""
    return {row["name"]: row for row in optimum.table()}


def at(objective, x):
    """dL/dx of an objective, held quantities fixed."""
    return optimum.slope(objective, x.clone().requires_grad_())


def uphill(value, x):
    """d value(log pi) / dx, nothing held."""
    return torch.autograd.functional.jacobian(lambda y: value(policy(y)), x)


# The truth


def test_the_optimum_is_worth_beta_log_z_and_any_policy_beta_kl_less():
    """J(pi*) = beta log Z; J* - J(pi) = beta KL(pi || pi*).
    Red: lab/optimum.py:log_normaliser: `rewards / BETA` -> `rewards`
    Red: lab/optimum.py:utility: `(rewards - losses` -> `(rewards - 0.9 * losses`"""
    z = (REF_LOGPS.exp() * (REWARDS / BETA).exp()).sum()
    close(optimum.utility(BEST, REWARDS), BETA * z.log(), 1e-12)
    assert z < 0.5
    for x in (LOGITS, REF_LOGPS, 10 * LOGITS):
        kl = (policy(x).exp() * (policy(x) - BEST)).sum()
        close(V - optimum.utility(policy(x), REWARDS), BETA * kl, 1e-12)


def test_the_implicit_reward_of_the_optimum_is_the_reward_less_beta_log_z():
    """r_theta = r - beta log Z at pi*: UNA's f = c = 0 holds where Z = 1 and nowhere else.
    Red: lab/optimum.py:optimum: `rewards / BETA -` -> `rewards -`
    Red: lab/optimum.py:feasible: `- BETA *` -> `- 0.9 *`
    Red: losses.py:implicit_reward: `return beta *` -> `return 2 * beta *`"""
    close(losses.implicit_reward(BEST, REF_LOGPS, BETA), REWARDS - V, 1e-12)
    close(optimum.log_normaliser(optimum.feasible(REWARDS)), 0.0, 1e-12)
    close(optimum.optimum(optimum.feasible(REWARDS)), BEST, 1e-12)


# Which gradients vanish at pi*


def test_reward_mse_on_policy_is_minus_two_beta_the_gradient_of_the_utility():
    """sum_y pi(y) d(u - r)^2 = -2 beta dJ with pi held: REINFORCE on UFT Eq. 3; pi* for any Z.
    Red: losses.py:una_reward: `.square()` -> `.square() / 2`
    Red: lab/optimum.py:expected: `policy(held).exp()` -> `policy(x).exp()`"""
    objective = expected(losses.una_reward, REWARDS, None)
    rising = uphill(lambda logps: optimum.utility(logps, REWARDS), LOGITS)
    close(at(objective, LOGITS), -2 * BETA * rising, 1e-12)
    close(at(objective, BEST), 0.0, 1e-12)


def test_reward_mse_off_policy_leaves_the_optimum_unless_v_is_subtracted():
    """Uniform data at pi*: the slope is not 0; with r - V, V = beta log Z (DRO), it is.
    Red: lab/optimum.py:expected: `if data is None else data` -> `if True else data`
    Red: losses.py:dro: `(rewards - values -` -> `(rewards -`"""
    assert at(expected(losses.una_reward, REWARDS, UNIFORM), BEST).norm() > 0.1
    close(at(expected(losses.una_reward, REWARDS - V, UNIFORM), BEST), 0.0, 1e-12)
    close(at(optimum.with_value(REWARDS), torch.cat((BEST, V[None]))), 0.0, 1e-12)


def test_uft_on_policy_starts_as_reinforce_with_the_score():
    """At pi = pi_ref: dL = -(beta / 2) d E_pi[sigma(r)], whatever Z is.
    Red: losses.py:uft: `).square()` -> `).square() / 2`
    Red: lab/optimum.py:expected: `targets, BETA)` -> `targets, 2 * BETA)`"""
    rising = uphill(lambda logps: (logps.exp() * SCORES).sum(), REF_LOGPS)
    close(at(expected(losses.uft, SCORES, None), REF_LOGPS), -BETA / 2 * rising, 1e-12)


def test_the_authors_online_loss_never_sees_the_reference(monkeypatch):
    """Where pi = pi_old: dL/dl = (beta / 2) (1/2 - sigma(r)), equal under any other pi_ref.
    Red: lab/optimum.py:authors_online: `(policy(x), old,` -> `(policy(x), REF_LOGPS,`"""
    got, regular = (at(f, LOGITS) for f in (optimum.authors_online,
                                            expected(losses.uft, SCORES, None)))
    weights = policy(LOGITS).exp() * BETA / 2 * (0.5 - SCORES)
    close(got, weights - policy(LOGITS).exp() * weights.sum(), 1e-12)
    monkeypatch.setattr(optimum, "REF_LOGPS", LOGITS.flip(0).log_softmax(0))
    assert torch.equal(at(optimum.authors_online, LOGITS), got)
    assert (at(expected(losses.uft, SCORES, None), LOGITS) - regular).norm() > 0.01


def test_population_preferences_are_met_by_the_optimum_and_by_the_rewards():
    """DPO's slope is 0 at pi*, the reward model's at r plus any constant (UFT Eq. 2).
    Red: lab/optimum.py:preferences: `rewards[i] - rewards[j]` -> `2 * rewards[i] - rewards[j]`
    Red: losses.py:reward_model: `(chosen - rejected)` -> `(2 * chosen - rejected)`"""
    def reward_model(chosen, rejected, ref_chosen, ref_rejected, beta):
        return losses.reward_model(beta * chosen, beta * rejected)

    close(at(optimum.preferences(losses.dpo, REWARDS), BEST), 0.0, 1e-12)
    model = optimum.preferences(reward_model, REWARDS)
    close(at(model, (REWARDS + 3) / BETA), 0.0, 1e-12)


def test_ipo_meets_the_win_rates_and_not_the_rewards(rows):
    """At the end D_i - D_j = (p_i - p_j) / tau, p_i = mean_j P(i > j).
    Red: losses.py:ipo: `1 / (2 * beta)` -> `1 / beta`
    Red: lab/optimum.py:preferences: `torch.sigmoid(rewards[i]` -> `torch.relu(rewards[i]`"""
    ratio = real(*rows["IPO, tau = beta"]["policy"]).log() - REF_LOGPS
    rate = torch.sigmoid(REWARDS[:, None] - REWARDS).mean(1)
    close(ratio - ratio[0], (rate - rate[0]) / BETA, 1e-9)


# Scores can be met by a policy only if they add up


def test_scores_can_be_met_only_if_they_add_up_to_one():
    """sigma(r_theta) = r for all y needs sum_y pi_ref (r / (1 - r))^(1 / beta) = 1, that is Z = 1.
    Red: lab/optimum.py:feasible: `rewards - BETA` -> `rewards + BETA`"""
    met = torch.sigmoid(optimum.feasible(REWARDS))
    answer = REF_LOGPS.exp() * (met / (1 - met)).pow(1 / BETA)
    close(answer.sum(), 1.0, 1e-12)
    close(answer, BEST.exp(), 1e-12)
    close(torch.sigmoid(losses.implicit_reward(answer.log(), REF_LOGPS, BETA)), met, 1e-12)
    assert (REF_LOGPS.exp() * (SCORES / (1 - SCORES)).pow(1 / BETA)).sum() < 0.5


@pytest.mark.parametrize("name", CONTROLS)
def test_uft_and_bce_reach_the_optimum_where_z_is_one(rows, name):
    """Foreign data and a squashed score do no harm then; r_theta = r, no offset.
    Red: lab/optimum.py:examined: `given = torch.sigmoid(shifted)` -> `given = score`"""
    assert rows[name]["tv"] <= 1e-8
    close(real(*rows[name]["offset"]), 0.0, 1e-8)


def test_scores_all_above_one_half_leave_a_floor(rows):
    """sum_y pi_ref (r / (1 - r))^(1 / beta) > 1: some s < r. The least (1/K) sum (s - r)^2 is .077.
    Red: lab/optimum.py:examined: `torch.sigmoid(HIGH), UNI` -> `torch.sigmoid(REWARDS), UNI`"""
    floor = rows["UFT, uniform, all > 1/2"]["loss"]
    assert optimum.log_normaliser(HIGH).exp() > 1 and 0.07 < floor < 0.08
    objective = expected(losses.uft, torch.sigmoid(HIGH), UNIFORM)
    tries = 5 * torch.randn(2000, K, generator=torch.Generator().manual_seed(0)).double()
    assert min(objective(x, x).item() for x in tries) > floor


# Where training ends


@pytest.mark.parametrize("name", ZEROS)
def test_these_losses_reach_the_optimum_although_z_is_not_one(rows, name):
    """TV = 0 and r - r_theta = beta log Z for every answer.
    Red: losses.py:dpo: `z = beta * margin` -> `z = 2 * beta * margin`
    Red: lab/optimum.py:with_value: `rewards, x[K]` -> `rewards, 0 * x[K]`
    Red: lab/optimum.py:expected: `policy(held).exp()` -> `UNIFORM`"""
    assert rows[name]["tv"] <= 1e-9 and rows[name]["reaches"]
    close(real(*rows[name]["offset"]), V, 1e-9)


def test_the_other_losses_miss_it_in_this_order(rows):
    """0 < BCE < UFT on-policy < uniform data < IPO < data of pi_ref < KTO < the authors' code.
    Red: lab/optimum.py:examined: `losses.una_reward, REWARDS, ref` -> `losses.una_reward, REWARDS, UNIFORM`
    Red: lab/optimum.py:examined: `losses.uft_bce, score, None` -> `losses.uft_bce, score, UNIFORM`
    Red: lab/optimum.py:kto_labels: `good * yes + (1 - good) * no` -> `yes`"""
    tv = {name: row["tv"] for name, row in rows.items()}
    uniform = [tv[f"{loss}, uniform"] for loss in ("BCE", "reward MSE", "UFT")]
    order = [0, tv["BCE, on-policy"], tv["UFT, on-policy"], min(uniform), max(uniform),
             tv["IPO, tau = beta"], tv["reward MSE, pi_ref"], tv["KTO, z0 = KL, uniform"],
             tv["authors' online loss"]]
    assert (real(*order).diff() > 0.015).all()


def test_kto_keeps_the_answers_that_are_good_more_often_than_not(rows):
    """sigma(r) > 1/2 for two of the five answers; the others' mass goes to 0.
    Red: losses.py:kto: `torch.sigmoid(-advantage)` -> `torch.sigmoid(advantage)`"""
    kept = real(*rows["KTO, z0 = KL, uniform"]["policy"]) > 1e-9
    assert torch.equal(kept, REWARDS > 0) and kept.sum() == 2


def test_the_authors_online_loss_collapses_to_the_best_answer(rows):
    """All mass on argmax r: TV = 1 - max-reward answer's pi*, J* - J = -beta log of the same.
    Red: lab/optimum.py:authors_online: `torch.sigmoid(REWARDS)` -> `torch.sigmoid(-REWARDS)`"""
    row, best = rows["authors' online loss"], REWARDS.argmax()
    close(real(row["policy"][best], row["tv"]), real(1, 1 - BEST[best].exp()), 1e-9)
    close(real(row["gap"]), -BETA * BEST[best], 1e-9)


def test_every_end_is_one_that_the_flow_cannot_leave(rows):
    """|slope| <= 1e-10 and no eigenvalue of d slope / dx is below 0 (rounding aside).
    Red: lab/optimum.py:settle: `> 1e-13` -> `> 1e-3`
    Red: lab/optimum.py:settle: `- torch.linalg.solve` -> `+ torch.linalg.solve`"""
    assert max(row["grad_norm"] for row in rows.values()) <= 1e-10
    for name, _, _, objective in optimum.examined():
        end = torch.cat((real(*rows[name]["policy"]).clamp(1e-30).log(), V[None]))
        assert torch.linalg.eigvals(optimum.curvature(objective, end)).real.min() > -1e-9, name


@pytest.mark.parametrize("name", ("UFT, on-policy", "UFT, uniform", "BCE, uniform"))
def test_plain_gradient_descent_from_the_reference_ends_there_too(rows, name):
    """x <- x - 20 dL/dx, 2000 times.
    Red: lab/optimum.py:settle: `> 1e-13` -> `> 1e-3`"""
    objective, x = next(one[3] for one in optimum.examined() if one[0] == name), REF_LOGPS
    for _ in range(2000):
        x = x - 20 * at(objective, x).detach()
    close(policy(x).exp(), real(*rows[name]["policy"]), 1e-9)


def test_uft_on_foreign_data_has_two_minima_and_the_start_chooses():
    """Near the answer with the greatest reward there is another end, TV .372 instead of .313.
    Red: lab/optimum.py:examined: `losses.uft, score, UN` -> `losses.uft_bce, score, UN`"""
    objective = {one[0]: one[3] for one in optimum.examined()}["UFT, uniform"]
    other = real(0.62, 0.17, 0.15, 0.04, 0.02).log()
    ends = [optimum.settle(objective, x) for x in (REF_LOGPS, other)]
    tv = [(policy(x).exp() - BEST.exp()).abs().sum() / 2 for x in ends]
    close(torch.stack(tv), real(0.3133, 0.3721), 1e-3)
    for x in ends:
        eigenvalues = torch.linalg.eigvalsh(optimum.curvature(objective, x))
        assert eigenvalues[0].abs() < 1e-12 and eigenvalues[1] > 1e-3  # a constant added to x


def test_the_committed_results_are_those_of_the_code(rows):
    """lab/results/optimum.json, to 1e-6.
    Red: lab/optimum.py: `BETA, K = 0.7, 5` -> `BETA, K = 0.70001, 5`"""
    saved = json.loads(optimum.RESULTS.read_text("utf-8"))
    assert saved["constants"]["rewards"] == REWARDS.tolist()
    assert saved["constants"]["beta"] == BETA and [r["name"] for r in saved["rows"]] == list(rows)
    for old, new in zip(saved["rows"], rows.values(), strict=True):
        assert old.keys() == new.keys() and old["given"] == new["given"]
        for key in ("tv", "gap", "offset", "loss", "policy", "grad_norm"):
            close(torch.tensor(new[key]), torch.tensor(old[key]), 1e-6)
