"""Draws docs/figures/*.svg from lab/results/*.json; readable on a light and on a dark page.

    python -m lab.figures       (also: make figures)
"""
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lab import summary, tables

OUT = Path(__file__).parent.parent / "docs/figures"
INK = "#808080"  # text and axes: dark enough for white, light enough for black
COLORS = ("#3b82f6", "#f97316", "#22a06b", "#a855f7", "#e0566f", "#b58900", "#14a3b8", "#888888")
SEQUENTIAL = ("sft_then_dpo", "sft_then_kto", "sft_then_una", "una_then_sft", "sft_then_uft_mixed")
STYLE = {"svg.hashsalt": "uft", "svg.fonttype": "path", "font.size": 9, "axes.edgecolor": INK,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.6, "axes.titlesize": 9}


def save(name: str, width: float, panels: int, draw: Callable[[list[Axes]], None]) -> None:
    """One row of panels, drawn by `draw`, as docs/figures/NAME.svg without a date in it."""
    figure, axes = plt.subplots(1, panels, figsize=(width, 3.2), layout="constrained")
    draw([axes] if panels == 1 else list(axes))
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def frontier(axes: list[Axes]) -> None:
    """Every setting of the sequential arms and of UFT on the mixture, on the validation split."""
    tuned = summary.load("tables")["tuned"]
    for x, ax in zip(("truth", "kl_text"), axes, strict=True):
        for name, color in zip(("uft_mixed", *SEQUENTIAL), COLORS, strict=False):
            first = tuned[name][0]
            ax.scatter([r[x] for r in tuned[name]], [r["form"] for r in tuned[name]], 14, color,
                       alpha=0.6, label=name)
            ax.scatter(first[x], first["form"], 60, color, marker="*")
        ax.set_xlabel({"truth": "truthful answers",
                       "kl_text": "KL(base||policy) per token of text"}[x])
        ax.set_ylabel("instructions followed")
    axes[1].set_xscale("log")
    axes[1].legend(fontsize=7, title="star: chosen", title_fontsize=7)


