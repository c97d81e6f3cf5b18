"""The least time a step can take here: the FLOPs it needs, over the measured matmul rate.

    python -m bench.floor --model runs/bench/small --task uft

Per row of T tokens, y of them scored, P the weights of the layers' matrices, R those of the
adapters, Q the width of all heads, V the vocabulary, D the width, L layers:

    layers      2P T forward, 2P T for the gradient of the activations, none for frozen weights
    adapters    2R T forward, 4R T backward
    attention   4Q L T(T+1)/2 forward, twice that backward
    head        2DV y forward, 2DV y for the gradient of the hidden state
    reference   the forward pass without adapters, and 2DV y, unless it is cached
    checkpointing   the layers' forward pass a second time
    KTO         a mismatched row forward by policy and reference, the latter unless it is cached

Only what is needed: in the last layer everything but keys and values on scored positions alone, in
the first no gradient of the embeddings. Padding and elementwise work are not in it. --shared runs
the common prompt of a pair once.
"""
import json
from typing import NamedTuple

import torch

from bench import clock, ours


class Row(NamedTuple):
    """What is run of a row: queries at positions start .. tokens - 1, the last `scored` scored."""

    start: int  # 0, or the length of a prompt that another row has run
    tokens: int
    scored: int


def pairs(first: int, last: int) -> int:
    """Query-key products of the causal queries at positions first .. last - 1."""
    return (last * (last + 1) - first * (first + 1)) // 2


def forward(row: Row, shape: dict, rank: int) -> dict[str, int]:
    """FLOPs of one forward pass through layers, adapters and attention; see the top."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    size = shape.get("head_dim") or width // shape["num_attention_heads"]
    q, k = (shape[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    inner = shape["intermediate_size"]
    keys, others = 2 * [(width, k)], [(width, q), (q, width), *2 * [(width, inner)], (inner, width)]
    run = row.tokens - row.start

    def everywhere(per_key: int, per_other: int) -> int:
        return 2 * (layers * run * per_key + ((layers - 1) * run + row.scored) * per_other)

    return {
        "layers": everywhere(*(sum(i * o for i, o in m) for m in (keys, others))),
        "adapters": everywhere(*(rank * sum(i + o for i, o in m) for m in (keys, others))),
        "attention": 4 * q * ((layers - 1) * pairs(row.start, row.tokens)
                              + pairs(row.tokens - row.scored, row.tokens)),
        "head": 2 * width * shape["vocab_size"] * row.scored,
        "unneeded": 2 * run * width * (q + 2 * k)}  # activations' gradient at the embeddings


def count(rows: list[Row], shape: dict, task: str, cached: bool, checkpointing: bool,
          rank: int = clock.RANK) -> tuple[int, int]:
    """(FLOPs of layers, adapters and attention, FLOPs of the head) of training on `rows` once."""
    body, head = 0, 0
    for row in rows:
        f = forward(row, shape, rank)
        once = f["layers"] + f["adapters"] + f["attention"]
        base = once - f["adapters"]
        backward = f["layers"] - f["unneeded"] + 2 * f["adapters"] + 2 * f["attention"]
        references = (task != "sft" and not cached) * (2 if task == "kto" else 1)
        body += once * (1 + checkpointing + (task == "kto")) + backward + references * base
        head += f["head"] * (2 + (task == "kto") + references)
    return body, head


def rows_of(units: list, shared: bool) -> list[Row]:
    """Row of every encoded row; shared: the second of a pair begins behind the common prompt."""
    return [Row(e.prompt_len if shared and i else 0, len(e.ids), len(e.ids) - e.prompt_len)
            for unit in units for i, e in enumerate(unit)]


def main() -> None:
    parser = clock.parser(__doc__, tuple(ours.LOSS))
    parser.add_argument("--shared", action="store_true", help="a pair's prompt is run once")
    options = parser.parse_args()
    options.micro_batch_tokens, dtype = 0, getattr(torch, options.dtype)
    units = ours.read_units(ours.settings(options), options.steps)
    units = units[options.warmup * options.batch:]
    shape = json.loads((options.model / "config.json").read_text("utf-8"))
    width, inner, positions = shape["hidden_size"], shape["intermediate_size"], 1024
    body_rate = clock.matmul_rate([(positions, width, width), (positions, width, inner),
                                   (positions, inner, width)], dtype, seconds=0.3)
    head_rate = clock.matmul_rate([(positions, width, min(shape["vocab_size"], n))
                                   for n in (1024, 8192)], dtype, seconds=0.3)
    body, head = count(rows_of(units, options.shared), shape, options.task, options.cached,
                       options.checkpointing)
    seconds = body / body_rate / 1e9 + head / head_rate / 1e9
    tokens = sum(len(e.ids) for unit in units for e in unit)
    print(json.dumps({
        "driver": "floor" + ", shared" * options.shared + ", cached" * options.cached,
        "task": options.task, "model": options.model.name, "dtype": options.dtype,
        "checkpointing": options.checkpointing, "tokens": tokens, "gflop_body": body / 1e9,
        "gflop_head": head / 1e9, "body_gflops": body_rate, "head_gflops": head_rate,
        "tokens_per_cpu_second": tokens / seconds}))


if __name__ == "__main__":
    main()
