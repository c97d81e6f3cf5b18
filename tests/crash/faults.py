"""Faults planted inside the process, and its calls recorded: what strace does, done to os.

Less sharp than strace (it cannot reach the writes of compiled code) but it needs nothing installed.
"""
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def plant(faults: list[dict]) -> None:
    """Each fault is {"call", "when", "fault", "path"}: the when-th call of os.CALL on the path.

    CALL is fsync, mkdir, rename or replace, path a part of one, fault "KILL" or an errno's name.
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

    def broken(target, other=None):
        """The call itself, but for the one time."""
        nonlocal left
        left -= fault["path"] in place(target)
        if left == 0:
            left = -1
            if fault["fault"] == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, fault["fault"]), os.strerror(
                getattr(errno, fault["fault"])), place(target))
        return call(target) if other is None else call(target, other)

    return broken


def record(trace: str) -> None:
    """Writes os.fsync, os.rename, os.replace and os.rmdir to a file, in strace's words.

    Compiled code writes unseen, so a file's own time tells at the rename whether it changed after
    its fsync; one that was never synced shows up there.
    """
    synced = {}

    def told(line):
        with open(trace, "a", encoding="utf-8") as out:
            out.write(f"{os.getpid()} {line} = 0\n")

    def made(path):
        if path not in synced:
            kind = f'mkdir("{path}", 0777)' if os.path.isdir(path) else (
                f'openat(AT_FDCWD, "{path}", O_WRONLY|O_CREAT, 0666)')
            told(kind)

    def fsync(handle, real=os.fsync):
        path = place(handle)
        made(path)
        real(handle)
        synced[path] = time.time_ns()
        told(f"fsync(3<{path}>)")

    def renaming(real):
        """os.rename or os.replace, told."""
        def rename(source, target):
            """Tells first what has changed since its fsync."""
            source, target = place(source), place(target)
            for path in map(str, [*Path(source).rglob("*"), source]):
                made(path)
                if os.stat(path).st_mtime_ns > synced.setdefault(path, 0):
                    told(f"ftruncate(3<{path}>, 0)")
            real(source, target)
            told(f'rename("{source}", "{target}")')
        return rename

    os.fsync, os.rename, os.replace = fsync, renaming(os.rename), renaming(os.replace)
