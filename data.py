"""Feedback as text: rows of data files become Examples, Examples become an order to train in.

A demonstration is feedback with reward 1 and a pair is two rows, chosen first: after `parse` nobody
can tell instruction data from feedback, which is the paper's idea in one line of data (UFT 2.3).
Every format is recognised by its columns (FORMATS). tokens.py turns the text into batches.
"""
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import doubts
import records
from doubts import Skip
from strict import show

Messages = tuple[tuple[str, str], ...]  # (role, content); roles are system, user, assistant


@dataclass(frozen=True)
class Example:
    """One response and its feedback: what a row of every format becomes."""

    prompt: Messages
    response: str
    reward: float  # explicit feedback in [0, 1]
    kind: str  # "sft", "chosen", "rejected" or "scored"; "prompt": to be answered by sampling
    where: str  # file:line, for messages
    answer: str = ""  # what sampled responses are compared with, if that is not the response


Unit = tuple  # the one row, or the two rows, that one loss term reads: Examples or Encoded ones


def text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, found {show(value)}")
    value.encode()  # a lone surrogate is a ValueError: no tokenizer takes it
    return value


def listed(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, found {show(value)}")
    return value


def scaled(value: object, name: str, low: float, high: float) -> float:
    """(value - low) / (high - low), a reward in [0, 1].   ValueError outside the range."""
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {show(value)}, which is no number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {show(value)}, outside [{low:g}, {high:g}]; UFT needs rewards"
                         " in [0, 1]: a `score` column on another scale needs --score_range "
                         "LOW,HIGH")
    return (value - low) / (high - low)


def turns(value: str | list | dict, role: str, name: str) -> Messages:
    """A text, a message or a list of messages (role/content or from/value) as Messages."""
    if not isinstance(value, list | dict):
        return ((role, text(value, name)),)
    out = []
    for m in [value] if isinstance(value, dict) else value:
        if not isinstance(m, dict):
            raise ValueError(f"{name}: a message is an object with role and content, found "
                             f"{show(m)}")
        speaker = m.get("role", m.get("from"))
        speaker = {"human": "user", "gpt": "assistant"}.get(str(speaker), speaker)
        if speaker in TOOLS:
            raise Skip(f"a turn of the role {speaker!r}")
        if speaker not in ("system", "user", "assistant"):
            raise ValueError(f"{name}: a message has the role {show(speaker)}, not system, user "
                             "or assistant")
        out.append((speaker, text(m.get("content", m.get("value")), f"{name}: its content")))
    return tuple(out)


def marked_turns(value: str, user: str, assistant: str) -> Messages:
    """Turns written into one text behind marks, as HH-RLHF and HelpSteer2 do; the first is user."""
    parts = re.split(f"({user}|{assistant})", value)
    speakers = ["user"] + ["user" if re.fullmatch(user, p) else "assistant" for p in parts[1::2]]
    return tuple((s, p.strip()) for s, p in zip(speakers, parts[::2], strict=True) if p.strip())


def read_prompt(row: dict) -> Messages:
    """The prompt of a row; an Alpaca input follows its instruction under its own heading."""
    name = "prompt" if "prompt" in row else "messages"
    value, lead, past = row[name], (), []
    if name == "messages" and not isinstance(value, dict):
        listed(value, name)
    if isinstance(value, str) and row.get("input"):
        value += f"\n\n### Input:\n{text(row['input'], 'input')}"
    if isinstance(value, str) and "<extra_id_1>" in value:
        return marked_turns(value, "\n?<extra_id_1>User\n", "\n?<extra_id_1>Assistant\n")
    if row.get("system") is not None and text(row["system"], "system"):
        lead = (("system", row["system"]),)
    for turn in listed(row.get("history") or [], "history"):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history holds pairs [question, answer], found {show(turn)}")
        past += zip(("user", "assistant"), (text(t, "a turn of history") for t in turn),
                    strict=True)
    return lead + tuple(past) + turns(value, "user", name)


