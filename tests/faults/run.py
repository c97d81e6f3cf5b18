"""Runs the fault table on the real command lines, a forked process a case.

    python -m tests.faults.run [--only PATTERN] [--every K] [--list]

The parent imports everything once and runs no torch operation; a child gets a fresh copy of the
fixture as its working folder, no input, a limit of memory, and ten seconds. See case.py for what
a case says. Ends with exit code 1 if a case fails.
"""
import argparse
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("train", "generate", "evaluate", "lora", "page")
FLAGS = {
    "train": "--model DIR/model --template plain --max_length 100 --held_out 4 --steps 2 "
             "--sample_tokens 0 --out DIR/run",
    "generate": "--model DIR/model --prompt hi --template plain --max_new_tokens 2",
    "evaluate": "--model DIR/model --template plain",
    "lora": "merge --model DIR/model --adapter DIR/adapter --out DIR/merged",
    "page": ""}
SECONDS, MEMORY = 10, 6 << 30  # of computing; of address space on top of the parent's
KNOWN = {  # of a terminal that knows ASCII only
    "surrogates not allowed": "libraries in Rust take no path outside the locale's encoding"}
WAIT = 60  # seconds of waiting, whatever else the machine does


def fixture(place: Path) -> None:
    """What every case gets a copy of; runs torch operations."""
    import folder
    import torch

    import lora
    import model

    for name, seed, changes in (("model", 0, {}), ("wide", 1, {"intermediate_size": 40})):
        folder.write_model(place / name, seed, **changes)
        net, generator = model.load(place / name, torch.float32), torch.Generator().manual_seed(1)
        lora.inject(net, 2, 4.0, generator=generator)
        for layer in lora.adapters(net).values():
            layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
        lora.save(net, place / ("adapter" if name == "model" else "other"), "my/base")
    shutil.rmtree(place / "wide")
    folder.write_files(place / "files")
    for path in (place / "files").iterdir():
        path.rename(place / path.name.replace("demonstrations", "data"))
    (place / "files").rmdir()


def command(case, place: Path) -> list[str]:
    """The words of a command line: the usual flags, these, and data.jsonl if they name no data."""
    flags = f"{FLAGS[case.program]} {case.flags}"
    if case.flags.startswith("ONLY "):
        flags = case.flags.removeprefix("ONLY ")
    elif case.program in ("train", "evaluate") and "--data" not in flags:
        flags += " --data DIR/data.jsonl"
    words = (w.replace("DIR", str(place)) for w in shlex.split(flags))
    return [os.fsdecode(w.encode("utf-8", "surrogateescape")) for w in words]


def files(place: Path) -> dict[str, tuple]:
    """What lies in the folder, and when it was written."""
    found = {}
    for folder, names, others in os.walk(place):
        for path in (os.path.join(folder, n) for n in (*names, *others)):
            about = os.lstat(path)
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            found[os.path.relpath(path, place)] = () if is_folder else (
                about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def child(case, place: Path, main, out: Path) -> int:
    """Makes the mistake and runs the program; out/result.json says how long and what it wrote."""
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out / "stdout", os.O_RDWR),
                               (2, out / "stderr", os.O_RDWR)):
        handle = os.open(path, mode | os.O_CREAT)
        os.dup2(handle, number)
        os.close(handle)
    if case.change:
        case.change(place)
    argv, before = command(case, place), files(place)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    began = time.perf_counter()
    try:
        main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(*[stop.code] * isinstance(stop.code, str), end="", file=sys.stderr)
    except BaseException:  # noqa: BLE001  (a Rust panic is no Exception)
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    seconds, after = time.perf_counter() - began, files(place)
    written = sorted(n for n in before | after if before.get(n) != after.get(n))
    (out / "result.json").write_text(json.dumps({"seconds": seconds, "written": written}))
    return code


def start(case, place: Path, main) -> int:
    """The id of a process that runs the case in a copy of the fixture."""
    out = place.parent / f"{place.name}.out"
    out.mkdir()
    shutil.copytree(place.parent / "fixture", place)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        code = child(case, place, main, out)
    except BaseException:  # noqa: BLE001  (a Rust panic is no Exception)
        traceback.print_exc()
    finally:
        os._exit(code)


def judge(case, code: int, place: Path, out: Path) -> tuple[str, float]:
    """("" or what is wrong, seconds) of a case that ended; code is negative for a signal."""
    said, err = ((out / n).read_bytes().decode("utf-8", "replace") if (out / n).exists() else ""
                 for n in ("stdout", "stderr"))
    result = json.loads((out / "result.json").read_text()) if (out / "result.json").exists() else {}
    lines = err.removesuffix("\n").split("\n")
    first = next((i for i, line in enumerate(lines) if not line.startswith(("usage:", " "))), 0)
    lines = lines[first:] if ": error: " in err else lines
    words = [w.strip().replace("DIR", str(place)) for w in case.words.split(";") if w.strip()]
    text = {"V": said, "W": said + err}.get(case.oracle, "\n".join(lines))
    control = [c for c in "\n".join(lines) if ord(c) in (*range(10), *range(11, 32),
                                                         *range(127, 160))]
    pwned = [p.name for p in place.rglob("pwned*")]
    good = {"R": code == 2, "K": code > 0}.get(case.oracle, code == 0)
    wrong = [
        ("no result" if code >= 0 else f"signal {-code}") * (not result or code == 99),
        "traceback" * ("Traceback" in err), "panic" * ("panicked" in err or "PanicExc" in err),
        f"code {code}" * (not good),
        f"{len(lines)} lines on stderr" * (case.oracle == "R" and (len(lines) > 1 or not err)),
        f"lacks {[w for w in words if w not in text]}" * any(w not in text for w in words),
        f"control characters {control[:5]!r}" * (case.oracle in "RK" and bool(control)),
        f"wrote {result.get('written')}" * (case.oracle == "R" and bool(result.get("written"))),
        f"ran code: {pwned}" * bool(pwned)]
    told = ", ".join(w for w in wrong if w)
    return told and f"{told}\n    {(err or said)[-600:]!a}", result.get("seconds", SECONDS)


