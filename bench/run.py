"""Runs every driver in turn, several times, and writes results.json and results.md beside it.

    make bench                                      everything, in .venv-peers
    python -m bench.run --tasks uft --dtype float32 --repeat 1 --out runs/bench
    python -m bench.run --table                     the page of what was measured so far

One process a run, the drivers of one setting one after another and all of it REPEAT times, so that
a ratio pairs runs that lie next to each other in time. Lines go to runs/bench/lines.jsonl at once:
a run that was stopped goes on, and lines that other sources measured are left aside. This process
stays small on purpose: Linux hands its peak memory on to its children.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/bench")
PROGRAMS = {
    "ours": ("ours",), "ours, cached": ("ours", "--cached"),
    "loop, full head": ("peer_loop", "--head", "full"),
    "loop, response head": ("peer_loop", "--head", "response"),
    "TRL": ("peer_trl",), "TRL, padding free": ("peer_trl", "--padding_free"),
    "TRL, cached": ("peer_trl", "--cached"),
    "floor": ("floor",), "floor, cached": ("floor", "--cached"),
    "floor, shared": ("floor", "--shared"),
    "floor, shared, cached": ("floor", "--shared", "--cached")}


class Comparison(NamedTuple):
    """Two drivers on the same work; the right one is a peer or a floor."""

    task: str
    left: str
    right: str
    title: str = ""


COMPARISONS = (
    Comparison("uft", "ours", "loop, full head", "UFT against a plain transformers + PEFT loop"),
    Comparison("uft", "ours", "loop, response head", "UFT against the loop with the head on "
               "response positions only"),
    Comparison("sft", "ours", "TRL", "SFT against TRL, padded"),
    Comparison("sft", "ours", "TRL, padding free", "SFT against TRL, padding free"),
    Comparison("dpo", "ours", "TRL", "DPO against TRL, reference in the step"),
    Comparison("dpo", "ours, cached", "TRL, cached", "DPO against TRL, reference cached by both"),
    Comparison("kto", "ours", "TRL", "KTO against TRL, reference in the step"),
    Comparison("kto", "ours, cached", "TRL, cached", "KTO against TRL, reference cached by both"),
    *(Comparison(task, "ours", "floor") for task in ("uft", "sft", "dpo", "kto")),
    *(Comparison(task, "ours, cached", "floor, cached") for task in ("dpo", "kto")),
    Comparison("dpo", "ours", "floor, shared"),
    Comparison("dpo", "ours, cached", "floor, shared, cached"))
WIDE = {("sft", "ours"), ("sft", "TRL"), ("sft", "floor"), ("dpo", "ours"), ("dpo", "TRL"),
        ("dpo", "floor"), ("dpo", "floor, shared")}  # what the wide vocabulary is measured with
TASKS, MODELS, DTYPES = ("uft", "sft", "dpo", "kto"), ("small", "wide"), ("float32", "bfloat16")
MEASURES = ("tokens_per_cpu_second", "tokens_per_second", "peak_mib", "setup_seconds")
KEY = ("model", "task", "dtype", "checkpointing", "driver")
SECONDS = {("small", "uft"): 25, ("small", "sft"): 25, ("small", "dpo"): 50, ("small", "kto"): 40,
           ("wide", "sft"): 70, ("wide", "dpo"): 200}  # of a process of 8 steps, roughly


def source() -> int:
    """A fingerprint of all code that a measurement depends on."""
    files = [*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]
    text = [p.read_bytes() for p in sorted(files) if p.name != Path(__file__).name]
    return zlib.crc32(b"".join(text))


def drivers(task: str, model: str) -> list[str]:
    """Names of PROGRAMS that are compared at this task, each once, ours first."""
    names = dict.fromkeys(n for c in COMPARISONS if c.task == task for n in (c.left, c.right))
    return [n for n in names if model != "wide" or (task, n) in WIDE]


def minutes(todo: list[dict]) -> float:
    """Roughly what these processes will take; a floor takes no time."""
    return sum(SECONDS[j["model"], j["task"]] * j["steps"] / 8 for j in todo
               if not j["driver"].startswith("floor")) / 60


def jobs(options: argparse.Namespace) -> Iterator[dict]:
    """Every process to run, in order: what a line says of its setting, and `repeat`."""
    for repeat in range(options.repeat):
        for model in options.models:
            for task in (t for t in options.tasks if drivers(t, model)):
                for checkpointing in options.checkpointing:
                    for dtype in options.dtype:
                        for driver in drivers(task, model):
                            yield {"model": model, "task": task, "dtype": dtype,
                                   "checkpointing": checkpointing == "on", "driver": driver,
                                   "steps": options.steps, "repeat": repeat}


def environment(home: str) -> dict[str, str]:
    """The same for every driver: two threads that sleep when idle, nothing fetched or cached."""
    return os.environ | {
        "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false", "HF_HOME": home, "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


def measure(job: dict) -> dict:
    """The line of one process, or its `error`."""
    module, *flags = PROGRAMS[job["driver"]]
    command = [sys.executable, "-m", f"bench.{module}", "--model", str(FOLDER / job["model"]),
               "--task", job["task"], "--dtype", job["dtype"], "--steps", str(job["steps"]),
               *flags, *["--checkpointing"] * job["checkpointing"]]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        run = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True,
                             text=True, check=False)
    line = {"error": run.stderr[-400:]} if run.returncode else json.loads(
        run.stdout.strip().splitlines()[-1])
    return shortened(job | line | {"process_seconds": time.perf_counter() - began})


def shortened(value: object) -> object:
    """Floats to six digits, also inside lists and dicts."""
    if isinstance(value, dict):
        return {k: shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shortened(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_lines(path: Path, stamp: int, steps: int) -> list[dict]:
    """The lines that these sources have measured with this number of steps, failures left out."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [d for d in found if d.pop("source") == stamp and d["steps"] == steps
            and "error" not in d]


