"""Which losses reach pi*, the policy that RLHF defines?   UFT Eq. 3

    pi* = pi_ref exp(r / beta) / Z     maximises J(pi) = E_pi[r] - beta KL(pi || pi_ref)

Question    Trained with exact expectations on one prompt, where does each loss end?
Prediction  Where Z is not 1 only a loss that cannot feel a constant added to r reaches pi*: pairs
            (DPO), a learned V (DRO), or the reward itself fitted to samples of the policy, where
            E_pi[grad log pi] = 0 removes the constant. A squashed score, foreign data or pi_old
            for pi_ref does not. (Written knowing a table of another bandit: not blind.) RLOO, with
            the KL in its reward, reaches it; GRPO, whose k3 is a loss, goes elsewhere.
Command     python -m lab.optimum
Runtime     4 s on one core
Answer      As predicted: four of fifteen reach pi*, reward MSE on the policy's own samples, RLOO,
            DPO and DRO. Z = .417 costs BCE on-policy a TV of .022, UFT on-policy .073, the same on
            uniform data .27 and .31, IPO .37, reward MSE on data of pi_ref .39; KTO keeps two
            answers (.44), the authors' online loss one, the best (.76). GRPO without its std ends
            where E[r] - beta' KL(pi_ref || pi) is greatest, beta' = beta G / (G - 1) (TV .17); with
            it (.32) r and 10 r end alike. With Z = 1 UFT and BCE reach pi* on uniform data too.
            Sizes and order hold for these constants. All start at pi_ref: from elsewhere UFT on
            uniform data may end in a second minimum (TV .372).

A bandit: one prompt, K = 5 answers, a softmax policy, float64, no sampling. x: the K logits, and
behind them DRO's V. The data are pi itself, all answers alike (uniform) or pi_ref. Where pi gives
the data, and where it is a target, it is held: no gradient goes through it. RLOO and GRPO see every
group of G = 8 answers, weighed by its probability. Conventions: r is any real number; a loss with a
sigmoid is given sigma(r), so that logit(target) = r is one reward for all; preferences are
Bradley-Terry, P(i > j) = sigma(r_i - r_j); gap = J(pi*) - J(pi); offset is r - r_theta, its least
and largest value over the answers with more than 1e-6 of the mass.
"""
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import losses
import policy_gradients

RESULTS = Path(__file__).parent / "results" / "optimum.json"
BETA, K, G = 0.7, 5, 8
REF_LOGPS = torch.tensor((0.05, 0.1, 0.5, 0.3, 0.05), dtype=torch.float64).log()
REWARDS = torch.tensor((0.5, 0.25, -1.0, -1.5, -0.75), dtype=torch.float64)
HIGH = torch.tensor((0.6, 0.7, 0.8, 0.9, 0.95), dtype=torch.float64).logit()  # all r > 1/2
UNIFORM = torch.full((K,), 1 / K, dtype=torch.float64)
Objective = Callable[[Tensor, Tensor], Tensor]  # (x, held), both the same numbers -> a scalar


# The truth


def log_normaliser(rewards: Tensor) -> Tensor:
    """log Z = log sum_y pi_ref(y) exp(r(y) / beta); J(pi*) = beta log Z."""
    return (REF_LOGPS + rewards / BETA).logsumexp(0)


def optimum(rewards: Tensor) -> Tensor:
    """log pi* = log pi_ref + r / beta - log Z, shape (K,)."""
    return REF_LOGPS + rewards / BETA - log_normaliser(rewards)


def utility(logps: Tensor, rewards: Tensor) -> Tensor:
    """J(pi) = E_pi[r - r_theta] = E_pi[r] - beta KL(pi || pi_ref).   UFT Eq. 3"""
    return (logps.exp() * (rewards - losses.implicit_reward(logps, REF_LOGPS, BETA))).sum()


def feasible(rewards: Tensor) -> Tensor:
    """r - beta log Z: the same pi*, but Z = 1, so that r_theta = r can hold for every answer."""
    return rewards - BETA * log_normaliser(rewards)


# The objectives: exact expectations of the functions in losses.py and policy_gradients.py


def policy(x: Tensor) -> Tensor:
    """log pi, (K,), from the first K entries of x."""
    return x[:K].log_softmax(0)


def expected(loss: Callable, targets: Tensor, data: Tensor | None) -> Objective:
    """sum_y data(y) loss(log pi(y), log pi_ref(y), targets(y), beta); data None: the held pi."""
    def objective(x: Tensor, held: Tensor) -> Tensor:
        weights = policy(held).exp() if data is None else data
        return (weights * loss(policy(x), REF_LOGPS, targets, BETA)).sum()

    return objective


