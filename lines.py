"""A .jsonl file too large to read at the start: rows by their offset, units when they are reached.

Only offsets are held, 8 bytes a row. It is not mapped: a mapped one counts as the run's memory.
"""
from collections.abc import Iterator
from itertools import chain, islice, takewhile
from pathlib import Path

import numpy as np

import data
import records
import tokens
from config import Config

CHUNK = 2**20  # bytes scanned at a time: few enough for a processor's cache
LONG = 64  # scores of one prompt to look back at: in a longer run those of even rows begin a pair


class Lines:
    """[i] is ("file:line", row), as records.rows has it, of a plain .jsonl file, read on demand.

    ValueError where records.rows has one, for this row alone, and where the file has changed."""

    def __init__(self, path: Path) -> None:
        records.check_file(path)
        self.path, self.file = path, path.open("rb")
        self.known = records.stamp(self.file)
        starts, doubtful = self.scan()
        blank = np.array([i for i in doubtful if not self.line(starts[i], i).strip()], np.int64)
        self.starts = np.delete(starts, blank) if len(blank) else starts
        self.blank = blank - np.arange(len(blank))  # rows before each blank line

    def scan(self) -> tuple[np.ndarray, list[int]]:
        """(offset of each line, numbers from 0 of those that begin with a blank), in chunks."""
        starts, doubtful, at, count, last = [], [], 0, 0, b"\n"
        while chunk := self.file.read(CHUNK):
            text = np.frombuffer(last + chunk, np.uint8)
            found = np.flatnonzero(text[:-1] == ord("\n"))  # a line begins behind each
            starts.append(found + at)
            doubtful += (np.flatnonzero(text[found + 1] <= ord(" ")) + count).tolist()
            at, count, last = at + len(chunk), count + len(found), chunk[-1:]
        return np.concatenate(starts or [np.empty(0, np.int64)]), doubtful

    def line(self, start: int, i: int) -> bytes:
        self.file.seek(start)
        return records.read_line(self.path, i + 1, self.file, self.known)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, i: int) -> tuple[int, bytes]:
        """(number from 1, text) of the line of row i."""
        n = i + int(self.blank.searchsorted(i, "right"))
        return n + 1, self.line(self.starts[i], n)

    def __getitem__(self, i: int) -> tuple[str, dict]:
        return next(records.json_lines(self.path, [self.at(i)]))


class Units:
    """The units of a .jsonl file by the row they begin in: none, one or more.

    Those of all rows are what data.units makes of the file without the prompts in `held`."""

    def __init__(self, path: Path, config: Config, chat: tokens.Chat, reads: str) -> None:
        self.rows, self.config, self.chat, self.reads = Lines(path), config, chat, reads
        self.held: set[data.Messages] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[data.Unit], list[dict]]:
        """(units that begin in row i, examples of the row that are dropped)."""
        mine, lost, long, _ = self.read(i)
        if mine and self.reads not in ("rows", "demonstrations"):  # which need no neighbours
            mine = self.begun(i, mine)
        return data.units(mine, self.reads)[0], lost + long

    def read(self, i: int, refuse: bool = False) -> tuple[list, list, list, list]:
        """(encoded examples of row i but for held-out ones, unusable, too long, formats).

        A bad row is unusable too, not the end of a run that has come this far, or a ValueError.
        """
        line = self.rows.at(i)
        try:
            row = records.json_lines(self.rows.path, [line])
            examples, lost, formats = data.read_rows(row, self.config.score_range)
            encoded, long = tokens.encode_all(
                examples, self.chat, self.config.max_length, self.config.truncate_prompt,
                self.reads)
        except ValueError as error:
            if refuse:
                raise
            return [], [{"where": f"{self.rows.path}:{line[0]}", "reason": str(error)}], [], []
        return [e for e in encoded if e.prompt not in self.held], lost, long, formats

    def begun(self, i: int, mine: list) -> list:
        """The examples of the groups, see data.grouped, that begin in row i: `mine`, as it is read.

        A group has one prompt, so to know which two scores pair, the walk back ends where it does.
        """
        back = {"scored": LONG, "rejected": 1}.get(mine[0].kind, 0)
        run = takewhile(lambda e: e.prompt == mine[0].prompt, self.beside(i, -1))
        before = [*islice(run, back)][::-1]
        if len(before) == LONG:
            before = before[LONG - i % 2:]
        after = islice(self.beside(i, 1), int(mine[-1].kind in ("scored", "chosen")))
        groups = data.grouped([*before, *mine, *after])
        return [e for group in groups if any(group[0] is m for m in mine) for e in group]

    def beside(self, i: int, step: int) -> Iterator[tokens.Encoded]:
        """The examples before (step -1) or behind (step 1) row i, nearest first."""
        rows = range(i + step, len(self) if step > 0 else -1, step)
        return chain.from_iterable(self.read(j)[0][::step] for j in rows)

    def sample(self, count: int) -> tuple[list, list, list, list]:
        """What `read` gives for `count` rows drawn by the seed, with the rest of their groups."""
        picks = np.random.default_rng(self.config.seed).choice(len(self), count, replace=False)
        found = [], [], [], []
        for i in np.sort(picks).tolist():
            mine, *rest = self.read(i, refuse=True)
            for column, more in zip(found, (mine and self.begun(i, mine), *rest), strict=True):
                column.extend(more)
        return found