def computed(pid: int) -> float:
    """Seconds of computing of a process."""
    ticks = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")


def finish(running: dict) -> tuple:
    """Waits for one of the running cases, killing what is late: (case, place, code, MiB)."""
    while True:
        for pid, (case, place, began) in running.items():
            waited = time.monotonic() - began
            late = waited > WAIT or waited > SECONDS and computed(pid) > SECONDS
            if late:
                os.kill(pid, 9)
            ended, status, usage = os.wait4(pid, 0 if late else os.WNOHANG)
            if ended:
                del running[pid]
                code = -14 if late else os.waitstatus_to_exitcode(status)
                return case, place, code, usage.ru_maxrss / 1024
        time.sleep(0.005)


def run(cases: list, jobs: int, show: bool) -> list[tuple]:
    """(case, what is wrong, seconds, MiB) of each case, told as they end."""
    main = {name: importlib.import_module(name).main for name in PROGRAMS}
    done, running, todo = [], {}, list(enumerate(cases))
    with tempfile.TemporaryDirectory() as folder:
        if not (pid := os.fork()):
            fixture(Path(folder, "fixture"))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the fixture could not be built")
        while todo or running:
            while todo and len(running) < jobs:
                i, case = todo.pop(0)
                place = Path(folder, f"c{i}")
                running[start(case, place, main[case.program])] = case, place, time.monotonic()
            case, place, code, size = finish(running)
            out = place.parent / f"{place.name}.out"
            wrong, seconds = judge(case, code, place, out)
            if case.oracle == "V" and not case.pending:
                case = case._replace(pending=next((KNOWN[k] for k in KNOWN if k in wrong), ""))
            done.append((case, wrong, seconds, size))
            mark = ("pending" if wrong else "ready") if case.pending else "FAILED" * bool(wrong)
            if mark or show:
                shown = f"{mark or 'ok':7} {case.name}: {wrong or case.pending}"
                text = (out / "stderr").read_text("utf-8", "replace") if show else ""
                print(shown + f"\n    {text!a}" * show, flush=True)
            for path in (place, out):
                shutil.rmtree(path, ignore_errors=True)
    return done


def summary(done: list[tuple]) -> str:
    """Cases by family, seconds and memory."""
    families: dict[str, list[int]] = {}
    for case, wrong, _, _ in done:
        count = families.setdefault(case.name[:1], [0, 0, 0])
        count[0] += 1
        count[1 + bool(case.pending)] += bool(wrong)
    told = "".join(f"{name}: {n} cases, {bad} failed, {pending} pending\n"
                   for name, (n, bad, pending) in sorted(families.items()))
    times = sorted(seconds for _, _, seconds, _ in done)
    at = [times[min(len(times) - 1, int(q * len(times)))] for q in (0.5, 0.95, 1)]
    return told + (f"{len(done)} cases, {sum(c[1] for c in families.values())} failed; seconds "
                   f"p50 {at[0]:.2f}, p95 {at[1]:.2f}, max {at[2]:.2f}; peak "
                   f"{max(size for *_, size in done):.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="regular expression found in the name")
    parser.add_argument("--every", type=int, default=1, help="only every K-th case")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--show", action="store_true", help="print what each case says on stderr")
    parser.add_argument("-j", dest="jobs", type=int, default=2, help="cases at a time")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    names = sorted(p.stem for p in Path(__file__).parent.glob("*_cases.py"))
    cases = [c for n in names for c in importlib.import_module(f"faults.{n}").cases()]
    twice = {c.name for i, c in enumerate(cases) if c.name in {d.name for d in cases[:i]}}
    cases = [c for c in cases if re.search(args.only, c.name)][::args.every]
    if twice or not cases:
        sys.exit(f"names used twice: {sorted(twice)}" if twice else "no such case")
    if args.list:
        print("\n".join(f"{c.oracle} {c.program:9} {c.name}" for c in cases))
        return
    late = ["huggingface_hub", "jinja2.ext"]  # what programs import late
    late += ["torch._dynamo"] * any(c.program == "train" and c.oracle != "R" for c in cases)
    for name in late:
        importlib.import_module(name)
    done = run(cases, args.jobs, args.show)
    print(summary(done))
    sys.exit(any(wrong and not case.pending for case, wrong, _, _ in done))


if __name__ == "__main__":
    main()
