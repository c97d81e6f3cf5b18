"""Low-rank adapters on named linear layers of any module.   LoRA, arXiv 2106.09685

    y = W x + b + scale * B A dropout(x),   A (R, I), B (O, R), scale = alpha / R

B starts at zero, so a fresh adapter changes nothing, bit for bit: the model with its adapters off
IS the reference policy, and log pi_theta - log pi_ref is exactly 0 at the first step.
Adapters are float32 whatever the base dtype (float64 over a float64 base), multiplied in the dtype
of x, as under autocast; the base is frozen.
On disk an adapter is PEFT's folder: adapter_config.json and adapter_model.safetensors.
Letters: I inputs, O outputs, R rank.
    python lora.py merge --model DIR --adapter DIR [--adapter DIR --method ties] --out DIR
"""
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backward
import deltas
import heads
import merging
import peft_folder
import strict
from command import Parser, number, stop
from peft_config import TARGETS, select


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update; keeps the names `weight` and `bias`."""

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        (outputs, inputs), device = base.weight.shape, base.weight.device
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.weight, self.bias, self.kind = base.weight, base.bias, type(base)
        self.lora_A = nn.Parameter(torch.zeros(r, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r, dtype=dtype, device=device))
        self.scale, self.dropout, self.enabled, self.merged = scale, dropout, True, False
        self.row = base.weight[:1].detach().clone()  # of the base, also when merged

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.merged:
            return backward.Linear.apply(x, self.weight, self.bias)
        if self.dropout and self.training:  # its mask has to be kept: nothing is gained by hand
            down = F.dropout(x, self.dropout) @ self.lora_A.to(x.dtype).T
            up = self.scale * (down @ self.lora_B.to(x.dtype).T)
            return backward.Linear.apply(x, self.weight, self.bias) + up
        return backward.Linear.apply(x, self.weight, self.bias, self.lora_A, self.lora_B,
                                     self.scale)

    def delta(self) -> Tensor:
        """scale * B A, the update of the weight, (O, I)."""
        return self.scale * self.lora_B @ self.lora_A

    def widened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x', W') with x' W'^T = y: R columns more, so that no update is rounded into W."""
        if not self.enabled or self.merged:
            return x, self.weight
        down = F.dropout(x, self.dropout, self.training) @ self.lora_A.to(x.dtype).T
        weight = torch.cat((self.weight, self.lora_B.to(self.weight.dtype)), 1)
        return torch.cat((x, self.scale * down), 1), weight


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its name in the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def matching(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` selects; see peft_config.select."""
    return select([n for n, m in model.named_modules()
                   if isinstance(m, nn.Linear | LoRALinear)], targets)


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
    """Inside the block the model is pi_ref: the frozen base, bit for bit; heads say 0."""
    before = {p: p.enabled for p in (*adapters(model).values(), *heads.found(model).values())}
    if any(layer.merged for layer in adapters(model).values()):
        raise ValueError("a merged model holds no reference: call lora.unmerge first")
    try:
        for part in before:
            part.enabled = False
        yield
    finally:
        for part, enabled in before.items():
            part.enabled = enabled


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


def l1(model: nn.Module) -> Tensor:
    """Sum of |scale B A| over all layers, PAFT's penalty on the delta.   arXiv 2406.17923

    Slope sign(B A), none while B is 0; one dense delta is in memory at a time.
    """
    return sum(checkpoint(lambda layer: layer.delta().abs().sum(), layer, use_reentrant=False)
               for layer in adapters(model).values())


def remove(model: nn.Module) -> None:
    """Puts plain linear layers back; an update that was not merged is dropped."""
    for name, layer in adapters(model).items():
        linear = layer.kind(*layer.weight.T.shape, bias=False, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear)


def save(model: nn.Module, folder: str | Path, base: str) -> None:
    """Writes PEFT's adapter folder, trained on `base`, and heads.py's file where there is a head.
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
    halves = {peft_folder.KEY.format(n, half): getattr(layer, f"lora_{half}").detach().cpu()
              .contiguous() for n, layer in layers.items() for half in "AB"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {n: layer.row for n, layer in layers.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={
        "format": "pt", "base": peft_folder.fingerprint(rows)})
    heads.save(model, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def load(model: nn.Module, folder: str | Path) -> None:
    """Freezes the model and attaches the adapter of a PEFT folder, nothing missing, nothing left.

    ValueError when the folder's layers are not exactly those its target_modules selects here, or
    when a shape does not fit.
    """
    config, layers = peft_folder.read(folder)
    if adapters(model):
        raise ValueError("the model already carries adapters: merge and remove them first")
    want = {n: (len(b), a.shape[1]) for n, (a, b, _) in layers.items()}
    try:
        selected = matching(model, config["target_modules"])
    except ValueError as error:
        raise ValueError(f"{folder}: target_modules: {error}") from None
    have = {n: tuple(model.get_submodule(n).weight.shape) for n in selected}
    if odd := sorted(n for n in want | have if want.get(n) != have.get(n)):
        raise ValueError(f"{folder}: adapter and model differ in {len(odd)} layers, first {odd[0]}:"
                         f" {want.get(odd[0], 'nothing')} there, {have.get(odd[0], 'no target')} "
                         f"here; trained on {strict.show(config.get('base_model_name_or_path'))}")
    peft_folder.check_base(folder, config, {n: model.get_submodule(n).weight[:1] for n in want})
    model.requires_grad_(False)
    for name, (a, b, scale) in layers.items():
        layer = attach(model, name, len(a), scale, config["lora_dropout"])
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
    heads.load(model, Path(folder))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lora.py", description="Tools for adapter folders.", allow_abbrev=False)
    command = parser.add_subparsers(required=True).add_parser(
        "merge", help="adapter into model", allow_abbrev=False)
    command.add_argument("--model", required=True, metavar="DIR", help="the base model's folder")
    command.add_argument("--adapter", required=True, metavar="DIR", action="append",
                         help="PEFT adapter folder, repeatable")
    command.add_argument("--method", choices=deltas.METHODS, help="how several become one update")
    command.add_argument("--weight", type=number, metavar="W", action="append", default=[],
                         help="one for each --adapter in their order; without it 1 each")
    command.add_argument("--density", type=number, metavar="SHARE", default=1.0,
                         help="of each update's entries this share stays, the largest; default 1")
    command.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    args = parser.parse_args(argv)
    try:
        count = merging.merge(args.model, args.adapter, args.out, args.method, args.weight,
                              args.density)
    except (ValueError, OSError) as error:
        stop("lora.py", ValueError(f"merging {', '.join(args.adapter)} into {args.model}: {error}"))
    print(f"{args.out}: {count} layers merged, opens like any Hugging Face folder")


if __name__ == "__main__":
    main()
