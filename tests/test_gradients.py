"""Theorems about the gradient in the adapters: every offline loss is a weighted sum of grad l_i.

l_i = log pi_theta(y_i|x_i) is the only road from a loss to the parameters, so the weights dL/dl_i
decide everything. A float64 model with adapters; the reference l0 is the model without them.
"""
import pytest
import tiny
import torch
from torch.nn.functional import one_hot

import lora
import losses

BETA = 0.3
LENGTHS = ((3, 4), (2, 6), (5, 2), (1, 3), (4, 5), (2, 2))  # (prompt, response) of each row
RATINGS = torch.tensor([1.0, 0.0, 0.25, 0.5, 0.9, 0.6], dtype=torch.float64)
LABELS = torch.tensor([True, False, True, False, False, True])
KTO_WEIGHT = torch.tensor([1.5, 0.5, 1.5, 0.5, 0.5, 1.5], dtype=torch.float64)
Z0 = torch.tensor(0.1, dtype=torch.float64)
NAMES = ("sft", "uft", "uft_bce", "dpo", "dpo_smoothed", "ipo", "una_pair", "bco_pair", "kto",
         "orpo", "simpo", "dro")


def policy(noise):
    """A tiny model with adapters whose B is random, of standard deviation `noise`."""
    net, generator = tiny.transformer(), torch.Generator().manual_seed(0)
    lora.inject(net, 2, 4.0, generator=generator)
    for layer in lora.adapters(net).values():
        draw = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
        layer.lora_B.data = noise * draw
    return net


