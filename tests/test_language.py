"""Where the gradients of the on-policy losses point, for a model whose responses are all known.

lab/language.py: 121 responses to a prompt, float64, adapters off the reference. Every expectation
is a sum over all responses, or over all pairs of them, each weighed by its probability, held;
gradients are those of the adapters. D = log pi(y|x) - log pi_ref(y|x), d_t its part at token t.
"""
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from calculus import close

import generate
import heads
import lora
import objectives
import policy_gradients
import rollouts
from config import Config
from lab import language
from tokens import Sampled

BETA = 0.2
N = 121
PAIRS = torch.cartesian_prod(torch.arange(N), torch.arange(N))  # every group of two responses


@pytest.fixture(scope="module", params=[(0, 1.0), (1, 0.7)], ids=["warm", "cool"])
def world(request):
    """A policy, a prompt and all that is known about them; one of two at temperature 0.7."""
    number, temperature = request.param
    net, prompt = language.speaker(), language.PROMPTS[number]
    now, ref, mask = language.known(net, prompt, temperature)
    return SimpleNamespace(
        net=net, prompt=prompt, temperature=temperature, now=now, ref=ref, mask=mask,
        logps=now.sum(1), ref_logps=ref.sum(1), pi=now.sum(1).exp().detach(),
        rewards=language.planted(prompt))


def gradient(net, value):
    """d value / d adapters, one vector."""
    trained = [p for layer in lora.adapters(net).values() for p in (layer.lora_A, layer.lora_B)]
    grads = torch.autograd.grad(value, trained, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def rising(w):
    """grad J, UFT Eq. 3."""
    return gradient(w.net, language.utility(w.logps, w.ref_logps, w.rewards, BETA))


def terms(w, rows, advantages, given=0.0, ref_logps=None, **changes):
    """objectives.Terms of the responses `rows`, as update.py fills them."""
    now, old = w.now[rows], w.now[rows].detach()
    empty = torch.zeros_like(old)
    sampled = Sampled(old, w.ref[rows], advantages, empty, empty, empty + given)
    config = Config(model="m", data=("d",), **{"beta": BETA} | changes)
    return objectives.Terms(now.sum(1), ref_logps, now, w.mask[rows], empty, sampled,
                            w.rewards[rows], ["sampled"] * len(rows), empty[0, 0], 4.0, config)


def expected(w, t, weights):
    """The gradient of the loss that t.config names, over its rows."""
    return gradient(w.net, (weights * objectives.LOSSES[t.config.loss].loss(t)).sum())


def over_pairs(w, **changes):
    """The mean gradient of a loss whose groups are two responses, over all 121^2 groups."""
    rows, config = PAIRS.flatten(), Config(model="m", data=("d",), beta=BETA, group=2, **changes)
    old, ref, mask = w.now.detach()[rows], w.ref[rows], w.mask[rows]
    advantages, _ = rollouts.credit(w.rewards[rows], old, ref, 0 * old, mask, config)
    weights = w.pi[PAIRS].prod(1).repeat_interleave(2) / 2
    return expected(w, terms(w, rows, advantages, **changes), weights)


def turned(a, b):
    """1 - cosine."""
    return 1 - torch.cosine_similarity(a, b, 0).item()


# The truth


def test_the_probabilities_of_all_responses_add_up_to_one(world):
    """Those that end and those cut at four tokens; policy and reference, at both temperatures.
    Red: lab/language.py:responses: `return ended + unfinished` -> `return ended`
    Red: lab/language.py:batch: `(place < torch` -> `(place + 1 < torch`
    Red: model.py:Transformer.response_logps: `(hidden_SD, packed` -> `(hidden_SD.flip(0), packed`
    Red: model.py:Transformer.token_logps: `, target_S)` -> `, target_S.flip(0))`"""
    said = language.responses()
    assert len({tuple(y) for y in said}) == len(said) == N
    assert all(3 not in y[:-1] and (y[-1] == 3 or len(y) == 4) for y in said)
    close(world.logps.exp().sum(), 1.0, 1e-12)
    close(world.ref_logps.exp().sum(), 1.0, 1e-12)
    assert (world.logps - world.ref_logps).abs().max() > 0.5


def test_the_optimum_is_worth_beta_log_z_and_every_policy_beta_kl_less(world):
    """J* - J(pi) = beta KL(pi || pi*), so that grad J = -beta grad KL(pi || pi*).
    Red: lab/language.py:utility: `- beta * divergence` -> `- 0.9 * beta * divergence`
    Red: lab/language.py:optimum: `rewards / beta` -> `rewards`
    Red: lab/language.py:divergence: `(logps - other)` -> `(other - logps)`"""
    best = language.optimum(world.ref_logps, world.rewards, BETA)
    z = (world.ref_logps.exp() * (world.rewards / BETA).exp()).sum()
    truth = world.ref_logps, world.rewards, BETA
    close(language.utility(best, *truth), BETA * z.log(), 1e-12)
    short = language.divergence(world.logps, best)
    close(BETA * z.log() - language.utility(world.logps, *truth), BETA * short.detach(), 1e-12)
    close(rising(world), -BETA * gradient(world.net, short), 1e-12)


# RLOO and PPO: the KL is inside the reward


def test_rloo_climbs_the_objective_of_rlhf(world):
    """Over all groups of two, from rewards through credit to loss: -grad J.
    Red: rollouts.py:credit: `earned_B - config.beta * k1` -> `earned_B + config.beta * k1`
    Red: rollouts.py:credit: `k1.sum(-1)).view` -> `k1.mean(-1)).view`
    Red: objectives.py:rloo: `/ t.mask.sum(-1)` -> `/ 4`
    Red: policy_gradients.py:rloo_advantages: `keepdim=True) - rewards_PG)` -> `keepdim=True))`"""
    close(over_pairs(world, loss="rloo"), -rising(world), 1e-12)


def credited(w, values, lam):
    """gae of a reward behind the response and -beta k1 at every token."""
    k1 = policy_gradients.kl(w.now.detach(), w.ref, "k1")
    last = w.mask.int().cumsum(1).argmax(1)
    rewards = -BETA * k1 + torch.nn.functional.one_hot(last, w.mask.shape[1]) * w.rewards[:, None]
    return policy_gradients.gae(rewards, values, w.mask, 1.0, lam)


def ppo(w, advantages):
    """The mean gradient of PPO's policy term; 4 tokens a row are what it divides by."""
    return 4 * expected(w, terms(w, torch.arange(N), advantages, loss="ppo", ppo_value_weight=0.0),
                        w.pi)


def test_ppo_climbs_it_too_whatever_the_values_say(world):
    """lam = 1: V, read before each token, is a baseline. Whitened: the same over A's deviation.
    Red: policy_gradients.py:gae: `gamma * value - values_BT[:, t]` -> `gamma * value`
    Red: model.py:Transformer.response_values: `value(hidden_SD)` -> `value(hidden_SD.flip(0))`
    Red: rollouts.py:credit: `rewards = -config.beta` -> `rewards = config.beta`
    Red: policy_gradients.py:ppo: `logps, advantages, clip)` -> `logps, returns, clip)`"""
    net = language.speaker()
    head = heads.attach(net, "value")
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1),
                                   dtype=torch.float64)
    with torch.no_grad():
        _, values, _ = net.response_values(*language.batch(world.prompt), False, world.temperature)
    assert values.std() > 0.3
    advantages, _ = credited(world, values, 1.0)
    close(ppo(world, advantages), -rising(world), 1e-12)
    assert turned(-ppo(world, credited(world, values, 0.5)[0]), rising(world)) > 0.001
    config = Config(model="m", data=("d",), loss="ppo", beta=BETA, ppo_lam=1.0)
    white, _ = rollouts.credit(world.rewards, world.now.detach(), world.ref, values, world.mask,
                               config)
    scale = (advantages[world.mask].var() + 1e-8).sqrt()
    close(ppo(world, white), -rising(world) / scale, 1e-12)


