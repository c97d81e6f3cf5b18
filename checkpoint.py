"""What a stopped run needs to go on: adapter, optimizer, step, place in the data, and its inputs.

    RUN/checkpoints/step-N/   adapter_config.json  adapter_model.safetensors
                              optimizer.safetensors  state.json  manifest.json
Learning rate, order of the data and dropout are functions of seed and step: no state to lose.
"""
import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import durable
import heads
import lora
import peft_folder
import records
import strict
from config import Config
from verifiers import RULE

FORMAT = 1
FREE = ("resume", "save_every", "keep", "reference_cache", "out", "device", "micro_batch_tokens",
        "gradient_checkpointing", "timeout", "memory_estimate",
        "sample_tokens", "test")  # may change on resuming: rounding and dropout draws may differ
CONTENT = ("model", "data")  # may lie elsewhere: their files' digests are compared
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "chat_template.jinja", "special_tokens_map.json")


def inputs(config: Config, folder: Path, weights: list[Path]) -> dict[str, str]:
    """{what: SHA-256} of every file the numbers of a run depend on; data with its weight."""
    texts = [folder / name for name in TEXTS if (folder / name).is_file()]
    shares = [records.weighted(spec) for spec in config.data]
    names = [f"model file {p.name}" for p in texts + weights] + [
        f"data file {i + 1}, {Path(p).name}:{share:g}" for i, (p, share) in enumerate(shares)]
    files = [*texts, *weights, *(Path(path) for path, _ in shares)]
    return dict(zip(names, durable.digests(files), strict=True))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """The run folder is this process's alone, and swept; ValueError where another holds it.

    The lock is the system's: it dies with its process. Windows has no fcntl, hence no lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as file:
        with contextlib.suppress(ModuleNotFoundError):
            import fcntl
            try:
                with durable.named(out / "lock"):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {out} is in use by another run: wait for it, stop it, or "
                                 "choose another --out") from None
        durable.sweep(out)
        durable.sweep(out / "checkpoints")
        yield


def check_room(net: nn.Module, out: Path) -> None:
    """ValueError where the disk has not even room for one checkpoint: weights and two moments."""
    need = 3 * sum(p.nbytes for p in net.parameters() if p.requires_grad)
    if (free := shutil.disk_usage(out).free) < need:
        raise ValueError(f"--out {out}: a checkpoint takes {need / 1e6:.2f} MB, the disk has "
                         f"{free / 1e6:.2f} MB free: make room, or choose another disk")


def steps(out: Path) -> list[Path]:
    """The folders of out/checkpoints, by step; whatever else lies there is not ours."""
    found = [p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=number)


def number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save(net: nn.Module, optimizer: torch.optim.Optimizer, out: Path, state: dict,
         config: Config) -> None:
    """Writes out/checkpoints/step-N, N = state["step"], and removes all but the newest config.keep.

    FloatingPointError for a tensor that is not finite, ValueError where the disk does not take it:
    older checkpoints are kept then.
    """
    final = out / "checkpoints" / f"step-{state['step']}"
    names = {p: n for n, p in net.named_parameters()}
    tensors = {f"{names[p]}/{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    trained = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    if bad := [n for n, t in (trained | tensors).items()  # a finite sum is the quick proof
               if not t.sum().isfinite() and not t.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} is not finite after the update, nothing is saved")
    state = state | {"format": FORMAT, "config": asdict(config), "versions": versions()}
    try:
        with durable.folder(final, manifest=True) as part:
            lora.save(net, part, config.model)
            save_file(tensors, part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps(state), "utf-8")
    except OSError as error:
        need = sum(t.nbytes for t in (trained | tensors).values()) / 1e6
        raise ValueError(f"saving {final} failed: {error}; it needs {need:.2f} MB. Older "
                         "checkpoints are whole: mend the disk and give --resume true") from error
    mine = [p for p in steps(out) if (p / durable.MANIFEST).is_file()]
    for old in [p for p in mine if number(p) <= state["step"]][:-config.keep]:  # newer are damaged
        durable.remove(old)


def versions() -> dict[str, object]:
    """What may change the last bits of a run."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def newest(out: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint, what is wrong with newer ones); None where none was ever made.

    ValueError where there are some, and none is whole.
    """
    told = []
    for folder in reversed(steps(out)):
        if not (why := durable.damage(folder)):
            return folder, told
        told.append(f"{folder} is damaged and is left out: {why}")
    if told:
        raise ValueError(f"cannot resume {out}: none of its checkpoints is whole. {told[0]}")
    return None, told


def compare(old: dict, now: dict, out: Path) -> None:
    """ValueError names the first input file, then the first flag, that is not as it was."""
    for key in old["inputs"] | now["inputs"]:
        if old["inputs"].get(key) != now["inputs"].get(key) and not key.startswith(RULE):
            raise ValueError(f"cannot resume {out}: {key} has changed since the run began. Put the "
                             "old one back, or start a new run with another --out")
    for key, value in json.loads(json.dumps(now["config"])).items():
        if key not in FREE + CONTENT and old["config"].get(key) != value:
            raise ValueError(f"cannot resume {out}: {key} was {old['config'].get(key)!r} and is "
                             f"now {value!r}. Use the old value, or start a new run with another "
                             "--out")


def resume(net: nn.Module, optimizer: torch.optim.Optimizer, out: Path, config: Config,
           start: dict) -> tuple[dict, list[str]]:
    """Puts the newest whole checkpoint back: (its state, lines to print).

    `start`, a run's state at step 0, is returned where the run made none. ValueError where a flag
    or a file that matters is not as it was.
    """
    (folder, told), kept = newest(out), strict.read_json(out / "config.json")
    state = start | {"format": FORMAT, "config": kept, "versions": versions()}
    if folder:
        state = strict.read_json(folder / "state.json")
    if lost := sorted((start.keys() | {"format", "config", "versions"}) - state.keys()):
        raise ValueError(f"{folder / 'state.json'} has no {lost[0]!r}: remove {folder}, and the "
                         "checkpoint before it is used")
    if state["format"] != FORMAT:
        raise ValueError(f"{folder} has format {state['format']!r}, this code reads {FORMAT}: "
                         "resume with the version that wrote it")
    compare(state, start | {"config": asdict(config)}, out)
    told += [f"{key} is not as it was: what follows is earned by the new one"
             for key, digest in start["inputs"].items()
             if key.startswith(RULE) and state["inputs"].get(key) != digest]
    told += [f"{key} was {value} and is now {versions()[key]}: the last bits may differ"
             for key, value in state["versions"].items() if versions()[key] != value]
    if folder:
        restore(net, optimizer, folder)
    return {key: state[key] for key in start}, told


def restore(net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Copies a checkpoint's tensors into adapters and optimizer; ValueError unless all fit."""
    weights = {n: p for n, p in net.named_parameters() if p.requires_grad}
    moments = load_file(folder / "optimizer.safetensors")
    saved = {f"{layer}.lora_{half}": tensor for layer, pair in peft_folder.read(folder)[1].items()
             for half, tensor in zip("AB", pair, strict=False)} | heads.read(folder)
    wanted = {n: p.shape for n, p in weights.items()} | {
        f"{n}/{part}": torch.Size([]) if part == "step" else p.shape
        for n, p in weights.items() for part in ("step", "exp_avg", "exp_avg_sq")}
    found = {n: t.shape for n, t in (saved | moments).items()}
    if odd := sorted(n for n in wanted | found if wanted.get(n) != found.get(n)):
        raise ValueError(f"{folder}: {odd[0]} has shape {found.get(odd[0], 'none, it is missing')}"
                         f", expected {wanted.get(odd[0], 'no such tensor')}")
    for name, tensor in saved.items():
        weights[name].data.copy_(tensor)
    for key, tensor in moments.items():
        name, _, part = key.rpartition("/")
        place = "cpu" if part == "step" else weights[name].device  # as AdamW keeps them
        optimizer.state[weights[name]][part] = tensor.to(place)
