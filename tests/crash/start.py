"""Two ways to start a trainer: forked from a warm process, or as a user would, `python train.py`.

Both have start(job) -> process id and wait(seconds) -> exit code, None if it still runs.
"""
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from .trial import ROOT, environment


class Warm:
    """Forks of server.py: a start costs milliseconds instead of the seconds of importing torch."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-B", str(Path(__file__).with_name("server.py"))], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
        self.line()

    def line(self) -> str:
        text = self.server.stdout.readline().decode()
        if not text:
            raise RuntimeError("the warm process has ended")
        return text.strip()

    def start(self, job: dict) -> int:
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = int(self.line())
        if self.pid < 2:  # the exit code of a job that nobody waited for: 0 would signal us all
            raise RuntimeError("the warm process is out of step: an earlier job was not waited for")
        return self.pid

    def wait(self, seconds: float) -> int | None:
        return int(self.line()) if select.select([self.server.stdout], [], [], seconds)[0] else None

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


class Real:
    """`python train.py ...`, with nothing of this harness inside."""

    def start(self, job: dict) -> int:
        """Only argv and log of a job are read."""
        with open(job["log"], "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-B", "train.py", *job["argv"]], cwd=ROOT, stdout=log, stderr=log,
                env=environment())
        self.pid = self.process.pid
        return self.pid

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def finish(way: Warm | Real, seconds: float = 120) -> int:
    """The exit code of a run that ends by itself; one that hangs is killed: RuntimeError."""
    code = way.wait(seconds)
    if code is None:
        os.kill(way.pid, signal.SIGKILL)
        way.wait(60)
        raise RuntimeError(f"the run did not end within {seconds} seconds")
    return code


def go(way: Warm | Real, job: dict) -> int:
    """Starts a job and waits for its end."""
    way.start(job)
    return finish(way)
