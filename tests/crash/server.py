"""A warm process that has imported everything and forks one trainer for each line of its input.

A job is a JSON object: argv and log (a file), and perhaps rows (a file: what each step read), hold
(wait for SIGUSR1), limits ({name of RLIMIT: bytes}), memory (bytes that it may still map), humble
(root's right to write everywhere is given up), faults (see faults.py), record (a file for its
calls), files (write model and data there instead). Answers: the child's id, then its exit code,
negative for a signal.

No tensor is touched before the fork: threads would not survive it. torch would import _dynamo at
the first step, a second's work: the parent has done that too.
"""
import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import struct
import sys
import traceback
from pathlib import Path

import faults

import train


def listen(path: str) -> None:
    """Adds the rate and the rows of each step to a file, before the step."""
    step = train.train_step

    def watched(net, optimizer, units, config, rate):
        with open(path, "a", encoding="utf-8") as out:
            out.write(f"{rate.hex()} {[e.where for unit in units for e in unit]}\n")
        return step(net, optimizer, units, config, rate)

    train.train_step = watched


def write_files(root: str) -> None:
    """The model and data of tests/folder.py, its layers wide enough for adapters of megabytes."""
    import folder

    folder.write_model(Path(root) / "model", hidden_size=256, intermediate_size=512)
    folder.write_files(Path(root) / "files")


def humble() -> None:
    """Without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH modes bind root as well."""
    libc, header = ctypes.CDLL(None), struct.pack("Ii", 0x20080522, 0)
    held = ctypes.create_string_buffer(24)
    libc.capget(header, held)
    effective, *rest = struct.unpack("6I", held.raw)
    libc.capset(header, struct.pack("6I", effective & ~0b110, *rest))


def limit(job: dict) -> None:
    """Sets the job's limits on this process."""
    limits = job.get("limits", {})
    if "memory" in job:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limits = limits | {"RLIMIT_AS": pages * resource.getpagesize() + job["memory"]}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))
    if job.get("humble"):
        humble()


def work(job: dict) -> None:
    """The job, in a process of its own."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("hold"):
        signal.sigwait({signal.SIGUSR1})
    limit(job)
    if "files" in job:
        return write_files(job["files"])
    if "rows" in job:
        listen(job["rows"])
    faults.plant(job.get("faults", []))
    if "record" in job:
        faults.record(job["record"])
    return train.main(job["argv"])


def child(job: dict) -> None:
    """Ends the process with the code that the command would have ended with."""
    code = 0
    try:
        work(job)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:  # noqa: BLE001, this is the end of a process
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    importlib.import_module("torch._dynamo")
    print("ready", flush=True)
    for line in sys.stdin:
        if not (pid := os.fork()):
            child(json.loads(line))
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
