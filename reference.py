"""log pi_ref(y|x), worked out once a row and kept on disk: pi_ref never changes.

A row that carries its ref_logps needs no reference pass. What is kept is what the pass gave, bit
for bit; a pass over other rows at the same time may round its last bit differently.
A store is DIR/FINGERPRINT.safetensors, the fingerprint being that of the model's files and dtype.
"""
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora
import model
import tokens

Known = dict[str, float]  # log pi_ref by `key`
NEW = 4096  # rows that a run may lose when it is killed


def key(row: tokens.Encoded) -> str:
    """32 hex digits of the row's ids and of where its response begins."""
    return hashlib.blake2b(repr((row.prompt_len, row.ids)).encode(), digest_size=16).hexdigest()


def fingerprint(folder: Path, dtype: str) -> str:
    """16 hex digits of config.json, the weights and the dtype they are used in."""
    total = hashlib.sha256(dtype.encode())
    for path in (folder / "config.json", *model.weight_files(folder)):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def read(path: Path) -> Known:
    """What a store holds; nothing where there is none.   ValueError where it is damaged."""
    try:
        held = load_file(path) if path.is_file() else {}
        return {bytes(k).hex(): v for k, v in zip(
            held["keys"].numpy(), held["logps"].tolist(), strict=True)} if held else {}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no store of reference log-probs ({error}): delete it, and it "
                         "is made anew") from None


def write(path: Path, known: Known) -> None:
    """Writes a store beside its old self, then replaces that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.tensor([list(bytes.fromhex(k)) for k in known], dtype=torch.uint8)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({"keys": keys, "logps": torch.tensor(list(known.values()))}, part)
    os.replace(part, path)


@torch.no_grad()
def fill(net: model.Transformer, units: Sequence[Sequence[tokens.Encoded]], known: Known,
         budget: int) -> list[tuple]:
    """The units with ref_logps in every row: from `known`, or worked out now and added to it."""
    new = [unit for unit in units
           if not all(row.ref_logps is not None or key(row) in known for row in unit)]
    for group in tokens.micro_batches(new, budget):
        rows = [row for unit in group for row in unit]
        batch = tokens.collate(rows)
        with lora.disabled(net):
            logps = net.response_logps(batch.ids, batch.response_mask)[0].sum(-1)
        known.update(zip(map(key, rows), logps.tolist(), strict=True))
    return [tuple(row if row.ref_logps is not None else replace(row, ref_logps=known[key(row)])
                  for row in unit) for unit in units]


def through(net: model.Transformer, batches: Iterator[tuple], path: Path,
            budget: int) -> Iterator[tuple]:
    """mixture.stream's (units, place), every row with its ref_logps, by the store at `path`.

    The store is read first, and written after every NEW rows and at the end.
    """
    known = read(path)
    written = len(known)
    try:
        for units, place in batches:
            yield fill(net, units, known, budget), place
            if len(known) - written >= NEW:
                write(path, known)
                written = len(known)
    finally:
        if len(known) > written:
            write(path, known)
