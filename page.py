"""The page of a run: report.html, one file without scripts, made from what lies in its folder.

config.json, metrics.jsonl and results.json say all that it shows; `escape` is for what users wrote.

    python page.py runs/0001
"""
import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

import curves
import durable
from command import Parser, stop
from config import REPEATED, Config

CURVES = ("A dot is a step; a line, and the number in its key, is the mean of the latest tenth of "
          "all steps. Between the edges of a band lie 8 in 10 rows of a step, on the same mean. "
          "Dashed: the loss of the reference, and of the best policy that gives every row the same "
          "implicit reward. The 4 dots in 100 that lie furthest out may "
          "be beyond an axis.")
ROWS = ("At the end of training, a dot for each row. Bands hold 8 in 10 rows; the weights are "
        "taken by autograd, the dashed curves are the formulas of losses.py.")
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2027; --soft: #59636e; --line: #d5dae0;
  --box: #f4f6f8; --plain: #3d4f66; --sft: #0867b5; --scored: #8136b3; --chosen: #08784f;
  --rejected: #bd3f0a; --sampled: #8136b3; --ochre: #8a6a00; --rose: #b3216c; --teal: #00777f }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7eaee; --soft: #a0abb6;
  --line: #39414a; --box: #1d2228; --plain: #a9bdd6; --sft: #62b4f5; --scored: #d1a0f2;
  --chosen: #40d19a; --rejected: #ff9364; --sampled: #d1a0f2; --ochre: #dcb73f; --rose: #f587b9;
  --teal: #46c9d3 } }
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
.any table { table-layout: fixed } .any td { overflow-wrap: anywhere }
.any th:first-child { width: 24% }
.grid { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.wide { overflow-x: auto }
.box { background: var(--box); border-radius: 6px; padding: .7rem .9rem; margin: .7rem 0 }
.box p, pre { white-space: pre-wrap } .box .grid { gap: 0 1.5rem } pre { font-size: .85rem }
.right { color: var(--chosen) } .wrong { color: var(--rejected) }
figure { margin: 0 } figcaption b, .key { margin-right: .6rem } .key { white-space: nowrap }
svg { display: block; width: 100%; height: auto }
.dots, .rows, .line, .dashes { fill: none; stroke-linecap: round; stroke-width: 2 }
.dots { stroke-width: 3; opacity: .4 } .rows { stroke-width: 5; opacity: .65 }
.dashes { stroke-dasharray: 5 5 } .band { opacity: .16 }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif }
.label { paint-order: stroke; stroke: var(--paper); stroke-width: 5px }
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


def lengths_table(before: dict, after: dict) -> str:
    """Mean tokens of the greedy answers to each test, or of the samples."""
    rows = [(name, f"{before[name]:.1f}", f"{end:.1f}", f"{end - before[name]:+.1f}")
            for name, end in after.items()]
    return table(("tokens of an answer", "start", "end", "change"), rows)


def section(head: str, note: str, figures: str) -> str:
    """Charts below a heading, "" where there are none."""
    return (f'<h2>{head}</h2><div class="grid">{figures}</div><p><small>{note}</small></p>'
            if figures else "")


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
    held, lengths, looked = (results.get(name, {}) for name in ("held_out", "lengths", "rows"))
    seconds = results.get("seconds")
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
        if results.get("samples") else "",
        "<h2>Length of answers</h2>" + lengths_table(**lengths) if lengths.get("after") else "",
        section("Curves", CURVES, curves.over_steps(rows, settings, looked)),
        section("Held-out rows, one by one", ROWS, curves.of_rows(looked, settings)),
        "<h2>Held-out rows</h2>" + held_out_table(**held) if held.get("after") else "",
        f'<h2>Command</h2><pre class="box">{escape(command(settings))}</pre>',
        f'<h2>Settings</h2><ul class="settings">{listed}</ul>')
    return "\n".join(part for part in parts if part)


def title(settings: dict) -> str:
    return f"{settings['loss']} on {Path(settings['model']).name or settings['model']}"


def read(run: str | Path) -> tuple[dict, list[dict], dict]:
    """(settings, metrics of every step, results).   ValueError where RUN is no run folder."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json; give a folder of runs/")
    settings = json.loads((run / "config.json").read_text("utf-8"))
    log, found = run / "metrics.jsonl", run / "results.json"
    lines = log.read_text("utf-8").split("\n")[:-1] if log.is_file() else []  # a kill cuts one
    results = json.loads(found.read_text("utf-8")) if found.is_file() else {}
    return settings, list(map(json.loads, lines)), results


def document(title: str, body: str) -> str:
    """The whole file around a body."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
            f"{body}\n</body></html>\n")


def write(run: str | Path) -> Path:
    """Makes RUN/report.html and returns its path."""
    settings, rows, results = read(run)
    out = Path(run) / "report.html"
    durable.write(out, document(title(settings), body(settings, rows, results)))
    return out


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
