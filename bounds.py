"""What a file may ask for: numbers in range, patterns that end, so much time and memory."""
import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import strict

PARTS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\(\??|\)|\||[*+]|\{\d*,(?:\d\d+)?\}|.", re.DOTALL)


def whole(key: str, value: object) -> int:
    """A positive integer of a size that some model could have."""
    most = 10_000 if key.startswith("num_") else 10**8
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{key} must be a positive integer up to {most}, found "
                         f"{strict.show(value)}")
    return value


def positive(key: str, value: object, bound: float) -> float:
    if type(value) not in (int, float) or not 0 < value < bound:
        raise ValueError(f"{key} must be a number between 0 and {bound:g}, found "
                         f"{strict.show(value)}")
    return value


def boolean(raw: dict, key: str, where: Path | None = None) -> bool:
    """True or false; absent and null are false. `where` is the file, if the caller is silent."""
    if raw.get(key) is not None and type(raw[key]) is not bool:
        raise ValueError(f"{where}: " * bool(where) + f"{key} must be true or false, found "
                         f"{strict.show(raw[key])}")
    return bool(raw.get(key))


def tame(pattern: str, repeats: int) -> bool:
    """Whether matching needs no endless time: nothing that repeats or chooses is itself repeated
    without bound, and there are at most so many unbounded repeats."""
    stack, closed, count = [False], False, 0  # of each open group: does it repeat or choose?
    for part in PARTS.findall(pattern):
        endless = part in "*+" or part[0] == "{" and len(part) > 1
        if endless and closed:
            return False
        count += endless
        closed = part == ")" and len(stack) > 1 and stack.pop()
        if part[0] == "(":
            stack.append(False)
        elif endless or closed or part == "|":
            stack[-1] = True
    return count <= repeats


def pattern(text: object, where: str) -> re.Pattern:
    """A regular expression from a file, compiled.   ValueError names `where` it stands."""
    try:
        if isinstance(text, str) and tame(text, 5):
            return re.compile(text)
        problem = "expected a text" if not isinstance(text, str) else (
            "it could run for ever; repeat nothing that repeats or chooses, and five times at most")
    except (re.error, RecursionError, OverflowError) as error:
        problem = str(error)
    raise ValueError(f"{where}: {strict.show(text)} is no usable regular expression: {problem}")


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """TimeoutError after so much computing time, where there are signals: on the main thread."""
    def late(number: int, frame: object) -> None:
        del number, frame
        raise TimeoutError(f"it takes longer than {seconds} seconds of computing")

    if not hasattr(signal, "setitimer") or (
            threading.current_thread() is not threading.main_thread()):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def memory(size: int) -> Iterator[None]:
    """MemoryError where the process would grow by more bytes, on Linux; for while it loads."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    import resource  # Unix has it
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(n for n in (soft, hard, now + size) if n != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
