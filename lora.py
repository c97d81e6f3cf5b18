"""Low-rank adapters on named linear layers of any module.   LoRA, arXiv 2106.09685

    y = W x + b + scale * B A dropout(x),   A (R, I), B (O, R), scale = alpha / R

B starts at zero, so a fresh adapter changes nothing, bit for bit: the model with its adapters off
IS the reference policy, and log pi_theta - log pi_ref is exactly 0 at the first step.
Adapters are float32 whatever the base dtype (float64 over a float64 base); the base is frozen.
On disk an adapter is PEFT's folder: adapter_config.json and adapter_model.safetensors.
Letters: I inputs, O outputs, R rank.
    python lora.py merge --model DIR --adapter DIR --out DIR
"""
import argparse
import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEY = "base_model.model.{}.lora_{}.weight"  # PEFT's name for half an adapter
REFUSED = ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layers_to_transform",
           "layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices",
           "init_lora_weights", "use_qalora", "use_bdlora", "alora_invocation_tokens")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update; keeps the names `weight` and `bias`."""

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        (outputs, inputs), device = base.weight.shape, base.weight.device
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.zeros(r, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r, dtype=dtype, device=device))
        self.scale, self.dropout, self.enabled, self.merged = scale, dropout, True, False

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        if not self.enabled or self.merged:
            return y
        x = nn.functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return (y + self.scale * (x @ self.lora_A.T @ self.lora_B.T)).to(y.dtype)

    def delta(self) -> Tensor:
        """scale * B A, the update of the weight, (O, I)."""
        return self.scale * self.lora_B @ self.lora_A


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its name in the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def matching(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` selects, as PEFT reads target_modules.

    A list holds full names or their last parts; a string is a regular expression for the full
    name, or "all-linear" (everything but lm_head). A target that matches nothing: ValueError.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | LoRALinear)]
    listed = [] if isinstance(targets, str) else targets
    patterns = {t: rf"(.*\.)?{re.escape(t)}" for t in listed} or {
        targets: r"(?!.*\blm_head$).*" if targets == "all-linear" else targets}
    found = {t: [n for n in linear if re.fullmatch(p, n)] for t, p in patterns.items()}
    for target in (t for t in found if not found[t]):
        last = sorted({n.split(".")[-1] for n in linear})
        raise ValueError(f"LoRA target {target!r} matches no linear layer; the model has {last}")
    return [n for n in linear if any(n in names for names in found.values())]


def attach(model: nn.Module, name: str, r: int, scale: float, dropout: float) -> LoRALinear:
    """Replaces the linear layer `name` by a LoRALinear whose adapter is all zeros."""
    layer = LoRALinear(model.get_submodule(name), r, scale, dropout).train(model.training)
    model.set_submodule(name, layer)
    return layer


def inject(model: nn.Module, r: int, alpha: float, targets: str | Sequence[str] = TARGETS,
           dropout: float = 0.0, generator: torch.Generator | None = None) -> None:
    """Freezes the model and puts fresh adapters on `targets`: A uniform in +-1/sqrt(I), B zero.

    Draws on the CPU, so one seed gives one adapter on every device.
    """
    if adapters(model):
        raise ValueError("the model already carries adapters: merge and remove them first")
    model.requires_grad_(False)
    for name in matching(model, targets):
        layer = attach(model, name, r, alpha / r, dropout)
        draw = torch.rand(layer.lora_A.shape, generator=generator)
        layer.lora_A.data.copy_((2 * draw - 1) / math.sqrt(layer.lora_A.shape[1]))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is pi_ref: the frozen base, bit for bit."""
    before = {layer: layer.enabled for layer in adapters(model).values()}
    if any(layer.merged for layer in before):
        raise ValueError("a merged model holds no reference: call lora.unmerge first")
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module, sign: int = 1) -> None:
    """W <- W + scale * B A in every adapted layer, whose adapter then rests."""
    for layer in adapters(model).values():
        if layer.merged == (sign < 0):
            layer.weight.data = (layer.weight + sign * layer.delta()).to(layer.weight.dtype)
            layer.merged = sign > 0


def unmerge(model: nn.Module) -> None:
    """Takes `merge` back, up to the rounding of the base dtype."""
    merge(model, sign=-1)


def remove(model: nn.Module) -> None:
    """Puts plain linear layers back; an update that was not merged is dropped."""
    for name, layer in adapters(model).items():
        linear = nn.Linear(*layer.weight.T.shape, bias=False, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear)


def save(model: nn.Module, folder: str | Path, base: str) -> None:
    """Writes PEFT's adapter folder; `base` is recorded as base_model_name_or_path.

    The scale is written as lora_alpha = scale * R with use_rslora false, which every reader
    understands; layers unlike the first are listed in rank_pattern and alpha_pattern.
    """
    layers = adapters(model)
    ranks = {n: layer.lora_A.shape[0] for n, layer in layers.items()}
    alphas = {n: layer.scale * ranks[n] for n, layer in layers.items()}
    first, parts = next(iter(layers)), sorted({n.split(".")[-1] for n in layers})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": ranks[first], "lora_alpha": alphas[first], "lora_dropout": layers[first].dropout,
        "target_modules": parts if matching(model, parts) == list(layers) else list(layers),
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "modules_to_save": None, "inference_mode": True,
    }
    halves = {KEY.format(n, half): getattr(layer, f"lora_{half}").detach().cpu().contiguous()
              for n, layer in layers.items() for half in "AB"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


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


def load(model: nn.Module, folder: str | Path) -> None:
    """Freezes the model and attaches the adapter of a PEFT folder, nothing missing, nothing left.

    ValueError when the folder's layers are not exactly those its target_modules selects here, or
    when a shape does not fit.
    """
    config, layers = read(folder)
    if adapters(model):
        raise ValueError("the model already carries adapters: merge and remove them first")
    want = {n: (len(b), a.shape[1]) for n, (a, b, _) in layers.items()}
    have = {n: tuple(model.get_submodule(n).weight.shape)
            for n in matching(model, config["target_modules"])}
    if odd := sorted(n for n in want | have if want.get(n) != have.get(n)):
        raise ValueError(f"{folder}: adapter and model differ in {len(odd)} layers, first {odd[0]}:"
                         f" {want.get(odd[0], 'nothing')} there, {have.get(odd[0], 'no target')} "
                         f"here; it was trained on {config.get('base_model_name_or_path')}")
    model.requires_grad_(False)
    for name, (a, b, scale) in layers.items():
        layer = attach(model, name, len(a), scale, config.get("lora_dropout", 0.0))
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)


def merge_folders(model: str | Path, adapter: str | Path, out: str | Path) -> int:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora.py", description="Tools for adapter folders.")
    command = parser.add_subparsers(required=True).add_parser("merge", help="adapter into model")
    command.add_argument("--model", required=True, metavar="DIR", help="the base model's folder")
    command.add_argument("--adapter", required=True, metavar="DIR", help="PEFT adapter folder")
    command.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    args = parser.parse_args(argv)
    try:
        count = merge_folders(args.model, args.adapter, args.out)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(2, f"lora.py: merging {args.adapter} into {args.model}: {error}\n")
    print(f"{args.out}: {count} layers merged, opens like any Hugging Face folder")


if __name__ == "__main__":
    main()
