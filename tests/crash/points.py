"""A fault at one chosen system call: a kill before it, or an error instead of it.

strace stops the forked trainer at the k-th call of a name (`-e inject=fsync:signal=KILL:when=3`),
so that also the windows of microseconds are hit which no random kill finds. The calls are those of
a plain trace of the same run: what one run does, every run of its flags does in the same order.
"""
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from . import start, trace, trial

ERRORS = ("ENOSPC", "EIO", "EACCES")
SHORT = ("--steps", "6", "--save_every", "2", "--lora_r", "8")
RESUMES = 4  # one point in so many lies in a resumed run


class Point(NamedTuple):
    """The when-th call of this name since the trace began gets the fault."""

    call: str
    when: int
    fault: str  # KILL or an errno
    torn: bool  # in a run that resumes the folder of a killed one

    def rule(self) -> str:
        kind = f"signal={self.fault}" if self.fault == "KILL" else f"error={self.fault}"
        return f"inject={self.call}:{kind}:when={self.when}"


class Place(NamedTuple):
    """Where the points are tried: the warm process and the folder of all files."""

    warm: start.Warm
    root: Path

    def flags(self, name: str) -> list[str]:
        return trial.flags(self.root, self.root / name, SHORT)

    def job(self, torn: bool = False) -> dict:
        return {"argv": self.flags("run") + ["--resume", "true"] * torn,
                "log": str(self.root / "point.log")}

    def prepare(self, torn: bool) -> None:
        """An empty place, or the folder of a run that was killed while it saved step 6."""
        shutil.rmtree(self.root / "run", ignore_errors=True)
        (self.root / "point.log").unlink(missing_ok=True)
        if torn:
            shutil.copytree(self.root / "torn", self.root / "run")


def traced(warm: start.Warm, job: dict, file: Path, rule: str = "") -> int:
    """Runs a job under strace, from its first call on, and returns its exit code."""
    pid = warm.start(job | {"hold": True})
    words = ["strace", "-f", "-y", "-s", "0", "-o", str(file), "-p", str(pid),
             "-e", f"trace={','.join('?' + name for name in trace.TRACED)}"]
    said = file.with_suffix(".said")
    with open(said, "wb") as stderr:
        strace = subprocess.Popen([*words, *(["-e", rule] if rule else [])], stderr=stderr)
    if not trial.wait(lambda: "attached" in said.read_text("utf-8") or strace.poll(), 60):
        os.kill(pid, signal.SIGKILL)
        warm.wait(60)
        raise RuntimeError(f"strace did not attach: {said.read_text('utf-8')}")
    os.kill(pid, signal.SIGUSR1)
    code = start.finish(warm)
    strace.wait(20)
    return code


def mine(file: Path, name: str = "") -> list[trace.Call]:
    """The calls of a trace by the main thread, which strace counts apart; perhaps of one name."""
    found = trace.calls(file.read_text("utf-8"))
    return [c for c in found if c.pid == found[0].pid and name in ("", c.name)]


def candidates(found: list[trace.Call], out: Path) -> list[tuple[str, int, str]]:
    """(call, its number among those of that name, path) of those below `out` that change the disk.

    The path is relative to `out`, "" for calls elsewhere.
    """
    counts, places = Counter(), []
    for call in found:
        counts[call.name] += 1
        below = [Path(p).relative_to(out) for p in call.paths() if Path(p).is_relative_to(out)]
        reads = call.name.startswith("open") and "O_CREAT" not in call.args
        if below and not reads:
            places.append((call.name, counts[call.name], str(below[-1])))
    return places


