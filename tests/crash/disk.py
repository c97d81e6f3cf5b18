"""A disk that is full, gone, read-only or slow, and no memory: each must end in a sentence.

    python -m tests.crash.disk

Each case runs into trouble, which must end with code 2, a sentence that names what failed, older
checkpoints byte for byte as they were and nothing left aside; with the trouble mended the run goes
on to the quiet end. Small tmpfs are mounted where the process is root; limits need no root.
"""
import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import points, start, trial

ADVICE = re.compile(r"\d[\d.]* MB")  # a save that fails says what it needs


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs of its own on a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "crash", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def may_mount() -> bool:
    """Whether a tmpfs can be mounted here: root may, outside of most containers."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "crash", folder]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return subprocess.run(["umount", folder], check=False).returncode == 0
    return False


def contents(out: Path) -> dict[str, bytes]:
    """{file: bytes} of all checkpoints."""
    return {str(p.relative_to(out)): p.read_bytes() for folder in trial.steps(out)
            for p in sorted(folder.iterdir())}


def lines(out: Path) -> int:
    """Steps that the run has logged."""
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def fails(place: points.Place, job: dict, out: Path, save: bool = True,
          event: Callable | None = None) -> list[str]:
    """Runs a job that must fail in a save; `event` happens at its fifth step. What is wrong."""
    place.warm.start(job)
    if event:
        trial.wait(lambda: lines(out) >= 5, 60)
        event()
    code, text = start.finish(place.warm), Path(job["log"]).read_text("utf-8")
    last = (text.strip().splitlines() or [""])[-1]
    print(f"{'':12} code {code}: {last[:230]}", flush=True)
    wrong = [f"exit code {code}, not 2"] * (code != 2) + ["a traceback"] * ("Traceback" in text)
    wrong += ["the sentence does not name what failed"] * (str(out) not in last)
    wrong += ["the sentence does not tell what is needed"] * (save and not ADVICE.search(last))
    wrong += [f"{name} left behind" for name in sorted(trial.unfinished(out))]
    return wrong + trial.unusable(out)


def mends(place: points.Place, job: dict, out: Path, quiet: str = "quiet6") -> list[str]:
    """The run goes on without the trouble: what is wrong with its end."""
    plain = {key: job[key] for key in ("argv", "log")}
    resumes = (out / "config.json").exists() and "--resume" not in job["argv"]
    code = start.go(place.warm, plain | {"argv": job["argv"] + ["--resume", "true"] * resumes})
    last = Path(job["log"]).read_text("utf-8").strip().splitlines()[-1]
    return [f"going on ended with {code}: {last}"] * (code != 0) or trial.differences(
        place.root / quiet, out)


def on_tmpfs(place: points.Place, options: str, more: str, save: bool = True) -> list[str]:
    """A run on a small tmpfs, which is then enlarged."""
    small = place.root / "small"
    with mounted(small, options):
        out = small / "run"
        job = place.job() | {"argv": trial.flags(place.root, out, points.SHORT)}
        wrong = fails(place, job, out, save)
        remount(small, more)
        return wrong + mends(place, job, out)


def full(place: points.Place) -> list[str]:
    """Room for two checkpoints and a half."""
    return on_tmpfs(place, "size=1200k", "size=64m")


def no_inodes(place: points.Place) -> list[str]:
    """Room for bytes, but for 22 files only."""
    return on_tmpfs(place, "size=64m,nr_inodes=22", "nr_inodes=1000")


def full_at_the_start(place: points.Place) -> list[str]:
    """No room for config.json."""
    return on_tmpfs(place, "size=4k", "size=64m", save=False)


def filled(place: points.Place) -> list[str]:
    """Another's file fills the disk while the run is on."""
    small = place.root / "small"

    def fill():
        with contextlib.suppress(OSError), open(small / "filler", "wb", buffering=0) as out:
            while True:
                out.write(bytes(4096))

    with mounted(small, "size=100m"):
        job = place.job() | {"argv": trial.flags(place.root, small / "run", ("--save_every", "7"))}
        wrong = fails(place, job, small / "run", False, fill)
        (small / "filler").unlink()
        return wrong + mends(place, job, small / "run", "quiet")


def file_size(place: points.Place) -> list[str]:
    """RLIMIT_FSIZE below the optimizer's file, in a run that resumes: older checkpoints stay."""
    place.prepare(True)
    out, job = place.root / "run", place.job(True)
    before = contents(out)
    wrong = fails(place, job | {"limits": {"RLIMIT_FSIZE": 200_000}}, out)
    wrong += ["an older checkpoint was touched"] * (contents(out) != before)
    return wrong + mends(place, job, out)


def read_only(place: points.Place) -> list[str]:
    """The folder of checkpoints loses its write mode in mid-run."""
    place.prepare(False)
    out = place.root / "run"
    job = place.job() | {"argv": trial.flags(place.root, out), "humble": True}
    wrong = fails(place, job, out, True, lambda: (out / "checkpoints").chmod(0o555))
    (out / "checkpoints").chmod(0o755)
    return wrong + mends(place, job, out, "quiet")


