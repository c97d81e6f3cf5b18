"""log pi_ref(y|x), worked out once a row and kept on disk: the base never changes.

A row that carries its ref_logps needs no reference pass. A store is DIR/FINGERPRINT.safetensors, of
the model's files, dtype and device. Every unit is run alone for it, so that no neighbour decides
the last bit: what is read equals what would be worked out again, on one machine, bit for bit.
"""
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import durable
import lora
import model
import tokens
from config import Config

Known = dict[str, float]  # log pi_ref by `keys`
NEW = 4096  # rows that a run may lose when it is killed


def keys(unit: Sequence[tokens.Encoded]) -> list[str]:
    """For each row 32 hex digits of the whole unit, ids and beginnings of responses, and its place.

    A row's last bit depends on the unit it is run in, so another unit is another value.
    """
    rows = [(row.prompt_len, row.ids) for row in unit]
    return [hashlib.blake2b(repr((rows, i)).encode(), digest_size=16).hexdigest()
            for i in range(len(rows))]


def fingerprint(folder: Path, dtype: str, device: str) -> str:
    """16 hex digits of config.json, the weights, and the dtype and kind of device they run in."""
    total = hashlib.sha256(f"{dtype} {torch.device(device).type}".encode())
    for digest in durable.digests([folder / "config.json", *model.weight_files(folder)]):
        total.update(bytes.fromhex(digest))
    return total.hexdigest()[:16]


def read(path: Path) -> Known:
    """What a store holds; nothing where there is none.   ValueError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        held = load_file(path)
        keys, logps = held["keys"], held["logps"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no store of reference log-probs ({error!r}): delete it, and "
                         "it is made anew") from None
    if keys.dtype != torch.uint8 or keys.shape != (len(logps), 16) or not logps.isfinite().all():
        raise ValueError(f"{path} is damaged: keys {tuple(keys.shape)} of {keys.dtype}, log-probs "
                         f"{tuple(logps.shape)}; delete it, and it is made anew")
    return {bytes(k).hex(): v for k, v in zip(keys.numpy(), logps.tolist(), strict=True)}


def write(path: Path, known: Known) -> None:
    """Writes a store beside its old self, then replaces that.   OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.tensor([list(bytes.fromhex(k)) for k in known], dtype=torch.uint8).view(-1, 16)
    durable.write(path, save({"keys": keys, "logps": torch.tensor(list(known.values()))}))


def store(config: Config, folder: Path) -> tuple[Path, Known] | None:
    """Where --reference_cache keeps this model's log-probs, and what it holds; written to at once,
    so that a folder that cannot be is found out before the run."""
    if not config.reference_cache:
        return None
    name = fingerprint(folder, config.dtype, config.device)
    path = Path(config.reference_cache) / f"{name}.safetensors"
    known = read(path)
    write(path, known)
    return path, known


@torch.no_grad()
def fill(net: model.Transformer, units: Sequence[Sequence[tokens.Encoded]], known: Known,
         budget: int) -> list[tuple]:
    """The units with ref_logps in every row: from `known`, or worked out now and added to it.

    `budget` is the tokens of one forward pass; with 1 every unit runs alone.
    """
    lost = [unit for unit in units if any(
        row.ref_logps is None and k not in known for row, k in zip(unit, keys(unit), strict=True))]
    for group in tokens.micro_batches(lost, budget):
        batch = tokens.collate([row for unit in group for row in unit])
        with lora.disabled(net):
            logps = net.response_logps(batch.ids, batch.response_mask)[0].sum(-1).tolist()
        names = [k for unit in group for k in keys(unit)]
        known.update((k, v) for k, v in zip(names, logps, strict=True) if math.isfinite(v))
    return [tuple(row if row.ref_logps is not None else
                  replace(row, ref_logps=known.get(k, math.nan))
                  for row, k in zip(unit, keys(unit), strict=True)) for unit in units]


def through(net: model.Transformer, batches: Iterator[tuple], path: Path,
            known: Known) -> Iterator[tuple]:
    """mixture.stream's (units, place), every row with its ref_logps, by the store at `path`.

    `known` is what the store holds; it is written after every NEW rows, and at the end.
    """
    written = len(known)
    try:
        for units, place in batches:
            yield fill(net, units, known, 1), place
            if len(known) - written >= NEW:
                write(path, known)
                written = len(known)
    finally:
        if len(known) > written:
            write(path, known)