def best_of(axes: list[Axes]) -> None:
    """Expected best validation score of k settings; optimistic, as any maximum of noisy means."""
    held = summary.load("tables")["best_of"]
    names = ("sft", "uft", "sft_then_una", "sft_then_dpo", "uft_mixed", "weighted_sft",
             "sft_una_mixed")
    for name, color in zip(names, COLORS, strict=False):
        axes[0].plot(range(1, len(held[name]) + 1), held[name], "o-", color=color, label=name,
                     markersize=3)
    axes[0].set(xlabel="settings tried", ylabel="expected best validation score")
    axes[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def drift(axes: list[Axes]) -> None:
    """Held-out nll against both KLs, one line per loss, one point per learning rate."""
    rows = summary.load("beta")["rows"]
    names = list(dict.fromkeys(n.split(", lr")[0] for n in rows))
    for x, ax in zip(("kl_policy", "kl_base"), axes, strict=True):
        for name, color in zip(names, COLORS, strict=False):
            runs = [r for n, r in rows.items() if n.split(", lr")[0] == name]
            points = [[summary.interval([r[k] for r in found])[0] for k in (x, "nll")]
                      for found in runs]
            ax.plot(*zip(*points, strict=True), "o-", color=color, label=name, markersize=4)
        ax.set_xlabel({"kl_policy": "KL(policy||base), nats an answer",
                       "kl_base": "KL(base||policy), nats an answer"}[x])
        ax.set(xscale="log", ylabel="held-out nll, nats a demonstration")
        ax.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        ax.minorticks_off()
    axes[0].legend(fontsize=7)


def mixture(axes: list[Axes]) -> None:
    """Truth and form against the number of demonstrations."""
    rows = summary.load("mixture")["rows"]
    for y, ax in zip(("truth", "form"), axes, strict=True):
        for how, color in zip(("one pass", "96 steps"), COLORS, strict=False):
            found = {int(n.split()[0]): r for n, r in rows.items() if n.endswith(how)}
            values = [summary.interval([r[y] for r in runs]) for runs in found.values()]
            ax.errorbar(list(found), *zip(*values, strict=True), fmt="o-", color=color, label=how,
                        markersize=4, capsize=2)
        ax.set(xscale="log", xlabel="demonstrations beside 1536 scored answers",
               ylabel={"truth": "truthful answers", "form": "instructions followed"}[y])
        ax.set_xticks(list(found), [str(n) for n in found], minor=False)
        ax.minorticks_off()
    axes[0].legend(fontsize=7)


def saturation(axes: list[Axes]) -> None:
    """Weight and gain of demonstrations over training: median, and 10% to 90% of the rows."""
    held = summary.load("saturation")
    for what, ax in zip(("weight", "gain"), axes, strict=True):
        for (beta, run), color in zip(held.items(), COLORS, strict=False):
            steps = [p["step"] for p in run["steps"]]
            low, middle, high = ([p[f"demonstrations {what} {q}"] for p in run["steps"]]
                                 for q in (10, 50, 90))
            ax.plot(steps, middle, color=color, label=f"beta {beta}")
            ax.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        ax.set(xlabel="step", ylabel={"weight": "weight (1: fresh demonstration)",
                                      "gain": "gain over the base, nats"}[what])
    axes[1].legend(fontsize=7)


def scores(axes: list[Axes]) -> None:
    """What is left of truth and form when scores are cut, shuffled or made constant."""
    rows = summary.load("scores")["rows"]
    for y, ax in zip(("truth", "form"), axes, strict=True):
        values = [summary.interval([r[y] for r in runs]) for runs in rows.values()]
        colors = [COLORS[n.startswith("mixture")] for n in rows]
        ax.barh(list(rows), [m for m, _ in values], xerr=[h for _, h in values], color=colors,
                ecolor=INK, capsize=2)
        ax.invert_yaxis()
        ax.set_xlabel({"truth": "truthful answers", "form": "instructions followed"}[y])
    axes[1].set_yticklabels([])


def optimum(axes: list[Axes]) -> None:
    """How far each loss ends from the exact optimum of the bandit."""
    rows = summary.load("optimum")["rows"]
    bars = axes[0].barh([r["name"] for r in rows], [r["tv"] for r in rows], color=COLORS[0])
    axes[0].bar_label(bars, [f"{r['tv']:.3f}" for r in rows], padding=3, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("total variation to pi*")


def online(axes: list[Axes]) -> None:
    """The model's reward and the true one as training goes on, and reward against divergence."""
    held = summary.load("online")
    names = [n for n in held["curves"] if "rule" not in n]
    for name, color in zip(names, COLORS, strict=False):
        for ax, values in zip(axes, zip(*held["curves"][name], strict=True), strict=False):
            ax.plot(range(1, len(values) + 1), values, color=color, label=name)
        points = [[r[k] for r in held["tuned"][name]] for k in ("kl_policy", "reward")]
        axes[2].scatter(*points, 24, color)
    axes[0].set(xlabel="step", ylabel="reward model, squashed")
    axes[1].set(xlabel="step", ylabel="true reward (graded)")
    axes[2].set(xlabel="KL(policy||base), nats an answer", ylabel="reward model, squashed")
    axes[0].legend(fontsize=7)


def hints(axes: list[Axes]) -> None:
    """Right answers that keep every constraint, and what kept them, per arm."""
    rows = summary.load("hints")["rows"]
    for y, ax in zip(("content", "form"), axes, strict=True):
        values = [summary.interval([r[y] for r in runs]) for runs in rows.values()]
        ax.barh(list(rows), [m for m, _ in values], xerr=[h for _, h in values], color=COLORS[0],
                ecolor=INK, capsize=2)
        ax.invert_yaxis()
        ax.set_xlabel({"content": "right, every constraint kept", "form": "constraints kept"}[y])
    axes[1].set_yticklabels([])


def main() -> None:
    matplotlib.use("Agg")
    assert set(SEQUENTIAL) < set(tables.ARMS)
    with plt.rc_context(STYLE):
        for name, width, panels, draw in (
                ("frontier", 8, 2, frontier), ("best_of", 5, 1, best_of), ("drift", 8, 2, drift),
                ("mixture", 8, 2, mixture), ("saturation", 8, 2, saturation),
                ("scores", 8, 2, scores), ("optimum", 6.5, 1, optimum),
                ("online", 11, 3, online), ("hints", 8, 2, hints)):
            save(name, width, panels, draw)
            print(f"docs/figures/{name}.svg")


if __name__ == "__main__":
    main()
