"""What a stopped run needs to go on: adapter, optimizer, CPU random state, step, place in the data.

    RUN/checkpoints/step-N/   adapter_config.json  adapter_model.safetensors
                              optimizer.safetensors  state.json
The order of the data is a function of the seed and a place (mixture.stream), kept with the step.
"""
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import peft_folder

FREE = ("resume", "save_every", "reference_cache", "out", "device", "micro_batch_tokens",
        "gradient_checkpointing",
        "sample_tokens", "test")  # may change on resuming: rounding and dropout draws may differ


def save(net: nn.Module, optimizer: torch.optim.Optimizer, out: Path, state: dict) -> None:
    """Writes out/checkpoints/step-N aside and renames it, N = state["step"]."""
    final = out / "checkpoints" / f"step-{state['step']}"
    part = final.with_suffix(".part")
    base = json.loads((out / "config.json").read_text("utf-8"))["model"]
    lora.save(net, part, base)
    names = {p: n for n, p in net.named_parameters()}
    tensors = {f"{names[p]}/{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    save_file(tensors | {"rng": torch.get_rng_state()}, part / "optimizer.safetensors")
    (part / "state.json").write_text(json.dumps(state), "utf-8")
    os.replace(part, final)


def resume(net: nn.Module, optimizer: torch.optim.Optimizer, out: Path, config: dict) -> dict:
    """Puts the newest checkpoint of a run back and returns its state.

    ValueError where there is none, or where `config` (a plain dict) is not the one it ran with.
    """
    folders = {p.name: p for p in (out / "checkpoints").glob("step-*") if not p.suffix}
    if not folders:
        raise ValueError(f"cannot resume {out}: it holds no checkpoint")
    old = json.loads((out / "config.json").read_text("utf-8"))
    for key, now in json.loads(json.dumps(config)).items():
        if key not in FREE and old.get(key) != now:
            raise ValueError(f"cannot resume {out}: {key} was {old.get(key)!r} and is now {now!r}. "
                             "Use the old value, or start a new run with another --out")
    folder = max(folders.values(), key=lambda p: int(p.name.removeprefix("step-")))
    state = json.loads((folder / "state.json").read_text("utf-8"))
    layers, tensors = lora.adapters(net), load_file(folder / "optimizer.safetensors")
    for name, (a, b, _) in peft_folder.read(folder)[1].items():
        layers[name].lora_A.data.copy_(a)
        layers[name].lora_B.data.copy_(b)
    torch.set_rng_state(tensors.pop("rng"))
    weights = dict(net.named_parameters())
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        place = "cpu" if part == "step" else weights[name].device  # as AdamW keeps them
        optimizer.state[weights[name]][part] = tensor.to(place)
    return state
