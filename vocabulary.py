"""tokenizer.json: checked for what would change ids in silence or never end, then opened.

The library behind it renumbers, panics (which is no Exception) and draws random merges; none of
that may reach a run.
"""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

import bounds
import strict

LIMIT = 128 << 20  # bytes; the largest of the hub have 35 million
PROBES = ("", "Hello 12\n\t\u00e9 \U0001f600", "x" * 40)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What the library prints when it panics does not reach the terminal."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def patterns(block: object) -> list[str]:
    """Every regular expression below a block of tokenizer.json."""
    if isinstance(block, dict):
        own = [block["Regex"]] if isinstance(block.get("Regex"), str) else []
        return own + [p for value in block.values() for p in patterns(value)]
    return [p for value in block for p in patterns(value)] if isinstance(block, list) else []


def numbers(raw: dict) -> dict[str, int]:
    """{token: id} as the file says it.   ValueError where an id is none, or is taken twice."""
    kind, added = raw.get("model"), raw.get("added_tokens") or []
    if type(kind) is not dict or type(kind.get("vocab")) not in (dict, list):
        raise ValueError("it holds no model with a vocab")
    vocab, owner = kind["vocab"], {}
    if type(vocab) is list:  # of [piece, score]
        vocab = {str(entry[0]): i for i, entry in enumerate(vocab) if entry}
    if type(added) is not list or not all(type(t) is dict and t.get("content") and type(
            t["content"]) is str for t in added):
        raise ValueError(f"added_tokens is {strict.show(added)}, expected objects with content")
    pairs = [*vocab.items(), *((t["content"], t.get("id")) for t in added)]
    for token, number in pairs:
        if type(number) is not int or not 0 <= number < 2**32:
            raise ValueError(f"token {strict.show(token)} has the id {strict.show(number)}, "
                             "expected a whole number from 0")
        if owner.setdefault(number, token) != token:
            raise ValueError(f"id {number} belongs to {strict.show(owner[number])} and to "
                             f"{strict.show(token)}")
    for token, number in pairs[len(vocab):]:
        if vocab.get(token, number) != number:
            raise ValueError(f"token {strict.show(token)} has the ids {vocab[token]} and {number}")
    return dict(pairs)


def check(raw: dict) -> dict[str, int]:
    """{token: id} of a tokenizer that gives every text the same ids each time, in fair time."""
    found = numbers(raw)
    if raw["model"].get("dropout"):
        raise ValueError(f"dropout is {strict.show(raw['model']['dropout'])}, which draws ids at "
                         "random: set it to null")
    for block in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for pattern in patterns(raw.get(block)):
            if not bounds.tame(pattern, 1000):
                raise ValueError(f"{block} has the regular expression {strict.show(pattern)}, "
                                 "which repeats what repeats and could run for ever")
    return found


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, without truncation and padding.   ValueError names what is wrong."""
    raw = strict.read_json(path, LIMIT)
    try:
        found = check(raw)
        with silent():
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            begins = tokenizer.encode("").ids
            for text in PROBES:
                encode(tokenizer, text)
        numbered = tokenizer.get_vocab()
        for token in (t for t, number in found.items() if numbered.get(t) != number):
            raise ValueError(f"token {strict.show(token)} has the id {found[token]}, but the "
                             f"library numbers it {numbered.get(token)}: ids have a gap")
        if odd := [i for i in begins if tokenizer.id_to_token(i) is None]:
            raise ValueError(f"post_processor writes the id {odd[0]}, which is no token")
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise ValueError(f"{path} is not a readable tokenizer: {error}") from None
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of a text, nothing added.   ValueError where the library gives up."""
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeError):
        raise ValueError(f"the text {strict.show(text)} holds a lone surrogate, which no tokenizer "
                         "takes: remove it") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer breaks on {strict.show(text)}: {error}") from None
    return encoding.ids, encoding.offsets