def score(net, lengths=LENGTHS):
    """(l, l0, number of response tokens) of the rows; l carries its graph."""
    ids, mask = tiny.batch(lengths)
    with lora.disabled(net), torch.no_grad():
        ref_logps = net.response_logps(ids, mask)[0].sum(-1)
    return net.response_logps(ids, mask)[0].sum(-1), ref_logps, mask.sum(-1)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def gradient(net, value):
    """d value / d adapters as one vector."""
    grads = torch.autograd.grad(value, trained(net), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def value(name, l, l0, n):
    """The offline loss `name`; even rows are chosen, odd rows rejected, m = l / n."""
    pair, m = (l[::2], l[1::2], l0[::2], l0[1::2], BETA), l / n
    return {
        "sft": lambda: losses.sft(l),
        "uft": lambda: losses.uft(l, l0, RATINGS, BETA),
        "uft_bce": lambda: losses.uft_bce(l, l0, RATINGS, BETA),
        "dpo": lambda: losses.dpo(*pair),
        "dpo_smoothed": lambda: losses.dpo(*pair, label_smoothing=0.1),
        "ipo": lambda: losses.ipo(*pair),
        "una_pair": lambda: losses.una_pair(*pair),
        "bco_pair": lambda: losses.bco_pair(*pair),
        "kto": lambda: losses.kto(l, l0, LABELS, Z0, BETA, 1.5, 0.5),
        "orpo": lambda: losses.orpo(m[::2], m[1::2], 0.1),
        "simpo": lambda: losses.simpo(m[::2], m[1::2], BETA, 0.5),
        "dro": lambda: losses.dro(l, l0, RATINGS, l0 / 10, BETA),
    }[name]()


def weights(name, l, l0, n):
    """dL/dl of every row, in closed form."""
    u, m, p = BETA * (l - l0), l / n, (l / n).exp()
    s, v = torch.sigmoid(u), torch.sigmoid(u - BETA * Z0)
    sign = torch.tensor([-1.0, 1.0] * 3, dtype=torch.float64)  # up for chosen, down for rejected

    def twice(x):
        return x.repeat_interleave(2)

    error = twice(torch.sigmoid(u[1::2] - u[::2]))
    margin = twice(u[::2] - u[1::2]) / BETA
    odds = p / (1 - p)
    odds_error = twice(odds[1::2] / (odds[::2] + odds[1::2]))
    return {
        "sft": -torch.ones_like(l),
        "uft": 2 * BETA * (s - RATINGS) * s * (1 - s),
        "uft_bce": BETA * (s - RATINGS),
        "dpo": sign * BETA * error,
        "dpo_smoothed": sign * BETA * (error - 0.1),
        "ipo": -sign * 2 * (margin - 1 / (2 * BETA)),
        "una_pair": sign * BETA * error,
        "bco_pair": BETA * (s - (sign < 0).double()),
        "kto": (1 - 2 * LABELS.double()) * KTO_WEIGHT * BETA * v * (1 - v),
        "orpo": (sign * 0.1 * odds_error / (1 - p) - (sign < 0).double()) / n,
        "simpo": sign * BETA * twice(torch.sigmoid(0.5 - BETA * (m[::2] - m[1::2]))) / n,
        "dro": -BETA * (RATINGS - l0 / 10 - u),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_is_the_closed_form_times_the_gradients_of_the_logps(name):
    """grad L = sum_i (dL/dl_i) grad l_i, with dL/dl_i as losses.py states it.

    Red: losses.py:implicit_reward: `return beta *` -> `return 2 * beta *`
    Red: losses.py:dpo: `z = beta * margin` -> `z = beta * margin / 2`
    Red: losses.py:ipo: `(h - 1 / (2 * beta)).square()` -> `(h - 1 / (2 * beta)).square() / 2`
    Red: losses.py:orpo: `logodds_ratio = (chosen -` -> `logodds_ratio = (0 * chosen -`
    Red: losses.py:simpo: `beta * (chosen_mean_logps` -> `(chosen_mean_logps`
    Red: lora.py:disabled: `part.enabled = False` -> `part.enabled = True`
    """
    net = policy(noise=0.05)
    l, l0, n = score(net)
    assert (l - l0).abs().min() > 1e-3
    got = gradient(net, value(name, l, l0, n).sum())
    with torch.no_grad():
        weight = weights(name, l, l0, n)
    close(got, sum(w * gradient(net, li) for w, li in zip(weight, l, strict=True)), 1e-12)


def test_token_mean_sft_weighs_every_row_by_one_over_the_tokens_per_row():
    """grad L = -sum_i grad l_i / tokens_per_row; its mean over rows is that of the token mean.

    Red: losses.py:sft_token_mean: `float(mask.sum()) / len(mask)` -> `float(mask.sum())`
    """
    net = policy(noise=0.05)
    tokens, mask = net.response_logps(*tiny.batch(LENGTHS))
    per_row = (4 + 6 + 2 + 3 + 5 + 2) / 6
    got = gradient(net, losses.sft_token_mean(tokens, mask).sum())
    close(got, -gradient(net, tokens.sum()) / per_row, 1e-12)


def test_uft_gradient_of_an_example_is_a_multiple_of_its_sft_gradient():
    """r = 1: grad L_UFT = 2 beta s (1 - s)^2 grad L_SFT in every parameter tensor.

    Red: losses.py:uft: `- rewards).square()` -> `- rewards).abs()`
    """
    net = policy(noise=0.05)
    l, l0, _ = score(net, LENGTHS[:1])
    s = torch.sigmoid(BETA * (l - l0)).item()
    pairs = [torch.autograd.grad(loss, trained(net), retain_graph=True) for loss in
             (losses.uft(l, l0, torch.ones_like(l), BETA), losses.sft(l))]
    for uft, sft in zip(*pairs, strict=True):
        close(uft, 2 * BETA * s * (1 - s)**2 * sft, 1e-12)
        cosine = torch.cosine_similarity(uft.flatten(), sft.flatten(), dim=0).item()
        assert 1 - cosine <= 1e-12


def test_uft_gradient_of_a_fresh_batch_is_beta_over_four_times_that_of_sft():
    """B = 0: D is exactly 0 in every row, so the whole batch gradient is (beta / 4) grad L_SFT.

    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps, 0.999 * ref_logps, beta)`
    """
    net = policy(noise=0.0)
    l, l0, _ = score(net)
    assert torch.equal(l, l0)
    uft = gradient(net, losses.uft(l, l0, torch.ones_like(l), BETA).sum())
    close(uft, BETA / 4 * gradient(net, losses.sft(l).sum()), 1e-12)
    assert uft.abs().max() > 1e-3


def test_a_step_on_uft_makes_a_demonstration_likelier():
    """The weight of grad l is negative for every D: SGD raises l, above and below the reference.

    Red: losses.py:uft: `return (` -> `return -(`
    """
    for shift in (-3.0, 0.0, 3.0):
        net = policy(noise=0.05)
        l, _, _ = score(net, LENGTHS[:1])
        losses.uft(l, l.detach() - shift, torch.ones_like(l), BETA).sum().backward()
        torch.optim.SGD(trained(net), lr=1e-3).step()
        assert score(net, LENGTHS[:1])[0] > l


@pytest.mark.parametrize(("eps", "low", "high"),
                         [(1e-30, 0, 1e-12), (1e-8, 1e-4, 1e-2), (1e-6, 1e-2, 1)])
def test_the_first_adamw_step_on_uft_is_that_on_sft_but_for_eps(eps, low, high):
    """A common factor beta / 4 cancels in g / (sqrt(g^2) + eps); difference per learning rate.

    Red: losses.py:uft: `(logps, ref_logps, beta)` -> `(logps, ref_logps * 0.9, beta)`
    """
    after = []
    for loss in (losses.sft, lambda l: losses.uft(l, l.detach(), torch.ones_like(l), 0.03)):
        net = policy(noise=0.0)
        loss(score(net)[0]).sum().backward()
        torch.optim.AdamW(trained(net), lr=1.0, weight_decay=0.0, eps=eps).step()
        after.append(torch.cat([p.detach().flatten() for p in trained(net)]))
    assert low <= (after[0] - after[1]).abs().max() <= high
    assert after[0].abs().max() > 0.9


def test_uft_turns_away_from_sft_once_the_rows_differ_in_their_log_ratios():
    """Two rows with one D: collinear gradients; with two: the row that is ahead weighs less.

    Red: losses.py:uft: `return (torch.sigmoid(` -> `return (torch.add(0,`
    """
    net = policy(noise=0.05)
    l, _, _ = score(net, LENGTHS[:2])
    sft, cosines = gradient(net, losses.sft(l).sum()), []
    for d in ((1.5, 1.5), (-1.0, 1.5)):
        l0 = l.detach() - torch.tensor(d, dtype=torch.float64)
        uft = gradient(net, losses.uft(l, l0, torch.ones_like(l), 1.0).sum())
        cosines.append(torch.cosine_similarity(uft, sft, dim=0).item())
    assert 1 - cosines[0] < 1e-12 and 1 - cosines[1] > 1e-3


def test_uft_gradient_before_the_head_is_one_scalar_per_sequence(monkeypatch):
    """dL/dh_t = (dL/dl) (onehot(y_t) - p_t) W for the state h_t before every response token t.

    Red: packing.py:pack: `ids_BT[row, where]` -> `ids_BT[row, where - 1]`
    Red: losses.py:uft: `- rewards` -> `- 0.5 * rewards`
    """
    net, seen = policy(noise=0.05), []

    def spy(packed, checkpointing):
        seen.append(type(net).packed(net, packed, checkpointing))
        return seen[-1]

    monkeypatch.setattr(net, "packed", spy)
    l, l0, n = score(net)
    got = torch.autograd.grad(losses.uft(l, l0, RATINGS, BETA).sum(), seen[1])[0]  # 0: reference's
    ids, mask = tiny.batch(LENGTHS)
    with torch.no_grad():
        weight = weights("uft", l, l0, n).repeat_interleave(n)[:, None]
        p = net.logits(seen[1]).softmax(-1)
        close(got, weight * (one_hot(ids[mask], tiny.V) - p) @ net.lm_head.weight, 1e-12)