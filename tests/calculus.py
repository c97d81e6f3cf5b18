"""Rows to try the losses on, and derivatives and minima to judge them by, all in float64."""
import torch
from torch import tensor

import losses


def real(*values):
    """A float64 vector."""
    return tensor(values, dtype=torch.float64)


BETA = 0.3
LOGPS = real(-7.3, -4.1, -2.2, -9.6, -0.8, -5.5)  # even rows are chosen, odd rows rejected
REF = real(-5.1, -6.4, -2.0, -8.8, -3.9, -5.9)
RATINGS = real(1.0, 0.0, 0.25, 0.5, 0.9, 0.6)
LABELS = tensor([True, False, True, False, False, True])
GRID = torch.linspace(-100, 100, 401, dtype=torch.float64)  # values of D
ORIGIN = real(0)


def on_pairs(loss, *more):
    """A pair loss as a function of rows."""
    return lambda l, l0, b: loss(l[::2], l[1::2], l0[::2], l0[1::2], b, *more)


ROWS = {  # every loss as a function of (logps, ref_logps, beta); ORPO and SimPO read means
    "sft": lambda l, l0, b: losses.sft(l),
    "uft": lambda l, l0, b: losses.uft(l, l0, RATINGS.to(l), b),
    "una_reward": lambda l, l0, b: losses.una_reward(l, l0, RATINGS.to(l), b),
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


def slopes(name):
    """dL/dl of every row of LOGPS, for the loss of that name in ROWS."""
    return slope(lambda l: ROWS[name](l, REF, BETA), LOGPS)


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