@pytest.mark.parametrize("lam", (0.0, 0.5, 1.0))
def test_with_the_true_values_ppo_climbs_it_at_every_lambda(world, lam):
    """V(x, y_<t) = E[what is still to come], by the sum over all responses that begin alike.
    Red: policy_gradients.py:gae: `(delta + gamma` -> `(rewards_BT[:, t] + gamma`
    Red: policy_gradients.py:gae: `value = values_BT` -> `value = 0.5 * values_BT`"""
    togo, ids = credited(world, 0 * world.now.detach(), 1.0)[0], language.batch(world.prompt)[0]
    values = torch.zeros_like(togo)
    for t in range(len(world.prompt), ids.shape[1]):
        alike = (ids[:, None, :t] == ids[None, :, :t]).all(-1) & world.mask[:, t]
        share = alike * world.pi
        values[:, t] = share @ togo[:, t] / share.sum(1).clamp(min=1e-30) * world.mask[:, t]
    close(ppo(world, credited(world, values, lam)[0]), -rising(world), 1e-12)


# UNA online


def una(w, ref_logps, target):
    rows = torch.arange(N)
    return expected(w, terms(w, rows, 0 * w.now.detach(), ref_logps=ref_logps, loss="una_online",
                             una_target=target), w.pi)


def test_una_on_the_policys_own_samples_climbs_it_two_beta_times_as_fast(world):
    """E[d (r_theta - r)^2] = -2 beta grad J; with sigma(r_theta) to r it is another direction.
    Red: losses.py:una_reward: `- rewards).square()` -> `- rewards).square() / 2`
    Red: losses.py:implicit_reward: `logps - ref_logps` -> `logps + ref_logps`
    Red: objectives.py:una_online: `else losses.una_reward` -> `else losses.uft_bce`"""
    close(una(world, world.ref_logps, "reward"), -2 * BETA * rising(world), 1e-12)
    assert turned(-una(world, world.ref_logps, "score"), rising(world)) > 0.001