def chosen(places: list[tuple[str, int, str]], count: int, torn: bool) -> list[Point]:
    """About `count` points: kills and, in turn, errors, of each kind of call at least two."""
    kinds = {}
    for i, (name, when, _) in enumerate(places):
        kinds.setdefault(name, []).extend(
            Point(name, when, fault, torn) for fault in ("KILL", ERRORS[i % len(ERRORS)]))
    shares = {n: min(len(k), max(2, count * len(k) // (2 * len(places)))) for n, k in kinds.items()}
    return [k[i * len(k) // shares[n]] for n, k in kinds.items() for i in range(shares[n])]


def outcome(place: Place, point: Point) -> tuple[str, list[str]]:
    """(what a point hit and did, what is wrong after it)."""
    out, file = place.root / "run", place.root / "point.trace"
    place.prepare(point.torn)
    code = traced(place.warm, place.job(point.torn), file, point.rule())
    kept, hit = [p.name for p in trial.steps(out)], mine(file, point.call)[point.when - 1:]
    text = (place.root / "point.log").read_text("utf-8")
    paths = [Path(p) for call in hit[:1] for p in call.paths() if Path(p).is_relative_to(out)]
    wrong = judged(place, code, point.fault == "KILL", point.torn)
    wrong += ["the fault missed the run folder"] * (not paths)
    where = str(paths[0].relative_to(out)) if paths else "?"
    last = f"  {text.strip().splitlines()[-1][:90]}" if code == 2 else ""
    return f"{where:50} code {code}, {' '.join(kept) or 'no checkpoint'}{last}", wrong


def judged(place: Place, code: int, killed: bool, torn: bool = False) -> list[str]:
    """What is wrong after a run that ended with `code` under a fault; it then goes on to its end.

    A killed run is resumed; a failed call ends the run with code 2 and a sentence, or does no harm
    (code 0); no folder that calls itself a checkpoint is broken; the end is bitwise the quiet one.
    """
    out, text = place.root / "run", (place.root / "point.log").read_text("utf-8")
    wrong = [f"exit code {code}"] * (code not in ((-9,) if killed else (0, 2)))
    wrong += ["a traceback"] * ("Traceback" in text)
    if code == 2:
        wrong += ["the sentence names no file"] * (str(out) not in text.strip().splitlines()[-1])
        old = trial.unfinished(place.root / "torn") if torn else set()  # without the lock it stays
        wrong += [f"{name} left behind" for name in sorted(trial.unfinished(out) - old)
                  if not name.startswith("tmp-old.")]  # whose removal failed
    wrong += trial.unusable(out)
    if code:
        wrong += go_on(place)
    return wrong + trial.differences(place.root / "quiet6", out)


def may_trace() -> bool:
    """Whether strace is installed and allowed to trace."""
    return bool(shutil.which("strace")) and subprocess.run(
        ["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


def go_on(place: Place) -> list[str]:
    """Resumes the run as a supervisor would; what is wrong with that."""
    code = start.go(place.warm, place.job((place.root / "run/config.json").exists()))
    last = (place.root / "point.log").read_text("utf-8").strip().splitlines()[-1:]
    return [f"the resumed run ended with {code}: {last}"] * (code != 0)


def prepared(place: Place) -> None:
    """Makes the model, the data, root/quiet6, and root/torn: killed at the end of its last save.

    A line of torn's log is cut in half.
    """
    out = place.root / "run"
    fault = {"call": "rename", "when": 1, "fault": "KILL", "path": "tmp-step-6"}
    for job in ({"files": str(place.root)}, {"argv": place.flags("quiet6")},
                {"argv": place.flags("run"), "faults": [fault]}):
        start.go(place.warm, job | {"log": str(place.root / "quiet.log")})
    if not trial.unfinished(out):
        raise RuntimeError(f"the run to tear was not torn, see {place.root / 'quiet.log'}")
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 7, "num_tok')
    os.rename(out, place.root / "torn")


def plain(place: Place, torn: bool) -> Path:
    """The trace of a run, or of one that resumes, to which nothing is done."""
    place.prepare(torn)
    file = place.root / f"plain{int(torn)}.trace"
    traced(place.warm, place.job(torn), file)
    return file


def plan(place: Place, count: int) -> tuple[list[Point], list[str]]:
    """(the points to try, what the plain traces show to be wrong)."""
    points, wrong = [], []
    for torn, share in ((False, count - count // RESUMES), (True, count // RESUMES)):
        file = plain(place, torn)
        wrong += trace.complaints(trace.calls(file.read_text("utf-8")), place.root / "run")
        points += chosen(candidates(mine(file), place.root / "run"), share, torn)
    return points, wrong


def sweep(place: Place, count: int) -> list[str]:
    """Tries `count` points and prints a line for each; what went wrong."""
    kinds, (points, bad) = Counter(), plan(place, count)
    for point in points:
        said, wrong = outcome(place, point)
        line = (f"{'resume' if point.torn else 'run':6} {point.call:9} {point.when:3}  "
                f"{point.fault:6} {said}")
        print(line, *wrong or ["-> bitwise"], sep="  ", flush=True)
        kinds[f"{point.call} {'KILL' if point.fault == 'KILL' else 'error'}"] += 1
        bad += [f"{line}: {fault}" for fault in wrong]
    print(f"{len(points)} points, {len(bad)} faults: {dict(sorted(kinds.items()))}")
    return bad
