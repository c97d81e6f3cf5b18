"""What a safe save costs: beside a plain write and fsync of the same bytes, and in a run.

    python -m tests.crash.cost --mib 200

Safe: checked for numbers that are not finite, written aside, hashed, synced file by file, renamed,
the folder above synced, the oldest checkpoint removed. Plain: the same bytes written and synced.
The least of several times counts, of the wall clock or of the processor: neighbours only add.
"""
import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import trial

MOST, SHARE = 2.0, 0.03  # times a plain write (and 2 s a GB); share of a run's time
INTERVAL = 500  # steps between checkpoints unless --save_every says otherwise


def spent(call: Callable) -> tuple[float, float]:
    """(seconds on the wall, seconds of processor) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def plain(files: list[bytes], folder: Path) -> None:
    """Writes and syncs the bytes, nothing else."""
    for i, body in enumerate(files):
        with open(folder / f"plain{i}", "wb") as out:
            out.write(body)
            out.flush()
            os.fsync(out.fileno())


def tuner(root: Path, mib: int) -> tuple:
    """(model, optimizer, settings) whose checkpoint takes about so many MiB."""
    import folder

    import train

    base = folder.write_model(root / "model", hidden_size=2048, intermediate_size=2048)
    rank = min(2048, mib * 2**20 // 294912)  # bytes that one rank of six layers takes, with moments
    argv = ["--model", str(base), "--data", "none", "--lora_targets", "gate_proj,up_proj,down_proj",
            "--lora_r", str(rank), "--out", str(root)]
    settings = train.parse_flags(argv, {})
    net, optimizer = train.adapted(settings, base)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = p.detach().clone()
    optimizer.step()
    return net, optimizer, settings


def saves(root: Path, mib: int, times: int) -> tuple[int, list, list]:
    """(bytes, `spent` by safe saves, by plain ones), taken in turn on the same disk."""
    import checkpoint

    net, optimizer, settings = tuner(root, mib)
    safe, bare = [], []
    for step in range(1, times + 3):
        state = {"step": step, "inputs": {}}
        safe.append(spent(lambda s=state: checkpoint.save(net, optimizer, root, s, settings)))
        files = [p.read_bytes() for p in trial.steps(root)[-1].iterdir()]
        bare.append(spent(lambda f=files: plain(f, root)))
    return sum(map(len, files)), safe[2:], bare[2:]  # the first two remove no older checkpoint


def run_share(root: Path) -> tuple[float, float]:
    """Seconds of (a step, a save) of `python train.py` on the bundled model and data."""
    import checkpoint
    import train

    step, save, taken = train.train_step, checkpoint.save, ([], [])

    def timed(call, seconds):
        """The call of five parameters, which notes its seconds."""
        def wrapped(a, b, c, d, e):
            began = time.perf_counter()
            result = call(a, b, c, d, e)
            seconds.append(time.perf_counter() - began)
            return result

        return wrapped

    train.train_step, checkpoint.save = timed(step, taken[0]), timed(save, taken[1])
    words = train.demo_flags()
    tests = [i for i, word in enumerate(words) if word == "--test"]
    words = [word for i, word in enumerate(words) if i not in tests and i - 1 not in tests]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*words, "--steps", "20", "--save_every", "4", "--sample_tokens", "0",
                    "--out", str(root / "demo")])
    train.train_step, checkpoint.save = step, save
    return statistics.median(taken[0]), statistics.median(taken[1])  # of the same minute


def main() -> None:
    parser = argparse.ArgumentParser("tests.crash.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=200, help="size of a checkpoint [200]")
    parser.add_argument("--times", type=int, default=5, help="saves of either kind [5]")
    parser.add_argument("--folder", help="on the disk to measure; default: a temporary one")
    args = parser.parse_args()
    sys.path[:0] = [str(trial.ROOT), str(trial.ROOT / "tests")]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        size, safe, bare = saves(root, args.mib, args.times)
        step, save = run_share(root)
    (a, a_cpu), (b, b_cpu) = map(min, zip(*safe, strict=True)), map(min, zip(*bare, strict=True))
    gigabytes, share = size / 1e9, save / (INTERVAL * step + save)
    print(f"{size / 1e6:.0f} MB, least of {args.times}: safe {a:.3f} s ({a_cpu:.3f} s of processor)"
          f", plain write and fsync {b:.3f} s ({b_cpu:.3f} s): {a / b:.2f} times, goal at most "
          f"{MOST:g} times and 2 s a GB ({MOST * b + 2 * gigabytes:.3f} s)")
    print(f"the demo: a step {step:.3f} s, a save {save:.3f} s: {share:.2%} of the run's time at "
          f"--save_every {INTERVAL}, goal at most {SHARE:.0%}")
    dear = all(x > MOST * y + 2 * gigabytes for x, y in ((a, b), (a_cpu, b_cpu)))
    sys.exit(dear or share > SHARE)


if __name__ == "__main__":
    main()
