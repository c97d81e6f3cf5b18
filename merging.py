"""Adapters into weights, folder to folder: no model is built, one shard is in memory at a time."""
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import durable
import peft_config
import peft_folder
import strict
import weights


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
    (config, layers), shards = peft_folder.read(adapter), weights.headers(model)
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
    rows = {}
    for path, found in shards.items():
        with safe_open(path, "pt") as file:
            rows |= {n: file.get_slice(f"{n}.weight")[:1] for n in layers if f"{n}.weight" in found}
    peft_folder.check_base(adapter, config, rows)
    copied = [file for file in [*model.iterdir(), *adapter.iterdir()] if "adapter" not in file.name
              and file.suffix in (".json", ".jinja", ".model", ".txt") and strict.exists(file)]
    with durable.folder(out) as part:
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
    return len(layers)