def why_void(left: dict, right: dict) -> str:
    """"" where both ran the same rows and began with the same loss; else what differs."""
    if "rows" not in left or "rows" not in right:
        return ""  # a floor has no loss
    if left["rows"] != right["rows"]:
        return "the rows differ"
    a, b = left["losses"][0], right["losses"][0]
    return "" if abs(a - b) <= 1e-3 * max(1, abs(a)) else f"first losses {a:g} and {b:g}"


def compare(runs: list[dict]) -> list[dict]:
    """A row per comparison and setting, from runs paired by `repeat`.

    `ratios` are left / right as [median, least, most] over the pairs; `left_medians` and
    `right_medians` the medians of the measures themselves; `void` says why a row does not count.
    """
    settings = dict.fromkeys(tuple(d[k] for k in KEY[:4]) for d in runs)
    by = {(*(d[k] for k in KEY), d["repeat"]): d for d in runs}
    out = []
    for task, left, right, title in COMPARISONS:
        for setting in (s for s in settings if s[1] == task):
            found = [(by.get((*setting, left, i)), by.get((*setting, right, i)))
                     for i in sorted({d["repeat"] for d in runs})]
            if not (both := [(a, b) for a, b in found if a and b]):
                continue
            keys = [k for k in MEASURES if k in both[0][1]]
            ratios = {k: [a[k] / b[k] for a, b in both] for k in keys}
            out.append(dict(zip(KEY[:4], setting, strict=True)) | {
                "left": left, "right": right, "title": title, "pairs": len(both),
                "void": next((v for a, b in both if (v := why_void(a, b))), ""),
                "ratios": {k: [f(r) for f in (median, min, max)] for k, r in ratios.items()},
                "left_medians": {k: median(a[k] for a, _ in both) for k in keys},
                "right_medians": {k: median(b[k] for _, b in both) for k in keys}})
    return out


