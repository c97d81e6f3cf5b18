"""What strace wrote, read: the system calls of a run, and whether their order survives a power cut.

kill -9 cannot show a missing fsync (the page cache outlives the process), the order of calls can:
every file of a folder, then the folder, then the rename that gives it its name, then the parent.
"""
import re
from pathlib import Path
from typing import NamedTuple

MAKES = ("open", "openat", "creat", "mkdir", "mkdirat")
RENAMES = ("rename", "renameat", "renameat2")
SYNCS = ("fsync", "fdatasync")
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "fallocate",
          "copy_file_range", "sendfile")
REMOVES = ("unlink", "unlinkat", "rmdir")
TRACED = (*MAKES, *RENAMES, *SYNCS, *WRITES, *REMOVES, "flock", "chmod", "fchmod", "fchmodat")
LINE = re.compile(r"(?:\[pid +)?(\d+)\]? +(.*)")


class Call(NamedTuple):
    """One system call: the thread, its name, the text between the brackets, what came back."""

    pid: int
    name: str
    args: str
    result: str

    def paths(self) -> list[str]:
        """The paths that it names or has open, in order, those beside a folder's handle joined."""
        text = r'"((?:[^"\\]|\\.)*)"'
        if self.name.endswith(("at", "at2")):  # 4</a/folder>, "name"
            beside = re.findall(rf"<(/[^>]*)>, {text}", self.args)
            if beside:
                return [str(Path(folder) / name) for folder, name in beside]
        if self.name in WRITES:  # its text is no path
            text = "(?!)()"
        return [a or b for a, b in re.findall(rf"{text}|<(/[^>]*)>", self.args)]

    def failed(self) -> bool:
        return self.result.startswith(("-1", "?"))


def calls(text: str) -> list[Call]:
    """The calls of a trace written with -f -y, those cut in two by another thread joined.

    A call during which the process dies has the result "?".
    """
    found, open_calls = [], {}
    for line in text.splitlines():
        if not (match := LINE.fullmatch(line)):
            continue
        pid, rest = int(match[1]), match[2]
        if rest.endswith("<unfinished ...>"):
            open_calls[pid] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = open_calls.pop(pid, "") + resumed[1]
        if call := re.fullmatch(r"(\w+)\((.*)\)\s+= (.*)", rest):
            found.append(Call(pid, call[1], call[2], call[3]))
    found += [Call(pid, *begun.partition("(")[::2], "?") for pid, begun in open_calls.items()]
    return found


class Entry(NamedTuple):
    """What a path has been through, by the places of calls in the trace; -1: never."""

    changed: int = -1  # written, or for a folder: an entry made, renamed or removed
    synced: int = -1


def history(trace: list[Call], stop: int) -> dict[str, Entry]:
    """{path: Entry} after the first `stop` calls. A rename takes what is known along."""
    found = {}

    def touch(path, part, i):
        found[path] = found.get(path, Entry())._replace(**{part: i})

    for i, call in enumerate(trace[:stop]):
        paths = call.paths()
        if call.failed() or not paths:
            continue
        parent = str(Path(paths[-1]).parent)
        if call.name in MAKES and (call.name.startswith("mkdir") or "O_CREAT" in call.args):
            if paths[-1] not in found:
                touch(parent, "changed", i)
            touch(paths[-1], "changed", i)
        elif call.name in WRITES:
            touch(paths[0], "changed", i)
        elif call.name in SYNCS:
            touch(paths[0], "synced", i)
        elif call.name in RENAMES:
            moved = {p: e for p, e in found.items() if Path(p).is_relative_to(paths[0])}
            for path, entry in moved.items():
                del found[path]
                found[str(paths[-1] / Path(path).relative_to(paths[0]))] = entry
            touch(str(Path(paths[0]).parent), "changed", i)
            touch(parent, "changed", i)
        elif call.name in REMOVES:
            found.pop(paths[0], None)
            touch(parent, "changed", i)
    return found


def complaints(trace: list[Call], out: Path) -> list[str]:
    """Where a run's calls break the promise: sentences, none if it is kept.

    For every rename that gives something below `out` its final name: each file below the source
    is synced after its last change, then the folder itself, then the rename, then, before anything
    else is renamed or removed beside it, the parent. tmp-* and what is in it is not final.
    """
    wrong = []
    for i, call in enumerate(trace):
        if call.name not in RENAMES or call.failed():
            continue
        source, target = call.paths()
        if not Path(target).is_relative_to(out) or "/tmp-" in target.removeprefix(str(out)):
            continue
        said = f"{Path(source).name} -> {Path(target).name}"
        below = {p: e for p, e in history(trace, i).items() if Path(p).is_relative_to(source)}
        if not below:
            wrong.append(f"{said}: nothing was written before the rename")
        wrong += [f"{said}: {Path(p).relative_to(source.rpartition('/')[0])} is not synced after "
                  "its last change" for p, e in sorted(below.items()) if e.synced < e.changed]
        folder = below.get(source, Entry())
        wrong += [f"{said}: the folder is synced before {Path(p).name}" for p, e in below.items()
                  if p != source and e.synced > folder.synced]
        wrong += [f"{said}: {fault}" for fault in parent_faults(trace, i, str(Path(target).parent))]
    return wrong


def parent_faults(trace: list[Call], i: int, parent: str) -> list[str]:
    """What happens beside a rename, call i, before its parent is synced."""
    for call in trace[i + 1:]:
        paths = [] if call.failed() else call.paths()
        if call.name in SYNCS and paths[:1] == [parent]:
            return []
        if call.name in RENAMES + REMOVES and any(str(Path(p).parent) == parent for p in paths):
            return [f"{call.name} of {Path(paths[0]).name} before {parent} is synced"]
    return [f"{parent} is never synced afterwards"]


def checkpoints(trace: list[Call], out: Path) -> list[str]:
    """Names of the checkpoints that the trace shows being given their name, in order."""
    return [Path(call.paths()[-1]).name for call in trace
            if call.name in RENAMES and not call.failed()
            and re.fullmatch(re.escape(f"{out}/checkpoints/") + r"step-\d+", call.paths()[-1])]
