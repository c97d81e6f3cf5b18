"""How memory and time grow with length, vocabulary, rows a step, rows of a file and a checkpoint.

    python -m bench.scaling                                 everything but loading
    python -m bench.scaling --parts load --load 7b          writes 14 GB under runs/, deletes them

One process a point. Its memory is what /proc/self/status says (Linux): the peak since the marks
were cleared, what is resident, and how much of that is anonymous or a mapped file. Pages of a
mapped file count as resident while they are in use, but they are the kernel's one copy of the
file: other processes share them, and they are dropped, not swapped, when memory is short.
Anonymous memory is the process's own; a checkpoint that is copied while it loads shows there.
A step is UFT's on `small` in float32, LoRA r=16 and the reference in the step, half of every row
response. The JSON file keeps parts that are not measured again.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import mixture
import model
import tokens
import train
from bench import large, run, work
from config import Config

REPEAT = 3  # steps of a point: memory is the peak of all, time the least without the first
STEP = {"rows": 1, "length": 1024, "micro_batch_tokens": 8192}
SETTINGS = {"length": STEP, "vocabulary": STEP,
            "rows": STEP | {"length": 256, "micro_batch_tokens": 2048}}
SIZES = {"length": (256, 512, 1024, 2048, 4096), "vocabulary": (8192, 32768, 151936),
         "rows": (1, 4, 16, 64), "data": (10**4, 10**5, 10**6)}
BOTH = {"mib": "MiB", "mib_saved": "MiB, checkpointing",
        "seconds": "seconds", "seconds_saved": "seconds, checkpointing"}
TABLES = {  # part: its title and {key: head} of its columns
    "length": ("A step on one row, by its length", {"length": "tokens of the row"} | BOTH),
    "vocabulary": ("A step on one row of 1024 tokens, by the size of the vocabulary",
                   {"vocabulary": "entries of the vocabulary"} | BOTH),
    "rows": ("A step on rows of 256 tokens, `--micro_batch_tokens 2048`",
             {"rows": "rows a step"} | BOTH),
    "data": ("From a .jsonl file, read by offset, to the first batch",
             {"data": "rows of the file", "seconds": "seconds", "mib": "MiB",
              "peak_mib": "MiB at the peak"}),
    "load": ("Loading a checkpoint in bfloat16",
             {"load": "shape", "cache": "file", "seconds": "seconds", "tensors_mib": "tensors, MiB",
              "peak_mib": "peak of the process, MiB", "ratio": "peak / tensors",
              "anonymous_mib": "anonymous, MiB", "mapped_mib": "mapped, MiB"})}


def memory() -> dict[str, float]:
    """MiB of this process: VmHWM (the peak), VmRSS, and its parts RssAnon and RssFile."""
    said = [s.split() for s in Path("/proc/self/status").read_text("utf-8").splitlines()]
    return {s[0][:-1]: int(s[1]) / 1024 for s in said if s[0].startswith(("Vm", "Rss"))}


def marked() -> dict[str, float]:
    """`memory`, the peak cleared: it is now what is resident."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return memory()


def step(point: dict) -> dict:
    """Peak MiB of training steps above what was resident before them, and seconds of one."""
    config = Config(model=point["folder"], data=("none",), batch_size=point["rows"], lora_r=16,
                    micro_batch_tokens=point["micro_batch_tokens"],
                    gradient_checkpointing=point["checkpointing"])
    net, optimizer = train.adapted(config, Path(config.model))
    draw, ids, taken = random.Random(0), range(4, point["vocabulary"]), []
    units = [(tokens.Encoded(draw.choices(ids, k=point["length"]), point["length"] // 2,
                             draw.random(), "scored", f"row {i}", (("user", f"{i}"),)),)
             for i in range(config.batch_size)]
    before = marked()
    for _ in range(REPEAT):
        began = time.perf_counter()
        train.train_step(net, optimizer, units, config, config.lr)
        taken.append(time.perf_counter() - began)
    return {"mib": memory()["VmHWM"] - before["VmRSS"], "seconds": min(taken[1:])}


def start(point: dict) -> dict:
    """Seconds to the first batch, and MiB by which the process is then larger, and was at most."""
    mixture.LARGE = 0  # a file of any size is read by offset
    config = Config(model=point["folder"], data=(point["file"],), template="plain")
    chat = tokens.Chat(config.model, config.template)
    before, began = marked(), time.perf_counter()
    files, weights, *_ = mixture.load_data(config, chat, train.LOSSES[config.loss].reads)
    next(mixture.stream(files, weights, config))
    seconds, after = time.perf_counter() - began, memory()
    return {"seconds": seconds} | {name: after[kind] - before["VmRSS"] for name, kind in
                                   (("mib", "VmRSS"), ("peak_mib", "VmHWM"))}


def load(point: dict) -> dict:
    """Seconds of model.load in bfloat16, and the process's peak beside the bytes of the tensors."""
    before, began = marked(), time.perf_counter()
    net = model.load(point["folder"], torch.bfloat16)
    seconds, after = time.perf_counter() - began, memory()
    size = sum(p.nbytes for p in net.parameters()) / 2**20
    return {"seconds": seconds, "tensors_mib": size, "peak_mib": after["VmHWM"],
            "ratio": after["VmHWM"] / size, "anonymous_mib": after["RssAnon"] - before["RssAnon"],
            "mapped_mib": after["RssFile"] - before["RssFile"]}


