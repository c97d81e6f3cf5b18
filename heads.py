"""One number read off a hidden state: what a response earns, or what is to be expected behind it.

    score          a reward model: read behind the last token of a response
    value          V of PPO and DRO: read before each token of a response
    discriminator  UniAPL's logit: read behind the last token, of the reference's hidden state
A head starts at zero and is float32, as adapters are; `score.weight` is the name that Hugging
Face's ...ForSequenceClassification folders give it. Letters: D width, N states.
"""
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weights

FILE = "heads.safetensors"  # beside an adapter; PEFT does not look at it
NAMES = ("score", "value", "discriminator")


class Head(nn.Module):
    """w . h of hidden states (N, D): (N,), float32 at least; zero while it is off."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.enabled = nn.Parameter(torch.zeros(1, size)), True

    def forward(self, hidden_ND: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        return hidden_ND.to(wide) @ self.weight[0].to(wide) * float(self.enabled)


def attach(model: nn.Module, name: str) -> Head:
    """Puts a fresh head of that name on a Transformer, on its device and in its dtype at least."""
    weight = model.model.norm.weight
    head = Head(len(weight)).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    model.add_module(name, head)
    return head


def found(model: nn.Module) -> dict[str, Head]:
    """The heads that a model carries."""
    return {name: part for name, part in model.named_children() if isinstance(part, Head)}


def save(model: nn.Module, folder: Path) -> None:
    """Writes folder/heads.safetensors, if there is a head."""
    held = {f"{name}.weight": head.weight.detach().cpu() for name, head in found(model).items()}
    if held:
        save_file(held, folder / FILE, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """{"score.weight": (1, D), ...} of an adapter folder, none where it has no file of heads.

    ValueError for another name, another shape, a number that is not finite, or no such file.
    """
    path = folder / FILE
    held = load_file(path) if path.exists() and weights.header(path) else {}
    for key, weight in held.items():
        name = key.removesuffix(".weight")
        if name not in NAMES or weight.ndim != 2 or len(weight) != 1 or not weight.isfinite().all():
            raise ValueError(f"{path}: {key} {tuple(weight.shape)} is not one of "
                             f"{', '.join(NAMES)} with finite numbers (1, width)")
    return held


def load(model: nn.Module, folder: Path) -> None:
    """Attaches the heads of an adapter folder.   ValueError where their width is another."""
    for key, weight in read(folder).items():
        head = attach(model, key.removesuffix(".weight"))
        if head.weight.shape != weight.shape:
            raise ValueError(f"{folder / FILE}: {key} has shape {tuple(weight.shape)}, the model "
                             f"needs {tuple(head.weight.shape)}")
        head.weight.data.copy_(weight)
        head.requires_grad_(False)
