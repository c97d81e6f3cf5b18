"""What a case of the fault table is, and the changes that most cases are made of.

The fixture that a change is given: model/, data.jsonl, scores.jsonl, pairs.jsonl, labels.jsonl,
adapter/ (of model/) and other/ (another model's adapter). Names in changes are relative to it.
"""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Change = Callable[[Path], None]


class Case(NamedTuple):
    """One mistake. The name begins with its family's id, as in "M05 eps is NaN".

    Oracles: R refused: exit code 2, one sentence on stderr with all words, nothing written.
    V valid: exit code 0, the words on stdout. W: exit code 0, the words on stdout or stderr.
    K stopped: another exit code than 0 and a plain message with the words.
    """

    name: str
    program: str  # train, generate, evaluate, lora, page
    change: Change | None
    flags: str = ""  # behind the usual ones, DIR is the place; "ONLY ..." instead of them
    words: str = ""  # separated by ";"
    oracle: str = "R"
    pending: str = ""  # why it may fail for now: reported, not counted


def real(name: str) -> str:
    """A file name as Python receives it from a command line, whatever the locale."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def write(name: str, content: str | bytes) -> Change:
    """The file holds `content` instead."""
    def change(place: Path) -> None:
        path = place / real(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    return change


def remove(name: str) -> Change:
    return lambda place: (place / name).unlink()


def rename(name: str, to: str) -> Change:
    return lambda place: (place / name).rename(place / real(to))


def edit(name: str, **keys) -> Change:
    """Keys of a JSON file hold other values; None stays null, Ellipsis removes the key."""
    def change(place: Path) -> None:
        raw = json.loads((place / name).read_text("utf-8")) | keys
        raw = {k: v for k, v in raw.items() if v is not ...}
        (place / name).write_text(json.dumps(raw), "utf-8")

    return change


def cut(name: str, length: int) -> Change:
    """Only the first bytes of the file are left; a negative length counts from the end."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:length])


def several(*changes: Change) -> Change:
    """One change after another."""
    def change(place: Path) -> None:
        for one in changes:
            one(place)

    return change


def link(name: str, to: str) -> Change:
    """The file is a symbolic link instead; `to` is taken from the link's own folder."""
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(to)

    return change


def fifo(name: str) -> Change:
    """The file is a named pipe that nobody writes to."""
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return change


def directory(name: str) -> Change:
    """The file is a folder instead."""
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir()

    return change


def tensors(name: str, edit_all: Callable[[dict], None]) -> Change:
    """`edit_all` changes the {name: tensor} of a safetensors file."""
    def change(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = {n: t.clone() for n, t in load_file(place / name).items()}
        edit_all(state)
        save_file({n: t.contiguous() for n, t in state.items()}, place / name)

    return change


def header(name: str, rewrite: Callable[[dict], dict | str | bytes]) -> Change:
    """`rewrite` makes another header of a safetensors file: a dict, its text, or its bytes."""
    def change(place: Path) -> None:
        data = (place / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        new = rewrite(json.loads(data[8:end]))
        new = json.dumps(new) if isinstance(new, dict) else new
        new = new.encode("utf-8") if isinstance(new, str) else new
        (place / name).write_bytes(len(new).to_bytes(8, "little") + new + data[end:])

    return change


def bomb(name: str) -> Change:
    """The file is a pickle that leaves a file `pwned` where it is opened."""
    return write(name, b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R.")