def in_the_way(place: points.Place) -> list[str]:
    """A file takes the place of the folder of checkpoints in mid-run."""
    place.prepare(False)
    out = place.root / "run"
    aside = place.root / "aside"
    shutil.rmtree(aside, ignore_errors=True)

    def swap():
        (out / "checkpoints").rename(aside)
        (out / "checkpoints").touch()

    job = place.job() | {"argv": trial.flags(place.root, out)}
    wrong = fails(place, job, out, True, swap)
    (out / "checkpoints").unlink()
    aside.rename(out / "checkpoints")
    return wrong + mends(place, job, out, "quiet")


def removed(place: points.Place) -> list[str]:
    """The run folder is removed in mid-run; a new run with the same flags is then the quiet one."""
    place.prepare(False)
    out = place.root / "run"

    def remove():
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)

    job = place.job() | {"argv": trial.flags(place.root, out)}
    wrong = fails(place, job, out, False, remove)
    shutil.rmtree(out, ignore_errors=True)
    return wrong + mends(place, job, out, "quiet")


def no_memory(place: points.Place) -> list[str]:
    """Too little address space at several sizes: in loading, in a step, in a save."""
    wrong = []
    for mib in (8, 80, 160, 250):
        place.prepare(False)
        out, job = place.root / "run", place.job() | {"memory": mib << 20}
        code = start.go(place.warm, job)
        text = Path(job["log"]).read_text("utf-8")
        last = (text.strip().splitlines() or [""])[-1]
        print(f"{'':12} {mib} MiB: code {code}: {last[:200]}", flush=True)
        wrong += [f"{mib} MiB: exit code {code}"] * (code not in (0, 2))
        wrong += [f"{mib} MiB: a traceback"] * ("Traceback" in text)
        wrong += trial.unusable(out) + mends(place, job, out)
    return wrong


def slow(place: points.Place) -> list[str]:
    """Each fsync takes a fifth of a second longer: nothing else changes."""
    place.prepare(False)
    rule = "inject=fsync:delay_enter=200000:when=1..20"
    began = time.perf_counter()
    code = points.traced(place.warm, place.job(), place.root / "slow.trace", rule)
    print(f"{'':12} code {code} after {time.perf_counter() - began:.1f} s", flush=True)
    return [f"exit code {code}"] * (code != 0) or trial.differences(
        place.root / "quiet6", place.root / "run")


def modes(place: points.Place) -> list[str]:
    """Files are readable for whom the umask lets read, not for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return [f"{path.name} has mode {path.stat().st_mode & 0o777:o}"
            for path in (place.root / "quiet6").rglob("*") if path.is_file()
            if path.stat().st_mode & 0o777 != 0o666 & ~mask]


def paused(place: points.Place) -> list[str]:
    """SIGSTOP and SIGCONT change nothing."""
    place.prepare(False)
    out = place.root / "run"
    place.warm.start(place.job() | {"argv": trial.flags(place.root, out)})
    trial.wait(lambda: lines(out) >= 5, 60)
    for number in (signal.SIGSTOP, signal.SIGCONT) * 3:
        os.kill(place.warm.pid, number)
        time.sleep(0.05)
    code = start.finish(place.warm)
    return [f"exit code {code}"] * (code != 0) or trial.differences(place.root / "quiet", out)


CASES = {"tmpfs full": full, "no inodes": no_inodes, "full at start": full_at_the_start,
         "filled": filled, "RLIMIT_FSIZE": file_size, "read-only": read_only,
         "in the way": in_the_way, "removed": removed, "no memory": no_memory, "slow": slow,
         "modes": modes, "paused": paused}
MOUNTS = ("tmpfs full", "no inodes", "full at start", "filled")


def tried(place: points.Place, names: list[str]) -> list[str]:
    """Runs the cases that can be run here; prints each; what went wrong."""
    bad, mounts, strace = [], may_mount(), shutil.which("strace")
    for name in names:
        if name in MOUNTS and not mounts or name == "slow" and not strace:
            print(f"{name:12} not run: needs {'strace' if name == 'slow' else 'root to mount'}")
            continue
        wrong = CASES[name](place)
        print(f"{name:12} {'; '.join(wrong[:3]) or 'ok'}", flush=True)
        bad += [f"{name}: {fault}" for fault in wrong]
    return bad


def main() -> None:
    parser = argparse.ArgumentParser("tests.crash.disk", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        place = points.Place(start.Warm(), root)
        points.prepared(place)
        start.go(place.warm, {"argv": trial.flags(root, root / "quiet"),
                              "log": str(root / "quiet.log")})
        bad = tried(place, args.names or list(CASES))
        place.warm.close()
    print(f"{len(bad)} wrong")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
