"""Where does Eq. 7's gradient live?

Question    dL/dlogps = 2 beta (s - r) s (1 - s): which rows does it push, at the start and later?
Prediction  At the start every row counts |r - 1/2|; later a demonstration's weight falls with its
            gain D = logps - ref_logps: half at D = .85/beta, a tenth at 2/beta. Rows that are
            hard for the base gain most and fade first. With beta .01 nothing fades here.
Command     python -m lab.saturation
Runtime     2 minutes on one core
Answer      As predicted. The median demonstration gains 2.7 nats and keeps 99% of its weight at
            beta .01, 85% at .1, 54% at .3, 11% at 1; then 0, 7, 40 and 86% of the demonstrations
            have less than half of theirs. The weight follows ref_logps (correlation .8 at beta .1):
            what the base finds hard gains most and fades first. Length says little (-.25). A beta
            of .01 on answers of this length is summed SFT under another name.

One run of the mixture per beta, one seed; the same 512 training rows are weighed every eight steps.
weight is |dL/dlogps| / (beta/4), which is 1 for a fresh demonstration.
"""
import torch

from lab import experiment, measure, summary
from lab.experiment import Stage

BETAS, EVERY, ROWS = (0.01, 0.1, 0.3, 1.0), 8, 512


def weights(gains: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """|2 beta (s - r) s (1 - s)| / (beta / 4): Eq. 7's push on each row, 1 for a fresh demo."""
    s = torch.sigmoid(beta * gains)
    return 8 * ((s - rewards) * s * (1 - s)).abs()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((x, y)))[0, 1].item()


def watched(beta: float) -> dict:
    """One run: quantiles over rows of gain and weight as training goes on, per kind."""
    stage = Stage("uft", "both", 5e-3, beta)
    rows = [e for u in experiment.units(stage, 1) for e in u]
    rows = [e for kind in ("sft", "scored") for e in rows if e.kind == kind][::len(rows) // ROWS]
    taught = torch.tensor([e.kind == "sft" for e in rows])
    rewards = torch.tensor([e.reward for e in rows])
    length = torch.tensor([len(e.ids) - e.prompt_len for e in rows]).float()
    net = measure.model.load(measure.BASE, torch.float32)
    ref_logps, steps = measure.logps(net, rows), []

    def watch(step: int, net: torch.nn.Module) -> None:
        """A point every EVERY steps."""
        if step % EVERY and step != 95:
            return
        gains = measure.logps(net, rows) - ref_logps
        found = weights(gains, rewards, beta)
        point = {"step": step + 1}
        for name, of in (("demonstrations", taught), ("scored", ~taught)):
            for what, x in (("gain", gains), ("weight", found)):
                q = x[of].quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
                point |= dict(zip((f"{name} {what} {p}" for p in (10, 50, 90)), q, strict=True))
            point[f"{name} faded"] = (found[of] < 0.5 * weights(gains * 0, rewards, beta)[of]
                                      ).float().mean().item()
        point["weight with length"] = correlation(found[taught], length[taught])
        point["weight with ref_logps"] = correlation(found[taught], ref_logps[taught])
        steps.append(point)

    experiment.fit(net, stage, 1, watch)
    return {"steps": steps}


def table(runs: dict) -> str:
    """First and last step of every run."""
    names = ("demonstrations gain 50", "demonstrations weight 50", "demonstrations faded",
             "scored gain 50", "scored weight 50", "weight with length", "weight with ref_logps")
    return summary.markdown(["beta", "step", *names], [
        [beta, str(p["step"]), *(f"{p[n]:.3f}" for n in names)]
        for beta, run in runs.items() for p in (run["steps"][0], run["steps"][-1])])


def main() -> None:
    torch.set_num_threads(1)
    out = {f"{beta:g}": watched(beta) for beta in BETAS}
    summary.save("saturation", out)
    print(table(out))


if __name__ == "__main__":
    main()