def machine() -> dict:
    """What a reader must know to place the figures."""
    said = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    cpu = next((s.partition(":")[2].strip() for s in said if s.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("torch", "transformers", "peft", "trl", "tokenizers")
    return {"cores": os.cpu_count(), "cpu": cpu, "memory_gib": round(memory),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in names}}


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def named(row: dict) -> str:
    return f"{row['model']}, {'bf16' if row['dtype'] == 'bfloat16' else 'fp32'}" + (
        ", checkpointing" * row["checkpointing"])


def comparison_row(row: dict) -> list[str]:
    """One line of a comparison's table: the ratios, then both absolute figures."""
    cells = [named(row)]
    for name in MEASURES:
        mid, low, high = row["ratios"][name]
        spread = f" ({low:.2f}..{high:.2f})" if name == MEASURES[0] else ""
        cells.append("void" if row["void"] else f"{mid:.2f}{spread}")
    for name in (MEASURES[0], MEASURES[2], MEASURES[3]):
        shape = ".1f" if name == "setup_seconds" else ".0f"
        cells.append(" / ".join(format(row[f"{side}_medians"][name], shape)
                                for side in ("left", "right")))
    return cells


def floor_row(row: dict) -> list[str]:
    ours, least = (row[f"{side}_medians"][MEASURES[0]] for side in ("left", "right"))
    return [f"{row['task']}, {named(row)}", row["left"], row["right"], f"{ours:.0f}",
            f"{least:.0f}", f"{row['ratios'][MEASURES[0]][0]:.2f}"]


def yardsticks(runs: list[dict]) -> str:
    """How fast the machine multiplied while these runs took turns, per dtype."""
    found = {}
    for run in runs:
        found.setdefault(run["dtype"], []).extend(run.get("gflops_per_cpu_second", []))
    return ", ".join(f"{dtype} {min(rates):.0f} to {max(rates):.0f}"
                     for dtype, rates in found.items() if rates)


def page(record: dict) -> str:
    """results.md, a function of results.json alone."""
    m, rows = record["machine"], record["comparisons"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    told = {"command": record["command"], "steps": record["steps"], "warm": record["steps"] - 2,
            "pairs": max((r["pairs"] for r in rows), default=0), "versions": versions,
            "yardsticks": yardsticks(record["runs"])}
    parts = [OPENING.format(**m | told)]
    heads = ["model", "tokens per CPU-second", "tokens per second", "peak memory", "set-up",
             "tokens per CPU-second, ours / peer", "peak MiB", "set-up, seconds"]
    for title in dict.fromkeys(c.title for c in COMPARISONS if c.title):
        if found := [r for r in rows if r["title"] == title]:
            parts.append(f"## {title}\n\n" + table(heads, [comparison_row(r) for r in found]))
            parts += [f"Void: {named(r)}: {r['void']}.\n" for r in found if r["void"]]
    if floors := [r for r in rows if not r["title"]]:
        heads = ["work", "driver", "floor", "tokens per CPU-second", "at the floor", "ours / floor"]
        parts.append(FLOOR + table(heads, [floor_row(r) for r in floors]))
    return "\n".join(parts)


OPENING = """# Speed and memory of a training step

```
{command}
```
{cores} cores ({cpu}), {memory_gib} GiB, Python {python}, {versions}.

Ours against the standard stack: the same checkpoint, rows in the same order, 4 rows (or pairs) a
step, LoRA r=16 on all seven linear layers, AdamW, no clipping, two threads. Each run is a process
of {steps} steps, of which the last {warm} count; runs of a setting take turns, up to {pairs} times.
`small` is a Qwen2 of 25 million weights and 8192 tokens of vocabulary, `wide` has the proportions
of Qwen2.5-0.5B: 151936 tokens on a hidden size of 320. bf16 is a bfloat16 base with float32
adapters, for the peers under autocast. Tokens are those of the rows, without padding and without
KTO's mismatched rows, on both sides.

The first four columns are ours / peer: medians of paired runs, in brackets the least and the most.
Above 1 is better for tokens, below 1 for memory (the process's peak) and for set-up (from the
start of the process to the first step). A comparison is void where the rows differ or the first
losses by more than .001 of max(1, loss). The speed of the machine moved meanwhile: GFLOP per
CPU-second of a matmul, taken in every process before and after its steps: {yardsticks}.
"""
FLOOR = """## The floor

What the needed multiplications alone would take at this machine's measured matmul rate
([`bench/floor.py`](floor.py) counts them); no padding and nothing elementwise. `shared` runs the
prompt of a pair once, `cached` has the reference's log-probs.

"""


def write(record: dict, folder: Path) -> None:
    """folder/results.json, one run a line, and folder/results.md."""
    lines = {k: json.dumps(v) for k, v in record.items()}
    for name in ("runs", "comparisons"):
        lines[name] = "[\n" + ",\n".join(json.dumps(d) for d in record[name]) + "\n]"
    folder.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f'"{name}": {value}' for name, value in lines.items())
    (folder / "results.json").write_text("{" + text + "}\n", "utf-8")
    (folder / "results.md").write_text(page(record), "utf-8")


def parse() -> argparse.Namespace:
    """The command line; what is left out of a selection is everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, choices in (("tasks", TASKS), ("models", MODELS), ("dtype", DTYPES),
                          ("checkpointing", ("off", "on"))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of which 2 do not count")
    parser.add_argument("--out", type=Path, default=ROOT / "bench", help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print the page so far, run nothing")
    return parser.parse_args()


def run_all(todo: list[dict], lines: Path, stamp: int) -> int:
    """Measures each job and appends its line; returns how many failed."""
    failed = 0
    for number, job in enumerate(todo, 1):
        line = measure(job)
        failed += "error" in line
        with open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"source": stamp}) + "\n")
        print(f"{number}/{len(todo)}  {named(job)}, {job['task']}, {job['driver']}: "
              f"{line.get('tokens_per_cpu_second', line.get('error'))}", flush=True)
    return failed


def main() -> None:
    options, lines, stamp = parse(), ROOT / FOLDER / "lines.jsonl", source()
    runs = read_lines(lines, stamp, options.steps)
    done = {(*(d[k] for k in KEY), d["repeat"]) for d in runs}
    todo = [j for j in jobs(options) if (*(j[k] for k in KEY), j["repeat"]) not in done]
    if not options.table:
        print(f"{len(todo)} runs to do, about {minutes(todo):.0f} minutes", flush=True)
        subprocess.run([sys.executable, "-m", "bench.work", *options.models], cwd=ROOT, check=True)
        failed = run_all(todo, lines, stamp)
        runs = read_lines(lines, stamp, options.steps)
    record = {"command": "make bench", "machine": machine(), "steps": options.steps, "runs": runs,
              "comparisons": shortened(compare(runs))}
    if options.table:
        print(page(record))
    else:
        write(record, options.out)
        sys.exit(f"{failed} runs failed, see {lines}; the same command tries them again"
                 if failed else 0)


if __name__ == "__main__":
    main()
