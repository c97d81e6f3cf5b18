"""From files with weights to held-out units and an endless stream of batches.

A file is FILE or FILE:WEIGHT, the weight being passes per epoch. Prompts are held out over all
files, so that none is trained on under another file's name. A large .jsonl is read when training
reaches its rows; until then it is known by a sample, which is held out of too.
"""
import json
import os
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import data
import doubts
import lines
import records
import tokens
from config import Config

LARGE = 64 * 2**20  # bytes: a plain .jsonl beyond is not read at the start, every other file is
SAMPLE = 4096  # rows that are read of it at the start


def load_data(config: Config, chat: tokens.Chat, reads: str) -> tuple:
    """(units per file, weights, held-out units, lines to print, dropped rows, units an epoch).

    reads is what the loss takes, see data.units. A large file's units are a lines.Units, and its
    numbers are its sample's, scaled. ValueError where nothing is left for the loss.
    """
    specs = [records.weighted(d) for d in config.data]
    found = [read(path, config, chat, reads) for path, _ in specs]
    repeated = doubts.repeats(rows for rows, *_ in found)
    held = data.hold_out([e for f in found for e in f[0]], config.held_out, config.seed)
    files, told, dropped, size = [], [], [], 0
    for (path, weight), (rows, lost, long, formats, later), doubt in zip(specs, found, repeated):
        units, left = data.units([e for e in rows if e.prompt not in held], reads)
        about, scale = ("about ", max(1, len(later) / SAMPLE)) if later else ("", 1)
        share = round(weight * scale * len(units))
        counted = [f"{about}{round(scale * len(part))}" for part in (rows, lost, long, units)]
        told.append(f"{path}: {' and '.join(dict.fromkeys(formats))}, {counted[0]} rows"
                    + f", estimated from a sample of {min(SAMPLE, len(later or ()))}" * bool(later)
                    + f", {counted[1]} unusable" * bool(lost)
                    + f", {counted[2]} longer than {config.max_length} tokens" * bool(long)
                    + f"; to train on: {counted[3]} {reads}"
                    + f", {weight:g} times: {share} an epoch" * (weight != 1)
                    + "".join(f", {about}{round(scale * n)} {what}" for what, n in (
                        *doubt.items(), *((f"left out ({r})", n) for r, n in left.items()))))
        if later:
            later.held = held
        files.append(later or units)
        dropped += [] if later else lost + long
        size += share
    if not size:
        such = f", such as {dropped[0]['where']} ({dropped[0]['reason']})" if dropped else ""
        raise ValueError(
            f"nothing is left to train on with --loss {config.loss}. {'. '.join(told)}. Dropped: "
            f"{len(dropped)} rows{such}. Raise --max_length, give --truncate_prompt true, lower "
            f"--held_out, raise FILE:WEIGHT, or choose data that {config.loss} can read")
    test = data.grouped([e for f in found for e in f[0] if e.prompt in held and (
        e.kind != "prompt" or reads == "prompts")])
    return files, [w for _, w in specs], test, told, dropped, size


def read(path: str, config: Config, chat: tokens.Chat, reads: str) -> tuple:
    """(encoded rows, unusable ones, too long ones, formats, a large file's lines.Units or None)."""
    if path.endswith(".jsonl") and os.path.getsize(path) > LARGE:
        later = lines.Units(Path(path), config, chat, reads)
        return *later.sample(min(SAMPLE, len(later))), later
    examples, lost, formats = data.read(path, config.score_range)
    rows, long = tokens.encode_all(examples, chat, config.max_length, config.truncate_prompt, reads)
    return rows, lost, long, formats, None


def stream(
    files: list, weights: list[float], config: Config, place: tuple[int, int] = (0, 0),
    listed: Path | None = None,
) -> Iterator[tuple[list, tuple[int, int]]]:
    """(batch of units, the place behind it) from a place on, for ever: a function of the seed.

    A place is (rows drawn, units used of the row drawn next). Dropped rows that are met are added
    to the file `listed`, each once.
    """
    (drawn, used), sizes, batch = place, [len(f) for f in files], []
    met = {json.loads(d)["where"] for d in listed.read_text("utf-8").splitlines()} if listed else {}
    first, at = divmod(drawn, sum(round(w * n) for w, n in zip(weights, sizes, strict=True)))
    rows = chain.from_iterable(data.order(sizes, weights, config.seed, e, at * (e == first))
                               for e in count(first))
    for file, row in rows:
        units, dropped = files[file][row] if isinstance(files[file], lines.Units) else (
            [files[file][row]], [])
        if listed and dropped and dropped[0]["where"] not in met:
            met.add(dropped[0]["where"])
            with open(listed, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(d) + "\n" for d in dropped)
        for unit in units[used:]:
            batch.append(unit)
            used += 1
            if len(batch) == config.batch_size:
                yield batch, (drawn + used // len(units), used % len(units))
                batch = []
        drawn, used = drawn + 1, 0
