"""The page of a run: report.html, one file without scripts, made from what lies in its folder.

config.json, metrics.jsonl and results.json say all that it shows; `escape` is for what users wrote.

    python page.py runs/0001
"""
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

import durable
from command import Parser, stop
from config import REPEATED, Config

KINDS = ("sft", "scored", "chosen", "rejected", "sampled")
CHARTS = (("Reward", "what sampled responses earn", ("reward",)),
          ("Divergence", "nats a response, from the reference", ("kl",)),
          ("Length", "tokens of a response", ("completions/mean_length",)),
          ("Loss", "what a step minimises", ("loss",)),
          ("Implicit reward", "beta log(policy / reference)", tuple(f"rewards/{k}" for k in KINDS)),
          ("Log-prob change", "nats above the reference", tuple(f"dlogp/{k}" for k in KINDS)),
          ("Log-prob", "nats", tuple(f"logps/{k}" for k in KINDS)),
          ("Gradient norm", "before clipping", ("grad_norm",)),
          ("Learning rate", "", ("learning_rate",)))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 12, 24, 40  # of a chart, in its own units
DRAWN = 500  # points of a curve, at most
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2027; --soft: #59636e; --line: #d5dae0;
  --box: #f4f6f8; --plain: #3d4f66; --sft: #0867b5; --scored: #8136b3; --chosen: #08784f;
  --rejected: #bd3f0a; --sampled: #8136b3 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7eaee; --soft: #a0abb6;
  --line: #39414a; --box: #1d2228; --plain: #a9bdd6; --sft: #62b4f5; --scored: #d1a0f2;
  --chosen: #40d19a; --rejected: #ff9364; --sampled: #d1a0f2 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem }
p, ul { margin: .4rem 0 } ul { padding-left: 1.2rem } small, .key { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .4rem; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal }
th:first-child { text-align: left; padding-left: 0; overflow-wrap: break-word }
tbody th { font-weight: 400 }
.grid { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.wide { overflow-x: auto }
.box { background: var(--box); border-radius: 6px; padding: .7rem .9rem; margin: .7rem 0 }
.box p, pre { white-space: pre-wrap } .box .grid { gap: 0 1.5rem } pre { font-size: .85rem }
.right { color: var(--chosen) } .wrong { color: var(--rejected) }
figure { margin: 0 } figcaption b, .key { margin-right: .6rem } .key { white-space: nowrap }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif }
.settings { columns: 15rem; font-size: .85rem; list-style: none; padding: 0 }
figure, tr, .box, li { break-inside: avoid } h2 { break-after: avoid }
@media (max-width: 34rem) { table, .key { font-size: .8rem } th, td { padding: .3rem .2rem } }
@media print { body { font-size: .75rem; padding: 0 } .grid { grid-template-columns: 1fr 1fr } }
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts; the first of a row names it."""
    top = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>'
                   + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>\n"
                   for name, *rest in rows)
    return (f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody>'
            "</table></div>")


def tests_table(tests: dict) -> str:
    """Tests at start and end in percent; change and interval in points."""
    rows = [(name, f"{g['before']:.1%}", f"{g['after']:.1%}", f"{100 * g['change']:+.1f}",
             " to ".join(f"{100 * x:+.1f}" for x in g["interval"] or ()) or "unknown", str(g["n"]))
            for name, g in tests.items()]
    return table(("test", "start", "end", "change", "95% interval", "n"), rows)


def held_out_table(before: dict, after: dict) -> str:
    rows = [(name, f"{before[name]:.4f}", f"{end:.4f}", f"{end - before[name]:+.4f}")
            for name, end in sorted(after.items())]
    return table(("held out", "start", "end", "change"), rows)


def sample(shown: dict) -> str:
    """A prompt with its two answers, each right, wrong, or not judged."""
    parts = []
    for when in ("before", "after"):
        mark = {None: "", True: "right", False: "wrong"}[shown[f"right_{when}"]]
        parts.append(f'<div><small>{when} <b class="{mark}">{mark}</b></small>'
                     f"<p>{escape(shown[when]) or '<small>(empty)</small>'}</p></div>")
    return (f'<div class="box"><small>prompt</small><p>{escape(shown["prompt"])}</p>'
            f'<div class="grid">{"".join(parts)}</div></div>')


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, seven at most."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of an axis: a little beyond the values, and never of no length."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(high) / 2 or 1.0
    return low - room, high + room


def curve(rows: Sequence[dict], name: str) -> list[tuple[float, float, float]]:
    """(step, value, mean of the latest tenth of values) wherever a metric is finite; a
    learning rate is its own mean. Thinned from the end, which stays, to about DRAWN points."""
    points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.inf))]
    back = 1 if name == "learning_rate" else max(1, len(points) // 10)
    out = []
    for i, (step, value) in enumerate(points):
        latest = [v for _, v in points[max(0, i + 1 - back) : i + 1]]
        out.append((step, value, sum(latest) / len(latest)))
    return out[:: -max(1, math.ceil(len(out) / DRAWN))][::-1]


def bounds(curves: dict[str, list]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges of both axes: every step; every mean, and 96 in 100 values."""
    points = [p for points in curves.values() for p in points]
    values, out = sorted(v for _, v, _ in points), len(points) // 50
    return (spread([s for s, _, _ in points]),
            spread([*values[out : len(values) - out], *(mean for _, _, mean in points)]))


