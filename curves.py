"""Which charts a run has: its metrics over steps, and its held-out rows one by one.

Each says in one sentence what a good and a bad curve look like.
"""
import math
from collections.abc import Callable, Sequence

import charts
from charts import Frame, Mark

KINDS = ("sft", "scored", "chosen", "rejected", "sampled")
CHARTS = (
    ("Reward", "what sampled responses earn", ("reward",),
     ("Good: it rises and levels off. Bad: flat, as no response earns more than its group; or a "
      "rise while the samples read worse.")),
    ("Divergence", "nats a response, from the reference", ("kl",),
     "Good: it grows slowly and levels off. Bad: it grows on while the reward stands still."),
    ("Length", "tokens of a response", ("completions/mean_length",),
     "Good: it settles at what an answer needs. Bad: it runs into --response_tokens, or to 1."),
    ("Loss", "what a step minimises", ("loss",),
     ("Good: it falls, below the dashed lines if there are any. Bad: it stays at one, where "
      "nothing about single rows is learned, or rises.")),
    ("Implicit reward", "beta log(policy / reference)", tuple(f"rewards/{k}" for k in KINDS),
     ("Good: kinds move apart, demonstrations and chosen rows upwards. Bad: all kinds move as one, "
      "or good rows sink.")),
    ("Log-prob change", "nats above the reference", tuple(f"dlogp/{k}" for k in KINDS),
     ("Good: good rows gain some nats, bad rows gain less or lose. Bad: everything sinks, or good "
      "rows gain without end, which is learning by heart.")),
    ("Log-prob", "nats", tuple(f"logps/{k}" for k in KINDS),
     "Good: good rows rise, and level off. Bad: they sink, or come close to 0, by heart."),
    ("Gradient weight", "mean |dL/dlogps| of a row", tuple(f"weight/{k}" for k in KINDS),
     "Good: it shrinks as rows near their targets. Bad: it is 0 while they are far from them."),
    ("Gradient norm", "before clipping", ("grad_norm",),
     ("Good: of one size, or slowly sinking. Bad: spikes that grow, or always above "
      "--max_grad_norm.")),
    ("Learning rate", "", ("learning_rate",),
     "Good: a ramp, then half a cosine to 0. Bad: any other shape, which no setting asks for."),
    ("Speed", "tokens a second", ("tokens_per_s",),
     "Good: level, as long as rows are alike. Bad: it sinks, as the machine does other work."),
    ("Memory", "peak, MiB", ("mem_mib",),
     "Good: level after some steps. Bad: a slope that does not end."))
WEIGHTS: dict[str, Callable[[float, float, float], float]] = {  # |dL/dlogps| of (s, r, beta)
    "uft": lambda s, r, beta: 2 * beta * abs(s - r) * s * (1 - s),
    "una_binary": lambda s, r, beta: 2 * beta * abs(s - r) * s * (1 - s),
    "uft_bce": lambda s, r, beta: beta * abs(s - r),
    "bco_pair": lambda s, r, beta: beta * abs(s - r),
    "sft": lambda _, r, beta: 1.0}
MARGINS: dict[str, Callable[[float, float, float], float]] = {  # of (z, beta, label_smoothing)
    "dpo": lambda z, beta, e: beta * abs(sigmoid(-z) - e),
    "una_pair": lambda z, beta, _: beta * sigmoid(-z),
    "ipo": lambda z, beta, _: abs(2 * z - 1) / beta}  # z = u_chosen - u_rejected


def sigmoid(u: float) -> float:
    """1 / (1 + exp(-u)), and no overflow on either side."""
    return 0.5 * (1 + math.tanh(u / 2))


def color(name: str) -> str:
    """Of a metric, or a kind: its kind's, else the plain one."""
    kind = name.rpartition("/")[2]
    return kind if kind in KINDS else "plain"


def baselines(rows: Sequence[dict], settings: dict, looked: dict) -> dict[str, float]:
    """Losses of two policies that know nothing of single rows: the reference, and the best that
    gives every row the same implicit reward, where that is another; of all the steps' rows.

    The latter is the variance of r for (s - r)^2, the entropy of its mean for cross-entropy. Losses
    without a formula at the reference were measured on held-out rows. {} for sampled rows, whose
    rewards change.
    """
    some, loss = [r for r in rows if "loss/start" in r and "reward" not in r], settings["loss"]
    if not some:
        return {"reference": looked["reference_loss"]} if "reference_loss" in looked else {}
    start, mean = (sum(r.get(name, 0.0) for r in some) / len(some)
                   for name in ("loss/start", "target/mean"))
    out = {"reference": start}
    if loss in ("uft", "una_binary"):
        out["best constant"] = start - (0.5 - mean) ** 2
    elif loss == "dro":
        out["best constant"] = start - mean**2 / 2
    elif loss == "uft_bce":
        out["best constant"] = -sum(p * math.log(p) for p in (mean, 1 - mean) if p > 0)
    return out