def answered(value: str | list | dict, name: str) -> tuple[Messages, str]:
    """(turns before, the last one, which must be the assistant's)."""
    said = turns(value, "assistant", name)
    if not said or said[-1][0] != "assistant":
        raise Skip("the last turn is not the assistant's" if said else f"no message in {name}")
    return said[:-1], said[-1][1]


def response(row: dict, where: str, reward: float, kind: str) -> list[Example]:
    before, answer = answered(row["response"], "response")
    return [Example(read_prompt(row) + before, answer, reward, kind, where)]


def read_demonstration(row: dict, where: str) -> list[Example]:
    return response(row, where, 1.0, "sft")


def read_asked(row: dict, where: str) -> list[Example]:
    """A prompt without a response: for losses that sample their own."""
    return [Example(read_prompt(row), "", 1.0, "prompt", where)]


def read_messages(row: dict, where: str) -> list[Example]:
    """One demonstration per assistant turn, all turns before it being the prompt.   UFT 3.1"""
    said = read_prompt({k: v for k, v in row.items() if k != "prompt"})
    out = [Example(said[:t], content, 1.0, "sft", where)
           for t, (role, content) in enumerate(said) if role == "assistant" and t > 0]
    if out and said[-1][0] != "assistant":
        raise Skip("the last turn is not the assistant's")
    return out


def read_ultrachat(row: dict, where: str) -> list[Example]:
    said = [{"role": ("user", "assistant")[i % 2], "content": c}
            for i, c in enumerate(listed(row["data"], "data"))]
    return read_messages({"messages": said}, where)


def read_score(row: dict, where: str) -> list[Example]:
    return response(row, where, row["score"], "scored")


def read_helpsteer(row: dict, where: str) -> list[Example]:
    """r = (.65 helpfulness + .8 correctness + .45 coherence) / 7.6, attributes 0 to 4.   UNA 4.1"""
    h, c, k = (4 * scaled(row[n], n, 0, 4) for n in ("helpfulness", "correctness", "coherence"))
    reward = (13 * h + 16 * c + 9 * k) / 152  # both in twentieths: ties and 1/2 come out exact
    return response(row, where, reward, "scored")


def read_label(row: dict, where: str) -> list[Example]:
    """Reward 1 or 0; of labelled messages the last is the answer."""
    if row["label"] not in (True, False):
        raise ValueError(f"label must be true or false, found {show(row['label'])}")
    if "response" not in row:
        *before, last = listed(row["messages"], "messages") or [None]
        row = row | {"prompt": before, "response": [last] if last else []}
    return response(row, where, float(row["label"]), "chosen" if row["label"] else "rejected")


def read_pair(row: dict, where: str) -> list[Example]:
    """Two adjacent rows, rewards 1 and 0; UltraFeedback's scores 1-10 give (s - 1) / 9 instead."""
    chosen, rejected = row["chosen"], row["rejected"]
    asked = bool(row.keys() & {"prompt", "messages"})
    if isinstance(chosen, str) and isinstance(rejected, str) and not asked:
        mark = "\n\nAssistant:"  # HH-RLHF: the prompt is where both begin alike
        cut = os.path.commonprefix([chosen, rejected]).rfind(mark)
        if not cut == chosen.rfind(mark) == rejected.rfind(mark) or cut < 0:
            raise Skip("chosen and rejected have no common prompt")
        prompt = marked_turns(chosen[:cut], "\n\nHuman:", mark)
        chosen, rejected = (t[cut + len(mark):].strip() for t in (chosen, rejected))
    else:
        prompt = read_prompt(row) if asked else ()
    (said, chosen), (also, rejected) = answered(chosen, "chosen"), answered(rejected, "rejected")
    if said != also or len(prompt) > 1 and said and said[:len(prompt)] != prompt:
        raise Skip("chosen and rejected have no common prompt")
    names = ("score_chosen", "score_rejected")
    scores, rewards = row if row.keys() & set(names) else row.get("metadata"), (1.0, 0.0)
    if isinstance(scores, dict) and scores.keys() & set(names):
        rewards = [scaled(scores.get(n), n, 1, 10) for n in names]
    if rewards[0] < rewards[1] or chosen == rejected and rewards[0] > rewards[1]:
        raise Skip("chosen and rejected are the same text" if chosen == rejected else
                   "the rejected answer has the higher score")
    prompt = said or prompt
    return [Example(prompt, chosen, rewards[0], "chosen", where),
            Example(prompt, rejected, rewards[1], "rejected", where)]


