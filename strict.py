"""Files from outside, read with suspicion: regular, of bounded size, UTF-8, strict JSON.

Whatever breaks a rule is a ValueError that names the file, and the line where there is one.
"""
import itertools
import json
import os
import re
import reprlib
import stat
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

LIMIT = 16 << 20  # bytes of a JSON file or a template; a tokenizer may have more
SIGNS = (  # how the bytes begin, without regard to case: what they are
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file with `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page: download the file itself"),
    (rb"\x1f\x8b", "gzip: unpack it"), (rb"PK\x03\x04", "a zip archive, never opened"),
    (rb"\x80[\x02-\x05][^\0]", "a pickle, never opened"), (rb"\s*\Z", "empty"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32: save it as UTF-8"),
    (rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0", "UTF-16: save it as UTF-8"))
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device",
         stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}


def clean(text: object) -> str:
    """The text on one line: control characters and what has no shape become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def show(value: object) -> str:
    """A value in a message: its repr, shortened, however large, deep or strange it is."""
    if isinstance(value, str):
        return clean(repr(value if len(value) <= 80 else value[:77] + "..."))
    return clean(reprlib.repr(value))


def sign(data: bytes) -> str:
    """What the first bytes of a file give away, as " (it is ...)", or nothing."""
    found = [what for pattern, what in SIGNS if re.match(pattern, data, re.IGNORECASE)]
    return f" (it is {found[0]})" if found else ""


def found(folder: str | Path) -> str:
    """What lies there, for a message."""
    if Path(folder).is_dir():
        return f"found: {sorted(os.listdir(folder))[:8]}"
    return "it is a file" if Path(folder).exists() else "there is no such folder"


def exists(path: Path) -> bool:
    """Whether a regular file, or a link to one, lies there; ValueError for anything else."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        if os.path.islink(path):
            raise ValueError(f"{path} is a link to nothing") from None
        return False
    except NotADirectoryError:
        raise ValueError(f"{path.parent} is a file, expected a folder") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} is a {KINDS.get(kind, 'special file')}, expected a file")
    return True


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A file of UTF-8 text, with or without a byte order mark."""
    if not exists(path):
        raise ValueError(f"{path} is missing")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{path} has {size} bytes, expected {limit} at most"
                             f"{sign(file.read(99))}")
        data = file.read(size + 1)  # no more: read(limit) would take the memory of all of it
    try:
        if b"\0" not in data[:4]:
            return data.decode("utf-8-sig")
        raise ValueError(f"{path} is no text in UTF-8{sign(data)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: byte 0x{data[error.start]:02x} at offset "
                         f"{error.start}{sign(data)}") from None


def parse(text: str) -> dict:
    """The object that a JSON text spells: no key twice, no NaN or infinity, no endless nesting."""
    def unique(pairs: Sequence[tuple[str, object]]) -> dict:
        """An object whose keys differ and whose numbers are finite."""
        found = dict(pairs)
        if len(found) < len(pairs):
            names = sorted(name for name, _ in pairs)
            twice = next(a for a, b in itertools.pairwise(names) if a == b)
            raise ValueError(f"{show(twice)} is there twice")
        for name in (n for n, value in pairs if type(value) is float and not isfinite(value)):
            raise ValueError(f"{show(name)} is {found[name]}, expected a number JSON can say")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno}: "
                         f"{error.msg}") from None
    if type(found) is not dict:
        raise ValueError(f"it holds a {type(found).__name__}, expected an object, {{...}}")
    return found


def read_json(path: Path, limit: int = LIMIT) -> dict:
    """The object in a JSON file; see `parse`."""
    text = read_text(path, limit)
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}{sign(text[:99].encode('utf-8'))}") from None


def optional_json(path: Path) -> dict:
    return read_json(path) if exists(path) else {}
