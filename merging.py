"""Adapters into weights, folder to folder: no model is built, one shard is in memory at a time."""
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltas
import durable
import heads
import peft_config
import peft_folder
import strict
import weights


def merge(model: str | Path, adapters: Sequence[str | Path], out: str | Path,
          method: str | None = None, factors: Sequence[float] = (), density: float = 1.0) -> int:
    """Writes `out`: the model folder with the adapters folded in, one shard in memory at a time.

    W + f(deltas) in each layer, of those adapters that have it: f is `method` of deltas.py, one
    adapter needs none; no factors are 1 each. Sums in float32, stores the base's dtype, copies
    tokenizer and configs; the first adapter's template and generation_config.json replace the
    base's. Of a reward model a ...ForSequenceClassification folder is made: its score for lm_head.
    Nothing lies in `out` before all of it does. Returns the number of layers merged.
    """
    model, adapters, out = Path(model), [Path(a) for a in adapters], Path(out)
    factors = list(factors) or [1.0] * len(adapters)
    check_flags(adapters, method, factors, density)
    if out.is_symlink():
        raise ValueError(f"{out} is a link: give a folder of its own with --out")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    opened, shards = {a: peft_folder.read(a) for a in adapters}, weights.headers(model)
    if strict.read_json(model / "config.json").get("quantization_config"):
        raise ValueError(f"{model / 'config.json'} has a quantization_config: give the original")
    for adapter, (config, layers) in opened.items():
        check_fit(model, shards, adapter, config, layers)
    score = heads.read(adapters[0]).get("score.weight")
    names = sorted({name for _, layers in opened.values() for name in layers})
    copied = [file for file in [*model.iterdir(), *adapters[0].iterdir()] if file.suffix in
              (".json", ".jinja", ".model", ".txt") and "adapter" not in file.name
              and strict.exists(file)]
    with durable.folder(out) as part:
        for path in shards:
            tensors = load_file(path)
            for name in tensors:
                weights.check_finite(path, name, tensors[name])
            for name in [n for n in names if f"{n}.weight" in tensors]:
                weight, given, used = tensors[f"{name}.weight"], [], []
                for factor, (adapter, (_, layers)) in zip(factors, opened.items(), strict=True):
                    if name in layers:
                        a, b, scale = layers[name]
                        wide = torch.promote_types(a.dtype, torch.float32)
                        given.append(scale * b.to(wide) @ a.to(wide))
                        used.append(factor)
                        weights.check_finite(adapter, f"{name}.weight's update", factor * given[-1])
                update = deltas.METHODS[method or "linear"](given, used, density)
                total = (weight.float() + update).to(weight.dtype)
                weights.check_finite(adapters[0], f"{name}.weight, merged,", total)
                tensors[f"{name}.weight"] = total
            if score is not None:
                tensors.pop("lm_head.weight", None)
                tensors |= {"score.weight": score} if path == min(shards) else {}
            if tensors:  # a shard may have held lm_head alone
                save_file(tensors, part / path.name, metadata={"format": "pt"})
            tensors.clear()
        for file in copied:
            shutil.copyfile(file, part / file.name)
        if score is not None:
            classify(part, min(shards).name)
    return len(names)


def classify(folder: Path, first: str) -> None:
    """Says in a written folder's json files that it is a reward model, its score in shard `first`.

    transformers reads the score before trailing pads: a pad that ends responses is none any more.
    """
    config, names = strict.read_json(folder / "config.json"), {"id2label": {"0": "LABEL_0"}}
    kind = config["model_type"].capitalize() + "ForSequenceClassification"
    ends = [given.get("eos_token_id") for given in (
        config, strict.optional_json(folder / "generation_config.json"))]
    if any(config.get("pad_token_id") in (e if type(e) is list else [e]) for e in ends):
        names["pad_token_id"] = None
    found = {"config.json": config | names | {
        "architectures": [kind], "num_labels": 1, "label2id": {"LABEL_0": 0}}}
    if (index := folder / "model.safetensors.index.json").is_file():
        places = strict.read_json(index)
        places["weight_map"] = {n: f for n, f in places["weight_map"].items()
                                if n != "lm_head.weight"} | {"score.weight": first}
        found[index.name] = places
    for name, value in found.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def check_flags(adapters: Sequence[Path], method: str | None, factors: Sequence[float],
                density: float) -> None:
    """ValueError for flags that contradict each other, and for one that would change nothing."""
    count = len(adapters)
    if count > 1 and not method:
        raise ValueError(f"found {count} times --adapter and no --method: give --method linear, "
                         "their weighted sum, or --method ties")
    if count < 2 and method:
        raise ValueError(f"--method {method} merges several adapters, found one --adapter: give "
                         "another, or leave --method out")
    if len(factors) != count:
        raise ValueError(f"found {len(factors)} times --weight and {count} times --adapter: give "
                         "each adapter one weight, or none")
    if count > 1 and any(heads.read(adapter) for adapter in adapters):
        raise ValueError("reward models, or policies with a value head, are not merged with "
                         "others: give one --adapter")
    if len({adapter.resolve() for adapter in adapters}) < count:
        raise ValueError("one folder is given twice with --adapter: give it once, and its --weight")
    if odd := [factor for factor in factors if not -1000 <= factor <= 1000]:
        raise ValueError(f"--weight: found {odd[0]:g}, expected a number from -1000 to 1000")
    if not 0 < density <= 1:
        raise ValueError(f"--density: found {density:g}, expected above 0 and up to 1")


def check_fit(model: Path, shards: dict[Path, weights.Header], adapter: Path, config: dict,
              layers: dict[str, tuple]) -> None:
    """ValueError where an adapter was trained on another base, or fits this one only in part."""
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