TOOLS = ("tool", "function", "function_call", "observation", "ipython", "developer")
ALIASES = {"completion": "response", "output": "response", "instruction": "prompt",
           "question": "prompt", "conversations": "messages", "context": "input",
           "system_prompt": "system"}
FORMATS: tuple[tuple[set[str], Callable[[dict, str], list[Example]], str], ...] = (
    ({"chosen", "rejected"}, read_pair, "pairs"),  # the first whose columns are all there wins
    ({"prompt", "response", "helpfulness", "correctness", "coherence"}, read_helpsteer,
     "HelpSteer2 scores"),
    ({"label", "prompt", "response"}, read_label, "labels"),
    ({"label", "messages"}, read_label, "labels"),
    ({"prompt", "response", "score"}, read_score, "scores"),
    ({"messages"}, read_messages, "conversations"),
    ({"data"}, read_ultrachat, "UltraChat conversations"),
    ({"prompt", "response"}, read_demonstration, "demonstrations"),
    ({"prompt"}, read_asked, "prompts"),
)
ASKED = {"prompt", "system", "history", "input"}  # with another column a response may be misspelt


def parse(row: dict, where: str, score_range: tuple[float, float]) -> tuple[str, list[Example]]:
    """(format, examples) of one row, recognised by its columns; further columns are ignored.

    But for feedback that its format does not read, and for names that look misspelt: ValueError.
    """
    doubts.check_names(row.keys(), ALIASES | {"answer": "response"})
    named = {}
    for column, value in row.items():
        if named.setdefault(ALIASES.get(column, column), value) != value:
            raise ValueError(f"two columns for one thing among {show(sorted(row))}: rename or "
                             "remove one")
    answer = str(row.get("answer", "")) if type(row.get("answer")) in (str, int, float) else ""
    if "answer" in row and "prompt" in named and not named.keys() & {"response", "chosen", "label"}:
        named["response"] = answer or row["answer"]  # GSM8K's question and answer
    for columns, reader, name in FORMATS:
        if columns <= named.keys() and (reader is not read_asked or named.keys() <= ASKED):
            doubts.check_unread(named.keys(), columns, name)
            if reader is read_score:
                named["score"] = scaled(row["score"], "score", *score_range)
            return name, [replace(e, answer=answer) for e in reader(named, where)]
    known = "; ".join("+".join(sorted(columns)) for columns, _, _ in FORMATS)
    raise ValueError(f"cannot tell the format from the columns {sorted(row)[:9]}. Known: {known}")


def read(path: str | Path, score_range: tuple[float, float] = (0, 1)) -> tuple[list, list, list]:
    """`read_rows` of a file.   ValueError where it holds no usable row."""
    bad: list[str] = []
    examples, dropped, formats = read_rows(records.rows(Path(path), bad), score_range, bad)
    if bad:
        more = f" (and {len(bad) - 1} more rows are wrong)" * (len(bad) > 1)
        raise ValueError(f"{bad[0]}{more}: mend the file, or remove the row")
    if not examples:
        first = "".join(f", the first at {d['where']}: {d['reason']}" for d in dropped[:1])
        raise ValueError(f"{path} holds no usable row ({len(dropped)} dropped{first})")
    return examples, dropped, formats


def read_rows(found: Iterable, score_range: tuple[float, float],
              bad: list | None = None) -> tuple[list, list, list]:
    """(examples, dropped rows, formats seen) of `rows`.   ValueError names file and line."""
    examples, dropped, formats = [], [], Counter()
    for where, row in found:
        try:
            name, made = parse(row, where, score_range)
            formats[name] += 1
            examples += doubts.usable(made)
        except Skip as reason:
            dropped.append({"where": where, "reason": str(reason)})
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            records.refuse(f"{where}: {error}", bad)
    return examples, dropped, list(formats)