def preferences(loss: Callable, rewards: Tensor) -> Objective:
    """mean_ij sigma(r_i - r_j) loss(i chosen, j rejected) over all ordered pairs."""
    i, j = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
    wins, ref = torch.sigmoid(rewards[i] - rewards[j]), (REF_LOGPS[i], REF_LOGPS[j])
    return lambda x, held: (wins * loss(policy(x)[i], policy(x)[j], *ref, BETA)).mean()


def with_value(rewards: Tensor) -> Objective:
    """mean_y (r - V - r_theta)^2 / 2, V = x[K] learned beside pi.   DRO, arXiv 2405.19107"""
    return lambda x, held: losses.dro(policy(x), REF_LOGPS, rewards, x[K], BETA).mean()


def authors_online(x: Tensor, held: Tensor) -> Tensor:
    """E_pi_old (sigma(beta log(pi / pi_old)) - sigma(r))^2: the authors' code anchors to pi_old."""
    old = policy(held)
    return (old.exp() * losses.uft(policy(x), old, torch.sigmoid(REWARDS), BETA)).sum()


def kto_labels(x: Tensor, held: Tensor) -> Tensor:
    """mean_y of KTO, y desirable with probability sigma(r); z0 = KL(pi || pi_ref), held."""
    now, old, good = policy(x), policy(held), torch.sigmoid(REWARDS)
    z0 = (old.exp() * (old - REF_LOGPS)).sum()
    yes = losses.kto(now, REF_LOGPS, torch.ones(K), z0, BETA)
    no = losses.kto(now, REF_LOGPS, torch.zeros(K), z0, BETA)
    return (good * yes + (1 - good) * no).mean()