def test_una_anchored_to_the_policy_of_just_now_climbs_the_reward_alone(world):
    """r_theta = 0 at the first update: -(beta / 2) grad E[r] (score), -2 beta grad E[r] (reward),
    as at pi = pi_ref; no divergence is seen.
    Red: losses.py:uft: `(torch.sigmoid(` -> `2 * (torch.sigmoid(`
    Red: objectives.py:una_online: `losses.uft if` -> `losses.una_reward if`"""
    up = gradient(world.net, (world.logps.exp() * world.rewards).sum())
    old = world.logps.detach()
    close(una(world, old, "score"), -BETA / 2 * up, 1e-12)
    close(una(world, old, "reward"), -2 * BETA * up, 1e-12)


# GRPO: the KL is in the loss, token by token


def by_state(w, from_policy, weights, mask):
    """sum_y weights sum_t of the KL between the two next-token distributions at t in the mask."""
    ids, _ = language.batch(w.prompt)
    now = (w.net.logits(w.net(ids)) / w.temperature).log_softmax(-1)
    with torch.no_grad(), lora.disabled(w.net):
        ref = (w.net.logits(w.net(ids)) / w.temperature).log_softmax(-1)
    p, q = (now, ref) if from_policy else (ref, now)
    each = (p.exp() * (p - q)).sum(-1)[:, :-1] * mask[:, 1:]
    return (weights * each.sum(1)).sum()


def test_the_k3_of_the_tokens_has_the_divergence_of_responses_as_its_mean(world):
    """E[sum_t k1] = E[sum_t k3] = E[sum_t KL at y_<t] = KL(pi || pi_ref), the chain rule.
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(d) - d`"""
    whole = language.divergence(world.logps, world.ref_logps)
    for name in ("k1", "k3"):
        each = policy_gradients.kl(world.now, world.ref, name).sum(1)
        close((world.pi * each).sum(), whole.detach(), 1e-12)
    close(by_state(world, True, world.pi, world.mask), whole.detach(), 1e-12)
    assert whole > 0.01


def test_of_whole_responses_k2_goes_down_one_divergence_and_k3_the_other(world):
    """E[grad D^2 / 2] = grad KL(pi || pi_ref), E[grad k3(D)] = grad KL(pi_ref || pi).
    Red: policy_gradients.py:kl: `d.square() / 2` -> `d.square()`
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(d) - d`"""
    k2, k3 = (policy_gradients.kl(world.logps, world.ref_logps, name) for name in ("k2", "k3"))
    reverse = gradient(world.net, language.divergence(world.logps, world.ref_logps))
    forward = gradient(world.net, language.divergence(world.ref_logps, world.logps))
    close(gradient(world.net, (world.pi * k2).sum()), reverse, 1e-12)
    close(gradient(world.net, (world.pi * k3).sum()), forward, 1e-12)
    assert turned(reverse, forward) > 0.001


def test_of_single_tokens_they_go_down_what_the_next_word_costs_and_not_where_it_leads(world):
    """sum_t k2 and sum_t k3: the KL at each y_<t one way and the other, the chance of y_<t held.
    Neither is the gradient of the responses' own divergence.
    Red: policy_gradients.py:kl: `d.square() / 2` -> `d.square()`
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(d) - d`"""
    for name, from_policy, ends in (("k2", True, (world.logps, world.ref_logps)),
                                    ("k3", False, (world.ref_logps, world.logps))):
        each = policy_gradients.kl(world.now, world.ref, name).sum(1)
        got = gradient(world.net, (world.pi * each).sum())
        state = by_state(world, from_policy, world.pi, world.mask)
        close(got, gradient(world.net, state), 1e-12)
        assert turned(got, gradient(world.net, language.divergence(*ends))) > 0.001


def test_grpo_over_a_constant_climbs_the_reward_against_the_next_words_divergence(world):
    """Without std: -((1 - 1/G) grad E[r] - beta grad sum_t KL(pi_ref || pi) at y_<t) / constant.
    Red: rollouts.py:credit: `config.grpo_scale)` -> `"group")`
    Red: objectives.py:grpo: `t.config.beta` -> `2 * t.config.beta`
    Red: policy_gradients.py:grpo: `each + beta *` -> `each - beta *`"""
    got = over_pairs(world, loss="grpo", grpo_scale="none", grpo_length="constant")
    up = gradient(world.net, (world.logps.exp() * world.rewards).sum())
    back = gradient(world.net, by_state(world, False, world.pi, world.mask))
    close(64 * got, -(up / 2 - BETA * back), 1e-12)
    assert turned(-got, rising(world)) > 0.001


