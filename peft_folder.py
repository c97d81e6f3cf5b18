"""Adapters on disk: PEFT's folder, read and checked, and merged into a model folder.

adapter_config.json says the rank, the scale and the layers, adapter_model.safetensors holds A and B
of every layer. Letters: I inputs, O outputs, R rank.
"""
import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEY = "base_model.model.{}.lora_{}.weight"  # PEFT's name for half an adapter
REFUSED = ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layers_to_transform",
           "layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices",
           "init_lora_weights", "use_qalora", "use_bdlora", "alora_invocation_tokens")


def read(folder: str | Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor, float]]]:
    """PEFT's folder as (config, {layer name: (A, B, scale)}).

    Scale is alpha / R, with use_rslora alpha / sqrt(R); rank_pattern and alpha_pattern override
    per layer. ValueError names what is not plain LoRA, and the first tensor that does not fit.
    """
    where, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    if missing := [p.name for p in (where, path) if not p.is_file()]:
        raise ValueError(f"{folder} is not an adapter folder: {missing[0]} is missing")
    try:
        config, tensors = json.loads(where.read_text("utf-8")), load_file(path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: adapter file is broken: {error}") from None
    if config.get("init_lora_weights") in (True, "gaussian"):  # the others change the base
        del config["init_lora_weights"]
    for key, value in ({"peft_type": "LORA", "bias": "none"} | dict.fromkeys(REFUSED)).items():
        if (config.get(key, value) or None) != value:
            raise ValueError(f"{where}: {key} = {config[key]!r} is not supported, only plain LoRA")
    if lost := [k for k in ("r", "lora_alpha", "target_modules") if not config.get(k)]:
        raise ValueError(f"{where}: {lost[0]} is missing")
    layers = {}
    for key in tensors:
        name = re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key)
        a, b = (tensors.get(KEY.format(name, half)) for half in "AB")
        r, alpha = (next((v for pattern, v in (config.get(f"{kind}_pattern") or {}).items()
                          if re.fullmatch(rf"(.*\.)?({pattern})", name)), config[default])
                    for kind, default in (("rank", "r"), ("alpha", "lora_alpha")))
        if key not in (KEY.format(name, "A"), KEY.format(name, "B")) or a is None or b is None:
            raise ValueError(f"{path}: {key} is not half of a pair like {KEY.format('NAME', 'A')}")
        if type(alpha) not in (int, float) or a.shape[:-1] + b.shape[1:] != (r, r) or not all(
                t.isfinite().all() for t in (a, b, torch.tensor(alpha))):
            raise ValueError(f"{path}: {name} has A {tuple(a.shape)}, B {tuple(b.shape)}, "
                             f"lora_alpha {alpha!r}, expected finite numbers of rank {r}")
        layers[name] = (a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    return config, layers


def merge(model: str | Path, adapter: str | Path, out: str | Path) -> int:
    """Writes `out`: the model folder with the adapter folded in, one shard in memory at a time.

    Sums in float32, stores the base's dtype, copies tokenizer and configs; the adapter's template
    and generation_config.json replace the base's. consolidated.safetensors, the same weights in
    Mistral's own names, stays behind. Returns the number of layers merged.
    """
    model, adapter, out = Path(model), Path(adapter), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    layers = read(adapter)[1]
    shards = {p.name: load_file(p) for p in sorted(model.glob("[!c]*.safetensors"))}  # mapped
    shapes = {n: t.shape for tensors in shards.values() for n, t in tensors.items()}
    want = {f"{name}.weight": (len(b), a.shape[1]) for name, (a, b, _) in layers.items()}
    if odd := sorted(name for name in want if shapes.get(name) != want[name]):
        raise ValueError(f"{model} {'has' if model.is_dir() else 'is no folder here, with'} no "
                         f"{odd[0]} of shape {want[odd[0]]}, which {adapter} adapts")
    out.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        for name in [n for n in layers if f"{n}.weight" in tensors]:
            (a, b, scale), weight = layers[name], tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = (weight.float() + scale * b @ a).to(weight.dtype)
        save_file(tensors, out / shard, metadata={"format": "pt"})
        tensors.clear()
    for file in [*model.iterdir(), *adapter.iterdir()]:
        if file.suffix in (".json", ".jinja", ".model", ".txt") and "adapter" not in file.name:
            shutil.copyfile(file, out / file.name)
    return len(layers)
