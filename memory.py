"""--memory_estimate true: what a run is going to hold, before anything is loaded.

One forward pass runs on torch's meta device, where tensors have a shape and no memory, and the
bytes that autograd keeps for the backward pass are counted: exactly those of a run on a CPU. What
is only there for a moment is estimated from them; bench/scaling.py measures both together.
"""
from pathlib import Path

import torch

import heads
import lora
import model
import rewards
from architecture import ModelConfig
from config import Config
from objectives import LOSSES

MOMENTS = 4  # float32 numbers a trained weight: itself, its gradient, AdamW's two moments
BLOCKS = 3  # the temporaries of a backward pass, in activations of one block: as measured, roughly
LOGITS = 48 * 2**20  # a tile of logits, its softmax and its gradient


def blank(config: Config, folder: Path) -> model.Transformer:
    """The model with fresh adapters, all shapes and no numbers."""
    with torch.device("meta"):
        net = model.Transformer(ModelConfig.from_folder(folder))
    net.to(getattr(torch, config.dtype))
    targets = "all-linear" if config.lora_targets == ("all-linear",) else config.lora_targets
    lora.inject(net, config.lora_r, config.lora_alpha, targets, config.lora_dropout)
    if head := LOSSES[config.loss].head:
        heads.attach(net, head)
    return net


def kept(net: model.Transformer, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes that a forward pass over `rows` unlike rows, half of each response, keeps."""
    ids, mask = torch.ones(rows, length, dtype=torch.long), torch.zeros(rows, length).bool()
    ids[:, 0], mask[:, length // 2:] = torch.arange(rows), True
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = net.response_logps(ids, mask, checkpointing)
    del result
    return sum(storage.nbytes() for storage in seen.values())


def estimate(config: Config, folder: Path) -> dict[str, float]:
    """Bytes by what they are for, of one process."""
    net, size = blank(config, folder), ModelConfig.from_folder(folder)
    online = LOSSES[config.loss].online
    length = config.max_length + config.response_tokens * online
    rows = max(1, config.micro_batch_tokens // length)
    plain = kept(net, rows, length, False)
    block = plain / size.num_hidden_layers
    saved = config.gradient_checkpointing  # then a block is run again, and its own are there twice
    out = {
        "frozen weights": sum(p.nbytes for p in net.parameters() if not p.requires_grad),
        "adapters, gradients, moments": MOMENTS * sum(
            p.nbytes for p in net.parameters() if p.requires_grad),
        f"activations of {rows} rows of {length} tokens": kept(
            net, rows, length, True) if saved else plain,
        "temporaries": (BLOCKS + saved) * block + LOGITS}
    if online:
        cells = 2 * size.num_hidden_layers * size.num_key_value_heads * size.head_dim
        out["keys and values while sampling"] = (
            config.batch_size * config.group * length * cells
            * getattr(torch, config.dtype).itemsize)
    if Path(config.reward).is_dir() and config.reward:
        judge = blank(config, rewards.sources(Path(config.reward))[0])
        out["frozen weights"] += sum(p.nbytes for p in judge.parameters())
    return out


def most(parts: dict[str, float]) -> float:
    """The sum, but for keys and values: they are gone before the activations come."""
    weights, moments, activations, temporaries, *sampling = parts.values()
    return weights + moments + max(activations + temporaries, *sampling, 0)


def told(config: Config, folder: Path) -> str:
    """The estimate as a table, with its sum."""
    parts = estimate(config, folder)
    lines = [f"{name:<48}{n / 1e9:>9.3f} GB" for name, n in parts.items()]
    total = "at the most, beside Python and torch themselves"
    return "\n".join([*lines, f"{total:<48}{most(parts) / 1e9:>9.3f} GB"])
