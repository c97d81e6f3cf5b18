"""Several runs on one page: what differs in their settings, their results, and each curve.

    python -m lab.compare runs/0001 runs/0002 [--out compare.html]

The interval of a test's end is start plus change: runs of one model start alike.
"""
from collections.abc import Sequence
from html import escape
from pathlib import Path

import charts
import curves
import durable
import page
from charts import Mark
from command import Parser, stop

COLORS = ("sft", "rejected", "chosen", "scored", "plain", "ochre", "rose", "teal")
HELD_OUT = {"reward": "highest", "rewards/accuracies": "highest", "score_mse": "lowest",
            "nll_per_token": "lowest"}
APART = ("held-out numbers do not compare: the runs hold out different rows, begin with different "
         "models, or hold out nothing")
Runs = dict[str, tuple[dict, list[dict], dict]]  # name: what page.read gives


def read(paths: Sequence[str]) -> Runs:
    """Runs by the name of their folder, or by path where two share that."""
    paths = list(dict.fromkeys(paths))
    if not 2 <= len(paths) <= len(COLORS):
        raise ValueError(f"found {len(paths)} runs, expected 2 to {len(COLORS)} different ones")
    names = [Path(p).resolve().name for p in paths]
    return {name if names.count(name) == 1 else path: page.read(path)
            for name, path in zip(names, paths, strict=True)}


def differing(runs: Runs) -> list[list[str]]:
    """The settings that are not the same in every run, but for where it was written."""
    every = [settings for settings, *_ in runs.values()]
    names = [n for n in dict.fromkeys(n for s in every for n in s) if n not in ("out", "resume")]
    rows = [(n, [s.get(n) for s in every]) for n in names]
    return [[n, *(", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values)]
            for n, values in rows if any(v != values[0] for v in values)]


def ends(gain: dict) -> tuple[float, float]:
    """The 95% interval of a test's end, everything where it has none."""
    low, high = gain["interval"] or (-1, 1)
    return gain["before"] + low, gain["before"] + high


def percent(gain: dict | None) -> str:
    if gain is None:
        return ""
    known = " to ".join(f"{100 * x:.1f}" for x in ends(gain)) if gain["interval"] else "unknown"
    return f"{gain['after']:.1%} ({known})"


def same_start(runs: Runs) -> bool:
    """Whether all began with the same log-probs, targets and rewards of the held-out rows."""
    before = [results.get("held_out", {}).get("before", {}) for *_, results in runs.values()]
    starts = [{k: round(v, 4) for k, v in b.items() if k.startswith(("logps/", "target/"))
               or k == "reward"} for b in before]
    return any(starts) and all(s == starts[0] for s in starts)


def judge(name: str, gains: dict[str, dict]) -> str:
    """Who ended highest in a test, and whether its interval lies above all others'."""
    top = max(g["after"] for g in gains.values())
    first = [run for run, g in gains.items() if g["after"] == top]
    near = [run for run, g in gains.items()
            if run not in first and ends(g)[1] >= ends(gains[first[0]])[0]]
    how = ("alike" if len(first) > 1 else "its 95% interval lies above every other" if not near
           else f"the 95% intervals do not separate it from {', '.join(near)}")
    return f"{' and '.join(first)} ended highest in {name}, {top:.1%}; {how}"


def verdict(runs: Runs) -> list[str]:
    """A sentence for each test that two runs were given, and for what held-out rows tell."""
    tests = {run: results.get("tests", {}) for run, (*_, results) in runs.items()}
    out = []
    for name in dict.fromkeys(n for some in tests.values() for n in some):
        gains = {run: some[name] for run, some in tests.items() if name in some}
        out += [judge(name, gains)] if len(gains) > 1 else []
    if not same_start(runs):
        return [*out, APART]
    after = {run: results["held_out"]["after"] for run, (*_, results) in runs.items()}
    for name, word in HELD_OUT.items():
        if all(name in numbers for numbers in after.values()):
            value, run = (max if word == "highest" else min)(
                (numbers[name], run) for run, numbers in after.items())
            out.append(f"{run} ended {word} in held-out {name}, {value:.4f} (no interval)")
    return out


def tables(runs: Runs) -> str:
    """Settings that differ, tests, lengths and held-out numbers, a column for each run."""
    found = [results for *_, results in runs.values()]
    rows = {"Settings that differ": differing(runs)}
    for head, of in (("Tests: end (95% interval)", lambda r: r.get("tests", {})),
                     ("Tokens of an answer", lambda r: r.get("lengths", {}).get("after", {})),
                     ("Held-out rows: end", lambda r: r.get("held_out", {}).get("after", {}))):
        show = percent if "Tests" in head else lambda v: "" if v is None else f"{v:.4g}"
        names = dict.fromkeys(n for r in found for n in of(r))
        rows[head] = [[n, *(show(of(r).get(n)) for r in found)] for n in names]
    return "".join(f'<h2>{head}</h2>\n<div class="any">{page.table(("", *runs), some)}</div>\n'
                   for head, some in rows.items() if some)


def overlaid(runs: Runs) -> str:
    """A chart for every metric that two runs logged: one line, and colour, a run. The loss only
    where all runs have the same, at the same beta."""
    out, losses = "", {(settings["loss"], settings["beta"]) for settings, *_ in runs.values()}
    for title, unit, names, note in curves.CHARTS:
        for name in names:
            lines = [(color, run, found) for color, (run, (_, rows, _)) in zip(
                COLORS, runs.items(), strict=False) if (found := charts.curve(rows, name))]
            if len(lines) > 1 and (title != "Loss" or len(losses) == 1):
                marks = [Mark("line", color, charts.smooth(points)) for color, _, points in lines]
                keys = [(color, f"{run} {points[-1][2]:.4g}") for color, run, points in lines]
                kind = f": {curves.color(name)}" if len(names) > 1 else ""
                out += charts.chart(title + kind, ("step", unit), marks, keys, note)
    return page.section("Curves", "Means of the latest tenth of all steps.", out)


def body(runs: Runs) -> str:
    """The page: who ended highest, what differs, results, curves."""
    listed = "".join(f'<li><span style="color:var(--{color})">&#9632;</span> <b>{escape(name)}</b> '
                     f"{escape(page.title(settings))}, {len(rows)} steps</li>\n" for color, (
                         name, (settings, rows, _)) in zip(COLORS, runs.items(), strict=False))
    said = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in verdict(runs))
    return (f'<h1>{len(runs)} runs</h1><ul class="runs">{listed}</ul>\n<ul>{said}</ul>\n'
            f"{tables(runs)}\n{overlaid(runs)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("lab.compare", description="One page of several runs.")
    parser.add_argument("runs", nargs="+", help="run folders, such as runs/0001")
    parser.add_argument("--out", default="compare.html", help="where the page is written")
    args = parser.parse_args(argv)
    try:
        runs = read(args.runs)
        durable.write(Path(args.out), page.document(f"{len(runs)} runs", body(runs)))
        print("\n".join([*verdict(runs), args.out]))
    except (ValueError, OSError) as error:
        stop("lab.compare", error)


if __name__ == "__main__":
    main()
