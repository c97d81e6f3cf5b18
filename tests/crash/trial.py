"""A tiny run to break: its files, its flags, and how its end is compared with that of a quiet run.

A run that was killed and went on must leave what the run that nobody disturbed left: each number
of metrics.jsonl bit for bit (but for two of the wall clock), the adapter, the newest checkpoint.
"""
import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
CLOCK = ("tokens_per_s", "mem_mib")  # figures of the wall clock and of the machine
FINAL = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "results.json",
         "report.html", "config.json")


def environment() -> dict[str, str]:
    """One thread, no network, and the repository's own modules before all others."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                         "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def flags(files: Path, out: Path, more: tuple[str, ...] = ()) -> list[str]:
    """A run over 36 rows, two a step, so that the second and the third epoch begin in it.

    Rank 256 on six layers: 14 MB a checkpoint, so that a kill often lands inside a save.
    """
    return [*f"--model {files}/model --data {files}/files/scores.jsonl --template plain --lr 0.01 "
            "--max_length 128 --held_out 4 --sample_tokens 0 --lora_r 256 --lora_dropout 0.1 "
            "--lora_targets gate_proj,up_proj,down_proj --batch_size 2 --steps 40 --save_every 1 "
            f"--out {out}".split(), *more]


def exact(value: object) -> object:
    """Numbers as hex floats, so that equal text means equal bits."""
    return float(value).hex() if isinstance(value, int | float) else value


def told(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without the figures of CLOCK."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: exact(v) for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def tensors(folder: Path) -> dict[str, tuple]:
    """{file/name: (dtype, shape, bytes)} of the .safetensors files of a folder."""
    return {f"{path.name}/{name}": (str(t.dtype), t.shape, t.tobytes())
            for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def steps(out: Path) -> list[Path]:
    """The checkpoints of a run by their step, the newest last."""
    found = [p for p in (out / "checkpoints").glob("step-*")
             if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def unfinished(out: Path) -> set[str]:
    """Names of folders that a save or a removal has not finished."""
    with contextlib.suppress(OSError):  # none yet, or no folder
        return {p.name for p in (out / "checkpoints").iterdir()
                if p.name.startswith("tmp-") or p.name.endswith(".part")}
    return set()


def broken(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing: read from outside, with no code of the run.

    Every file of manifest.json has its size and SHA-256, no other file lies there, tensors are
    finite, state.json names the folder's step.
    """
    try:
        sums = listed(json.loads((folder / "manifest.json").read_text("utf-8")))
        there = {p.name for p in folder.iterdir()} - {"manifest.json"}
        if there != sums.keys() or len(there) < 4:
            return f"{folder.name} holds {sorted(there)}, its manifest lists {sorted(sums)}"
        for name, expected in sums.items():
            body = (folder / name).read_bytes()
            if (len(body), hashlib.sha256(body).hexdigest()) != expected:
                return f"{folder.name}/{name} is not the file of its manifest"
        for name in (n for n in there if n.endswith(".safetensors")):
            if not all(np.isfinite(t).all() for t in load_file(folder / name).values()):
                return f"{folder.name}/{name} holds a number that is not finite"
        if json.loads((folder / "state.json").read_text("utf-8"))["step"] != int(folder.name[5:]):
            return f"{folder.name}/state.json names another step"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{folder.name}: {error!r}"
    return ""


def listed(manifest: dict) -> dict[str, tuple[int, str]]:
    """{file: (size, SHA-256)} of a manifest, whichever way its entries are spelled."""
    files = manifest.get("files", manifest)
    pairs = {name: entry.values() if isinstance(entry, dict) else entry
             for name, entry in files.items() if isinstance(entry, dict | list)}
    return {name: (next(v for v in pair if isinstance(v, int)),
                   next(v for v in pair if isinstance(v, str))) for name, pair in pairs.items()}


def unusable(out: Path) -> list[str]:
    """What is wrong with each folder of a run that calls itself a checkpoint."""
    return [fault for folder in steps(out) if (fault := broken(folder))]


def differences(quiet: Path, out: Path) -> list[str]:
    """How the end of a run differs from the quiet run's: sentences, none if it does not."""
    lost = [f"{name} is missing" for name in FINAL if not (out / name).is_file()]
    if lost:
        return lost
    a, b = told(quiet), told(out)
    wrong = [f"line {i + 1} of metrics.jsonl: {key} is {y.get(key)}, was {x.get(key)}"
             for i, (x, y) in enumerate(zip(a, b, strict=False)) for key in {**x, **y}
             if x.get(key) != y.get(key)]
    wrong += [f"{len(b)} lines of metrics.jsonl, not {len(a)}"] * (len(a) != len(b))
    last = steps(quiet)[-1].name
    for name in ("adapter", f"checkpoints/{last}"):
        x, y = tensors(quiet / name), tensors(out / name)
        wrong += [f"{name}/{key} differs" for key in {**x, **y} if x.get(key) != y.get(key)]
    ends = [json.loads((p / "results.json").read_text("utf-8")) | {"seconds": 0}
            for p in (quiet, out)]
    wrong += ["results.json differs"] * (ends[0] != ends[1])
    wrong += [f"{name} is left behind" for name in sorted(unfinished(out))]
    return wrong + unusable(out)


def rows_differ(quiet: Path, out: Path) -> list[str]:
    """Steps whose rows or rates the quiet run did not have; a log may repeat steps after a kill."""
    known = set(quiet.read_text("utf-8").splitlines())
    return [line for line in out.read_text("utf-8").splitlines() if line not in known]


def wait(ready, seconds: float) -> bool:
    """Whether ready() came true within so many seconds."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
