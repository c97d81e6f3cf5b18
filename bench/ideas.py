"""What each idea of the fast path is worth: one switched off at a time, the same step timed again.

    python -m bench.ideas                           every idea, both dtypes, three turns
One process a run, two threads, turns interleaved. A figure is the median over the turns of the
speed, or the peak memory, with all ideas over those without the one: DPO, reference in the step, on
the `small` model of bench/work.py. Writes bench/ideas.json and prints its table.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import backward
import model
import packing
import train
from bench import clock, ours, work

ROOT = Path(__file__).resolve().parent.parent
IDEAS = {
    "onednn": "float32 products by oneDNN instead of torch's MKL",
    "chunks": "attention in chunks instead of torch's CPU kernel",
    "last": "the last layer works for predicting tokens only",
    "prompts": "a pair's prompt runs once",
    "head": "the head's gradient found in the forward pass, not by a second one",
    "layers": "LoRA, norms, SwiGLU and rotation with gradients by hand",
}


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None = None,
                 b: Tensor | None = None, scale: float = 1.0) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if a is None else y + scale * (x @ a.to(x.dtype).T @ b.to(x.dtype).T)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(backward.promoted(x))
    wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide.to(x.dtype) * weight


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + F.pad(first, (first.shape[-1], 0)) * sin - F.pad(
        second, (0, second.shape[-1])) * sin


def plain_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """A tile's log-probs, its logits made again in backward."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def tiled_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.cat([checkpoint(plain_logps, hidden[rows], weight, target[rows],
                                   use_reentrant=False)
                        for rows in backward.tiles(hidden, len(weight))])


def whole_block(packed: Callable) -> Callable:
    """Block.packed for all tokens, the kept ones chosen at the end."""
    def run(self, x: Tensor, tables: tuple, segments: list, kept: Tensor | None) -> Tensor:
        y = packed(self, x, tables, [(rows, rows, prompt) for _, rows, prompt in segments], None)
        return y if kept is None else y.index_select(1, kept)
    return run


def switch_off(idea: str) -> None:
    """Puts plain PyTorch in the place of one idea, in this process."""
    if idea == "onednn":
        backward.product = F.linear
    if idea == "chunks":
        model.attend_packed = packing.attend_each
    if idea == "last":
        model.Block.packed = whole_block(model.Block.packed)
    if idea == "head":
        backward.TargetLogps.apply = tiled_logps
    if idea == "layers":
        backward.Linear.apply, backward.RMSNorm.apply = plain_linear, plain_norm
        backward.Rotate.apply = plain_rotation
        backward.SwiGLU.apply = lambda gate, up: F.silu(gate) * up


def one(options: argparse.Namespace) -> None:
    """One run in this process, without options.idea: prints its line."""
    switch_off(options.idea)
    watch = clock.Clock(options, options.idea)
    config = ours.settings(options)
    net, optimizer = train.adapted(config, options.model)
    units = ours.read_units(config, options.steps)
    if options.idea == "prompts":  # another first token: nothing is shared
        units = [(a, replace(b, ids=[b.ids[0] ^ 1, *b.ids[1:]])) for a, b in units]
    for start in range(0, len(units), options.batch):
        step = units[start:start + options.batch]
        watch.count([(e.ids, len(e.ids) - e.prompt_len) for unit in step for e in unit])
        watch.tick(train.train_step(net, optimizer, step, config, clock.RATE)["loss"])
    watch.report()


def table(record: list[dict]) -> str:
    """Markdown of the medians; record holds the lines of all runs, in turn."""
    out = ["| idea | speed, float32 | memory, float32 | speed, bfloat16 | memory, bfloat16 |",
           "|---|---|---|---|---|"]
    for idea, text in IDEAS.items():
        cells = []
        for dtype in ("float32", "bfloat16"):
            runs = {name: [r for r in record if (r["driver"], r["dtype"]) == (name, dtype)]
                    for name in ("all", idea)}
            pairs = list(zip(runs["all"], runs[idea], strict=True))
            for key in ("tokens_per_cpu_second", "peak_mib"):
                cells.append(f"{median(a[key] / b[key] for a, b in pairs):.2f}x" if pairs else "-")
        out.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    if "--idea" in sys.argv:
        parser = clock.parser(__doc__, ("dpo",))
        parser.add_argument("--idea", choices=("all", *IDEAS))
        parser.add_argument("--micro_batch_tokens", type=int, default=0)
        one(parser.parse_args())
        return
    parser = argparse.ArgumentParser("bench.ideas", description="What each idea is worth.")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of which 2 do not count")
    options, record = parser.parse_args(), []
    folder = work.make("small", ROOT / "runs/bench")
    for dtype in ("float32", "bfloat16") * options.repeat:
        for idea in ("all", *IDEAS):
            run = subprocess.run(
                [sys.executable, "-m", "bench.ideas", "--idea", idea, "--model", str(folder),
                 "--task", "dpo", "--dtype", dtype, "--steps", str(options.steps)],
                cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2",
                                            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"},
                stdout=subprocess.PIPE, text=True, check=True)
            record.append(json.loads(run.stdout.splitlines()[-1]))
            print(dtype, idea, record[-1]["tokens_per_cpu_second"], file=sys.stderr, flush=True)
    (ROOT / "bench/ideas.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
