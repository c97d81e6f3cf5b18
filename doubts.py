"""Feedback that can be read and is doubtful: names nearly right, odd turns, rows that disagree.

Data sets carry columns that nobody reads here (id, source, date), so those are let be. A column
that looks like one that is read, or that holds feedback which its format leaves unread, is not:
a score that is overlooked makes a bad answer a demonstration.
"""
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from itertools import pairwise

from strict import show

FEEDBACK = {"score", "label", "chosen", "rejected", "helpfulness", "correctness", "coherence",
            "rating", "reward", "response"}
UNREAD = {"pairs": {"score", "label"}}  # what a format must not meet, if not FEEDBACK
SPARE = FEEDBACK - UNREAD["pairs"] | {"answer", "data", "messages"}  # pairs may carry them too
KNOWN = FEEDBACK | {"prompt", "messages", "data", "answer", "system", "history", "input",
                    "metadata", "score_chosen", "score_rejected"}


class Skip(Exception):
    """A row that cannot be used, with the reason: dropped, counted and listed."""


def usable(made: list) -> list:
    """The examples of a row.   Skip where a loss or a chat template could not read them."""
    if not made:
        raise Skip("no assistant turn")
    if not all(e.prompt and (e.response.strip() or e.kind == "prompt") for e in made):
        raise Skip("empty prompt or response")
    if any(e.response.strip() == "DUMMY_ANSWER" for e in made):  # as UNA's authors write it
        raise Skip("DUMMY_ANSWER stands for no answer")
    said = [*(role for role, _ in made[-1].prompt), "assistant"]
    if twice := [a for a, b in pairwise(said) if b in (a, "system")]:
        raise Skip(f"behind a turn of the {twice[0]} comes another, or the system's")
    return made


def near(a: str, b: str) -> bool:
    """One letter more, less, other or swapped with its neighbour, where b has five or more."""
    less = [{(i, w[:i] + w[i + 1:]) for i in range(len(w))} for w in (a, b)]
    swapped = {a[:i] + a[i + 1] + a[i] + a[i + 2:] for i in range(len(a) - 1)}
    return a.strip().lower() == b or len(b) > 4 and bool(
        less[0] & less[1] or b in swapped or b in {w for _, w in less[0]}
        or a in {w for _, w in less[1]})


@lru_cache(1024)
def misspelt(columns: frozenset[str], like: tuple) -> tuple[str, str] | None:
    """(column, known name it is near to) of the first that stands for one that is not there."""
    there, known = {dict(like).get(c, c) for c in columns}, KNOWN | {name for name, _ in like}
    there |= SPARE if there >= {"chosen", "rejected"} else set()
    wanted = sorted(k for k in known if dict(like).get(k, k) not in there)
    return next(((c, k) for c in sorted(columns - known) for k in wanted if near(c[:99], k)), None)


def check_names(columns: Collection[str], like: Mapping[str, str]) -> None:
    """ValueError for a column that is misspelt; `like` are other names of known columns."""
    if found := misspelt(frozenset(columns), tuple(like.items())):
        raise ValueError(f"column {show(found[0])} looks like {found[1]!r}, misspelt: rename or "
                         "remove it")


def check_unread(columns: Collection[str], read: Collection[str], name: str) -> None:
    """ValueError for feedback that a format, which reads the columns `read`, would overlook."""
    twice = {"response"} if {"messages", "prompt"} <= set(columns) else set()  # said there as well
    if unread := sorted(UNREAD.get(name, FEEDBACK) & set(columns) - set(read) - twice):
        raise ValueError(f"column {unread[0]!r} is feedback that a row of {name} "
                         f"({', '.join(sorted(read))}) does not read: rename or remove it, or give "
                         "the other columns of its format")


def repeats(files: Iterable[Iterable]) -> list[Counter]:
    """What to say of each file of encoded rows, and how often: rows that say what one before says.

    The same prompt and response, in this file or one before, with the same or other feedback.
    """
    seen: dict[int, float] = {}
    out = []
    for rows in files:
        out.append(Counter())
        for row in rows:
            key = hash((row.prompt_len, tuple(row.ids)))
            if key in seen:
                out[-1]["said before" if seen[key] == row.reward else
                        "said before with OTHER feedback"] += 1
            seen.setdefault(key, row.reward)
    return out
