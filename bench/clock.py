"""What every driver shares: its flags, the clock of its steps, and the JSON line it prints.

A driver calls `count` when a step begins, `tick` when it has ended, `report` after the last. CPU
time is that of all threads of the process, so a neighbour who takes a core does not slow it down
(though he may slow the memory); wall time is what a user waits.
"""
import argparse
import functools
import itertools
import json
import os
import resource
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

import backward
from bench import work

RANK, ALPHA, RATE, BETA, MAX_LENGTH = 16, 32, 1e-4, 0.1, 1024  # the same for every driver
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parser(doc: str, tasks: Sequence[str]) -> argparse.ArgumentParser:
    """The flags every driver takes."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--model", type=Path, required=True, help="a folder of work.make")
    made.add_argument("--task", choices=tasks, required=True)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="of the base; adapters are float32")
    made.add_argument("--checkpointing", action="store_true")
    made.add_argument("--cached", action="store_true", help="reference before the first step")
    made.add_argument("--steps", type=int, default=8, help="all of them")
    made.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    made.add_argument("--batch", type=int, default=4, help="rows a step, or pairs")
    return made


def read(options: argparse.Namespace) -> list[dict]:
    """The first steps * batch rows of the task's file.   ValueError where it has fewer."""
    path = options.model / f"{work.FILES[options.task]}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if len(rows) < (need := options.steps * options.batch):
        raise ValueError(f"{path} has {len(rows)} rows, --steps and --batch ask for {need}")
    return rows[:need]


def age() -> float:
    """Seconds since this process was started, its interpreter's start included."""
    fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


@torch.no_grad()
def matmul_rate(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype,
                seconds: float = 0.1) -> float:
    """GFLOP per CPU-second of (m, k) @ (k, n), by torch.mm into a kept output or by
    backward.product, whichever is faster: the best of all tries."""
    best = 0.0
    for (m, k, n), own in itertools.product(shapes, (False, True)):
        x, w, y = (torch.ones(size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
        calls, stop = max(1, int(2e9 / (2 * m * k * n))), time.perf_counter() + seconds
        multiply = functools.partial(backward.product, x, w.T) if own else functools.partial(
            torch.mm, x, w, out=y)
        multiply()
        while time.perf_counter() < stop:
            began = time.process_time()
            for _ in range(calls):
                multiply()
            spent = time.process_time() - began
            best = max(best, 2 * m * k * n * calls / spent / 1e9 if spent else 0)
    return best


class Clock:
    """Marks of one run, step by step; made when the driver's imports are done."""

    def __init__(self, options: argparse.Namespace, driver: str) -> None:
        self.options, self.driver, self.imported, self.ready = options, driver, age(), 0.0
        self.marks, self.losses, self.batches, self.yardsticks = [], [], [], []

    def yardstick(self) -> None:
        """Notes the speed of the machine at this moment."""
        dtype = getattr(torch, self.options.dtype)
        self.yardsticks.append(matmul_rate([(1024, 512, 512)], dtype))

    def count(self, rows: list[tuple[list[int], int]]) -> None:
        """A step begins on these rows: (ids without padding, how many of them are scored)."""
        if not self.marks:
            self.ready = age()
            self.yardstick()
            self.marks.append((time.perf_counter(), time.process_time()))
        self.batches.append(rows)

    def tick(self, loss: float) -> None:
        """The step has ended, its update done."""
        self.marks.append((time.perf_counter(), time.process_time()))
        self.losses.append(loss)

    def line(self) -> dict:
        """Everything measured. `rows` is a fingerprint: equal for equal ids in every step."""
        options, first = self.options, min(self.options.warmup, len(self.losses) - 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.yardstick()
        (wall, cpu), (wall_end, cpu_end) = self.marks[first], self.marks[-1]
        counted = [row for rows in self.batches[first:] for row in rows]
        tokens = sum(len(ids) for ids, _ in counted)
        return {
            "driver": self.driver, "task": options.task, "model": options.model.name,
            "dtype": options.dtype, "checkpointing": options.checkpointing,
            "steps": len(self.losses), "warmup": first, "batch": options.batch,
            "threads": torch.get_num_threads(), "tokens": tokens,
            "response_tokens": sum(scored for _, scored in counted),
            "cpu_seconds": cpu_end - cpu, "wall_seconds": wall_end - wall,
            "tokens_per_cpu_second": tokens / (cpu_end - cpu),
            "tokens_per_second": tokens / (wall_end - wall), "losses": self.losses,
            "import_seconds": self.imported, "setup_seconds": self.ready, "peak_mib": peak,
            "gflops_per_cpu_second": self.yardsticks,
            "rows": zlib.crc32(repr([sorted(rows) for rows in self.batches]).encode())}

    def report(self) -> None:
        """The line, on stdout and the last thing there."""
        print(json.dumps(self.line()), flush=True)