def over_steps(rows: Sequence[dict], settings: dict, looked: dict) -> str:
    """Every chart whose metrics were logged; log-probs only where there is no reference.

    A dot is a step, a line the mean of the latest tenth, a band the same means of p10 and p90;
    dashes are baselines of the loss.
    """
    out, flat = "", baselines(rows, settings, looked)
    for title, unit, names, note in CHARTS:
        curves = {name: points for name in names if (points := charts.curve(rows, name))}
        if not curves or (title == "Log-prob" and "Log-prob change" in out):
            continue
        marks = []
        for name, points in curves.items():
            low, high = (charts.curve(rows, f"{name}/p{p}0") for p in (1, 9))
            if low and high:
                marks.append(Mark("band", color(name), [
                    (a[0], a[2], b[2]) for a, b in zip(low, high, strict=True)]))
            else:
                marks.append(Mark("dots", color(name), [p[:2] for p in points]))
            marks.append(Mark("line", color(name), charts.smooth(points)))
        ends = [curves[next(iter(curves))][place][0] for place in (0, -1)]
        marks += [Mark("dashes", "soft", [(x, value) for x in ends], f"{name} {value:.3g}")
                  for name, value in flat.items() if title == "Loss"]
        keys = [(color(name), f"{name} {points[-1][2]:.4g}") for name, points in curves.items()]
        out += charts.chart(title, ("step", unit), marks, keys, note)
    return out


def calibration(rows: dict) -> str:
    """Target r over sigmoid(r_theta): rows, ten bins of equally many rows, and the diagonal.

    "" where all targets are the same: nothing can be told apart.
    """
    if len(set(rows["reward"])) < 2:
        return ""
    pairs = [(sigmoid(u), r) for u, r in zip(rows["implicit_reward"], rows["reward"], strict=True)]
    kinds = [kind for kind in KINDS if kind in rows["kind"]]
    marks = [Mark("rows", kind, [p for p, k in zip(pairs, rows["kind"], strict=True) if k == kind])
             for kind in kinds]
    marks += [Mark("dashes", "soft", [(0, 0), (1, 1)]), Mark("line", "plain", charts.bins(pairs))]
    return charts.chart(
        "Calibration", ("sigmoid of the implicit reward", "target r"), marks,
        [*((kind, kind) for kind in kinds), ("plain", "mean of a tenth")],
        "Good: the line follows the dashed diagonal. Bad: it is level, as the policy cannot tell "
        "rows apart; or short and upright, as it tells them apart by less than their targets.",
        Frame((-0.02, 1.02), (-0.04, 1.04)))


def by_position(rows: dict) -> str:
    """Mean log-prob change of the first, second, ... token of a response, with its quantiles."""
    found = {kind: [(place, *of) for place, of in enumerate(some, 1)]
             for kind in KINDS if (some := rows["positions"].get(kind))}
    if not found:
        return ""
    marks = [Mark("band", kind, [(x, low, high) for x, _, low, high in points])
             for kind, points in found.items()]
    marks += [Mark("line", kind, [p[:2] for p in points]) for kind, points in found.items()]
    return charts.chart(
        "Where it changed", ("token of the response", "nats above the reference"), marks,
        [(kind, kind) for kind in found],
        "Good: gains wherever answers differ. Bad: only the first tokens move (a manner of "
        "beginning), or later ones sink.")


def weight(rows: dict, settings: dict) -> str:
    """|dL/dlogps| of rows, by autograd, over the implicit reward, or over the pair's margin; and
    the curves of WEIGHTS for r = 1 and 0, or that of MARGINS, as losses.py has them."""
    loss, beta = settings["loss"], settings["beta"]
    u, measured, sides, unit = rows["implicit_reward"], rows["weight"], rows["kind"], ""
    if loss in MARGINS:
        u, measured = [a - b for a, b in zip(u[::2], u[1::2], strict=True)], measured[::2]
        sides, unit = ["plain"] * len(u), "margin of the pair"
    low, high = charts.spread([-3, 3, *u])
    line = [low + (high - low) * i / 100 for i in range(101)]
    curves = {("chosen", "theory"): lambda x: MARGINS[loss](x, beta, settings["label_smoothing"])
              } if loss in MARGINS else {
        (side, f"theory, r = {r}"): lambda x, r=r: WEIGHTS[loss](sigmoid(x), r, beta)
        for r, side in ((1, "chosen"), (0, "rejected"))
        if loss in WEIGHTS and (r or min(rows["reward"]) < 1)}
    marks = [Mark("dashes", key[0], [(x, curve(x)) for x in line]) for key, curve in curves.items()]
    shown = [kind for kind in (*KINDS, "plain") if kind in sides]
    marks += [Mark("rows", kind, [(x, y) for x, y, k in zip(u, measured, sides, strict=True)
                                  if k == kind]) for kind in shown]
    keys = [(kind, "pair" if kind == "plain" else kind) for kind in shown]
    axes = Frame(charts.spread(line), charts.spread([0, *(p[1] for m in marks for p in m.points)]))
    return charts.chart(
        "Weight of a row", (unit or "implicit reward", "|dL/dlogps|"), marks, keys + list(curves),
        "Good: dots lie on the curve of their target, or between both, and where it is high while "
        "rows still have to move. Bad: on a flat end, far from the target: such rows are given up.",
        axes)


def of_rows(rows: dict, settings: dict) -> str:
    """The charts of held-out rows, as anatomy.py leaves them; "" where there are none."""
    if not rows:
        return ""
    return calibration(rows) + by_position(rows) + (
        weight(rows, settings) if "weight" in rows else "")
