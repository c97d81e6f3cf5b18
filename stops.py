"""Every way a run ends before its last step: a signal, bad numbers, no memory, a failed save."""
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import parallel
import report
import strict
from config import Config


class Stopped(Exception):
    """A signal ended the run between two steps; its state is saved. args: message, signal."""


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Inside the block SIGINT and SIGTERM are put on the list given; a second one acts at once."""
    caught, before = [], {k: signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)}
    kinds = [k for k in before if before[k] != signal.SIG_IGN]  # a shell's `&` has it ignored

    def catch(number: int) -> None:
        """Takes note; the next signal finds what was there before."""
        caught.append(number)
        for kind in kinds:
            signal.signal(kind, before[kind])  # so that a second one acts
        with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee` as well: nobody may listen
            if not parallel.rank():
                print("stopping after this step; once more stops at once", file=sys.stderr,
                      flush=True)

    here = threading.current_thread() is threading.main_thread()  # others may not set handlers
    try:
        for kind in kinds if here else ():
            signal.signal(kind, lambda number, _: catch(number))
        yield caught
    finally:
        for kind in kinds if here else ():
            signal.signal(kind, before[kind])


def no_memory(error: Exception) -> bool:
    """Whether torch, Python or oneDNN got no memory: three ways to say it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in (
            "allocate memory", "create a primitive", "start new thread", "bad_alloc"))


def explain(error: Exception, step: int, units: list, config: Config, out: Path) -> Exception:
    """What a user is told when a step fails: numbers, memory, a dead process; else it is ours."""
    if isinstance(error, FloatingPointError):
        if not parallel.rank():
            report.write_lines(out / "bad_batch.jsonl", [asdict(e) for u in units for e in u])
        return ValueError(f"step {step + 1}: {error}. Usual causes: --lr {config.lr} too high, "
                          f"damaged weights. The batch is saved in {out / 'bad_batch.jsonl'}")
    if no_memory(error):
        return ValueError(
            f"out of memory at step {step + 1}. Try in this order: --micro_batch_tokens "
            f"{config.micro_batch_tokens // 2}, --gradient_checkpointing true, --dtype bfloat16, "
            f"--max_length {config.max_length // 2}"
            f"{', --group ' + str(config.group // 2) if config.reward else ''}; "
            "--memory_estimate true says what each needs")
    return told(error, f"at step {step + 1}", config.timeout)


def told(error: Exception, when: str, timeout: float) -> Exception:
    """A ValueError in place of what torch raises when another process is gone; else `error`."""
    gone = isinstance(error, dist.DistError) or type(error) is RuntimeError and "gloo" in str(error)
    return ValueError(f"another process died or did not answer for {timeout:g} s {when}; start "
                      f"again with --resume true ({str(error).split('. ')[0]})") if gone else error


def fail(message: str, code: int) -> None:
    """Says why this process ends, if anything, and ends it."""
    place = os.environ.get("RANK", "0")
    if message:
        time.sleep(2 * (place != "0"))  # till then torchrun ends who says the same as the first
        line = f"rank {place}: train.py: {message}".removeprefix("rank 0: ")
        with contextlib.suppress(OSError):  # the code says it as well
            print(strict.clean(line), file=sys.stderr, flush=True)
    (os._exit if parallel.size() > 1 else sys.exit)(code)  # _exit waits for no one that is dead