def test_grpo_over_the_rows_own_length_turns_the_gradient(world):
    """The same rewards weigh less in a long answer: no gradient of E[r]; the batch's mean does not.
    Red: objectives.py:length: `{"row": drawn,` -> `{"row": t.tokens_per_row,`"""
    one, row, batch = (over_pairs(world, loss="grpo", grpo_scale="none", grpo_length=length)
                       for length in ("constant", "row", "batch"))
    assert turned(row, one) > 1e-4
    close(4 * batch, 64 * one, 1e-12)


def test_behind_a_hint_uft_hint_is_grpo_and_on_it_sft(world):
    """UFT of Liu et al., Eq. 3.3: (1 - 1/G) grad E[r | hint] less beta grad sum_t KL(pi_ref || pi)
    behind the hint, over the constant, and hint_weight grad log pi(hint), the other way up.
    Red: objectives.py:uft_hint: `t.config.hint_weight` -> `2 * t.config.hint_weight`
    Red: objectives.py:uft_hint: `t.sampled.given.bool()` -> `~t.sampled.given.bool()`
    Red: policy_gradients.py:uft_hint: `advantages.masked_fill(hint_mask, 0)` -> `-advantages`"""
    ids, _ = language.batch(world.prompt)
    said, first = ids[:, len(world.prompt):], len(world.prompt)
    rows = ((said[:, :2] == torch.tensor([0, 1])).all(1) & world.mask[:, first + 1]).nonzero()[:, 0]
    pairs = torch.cartesian_prod(rows, rows)
    drawn = world.mask & (torch.arange(ids.shape[1]) >= first + 2)
    behind = (world.now * drawn).sum(1)
    chance, many = behind.detach().exp(), pairs.flatten()
    close(chance[rows].sum(), 1.0, 1e-12)
    changes = {"loss": "uft_hint", "grpo_scale": "none", "grpo_length": "constant", "group": 2}
    advantages, _ = rollouts.credit(
        world.rewards[many], world.now.detach()[many], world.ref[many], 0 * world.ref[many],
        drawn[many], Config(model="m", data=("d",), **changes))
    given = 1.0 * (world.mask & ~drawn)[many]
    got = expected(world, terms(world, many, advantages, given, hint_weight=0.3, **changes),
                   chance[pairs].prod(1).repeat_interleave(2) / 2)
    up = gradient(world.net, (behind.exp() * world.rewards)[rows].sum())
    weights = torch.zeros_like(chance).index_put((rows,), chance[rows])
    back = gradient(world.net, by_state(world, False, weights, drawn))
    hint = gradient(world.net, (world.now * ~drawn)[rows[0]].sum())
    close(got, -(up / 2 - BETA * back) / 64 - 0.3 * hint, 1e-12)


# Sampling


def misfit(counts, logps):
    """Chi-square of counts against exact probabilities, in its deviations above its mean."""
    want = logps.exp() * counts.sum()
    rare = want < 5
    cells = [torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, want)]
    free = len(cells[0]) - 1
    statistic = ((cells[0] - cells[1]).square() / cells[1]).sum().item()
    return (statistic - free) / math.sqrt(2 * free)


def test_responses_are_drawn_with_the_probabilities_that_the_losses_read(world):
    """3000 draws against the exact pi(y|x): chi-square within 4 deviations of its mean, at
    temperature 1 and .7; the other temperature, or the reference, is more than 10 away.
    Red: generate.py:next_token: `(logits_BV / temperature)` -> `(logits_BV * temperature)`
    Red: model.py:Transformer.token_logps: `hidden_SD / temperature` -> `hidden_SD * temperature`
    Red: generate.py:read: `found[i] = hidden_BTD[n, -1]` -> `found[i] = hidden_BTD[n, 0]`"""
    drawn = generate.sample(world.net, [world.prompt] * 3000, language.LONGEST, {language.END},
                            world.temperature, 1.0, torch.Generator().manual_seed(0))
    count = Counter(map(tuple, drawn))
    counts = torch.tensor([count[tuple(y)] for y in language.responses()]).double()
    assert counts.sum() == 3000
    assert misfit(counts, world.logps.detach()) < 4
    other = language.known(world.net, world.prompt, 1.7 - world.temperature)[0].sum(1).detach()
    assert misfit(counts, other) > 10 and misfit(counts, world.ref_logps) > 10
