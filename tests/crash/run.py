"""Kills a real run at random and at chosen system calls, and says whether anything was lost.

    python -m tests.crash.run --kills 200 --points 60

A trial starts a run, kills it (SIGKILL) at a random moment, resumes it, kills it again, until it
ends by itself; its end must equal the quiet run's bit for bit. Exit code 1 if anything is wrong.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from . import points, start, trial

SPAN = 0.9  # seconds after the first step within which a kill falls
EARLY = 0.15  # share of kills while the run starts or resumes
AIMED = 0.45  # share that waits, after its random time, until a save has begun
REAL = 0.04  # share of starts as `python train.py`, whose imports take seconds


def kill(way: start.Warm | start.Real, out: Path, draw: random.Random) -> int | None:
    """Waits a random time and kills the run; its exit code, -9 for a kill."""
    metrics = out / "metrics.jsonl"

    def seen():
        return metrics.stat() if metrics.exists() else None

    began, code = seen(), None
    if draw.random() < EARLY:
        time.sleep(draw.uniform(0, 4.0 if isinstance(way, start.Real) else 0.4))
    else:
        deadline = time.monotonic() + 60
        while seen() == began and code is None and time.monotonic() < deadline:
            code = way.wait(0.002)
        code = way.wait(draw.uniform(0, SPAN)) if code is None else code
        if draw.random() < AIMED and code is None:
            before = trial.unfinished(out)
            trial.wait(lambda: trial.unfinished(out) - before, 1)
            code = way.wait(draw.uniform(0, 0.05))
    if code is None and (code := way.wait(0)) is None:
        os.kill(way.pid, signal.SIGKILL)
        code = start.finish(way)
    return code


def trial_run(warm: start.Warm, root: Path, draw: random.Random, kills: int, tally: Counter,
              flags: tuple[str, ...] = ()) -> list[str]:
    """One run to its end, with at most `kills` kills on the way; what is wrong with it."""
    out, rows, log = root / "run", root / "run.rows", root / "run.log"
    shutil.rmtree(out, ignore_errors=True)
    for file in (rows, log):
        file.unlink(missing_ok=True)
    wrong, code, left, flags = [], None, kills, trial.flags(root, out, flags)
    while code != 0:
        more = ["--resume", "true"] if (out / "config.json").exists() else []
        way = start.Real() if draw.random() < REAL else warm
        before = trial.unfinished(out)
        way.start({"argv": [*flags, *more], "log": str(log), "rows": str(rows)})
        tally["starts"] += 1
        tally["real starts"] += way is not warm
        code = kill(way, out, draw) if left else start.finish(way)
        if code == -9:
            left -= 1
            tally["kills"] += 1
            tally["kills in mid-save"] += bool(trial.unfinished(out) - before)
            tally["kills before the first checkpoint"] += not trial.steps(out)
            faults = trial.unusable(out)
            tally["unusable folders"] += len(faults)
            wrong += faults
        elif code:
            tally["hand work"] += 1
            last = log.read_text("utf-8").strip().splitlines()[-1:]
            return [*wrong, f"a start ended with {code}: {last}"]
    return wrong + trial.differences(root / "quiet", out) + trial.rows_differ(
        root / "quiet.rows", rows)


def quiet(warm: start.Warm, root: Path, flags: tuple[str, ...] = ()) -> list[str]:
    """The runs that nobody disturbs: a forked one, and `python train.py`, which must agree."""
    log = str(root / "quiet.log")
    for way, name in ((warm, "quiet"), (start.Real(), "real")):
        code = start.go(way, {"argv": trial.flags(root, root / name, flags), "log": log,
                              "rows": str(root / "quiet.rows")})
        if code:
            return [f"the quiet run ended with {code}, see {log}"]
    return trial.differences(root / "quiet", root / "real")


def kill_many(warm: start.Warm, root: Path, kills: int, seed: int) -> list[str]:
    """Trials until there were so many kills; prints the tally, returns what went wrong."""
    tally, wrong, draw = Counter(), quiet(warm, root), random.Random(seed)
    while tally["kills"] < kills and len(wrong) < 20:
        left = min(kills - tally["kills"], draw.randint(2, 12))
        faults = trial_run(warm, root, draw, left, tally)
        tally["trials"] += 1
        tally["trials that differ"] += bool(faults)
        if faults:
            shutil.copytree(root / "run", root / f"bad{tally['trials']}", dirs_exist_ok=True)
        wrong += [f"trial {tally['trials']}: {fault}" for fault in faults[:5]]
        print(dict(tally), *faults[:2], flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser("tests.crash.run", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs go, kept; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary).resolve()
        root.mkdir(parents=True, exist_ok=True)
        place, wrong = points.Place(start.Warm(), root), []
        points.prepared(place)
        if args.kills:
            wrong += kill_many(place.warm, root, args.kills, args.seed)
        if args.points:
            wrong += points.sweep(place, args.points)
        place.warm.close()
    print("\n".join([*wrong, f"{len(wrong)} wrong"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
