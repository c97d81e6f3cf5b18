"""Adapters on disk: PEFT's folder, read and checked.

adapter_config.json says the rank, the scale and the layers, adapter_model.safetensors holds A and B
of every layer. Letters: I inputs, O outputs, R rank.
"""
import hashlib
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import peft_config
import strict
import weights

KEY = "base_model.model.{}.lora_{}.weight"  # PEFT's name for half an adapter


def fingerprint(rows: dict[str, Tensor]) -> str:
    """16 hex digits of {layer: first row of its base weight}, in bfloat16 whatever its dtype is.

    It tells bases of one shape apart; PEFT, which writes none, reads past it.
    """
    total = hashlib.sha256()
    for name in sorted(rows):
        total.update(name.encode() + rows[name].to("cpu", torch.bfloat16).view(torch.int16)
                     .numpy().tobytes())
    return total.hexdigest()[:16]


def check_base(folder: str | Path, config: dict, rows: dict[str, Tensor]) -> None:
    """ValueError where the adapter names the fingerprint of another base than that of `rows`."""
    if config["base"] not in (None, fingerprint(rows)):
        raise ValueError(f"{folder} was trained on another base, whose weights differ from these: "
                         f"give {strict.show(config.get('base_model_name_or_path'))}")


def read(folder: str | Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor, float]]]:
    """PEFT's folder as (config, {layer name: (A, B, scale)}); config["base"]: see fingerprint.

    Scale is alpha / R, with use_rslora alpha / sqrt(R); rank_pattern and alpha_pattern override
    per layer. ValueError names what is not plain LoRA, and the first tensor that does not fit.
    """
    where, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for file in (where, path):
        if not Path(folder).is_dir() or not strict.exists(file):
            raise ValueError(f"{folder} is not an adapter folder: {file.name} is missing "
                             f"({strict.found(folder)}); pickles are never loaded")
    config, names, layers = peft_config.read(where), weights.header(path), {}
    with safe_open(path, "pt") as file:
        config["base"] = (file.metadata() or {}).get("base")
        tensors = {name: file.get_tensor(name) for name in names}
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