def chart(title: str, unit: str, curves: dict[str, list]) -> str:
    """A figure: a dot for a value, a line for the means, and in the key the latest mean."""
    (x0, x1), (y0, y1) = bounds(curves)
    across, up = (WIDTH - LEFT - RIGHT) / (x1 - x0), (HEIGHT - TOP - BOTTOM) / (y1 - y0)
    drawn, keys = f'<text x="{LEFT}" y="14">{escape(unit)}</text>', ""
    for value in ticks(y0, y1):
        y = HEIGHT - BOTTOM - (value - y0) * up
        drawn += (f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--line)" '
                  f'stroke-width="{1 + (value == 0)}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                  f'text-anchor="end">{value:g}</text>')
    for value in (v for v in ticks(x0, x1) if v == round(v)):
        drawn += (f'<text x="{LEFT + (value - x0) * across:.1f}" y="{HEIGHT - BOTTOM + 18}" '
                  f'text-anchor="middle">{value:.0f}</text>')
    drawn += f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
    for name, points in curves.items():
        kind = name.rpartition("/")[2]
        color = f"var(--{kind if kind in KINDS else 'plain'})"
        dots, means = ([f"{LEFT + (p[0] - x0) * across:.1f} "
                        f"{HEIGHT - BOTTOM - (p[i] - y0) * up:.1f}" for p in points
                        if y0 <= p[i] <= y1] for i in (1, 2))
        drawn += (f'<g fill="none" stroke="{color}" stroke-linecap="round"><path d="M'
                  f'{"h0M".join(dots)}h0" stroke-width="3" opacity=".35"/><path d="M'
                  f'{"L".join(means)}h0" stroke-width="2"/></g>')
        keys += (f'<span class="key"><span style="color:{color}">&#9632;</span> {escape(name)} '
                 f"{points[-1][2]:.4g}</span> ")
    return (f'<figure><figcaption><b>{escape(title)}</b> {keys}</figcaption>\n<svg viewBox="0 0 '
            f'{WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg></figure>\n')


def charts(rows: Sequence[dict]) -> str:
    """Every chart whose metrics were logged; log-probs only where there is no reference."""
    out = ""
    for title, unit, names in CHARTS:
        curves = {name: points for name in names if (points := curve(rows, name))}
        if curves and not (title == "Log-prob" and "Log-prob change" in out):
            out += chart(title, unit, curves)
    return (f'<h2>Curves</h2><div class="grid">{out}</div><p><small>A dot is a step; a line, and '
            "the number in its key, is the mean of the latest tenth of all steps. The 4 dots "
            "in 100 that lie furthest out may be beyond an axis.</small></p>") if out else ""


def command(settings: dict) -> str:
    """The command line that starts the run anew: every flag that is not at its default."""
    words = ["python", "train.py"]
    for f in fields(Config):
        value = settings.get(f.name, f.default)
        value = tuple(value) if isinstance(value, list) else value
        texts = [",".join(map(str, value))] if isinstance(value, tuple) else [
            str(value).lower() if isinstance(value, bool) else str(value)]
        if value != f.default and f.name not in ("out", "resume"):
            for text in value if f.name in REPEATED else texts:
                flag = f"--{f.name}"
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)


def body(settings: dict, rows: Sequence[dict], results: dict) -> str:
    """The sections of the page, each left out where the run has nothing for it."""
    held, seconds = results.get("held_out", {}), results.get("seconds")
    verdict = results.get("verdict", "no results.json: the run goes on, or was stopped")
    about = [f"{len(rows)} step{'s' * (len(rows) != 1)} of {settings['batch_size']}",
             f"beta {settings['beta']:g}", f"learning rate {settings['lr']:g}",
             f"seed {settings['seed']}", *([f"{seconds:.0f} seconds"] if seconds else []),
             ", ".join(settings["data"])]
    listed = "".join(f"<li>{escape(name)} <b>{escape(json.dumps(value))}</b></li>\n"
                     for name, value in settings.items())
    parts = (
        f"<h1>{escape(title(settings))}</h1><p><small>{escape('; '.join(about))}</small></p>",
        "<ul>" + "".join(f"<li>{escape(v)}</li>" for v in verdict.split("; ") if v) + "</ul>",
        "<h2>Tests</h2>" + tests_table(results["tests"]) if results.get("tests") else "",
        "<h2>Samples</h2>" + "".join(map(sample, results["samples"]))
        if results.get("samples") else "", charts(rows),
        "<h2>Held-out rows</h2>" + held_out_table(**held) if held.get("after") else "",
        f'<h2>Command</h2><pre class="box">{escape(command(settings))}</pre>',
        f'<h2>Settings</h2><ul class="settings">{listed}</ul>')
    return "\n".join(part for part in parts if part)


def title(settings: dict) -> str:
    return f"{settings['loss']} on {Path(settings['model']).name or settings['model']}"


def write(run: str | Path) -> Path:
    """Makes RUN/report.html and returns its path.   ValueError where RUN is no run folder."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json; give a folder of runs/")
    settings = json.loads((run / "config.json").read_text("utf-8"))
    log, found = run / "metrics.jsonl", run / "results.json"
    lines = log.read_text("utf-8").split("\n")[:-1] if log.is_file() else []  # a kill cuts one
    results = json.loads(found.read_text("utf-8")) if found.is_file() else {}
    durable.write(
        run / "report.html", '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title(settings))}</title><style>{STYLE}</style></head>\n<body>\n"
        f"{body(settings, list(map(json.loads, lines)), results)}\n</body></html>\n")
    return run / "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("page.py", description="Makes report.html of a run again.")
    parser.add_argument("run", help="run folder, such as runs/0001")
    args = parser.parse_args(argv)
    try:
        print(write(args.run))
    except (ValueError, OSError) as error:
        stop("page.py", error)


if __name__ == "__main__":
    main()