def points(part: str, sizes: Sequence, shape: work.Shape, folder: Path) -> Iterator[dict]:
    """What `step`, `start` or `load` measures, one after another; what it reads is made before.

    A checkpoint is read twice: from the disk, then with its pages in memory.
    """
    chat, file = folder / "chat", folder / "rows.jsonl"
    if part == "data":
        work.write_model(chat, shape)
    for size in sizes:
        if part == "data":
            large.rows(file, size)
            yield {"folder": str(chat), "file": str(file), "data": size}
        elif part == "load":
            large.checkpoint(folder / size, large.SHAPES[size])
            yield {"folder": str(folder / size), "load": size, "cache": "on disk"}
            yield {"folder": str(folder / size), "load": size, "cache": "in memory"}
        else:
            point = SETTINGS[part] | {"vocabulary": shape.vocabulary, part: size}
            place = folder / f"{point['vocabulary']}"
            if not place.exists():
                made = shape._replace(vocabulary=point["vocabulary"])
                model.save(work.weights(made, 0), place)
            yield point | {"folder": str(place)}


def measure(part: str, point: dict) -> dict:
    """The point without its files and what its process says; `_saved`: a step's, checkpointing."""
    line = {k: v for k, v in point.items() if k not in ("folder", "file")}
    for end, on in (("", False), ("_saved", True))[:1 + (part in SETTINGS)]:
        given = json.dumps(point | {"part": part, "checkpointing": on})
        done = subprocess.run(
            [sys.executable, "-m", "bench.scaling", "--point", given], cwd=run.ROOT, text=True,
            env=run.environment(point["folder"]) | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"},
            stdout=subprocess.PIPE, check=True)  # a capacity as train.main sets it
        line |= {k + end: v for k, v in run.shortened(json.loads(done.stdout)).items()}
    return line


def table(record: dict) -> str:
    """The markdown of a record: the machine, then a titled table for every part it has."""
    out = ["{cores} cores, {memory_gib} GiB, torch {torch}, two threads.\n".format(
        **record["machine"])]
    for part, (title, heads) in ((p, t) for p, t in TABLES.items() if p in record):
        rows = [[v if isinstance(v, str) else f"{v:,.0f}" if v >= 100 else f"{v:.3g}"
                 for v in (line[key] for key in heads)] for line in record[part]]
        out.append(f"{title}:\n\n" + run.table(list(heads.values()), rows))
    return "\n".join(out)


def figure(record: dict, path: Path) -> None:
    """Four panels: memory of a step by length, vocabulary and rows; the start by rows of a file."""
    import matplotlib
    from matplotlib.figure import Figure

    from lab.figures import COLORS, STYLE  # slow to import, and needed here alone
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(7, 5), layout="constrained")
        for part, ax in zip(SIZES, drawn.subplots(2, 2).flat, strict=True):
            if not (lines := record.get(part)):
                continue
            heads = TABLES[part][1]
            sizes, step_part = [d[part] for d in lines], part in SETTINGS
            for key, color in zip(("mib", "mib_saved" if step_part else "seconds"), COLORS):
                ax.plot(sizes, [d[key] for d in lines], "o-", ms=4, color=color, label=heads[key])
            ax.set(xscale="log", xlabel=heads[part], ylabel="memory of a step, MiB"
                   if step_part else "to the first batch: MiB, seconds")
            ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
            if part == "length":
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:,.0f}")
            else:
                ax.set_ylim(bottom=0)
            ax.minorticks_off()
            if part in ("length", "data"):
                ax.legend(fontsize=7)
        drawn.savefig(path, transparent=True, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(SIZES))
    parser.add_argument("--load", choices=large.SHAPES, default="7b", help="shape of the part load")
    parser.add_argument("--out", type=Path, default=run.ROOT / "bench/scaling.json", metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE",
                        default=run.ROOT / "docs/figures/scaling.svg")
    parser.add_argument("--point", type=json.loads, help="JSON: measure this, in this process")
    options, runs = parser.parse_args(argv), run.ROOT / "runs"
    if point := options.point:
        print(json.dumps({"data": start, "load": load}.get(point["part"], step)(point)))
        return
    record = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    record["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__, "memory_gib": round(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)}
    runs.mkdir(exist_ok=True)
    for part in options.parts:
        sizes, record[part] = SIZES.get(part, [options.load]), []
        with tempfile.TemporaryDirectory(dir=runs) as folder:  # on a disk, where /tmp may be memory
            try:
                for point in points(part, sizes, work.SHAPES["small"], Path(folder)):
                    record[part].append(measure(part, point))
                    print(part, record[part][-1], file=sys.stderr, flush=True)
            except ValueError as error:
                parser.exit(2, f"bench.scaling: {error}\n")
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    figure(record, options.figure)
    print(table(record), end="")


if __name__ == "__main__":
    main()