def grouped(examples: Sequence) -> list[Unit]:
    """Pairs together, the rest alone: chosen with rejected, or two adjacent scores of a prompt."""
    out, i = [], 0
    while i < len(examples):
        group = tuple(examples[i : i + 2])
        kinds, prompts = tuple(e.kind for e in group), {e.prompt for e in group}
        if kinds not in (("chosen", "rejected"), ("scored", "scored")) or len(prompts) > 1:
            group = group[:1]
        out.append(group)
        i += len(group)
    return out


def units(examples: Sequence, reads: str) -> tuple[list[Unit], Counter]:
    """What one loss term reads, one unit each, and a count by reason of the rows left out.

    reads "groups": see `grouped`; "rows": every row; "demonstrations": sft and chosen rows;
    "labels": every row, its reward made 0 or 1 (a score is cut at 1/2); "pairs": the chosen row
    first, or the better of two scores; "prompts": a row of each group, for its prompt. Pairs and
    labels leave out ties, which prefer nothing.
    """
    out, left = [], Counter()
    labels = {"sft": 1.0, "chosen": 1.0, "rejected": 0.0}
    for group in grouped(examples):
        tie = len(group) == 2 and group[0].reward == group[1].reward
        scored = group[0].kind == "scored"
        if reads == "prompts":
            out.append(group[:1])
            left["a second answer to its prompt"] += len(group) - 1
        elif group[0].kind == "prompt":
            left["a prompt without a response"] += 1
        elif reads == "rows":
            out += [(e,) for e in group]
        elif reads == "demonstrations":
            out += [(e,) for e in group if e.kind in ("sft", "chosen")]
            left["not a demonstration"] += sum(e.kind in ("rejected", "scored") for e in group)
        elif tie and (reads == "pairs" or not scored):
            left["a tie"] += len(group)
        elif reads == "pairs" and len(group) == 2:
            group = sorted(group, key=lambda e: -e.reward) if scored else group
            out.append((replace(group[0], kind="chosen"), replace(group[1], kind="rejected")))
        elif reads == "pairs":
            left["not one of a pair"] += 1
        else:
            out += [(replace(e, reward=labels.get(e.kind, float(e.reward > 0.5))),)
                    for e in group if not (scored and e.reward == 0.5)]
            left["a score of exactly 1/2"] += sum(scored and e.reward == 0.5 for e in group)
    return out, +left


def hold_out(examples: Sequence, count: int, seed: int) -> set[Messages]:
    """Prompts, drawn by hash, that hold about `count` examples: none of theirs is to be trained."""
    sizes, chosen, total = Counter(e.prompt for e in examples), set(), 0
    for prompt in sorted(sizes, key=lambda p: zlib.crc32(f"{seed}{p}".encode())):
        if total >= count:
            break
        chosen.add(prompt)
        total += sizes[prompt]
    return chosen


def order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int,
          start: int = 0) -> Iterator[tuple[int, int]]:
    """(file, row) in the order of one epoch, from position `start` on: a pure function.

    A file of weight w gives round(w * size) rows an epoch, walking its own endless sequence of
    shuffles: after any number of epochs its rows were seen equally often, give or take one.
    """
    counts = [round(weight * size) for size, weight in zip(sizes, weights, strict=True)]
    ends, walked, at = np.cumsum(counts), np.empty(sum(counts), np.int64), 0
    for file, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        slot, last = epoch * count, (epoch + 1) * count
        while slot < last:
            lap, place = divmod(slot, size)
            take, draw = min(size - place, last - slot), np.random.default_rng([seed, file, lap])
            walked[at : at + take] = draw.permutation(size)[place : place + take]
            slot, at = slot + take, at + take
    shuffled = np.random.default_rng([seed, epoch]).permutation(at)  # in all 16 bytes a row
    for picks in (shuffled[i : i + 4096] for i in range(start, at, 4096)):
        files = ends.searchsorted(picks, "right")
        yield from zip(files.tolist(), walked[picks].tolist(), strict=True)
