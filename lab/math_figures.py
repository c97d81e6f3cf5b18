"""Draws the figures of docs/math.md from losses.py and policy_gradients.py themselves.

    python -m lab.math_figures       (also: make figures)

u = beta (logps - ref_logps) throughout, s = sigmoid(u); a curve is the closed form that the text
derives, a dot the derivative that autograd takes of the function in losses.py.
"""
from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import losses
import policy_gradients
from lab import figures, optimum, summary

LINE = torch.linspace(-5, 5, 201, dtype=torch.float64)
DOTS = torch.arange(-4.5, 5, 1.0, dtype=torch.float64)
BETAS = (0.01, 0.03, 0.1, 0.3)
DATA = torch.tensor((0.7, 0.3, 0.0), dtype=torch.float64)  # how often each response is shown
REF = torch.tensor((0.1, 0.3, 0.6), dtype=torch.float64).log()


def pull(loss: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """|dL/du| of a loss of u, by autograd."""
    x = u.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0].abs()


def demonstrations() -> dict[str, tuple[Callable, Callable]]:
    """{name: (its loss as a function of u, |dL/du| in closed form)} for a row with r = 1."""
    def shown(loss: Callable) -> Callable:
        return lambda u: loss(u, torch.zeros_like(u), torch.ones_like(u), 1.0)

    def kto(u: Tensor) -> Tensor:
        return losses.kto(u, torch.zeros_like(u), torch.ones_like(u), torch.zeros(()), 1.0)

    s = torch.sigmoid
    return {"SFT": (losses.sft, lambda u: u * 0 + 1),
            "UFT": (shown(losses.uft), lambda u: 2 * s(u) * s(-u)**2),
            "BCE": (shown(losses.uft_bce), lambda u: s(-u)),
            "KTO, z0 = 0": (kto, lambda u: s(u) * s(-u))}


def pulls(axes: list[Axes]) -> None:
    """How hard a demonstration is pulled, over u: each loss in units of its own start."""
    for (name, (loss, form)), color in zip(demonstrations().items(), figures.COLORS, strict=False):
        start = form(torch.zeros(1, dtype=torch.float64))
        axes[0].plot(LINE, form(LINE) / start, color=color, label=name)
        axes[0].plot(DOTS, pull(loss, DOTS) / start, "o", color=color, markersize=3)
    runs = summary.load("saturation").items()
    ends = [(float(beta), run["steps"][-1]) for beta, run in runs]
    axes[0].plot([beta * end["demonstrations gain 50"] for beta, end in ends],
                 [end["demonstrations weight 50"] for _, end in ends], "*", color=figures.INK,
                 markersize=9, label="medians after training, beta .01, .1, .3, 1")
    axes[0].set(xlabel="u = beta (logps - ref_logps)", ylabel="weight (1: fresh demonstration)")
    axes[0].legend(fontsize=7)


def floor(axes: list[Axes]) -> None:
    """What is left of Eq. 7 and of its pull where a demonstration has probability 1."""
    nats = torch.linspace(0, 300, 301, dtype=torch.float64)
    zero, one = torch.zeros_like(nats), torch.ones_like(nats)
    for beta, color in zip(BETAS, figures.COLORS, strict=False):
        least = losses.uft(zero, -nats, one, beta)
        weight = pull(lambda u: losses.uft(u, torch.zeros_like(u), one, 1.0), beta * nats) * 4
        for ax, y in zip(axes, (least, weight), strict=True):
            ax.plot(nats, y, color=color, label=f"beta {beta:g}")
    axes[0].set(xlabel="-ref_logps, nats", ylabel="the least that Eq. 7 can be")
    axes[1].set(xlabel="-ref_logps, nats", ylabel="weight left at probability 1")
    axes[0].legend(fontsize=7)


def shown(beta: float) -> Tensor:
    """The policy that UFT makes of responses shown as often as DATA says, as probabilities."""
    def objective(x: Tensor, _: Tensor) -> Tensor:
        return (DATA * losses.uft(x.log_softmax(0), REF, torch.ones_like(x), beta)).sum() * 4 / beta

    return optimum.settle(objective, REF).softmax(0)


