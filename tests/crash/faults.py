"""Faults planted inside the process: what strace does to a system call, done to a function of os.

Less sharp than strace (it cannot reach the writes of compiled code) but it needs nothing installed.
"""
import errno
import os
import signal
from collections.abc import Callable

CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open")


def plant(faults: list[dict]) -> None:
    """Each fault is {"call", "when", "fault", "path"}: the when-th call of os.CALL that names path.

    Or that has it open; fault is "KILL" or the name of an errno, and "path" a part of a path.
    """
    for fault in faults:
        setattr(os, fault["call"], spoiled(getattr(os, fault["call"]), fault))


def place(target: object) -> str:
    """The path of a file descriptor, or the path itself."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return os.path.abspath(os.fspath(target))


def spoiled(call: Callable, fault: dict) -> Callable:
    """os.CALL that fails, or kills the process, the when-th time that it is used on the path."""
    left = fault["when"]

    def broken(target, *rest, **named):
        nonlocal left
        left -= fault["path"] in place(target)
        if left == 0:
            left = -1
            if fault["fault"] == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, fault["fault"]), os.strerror(
                getattr(errno, fault["fault"])), place(target))
        return call(target, *rest, **named)

    return broken
