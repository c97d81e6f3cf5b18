"""Adapters on disk: PEFT's folder, read and checked, and merged into a model folder.

adapter_config.json says the rank, the scale and the layers, adapter_model.safetensors holds A and B
of every layer. Letters: I inputs, O outputs, R rank.
"""
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_config
import strict
import weights

KEY = "base_model.model.{}.lora_{}.weight"  # PEFT's name for half an adapter


def read(folder: str | Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor, float]]]:
    """PEFT's folder as (config, {layer name: (A, B, scale)}).

    Scale is alpha / R, with use_rslora alpha / sqrt(R); rank_pattern and alpha_pattern override
    per layer. ValueError names what is not plain LoRA, and the first tensor that does not fit.
    """
    where, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for file in (where, path):
        if not Path(folder).is_dir() or not strict.exists(file):
            raise ValueError(f"{folder} is not an adapter folder: {file.name} is missing "
                             f"({strict.found(folder)}); pickles are never loaded")
    config, names, layers = peft_config.read(where), weights.header(path), {}
    tensors = load_file(path)
    for key in names:
        name = re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key)
        a, b = (tensors.get(KEY.format(name, half)) for half in "AB")
        r, alpha = (next((v for p, v in config[f"{kind}_pattern"] if p.fullmatch(name)), usual)
                    for kind, usual in (("rank", config["r"]), ("alpha", config["lora_alpha"])))
        if key not in (KEY.format(name, "A"), KEY.format(name, "B")) or a is None or b is None:
            raise ValueError(f"{path}: {key} is not half of a pair like {KEY.format('NAME', 'A')}")
        if a.shape[:-1] + b.shape[1:] != (r, r):
            raise ValueError(f"{path}: {name} has A {tuple(a.shape)}, B {tuple(b.shape)}, expected "
                             f"(rank, inputs) and (outputs, rank) of rank {r}")
        for half, tensor in (("A", a), ("B", b)):
            weights.check_finite(path, KEY.format(name, half), tensor.float())
        layers[name] = (a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    if not layers:
        raise ValueError(f"{path} holds no tensor: the adapter is empty")
    return config, layers


def merge(model: str | Path, adapter: str | Path, out: str | Path) -> int:
    """Writes `out`: the model folder with the adapter folded in, one shard in memory at a time.

    Sums in float32, stores the base's dtype, copies tokenizer and configs; the adapter's template
    and generation_config.json replace the base's. Nothing lies in `out` before all of it does.
    Returns the number of layers merged.
    """
    model, adapter, out = Path(model), Path(adapter), Path(out)
    if out.is_symlink():
        raise ValueError(f"{out} is a link: give a folder of its own with --out")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    (config, layers), shards = read(adapter), weights.headers(model)
    if strict.read_json(model / "config.json").get("quantization_config"):
        raise ValueError(f"{model / 'config.json'} has a quantization_config: give the original")
    shapes = {n: s for found in shards.values() for n, s in found.items()}
    want = {f"{name}.weight": (len(b), a.shape[1]) for name, (a, b, _) in layers.items()}
    if odd := sorted(name for name in want if shapes.get(name) != want[name]):
        raise ValueError(f"{model} has no {odd[0]} of shape {want[odd[0]]}, which {adapter} adapts")
    linear = [n.removesuffix(".weight") for n, s in shapes.items()
              if len(s) == 2 and not n.endswith("embed_tokens.weight")]
    if odd := sorted(layers.keys() ^ peft_config.select(linear, config["target_modules"])):
        raise ValueError(f"{adapter}: its target_modules and its tensors differ in {len(odd)} "
                         f"layers of {model}, first {odd[0]}")
    copied = [file for file in [*model.iterdir(), *adapter.iterdir()] if "adapter" not in file.name
              and file.suffix in (".json", ".jinja", ".model", ".txt") and strict.exists(file)]
    part = out.with_name(out.name + ".part")
    if part.exists():
        raise ValueError(f"{part} is there, left by a merge that was stopped: remove it")
    part.mkdir(parents=True)
    try:
        for path in shards:
            tensors = load_file(path)
            for name in tensors:
                weights.check_finite(path, name, tensors[name])
            for name in [n for n in layers if f"{n}.weight" in tensors]:
                (a, b, scale), weight = layers[name], tensors[f"{name}.weight"]
                wide = torch.promote_types(a.dtype, torch.float32)
                total = (weight.float() + scale * b.to(wide) @ a.to(wide)).to(weight.dtype)
                weights.check_finite(adapter, f"{name}.weight, merged,", total)
                tensors[f"{name}.weight"] = total
            save_file(tensors, part / path.name, metadata={"format": "pt"})
            tensors.clear()
        for file in copied:
            shutil.copyfile(file, part / file.name)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(layers)