def small_beta(axes: list[Axes]) -> None:
    """Where UFT ends for every beta, and how hard it pushes a scored row at three values of u."""
    betas = torch.logspace(-3, 1, 17, dtype=torch.float64)
    ends = torch.stack([shown(beta) for beta in betas.tolist()])
    for i, color in enumerate(figures.COLORS[:2]):
        axes[0].plot(betas, ends[:, i], color=color, label=f"UFT, response {i + 1}")
        axes[0].axhline(DATA[i], color=color, linestyle=":", label=f"SFT: its share, {DATA[i]:g}")
    axes[0].set(xscale="log", xlabel="beta", ylabel="probability at the end", ylim=(0, 1))
    rewards = torch.linspace(0, 1, 101, dtype=torch.float64)
    for u, color in zip((0.0, 1.0, 2.0), figures.COLORS[2:], strict=False):
        s = torch.sigmoid(torch.tensor(u))
        axes[1].plot(rewards, 4 * (rewards - s) * s * (1 - s), color=color, label=f"UFT, u = {u:g}")
    axes[1].plot(rewards, rewards - 0.5, ":", color=figures.INK, linewidth=3, label="r - 1/2")
    axes[1].set(xlabel="score r", ylabel="push up, over beta / 2")
    for ax in axes:
        ax.legend(fontsize=7)


def pairs(axes: list[Axes]) -> None:
    """BCE of a pair over the shift that its two rows share; DPO cannot feel the shift."""
    zero = torch.zeros_like(LINE)
    for margin, color in zip((-2.0, 0.0, 2.0), figures.COLORS, strict=False):
        rows = (LINE + margin / 2, LINE - margin / 2, zero, zero, 1.0)
        axes[0].plot(LINE, losses.bco_pair(*rows), color=color, label=f"BCE, margin {margin:g}")
        axes[0].plot(LINE, losses.dpo(*rows), "--", color=color, label=f"DPO, margin {margin:g}")
    axes[0].set(xlabel="(u_w + u_l) / 2", ylabel="loss of the pair")
    axes[0].legend(fontsize=7, ncols=3, loc="upper center")
    axes[0].set_ylim(0, 8)


def estimators(axes: list[Axes]) -> None:
    """k1, k2, k3 as values; as losses, their mean gradient (bars) and that of each KL (dots)."""
    names = ("k1", "k2", "k3")
    for name, color in zip(names, figures.COLORS, strict=False):
        axes[0].plot(LINE, policy_gradients.kl(LINE, LINE * 0, name), color=color, label=name)
    axes[0].set(xlabel="log pi - log pi_ref of a sample", ylabel="estimate", xlim=(-3, 3),
                ylim=(-3, 9))
    logits, ref = optimum.REWARDS * 2, optimum.REF_LOGPS
    chance, where = logits.softmax(0), torch.arange(len(logits))

    def slope(value: Callable[[Tensor], Tensor]) -> Tensor:
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(value(x.log_softmax(0)), x)[0]

    for i, (name, color) in enumerate(zip(names, figures.COLORS, strict=False)):
        mean = slope(lambda now, name=name: (chance * policy_gradients.kl(now, ref, name)).sum())
        axes[1].bar(where + (i - 1) * 0.25, mean, 0.22, color=color)
    for shift, mark, label, true in (
            (0.0, "D", "grad KL(pi||pi_ref)", lambda p: (p.exp() * (p - ref)).sum()),
            (0.25, "o", "grad KL(pi_ref||pi)", lambda p: (ref.exp() * (ref - p)).sum())):
        axes[1].plot(where + shift, slope(true), mark, color=figures.INK, markersize=5, label=label)
    axes[1].set(xlabel="logit of answer", ylabel="mean gradient as a loss")
    for ax in axes:
        ax.legend(fontsize=7)


FIGURES = (("pulls", 6.5, 1, pulls), ("floor", 8, 2, floor), ("small_beta", 8, 2, small_beta),
           ("pairs", 6.5, 1, pairs), ("estimators", 8, 2, estimators))


def main() -> None:
    matplotlib.use("Agg")
    with plt.rc_context(figures.STYLE):
        for name, width, panels, draw in FIGURES:
            figures.save(name, width, panels, draw)
            print(f"docs/figures/{name}.svg")


if __name__ == "__main__":
    main()
