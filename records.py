"""Rows of data files, read with suspicion: which bytes are a row, and what is wrong with the rest.

.jsonl, .json (a list, or lines), either with .gz, .parquet, and .csv for questions. A row is a JSON
object; NaN, a key that comes twice, and bytes that are no UTF-8 are refused with file and line.
Nothing is read that is no regular file, and no more than a row may take.
"""
import csv
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import IO

from strict import clean, show

LONGEST = 16 * 2**20  # bytes of a line
WHOLE = 2**30  # bytes of a .json list, which is parsed at once
GROWTH, SLACK = 200, 2**26  # bytes of text in a byte of gzip, beyond the first 64 MiB: usual is 20
MAGIC = {b"PK\x03\x04": "a zip archive: unpack it", b"PAR1": "a parquet file: call it .parquet",
         b"\x1f\x8b": "compressed with gzip: call it .gz", b"BZh": "compressed: unpack it",
         b"\xfd7zXZ": "compressed: unpack it", b"\x28\xb5\x2f\xfd": "compressed: unpack it"}
UTF_16 = ("looks like UTF-16", "save it as UTF-8")


def rows(path: Path, bad: list | None = None) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of a data file.   ValueError with line, or all of them into `bad`."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    check_file(path)
    try:
        yield from csv_rows(path) if path.suffix == ".csv" else json_rows(path, bad)
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None


def check_file(path: Path) -> None:
    """ValueError unless a regular file is there whose first bytes are not those of an archive."""
    if not os.path.exists(path):
        raise ValueError(f"{clean(path)}: No such file or directory (seen from {os.getcwd()}): "
                         "check its name")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{clean(path)} is {kind}, expected a regular file with rows")
    with open(path, "rb") as file:
        first = file.read(8)
    for start, kind in MAGIC.items():
        if first.startswith(start) and not (start == b"\x1f\x8b" and path.suffix == ".gz"):
            raise ValueError(f"{clean(path)} is {kind}; expected one JSON object a line")


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """`rows` of a table; pyarrow is large, and needed by few."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    if not path.is_file():
        raise ValueError(f"{clean(path)}: No such file or directory: check its name")
    try:
        table = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no readable parquet file ({clean(error)[:200]})") from None
    yield from ((f"{path}:{i}", row) for i, row in enumerate(table, 1))


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """`rows` of a table whose first line names the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="")
        try:
            yield from ((f"{path}:{reader.line_num}", row) for row in reader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def json_rows(path: Path, bad: list | None = None) -> Iterator[tuple[str, dict]]:
    """`rows` of a JSON list or of one object a line."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        first = file.read(99).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # behind a BOM, if any
        whole = path.name.removesuffix(".gz").endswith(".json") and first == b"["
        file.seek(0)
        yield from json_lines(path, all_of(path, file) if whole else numbered(path, file), whole,
                              bad)


def all_of(path: Path, file: IO[bytes]) -> list[tuple[int, bytes]]:
    """The file as one line.   ValueError where it is too large to be parsed at once."""
    most = min(WHOLE, largest(path))
    content = file.read(most + 1) if path.suffix == ".gz" or stamp(file)[0] <= most else None
    if content is None or len(content) > most:
        raise ValueError(f"{path} holds more than {most >> 20} MiB in one JSON list: write one "
                         "object a line, and call it .jsonl")
    return [(1, content)]


def largest(path: Path) -> int:
    """Bytes that may come out of a file: a small gzip that holds a huge one is no data."""
    return max(SLACK, GROWTH * path.stat().st_size) if path.suffix == ".gz" else 2**62


def numbered(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, line), each read only as far as a line may go."""
    room = largest(path)
    for n in count(1):
        line = read_line(path, n, file)
        room -= len(line)
        if room < 0:
            raise ValueError(f"{path}:{n}: more than {GROWTH} times the size of the compressed "
                             "file: this is no text; unpack it and look")
        if not line:
            return
        yield n, line


def read_line(path: Path, number: int, file: IO[bytes], known: tuple | None = None) -> bytes:
    """The line where the file stands.   ValueError beyond LONGEST, and where the file changed."""
    if known and stamp(file) != known:
        raise ValueError(f"{path} has changed since the run first read it: start a new run")
    line = file.readline(LONGEST + 1)
    if len(line) > LONGEST:
        raise ValueError(f"{path}:{number}: the line is longer than {LONGEST >> 20} MiB: expected "
                         "one JSON object a line")
    return line


def stamp(file: IO[bytes]) -> tuple[int, int]:
    """Size and time of the last change of an open file."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def weighted(spec: str) -> tuple[str, float]:
    """(path, weight) of FILE or FILE:WEIGHT.   ValueError where the weight is not of (0, 1000]."""
    path, _, weight = spec.rpartition(":")
    if not path or os.path.exists(spec) or not re.fullmatch(r"[-+\d._eE]+|-?(nan|inf)", weight):
        return spec, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise ValueError(f"--data {clean(spec)}: found the weight {weight}, expected passes per "
                         "epoch above 0 and up to 1000")
    return path, value


def json_lines(path: Path, lines: Iterable, whole: bool = False,
               bad: list | None = None) -> Iterator[tuple[str, dict]]:
    """`rows` of (number, line) pairs, or of the one that lists them all."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = strict_json(line)
        except ValueError as error:
            refuse(f"{path}:{number}: {error}", bad)
            continue
        for i, row in enumerate(value if whole else [value], 1):
            where = f"{path} item {i}" if whole else f"{path}:{number}"
            if isinstance(row, dict):
                yield where, row
            else:
                refuse(f"{where}: expected an object, found {type(row).__name__} {show(row)}", bad)


def refuse(sentence: str, bad: list | None) -> None:
    """ValueError, or where all mistakes are wanted, one more of them."""
    if bad is None:
        raise ValueError(sentence)
    bad.append(sentence)


def strict_json(line: bytes) -> object:
    """The value of a JSON text.   ValueError for what json takes, and for what it crashes on."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant,
                          object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        guess, advice = UTF_16 if b"\0" in line[:80] else ("is not UTF-8", "save the file as UTF-8")
        what = f"byte {error.start} of the line, 0x{line[error.start]:02x}, {guess}: {advice}"
    except json.JSONDecodeError as error:
        what = f"{error.msg}, character {error.pos + 1}"
        what += f": the file {UTF_16[0]}, {UTF_16[1]}" * (b"\0" in line[:80])
    except RecursionError:
        what = "brackets within brackets, too many of them"
    except ValueError as error:  # of ours, or the interpreter's for an integer of 5000 digits
        what = str(error).split(":")[0]
    start = clean(line[:80].decode("utf-8", "replace").strip())
    raise ValueError(f"not valid JSON ({what}): {start}") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; json itself would keep the last of two alike."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {show(twice)} comes twice")
    return out
