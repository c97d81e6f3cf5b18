"""Mutation scores: how many small faults, put into a file one at a time, the tests notice.

    python tests/mutants.py [NAME ...] [-j N] [--most N]          (OMP_NUM_THREADS=1, see Makefile)
tests/mutations.py says what a fault is. Each runs in a fork of a process that has torch loaded,
with the tests that reach its line, in a copy of the repository. A test that fails, or code that
cannot be loaded, kills it; a timeout does not count. Survivors are listed with their diffs in
runs/mutants/; those that docs/mutants.md calls equivalent are told apart. Needs
requirements-proofs.txt.
"""
import argparse
import difflib
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import mutations
import pytest
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
LISTED = ROOT / "docs/mutants.md"  # survivors with their reasons
EQUIVALENT = re.compile(r"^- `(\w+\.py)`: `(.*)` -> `(.*)`: equivalent", re.MULTILINE)
PLAN = {  # file: the score to reach in percent, and the tests that may kill
    "losses": (97, "losses losses_pairs losses_kto gradients train"),
    "policy_gradients": (97, "policy_gradients language"),
    "lora": (92, "lora adapter packing gradients train"),
    "model": (90, "model model_config attention weights packing backward generate train"),
    "backward": (90, "backward packing attention model gradients lora train"),
    "packing": (90, "packing attention model backward train"),
    "architecture": (90, "model_config model weights"),
    "data": (88, "data lines mixture"),
    "records": (88, "data lines mixture questions"),
    "doubts": (88, "data lines mixture"),
    "peft_config": (90, "adapter lora"),
    "peft_folder": (90, "adapter lora"),
    "merging": (90, "adapter lora"),
    "checkpoint": (85, "checkpoint resume"),
    "durable": (85, "durable checkpoint"),
}
LOADED = ("torch", "torch.utils.checkpoint", "numpy", "tokenizers", "safetensors.torch",
          "jinja2.sandbox", "jinja2.ext", "tqdm")  # before the first fork


def reached(folder: Path, name: str, files: list[str]) -> tuple[dict, Counter]:
    """({line: tests that run it}, {test: seconds}) of a file, from one run with coverage."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-qp", "no:cacheprovider", f"--cov={name}",
         "--cov-config=/dev/null", "--cov-context=test", "--cov-report=", "--junitxml=times.xml",
         *files], cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{run.stdout[-3000:]}The tests must pass before the code is broken.")
    seconds, data = Counter(), CoverageData(folder / ".coverage")
    for case in ElementTree.parse(folder / "times.xml").iter("testcase"):
        test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').split('[')[0]}"
        seconds[test] += float(case.get("time"))
    data.read()
    lines = defaultdict(set)
    for line, contexts in data.contexts_by_lineno(str(folder / f"{name}.py")).items():
        lines[line] = {c.split("[")[0].split("|")[0] for c in contexts} - {""}
    for cached in folder.glob(f"__pycache__/{name}.*"):
        cached.unlink()
    return lines, seconds


def verdict(task: tuple) -> tuple[int, str, str, list[str]]:
    """(line, changed source, "killed", "survived" or "timeout", tests) of one fault."""
    template, name, line, text, names, limit = task
    folder = template.with_name(f"{template.name}-{os.getpid()}")
    if not folder.is_dir():
        shutil.copytree(template, folder)
    (folder / f"{name}.py").write_text(text, "utf-8")
    if not (child := os.fork()):
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True  # two faults of one second would share a cached file
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os._exit(pytest.main(["-xqp", "no:cacheprovider", *names]))
    ends, status = time.monotonic() + limit, None
    while status is None and time.monotonic() < ends:
        time.sleep(0.02)
        status = os.waitstatus_to_exitcode(done[1]) if (done := os.waitpid(child, os.WNOHANG))[
            0] else None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = {None: "timeout", 0: "survived", 5: "no test ran"}.get(status, "killed")
    return line, text, said, names


def change(source: str, text: str) -> tuple[str, str]:
    """The lines that differ, before and after, without the blanks around them."""
    diff = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0))[3:]
    return tuple(" ".join(d[1:].strip() for d in diff if d[0] == sign) for sign in "-+")


def measure(name: str, jobs: int, most: int) -> tuple[int, Counter]:
    """(faults there are, verdicts of those tried); the survivors go to runs/mutants/NAME.txt."""
    source, began = (ROOT / f"{name}.py").read_text("utf-8"), time.monotonic()
    found = mutations.mutations(source)
    tried = random.Random(0).sample(found, min(most, len(found)))
    files = [f"tests/test_{f}.py" for f in PLAN[name][1].split()]
    files = [f for f in files if (ROOT / f).is_file()]
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "peers", "properties", "runs", "mutants"))
        lines, seconds = reached(folder, name, files)
        tasks = []
        for line, text in tried:
            names = sorted(lines[line] or seconds,
                           key=lambda t: (files.index(t.split("::")[0]), seconds[t]))
            tasks.append((folder, name, line, text, names, 20 + 5 * sum(seconds[n] for n in names)))
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            results = sorted(pool.imap_unordered(verdict, tasks), key=lambda r: r[0])
    out = ROOT / "runs/mutants" / f"{name}.txt"
    out.parent.mkdir(parents=True, exist_ok=True)
    known, counts = EQUIVALENT.findall(LISTED.read_text("utf-8")), Counter()
    with open(out, "w", encoding="utf-8") as report:
        for line, text, said, names in results:
            before, after = change(source, text)
            same = said == "survived" and (f"{name}.py", before, after) in known
            counts["equivalent" if same else said] += 1
            if said != "killed" and not same:
                report.write(f"- `{name}.py`: `{before}` -> `{after}`: {said}, line {line}, "
                             f"{len(names)} tests\n")
    print(f"{name}.py: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return len(found), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PLAN)}; default: all")
    parser.add_argument("-j", dest="jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--most", type=int, default=300, help="faults of a file, drawn by a seed")
    args = parser.parse_args()
    for name in LOADED:
        importlib.import_module(name)
    low = []
    for name in args.names or [n for n in PLAN if (ROOT / f"{n}.py").is_file()]:
        total, counts = measure(name, args.jobs, args.most)
        tried, killed, same = counts.total(), counts["killed"], counts["equivalent"]
        sample, score = f" (of {total})" * (tried < total), 100 * killed / (tried - same)
        print(f"{name}.py: {tried} faults{sample}, {killed} killed, {counts['survived']} survived, "
              f"{counts['timeout']} timeouts, {same} listed as equivalent: {score:.1f}% "
              f"({100 * killed / tried:.1f}% of all), goal {PLAN[name][0]}%", flush=True)
        low += [name] * (score < PLAN[name][0])
    sys.exit(f"below the goal: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
