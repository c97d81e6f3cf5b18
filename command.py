"""What every command tells a user whom it refuses: one sentence on stderr, and exit code 2.

A sentence names the flag or the file and line, what was found, what was expected, what to do. Text
from files and command lines is shown cut and escaped, so that no terminal obeys it.
"""
import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from strict import clean, show


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {show(text)}, expected a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {show(text)}, expected a number") from None


def low_high(text: str) -> tuple[float, ...]:
    """LOW,HIGH as numbers; which of them make a range, `check` says."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {show(text)}, expected LOW,HIGH, such as 1,5") from None


def check(found: object, rules: Iterable[tuple]) -> None:
    """ValueError names the first flag, an attribute of `found`, that breaks a rule.

    A rule is (what is expected, a test of the value, names of the flags).
    """
    for wanted, good, names in rules:
        for name in names.split():
            if not good(value := getattr(found, name)):
                raise ValueError(f"--{name}: found {show(value)}, expected {wanted}")


def stop(program: str, error: Exception) -> NoReturn:
    """Exits with code 2 and the sentence of an error on stderr."""
    if isinstance(error, BrokenPipeError):  # who read our output is gone: let the rest of it go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(clean(f"{program}: {error}"), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one sentence, with the flag that was perhaps meant."""

    def parse_args(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """What a terminal cannot show is printed with backslashes from here on, not refused."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError):  # a pipe that nobody reads
                    stream.reconfigure(errors="backslashreplace")
        given = "\0".join([*(sys.argv[1:] if words is None else words), ""])
        given = re.sub(r"((?:^|\0)--\w+)\0(?=-[\d.])", r"\1=", given)  # -1,3 is a value, no flag
        return super().parse_args(given.split("\0")[:-1])

    def error(self, message: str) -> None:
        """Exits with code 2."""
        known = sorted(set(re.findall(r"--\w+", self.format_help())))
        asked = message.partition("unrecognized arguments: ")[2].split()
        asked = [word.split("=")[0] for word in asked if word.startswith("-")]
        near = [f"{word} may be {' or '.join(found)}" for word in asked if (
            found := [k for k in known if k.startswith(word)][:3]
            or difflib.get_close_matches(word, known, 2))]
        hint = f" ({'; '.join(near)})" if near else ""
        stop(self.prog, ValueError(f"{message}{hint}; --help lists the flags"))