def over_groups(gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Objective:
    """E[mean over the group of gradient(log pi, log pi_old, log pi_ref, r)] over all groups of G.

    `gradient` takes (P, G) of each and gives (P, G); a group's order does not matter, so that each
    stands for G! / (n_1! ... n_K!) draws.
    """
    groups = torch.tensor(list(itertools.combinations_with_replacement(range(K), G)))  # (P, G)
    counts = torch.nn.functional.one_hot(groups, K).sum(1).double()
    ways = torch.lgamma(counts.sum(1) + 1) - torch.lgamma(counts + 1).sum(1)

    def objective(x: Tensor, held: Tensor) -> Tensor:
        old = policy(held)[groups]
        chance = (ways + old.sum(1)).exp() / G
        each = gradient(policy(x)[groups], old, REF_LOGPS[groups], REWARDS[groups])
        return (chance[:, None] * each).sum()

    return objective


def rloo(now: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    """KL in the reward, r - beta k1."""
    earned = rewards - BETA * policy_gradients.kl(old, ref, "k1")
    return policy_gradients.rloo(now, old, policy_gradients.rloo_advantages(earned), 0.2)


def grpo(scale: str) -> Callable:
    """KL in the loss, beta k3; a response is one token. Its std is of "group", or "none"."""
    def gradient(now: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        advantages = policy_gradients.grpo_advantages(rewards, scale)
        tokens = (x[..., None] for x in (now, old, ref, advantages))
        return policy_gradients.grpo(*tokens, 0.2, BETA, 1.0)

    return gradient


def examined() -> Iterator[tuple[str, str, Tensor, Objective]]:
    """(name, what it is given, the rewards that define its pi*, objective), best expected first."""
    ref, score, shifted = REF_LOGPS.exp(), torch.sigmoid(REWARDS), feasible(REWARDS)
    given = torch.sigmoid(shifted)
    yield "reward MSE, on-policy", "r", REWARDS, expected(losses.una_reward, REWARDS, None)
    yield "RLOO, on-policy", "r - beta k1", REWARDS, over_groups(rloo)
    yield "DPO", "P(i > j)", REWARDS, preferences(losses.dpo, REWARDS)
    yield "DRO with V, uniform", "r", REWARDS, with_value(REWARDS)
    yield "BCE, on-policy", "sigma(r)", REWARDS, expected(losses.uft_bce, score, None)
    yield "UFT, on-policy", "sigma(r)", REWARDS, expected(losses.uft, score, None)
    yield "GRPO without std", "r", REWARDS, over_groups(grpo("none"))
    yield "BCE, uniform", "sigma(r)", REWARDS, expected(losses.uft_bce, score, UNIFORM)
    yield "reward MSE, uniform", "r", REWARDS, expected(losses.una_reward, REWARDS, UNIFORM)
    yield "UFT, uniform", "sigma(r)", REWARDS, expected(losses.uft, score, UNIFORM)
    yield "GRPO", "r", REWARDS, over_groups(grpo("group"))
    yield "IPO, tau = beta", "P(i > j)", REWARDS, preferences(losses.ipo, REWARDS)
    yield "reward MSE, pi_ref", "r", REWARDS, expected(losses.una_reward, REWARDS, ref)
    yield "KTO, z0 = KL, uniform", "sigma(r)", REWARDS, kto_labels
    yield "authors' online loss", "sigma(r)", REWARDS, authors_online
    yield "UFT, uniform, Z = 1", "sigma(r')", shifted, expected(losses.uft, given, UNIFORM)
    yield "BCE, uniform, Z = 1", "sigma(r')", shifted, expected(losses.uft_bce, given, UNIFORM)
    yield "UFT, uniform, all > 1/2", ".6 to .95", HIGH, expected(
        losses.uft, torch.sigmoid(HIGH), UNIFORM)


# Where training ends


def slope(objective: Objective, x: Tensor) -> Tensor:
    """dL/dx with `held` constant, differentiable in x once more: there `held` moves along."""
    moving = x.clone()
    return torch.autograd.grad(objective(moving, x), moving, create_graph=True)[0]


def curvature(objective: Objective, x: Tensor) -> Tensor:
    """The matrix d slope / dx, symmetric only where nothing is held."""
    return torch.autograd.functional.jacobian(lambda y: slope(objective, y), x)


def settle(objective: Objective, start: Tensor) -> Tensor:
    """The end of the flow dx/dt = -slope(x) from `start`: implicit Euler steps that grow by 1.05.

    Small steps follow the flow; the large ones at the end are Newton's and double the digits. What
    is held moves with x: the data are always fresh, and pi_old is always the policy of just now
    (measured: four inner steps per pi_old, or a whole inner minimisation, end at the same answer).
    """
    x, step = start, 0.5
    while (gradient := slope(objective, x.requires_grad_())).norm() > 1e-13 and step < 1e12:
        system = torch.eye(len(x)).to(x) / step + curvature(objective, x)
        x, step = (x - torch.linalg.solve(system, gradient)).detach(), 1.05 * step
    return x.detach()


def row(name: str, given: str, rewards: Tensor, objective: Objective) -> dict:
    """One line of the table: the policy that `objective` ends at, compared with pi*."""
    start = torch.cat((REF_LOGPS, torch.zeros(1).to(REF_LOGPS)))  # V = 0; only DRO reads it
    x = settle(objective, start)
    logps, best = policy(x), optimum(rewards)
    offset = (rewards - losses.implicit_reward(logps, REF_LOGPS, BETA))[logps.exp() > 1e-6]
    tv = 0.5 * (logps.exp() - best.exp()).abs().sum().item()
    return {"name": name, "given": given, "tv": tv, "reaches": tv <= 1e-6,
            "gap": (utility(best, rewards) - utility(logps, rewards)).item(),
            "offset": [offset.min().item(), offset.max().item()],
            "loss": objective(x, x).item(), "policy": logps.exp().tolist(),
            "grad_norm": slope(objective, x.requires_grad_()).norm().item()}


def table() -> list[dict]:
    """One row per objective of `examined`: name, given, tv, gap, offset, loss, policy, ..."""
    return [row(*one) for one in examined()]


def main() -> None:
    rows, log_z = table(), log_normaliser(REWARDS).item()
    constants = {"beta": BETA, "pi_ref": REF_LOGPS.exp().tolist(), "rewards": REWARDS.tolist(),
                 "optimum": optimum(REWARDS).exp().tolist(), "Z": torch.tensor(log_z).exp().item(),
                 "best_utility": BETA * log_z}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"constants": constants, "rows": rows}, indent=1) + "\n")
    print(f"Z {constants['Z']:.3f}   J* = beta log Z = {BETA * log_z:.4f}   beta {BETA}")
    print(f"{'loss':24} {'given':11} {'TV':>7} {'J* - J':>8} {'r - r_theta':>16}  verdict")
    for one in rows:
        print(f"{one['name']:24} {one['given']:11} {one['tv']:7.4f} {one['gap']:z8.4f} "
              f"{one['offset'][0]:+z7.3f}..{one['offset'][1]:+z7.3f}  "
              f"{'reaches pi*' if one['reaches'] else 'does not'}")


if __name__ == "__main__":
    main()
