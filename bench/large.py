"""Large files, written piece by piece: rows of a .jsonl file, and a checkpoint in shards."""
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import model
from bench import work

SHAPES = {"tiny": work.SHAPES["tiny"], "1b": work.Shape(2048, 22, 32, 4, 5632, 32000),
          "7b": work.Shape(4096, 32, 32, 8, 14336, 32000)}  # of TinyLlama-1.1B and Mistral-7B
SHARD = 9  # tensors of a shard, as many as a layer has: what is held while one is written


def rows(path: Path, count: int) -> None:
    """`count` scored rows of about 470 bytes, pieces of one text, no two prompts the same."""
    draw = random.Random(0)
    text = " ".join(itertools.islice(work.speaker(draw), 50000))
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            at = draw.randrange(len(text) - 415)
            row = {"prompt": f"{i} {text[at:at + 200]}", "response": text[at + 200:at + 415]}
            out.write(json.dumps(row | {"score": i % 5 / 4}) + "\n")


def checkpoint(out: Path, shape: work.Shape) -> None:
    """An untied Mistral of any finite weights, in shards with an index, on the disk alone.

    ValueError where the disk has too little room.
    """
    config = work.config(shape) | {"model_type": "mistral", "tie_word_embeddings": False}
    with torch.device("meta"):
        state = model.Transformer(model.ModelConfig.from_dict(config)).state_dict()
    out.mkdir(parents=True)
    need, free = (n / 2**30 for n in (sum(2 * t.numel() for t in state.values()),
                                      shutil.disk_usage(out).free))
    if need > 0.95 * free:
        raise ValueError(f"--load needs {need:.1f} GiB of disk for a while and {out} has "
                         f"{free:.1f} GiB free: make room, or choose a smaller shape")
    names, files = list(state), {}
    for i in range(0, len(names), SHARD):
        made = {n: torch.linspace(-0.02, 0.02, state[n].shape[-1]) for n in names[i:i + SHARD]}
        path = out / f"model-{i // SHARD + 1:05}.safetensors"
        save_file({n: row.bfloat16().expand(state[n].shape).contiguous()
                   for n, row in made.items()}, path)
        files |= dict.fromkeys(made, path.name)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # for only what is on the disk can be dropped from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), "utf-8")
