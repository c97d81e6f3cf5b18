"""From files with weights to held-out units and an endless stream of batches.

A file is FILE or FILE:WEIGHT, the weight being passes per epoch. Prompts are held out over all
files together, so that none of theirs is trained on under another file's name.
"""
import itertools
from collections.abc import Iterator

import data
import tokens
from config import Config


def load_data(config: Config, chat: tokens.Chat, reads: str) -> tuple[list, list, list, list, list]:
    """(units per file, their weights, held-out units, lines to print, dropped rows).

    reads is what the loss takes, see data.units. ValueError where nothing is left for it.
    """
    parts = [d.rpartition(":") for d in config.data]
    specs = [(p, float(w)) if p and w.replace(".", "", 1).isdigit() else (d, 1.0)
             for d, (p, _, w) in zip(config.data, parts, strict=True)]
    files, told, dropped, rows = [], [], [], []
    for path, _ in specs:
        examples, lost, formats = data.read(path, config.score_range)
        encoded, long = tokens.encode_all(
            examples, chat, config.max_length, config.truncate_prompt)
        rows.append(encoded)
        dropped += lost + long
        told.append(f"{path}: {' and '.join(formats)}, {len(encoded)} rows"
                    + f", {len(lost)} unusable" * bool(lost)
                    + f", {len(long)} longer than {config.max_length} tokens" * bool(long))
    held = data.hold_out([e for r in rows for e in r], config.held_out, config.seed)
    for i, encoded in enumerate(rows):
        units, left = data.units([e for e in encoded if e.prompt not in held], reads)
        files.append(units)
        told[i] += f"; to train on: {len(units)} {reads}"
        told[i] += f", {specs[i][1]:g} times an epoch" * (specs[i][1] != 1)
        told[i] += "".join(f", {n} left out ({reason})" for reason, n in left.items())
    if not sum(round(w * len(f)) for f, (_, w) in zip(files, specs, strict=True)):
        such = f", such as {dropped[0]['where']} ({dropped[0]['reason']})" if dropped else ""
        raise ValueError(
            f"nothing is left to train on with --loss {config.loss}. {'. '.join(told)}. Dropped: "
            f"{len(dropped)} rows{such}. Raise --max_length, give --truncate_prompt true, lower "
            f"--held_out, raise FILE:WEIGHT, or choose data that {config.loss} can read")
    test = data.grouped([e for r in rows for e in r if e.prompt in held])
    return files, [w for _, w in specs], test, told, dropped


def stream(files: list, weights: list[float], config: Config, start: int) -> Iterator[list]:
    """The batches of units from step `start` on, for ever: a function of seed and position."""
    picks = itertools.chain.from_iterable(
        data.order([len(f) for f in files], weights, config.seed, e) for e in itertools.count())
    picks = itertools.islice(picks, start * config.batch_size, None)
    while True:
        yield [files[f][i] for f, i in itertools.islice(picks, config.batch_size)]
