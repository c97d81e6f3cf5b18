"""Our UFT training step on a GPU, and what every driver there shares: shapes, weights, rows, clock.

    python -m bench.gpu_step --shape mistral-7b            our step; prints one JSON line

Weights are drawn on the device in their own dtype, a generator a tensor seeded by its name: no
file is read, nothing is held twice, and a peer with the same names has the same numbers. Rows have
scores; the reference is run in the step, LoRA is on all seven linear layers, its float32 adapters
over a frozen base, and checkpointing is on.
"""
import argparse
import json
import random
import time
import zlib
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

import lora
import model
import report
import train
from bench import clock, floor
from config import Config, check_device
from tokens import Encoded

Unit = list[Encoded]  # one row
Step = Callable[[list[Unit]], tuple[float, float]]  # (loss, mean log-prob of a response)

MISTRAL = {"model_type": "mistral", "sliding_window": None, "rms_norm_eps": 1e-5}
QWEN = {"model_type": "qwen2", "use_sliding_window": False, "rms_norm_eps": 1e-6}  # qkv biases
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "intermediate_size", "vocab_size")
SHAPES = {
    "tiny": (QWEN, (64, 2, 4, 2, 16, 128, 256)),  # for tests
    "small": (MISTRAL, (1024, 16, 8, 4, 128, 2816, 32000)),  # to see that everything runs
    "mistral-7b": (MISTRAL, (4096, 32, 32, 8, 128, 14336, 32000)),
    "qwen2.5-32b": (QWEN, (5120, 64, 40, 8, 128, 27648, 152064)),
}


def shape(name: str) -> dict:
    """The config.json of an untied model, for this repository and for transformers alike."""
    kind, sizes = SHAPES[name]
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return kind | dict(zip(SIZES, sizes, strict=True)) | {
        "hidden_act": "silu", "rope_theta": 1e6, "rope_parameters": rope, "attention_dropout": 0.0,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "use_cache": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


@torch.no_grad()
def draw(named: Iterable[tuple[str, Tensor]]) -> None:
    """Fills tensors where they lie: norms N(1, .01), embeddings, biases and B N(0, .01) or zero,
    matrices N(0, 1 / inputs). Names are the checkpoint's; PEFT's wrapping of them does not count.
    """
    for name, weight in named:
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = name.replace(".default.weight", "")
        seed = zlib.crc32(name.encode())
        generator = torch.Generator(weight.device).manual_seed(seed)
        if "lora_B" in name:
            weight.zero_()
        elif "norm" in name:
            weight.normal_(1, 0.1, generator=generator)
        elif "embed" in name or "bias" in name:
            weight.normal_(0, 0.1, generator=generator)
        else:
            weight.normal_(0, weight.shape[1]**-0.5, generator=generator)


def blank(name: str, dtype: torch.dtype, device: str) -> model.Transformer:
    """The frozen model of a shape with room for its weights on `device`, not filled."""
    with torch.device("meta"):
        net = model.Transformer(model.ModelConfig.from_dict(shape(name)))
    return net.to(dtype).to_empty(device=device).requires_grad_(False)


def work(options: argparse.Namespace) -> list[list[Unit]]:
    """The units of every step: prompt and response of 3/8 to 1/2 of --length tokens each."""
    pick, vocabulary = random.Random(0), shape(options.shape)["vocab_size"]

    def row() -> Encoded:
        prompt, response = (pick.randint(3 * options.length // 8, options.length // 2)
                            for _ in range(2))
        ids = [pick.randrange(3, vocabulary) for _ in range(prompt + response)]
        return Encoded(ids, prompt, round(pick.random(), 3), "scored", "random", ())

    return [[[row()] for _ in range(options.rows)] for _ in range(options.warmup + options.steps)]


def flops(units: list[Unit], name: str, checkpointing: bool) -> int:
    """FLOPs that a UFT step on `units` needs, as floor.py counts them, head included."""
    return sum(floor.count(floor.rows_of(units, False), shape(name), "uft", False, checkpointing))


def seconds(step: Step, units: list[Unit], device: str) -> tuple[float, float, float]:
    """(wall seconds of a step with nothing pending on the GPU before or after, loss, log-prob)."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    loss, logps = step(units)
    wait()
    return time.perf_counter() - began, loss, logps


def line(options: argparse.Namespace, driver: str, build: Callable[..., Step]) -> dict:
    """Everything measured, medians over the steps behind the warm-up; or `error`, one line.

    `tflops` is what the needed multiplications come to per second, the second forward pass of
    checkpointing among them; `tflops_once` leaves that out. `rows` is a fingerprint: equal for
    equal ids in every step.
    """
    cuda, batches, done = options.device.startswith("cuda"), work(options), []
    said = {"driver": driver, "task": "uft", "model": options.shape, "dtype": options.dtype,
            "device": torch.cuda.get_device_name() if cuda else "cpu", "checkpointing": True,
            "batch": options.rows, "length": options.length, "steps": options.steps,
            "warmup": options.warmup, "rows": zlib.crc32(repr(batches).encode())}
    try:
        step = build(options)
        for units in batches:
            done.append(seconds(step, units, options.device))
    except torch.OutOfMemoryError:
        where = f"at step {len(done) + 1}" if done else "before the first step was done"
        return said | {"error": f"out of memory {where}, at "
                                f"{report.memory_mib(options.device) / 1024:.1f} GiB"}
    counted = list(zip(batches, done, strict=True))[options.warmup:]

    def rate(amount: Callable[[list[Unit]], float]) -> float:
        return median(amount(units) / spent for units, (spent, *_) in counted)

    return said | {
        "seconds_per_step": median(spent for _, (spent, *_) in counted),
        "tokens_per_second": rate(lambda units: sum(len(e.ids) for unit in units for e in unit)),
        "tflops": rate(lambda units: flops(units, options.shape, True) / 1e12),
        "tflops_once": rate(lambda units: flops(units, options.shape, False) / 1e12),
        "peak_gib": report.memory_mib(options.device) / 1024,
        "losses": [loss for _, loss, _ in done], "first_logps": done[0][2]}


def build(options: argparse.Namespace) -> Step:
    """train.train_step on random weights; gradients are not clipped, the rate is constant."""
    config = Config(
        model="random", data=("random",), loss="uft", beta=clock.BETA, lr=clock.RATE,
        lora_r=clock.RANK, lora_alpha=clock.ALPHA, max_length=options.length, max_grad_norm=1e9,
        batch_size=options.rows, dtype=options.dtype, device=options.device,
        micro_batch_tokens=options.micro_batch_tokens, gradient_checkpointing=True)
    net = blank(options.shape, getattr(torch, options.dtype), options.device)
    lora.inject(net, config.lora_r, config.lora_alpha, config.lora_targets)
    draw(net.named_parameters())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=config.lr, weight_decay=config.weight_decay)

    def step(units: list[Unit]) -> tuple[float, float]:
        said = train.train_step(net, optimizer, units, config, clock.RATE)
        return said["loss"], said["logps/scored"]

    return step


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers for argparse, which says what it expected instead of others."""
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, found {text}")
        return int(text)

    return read


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that bench.gpu and every driver take, but for --shape."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name, least, default, told in (
            ("rows", 1, 4, "a step"), ("steps", 1, 5, "that count"),
            ("length", 8, 2048, "most tokens of a row; 3/4 of that are the least"),
            ("warmup", 0, 2, "steps before those that count"),
            ("micro_batch_tokens", 1, 8192, "padded positions a forward pass")):
        made.add_argument(f"--{name}", type=at_least(least), default=default, metavar="N",
                          help=f"{told} [{default}]")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                      help="of the base; adapters are float32")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return made


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, required=True)
    options = made.parse_args()
    check_device(options.device)
    print(json.dumps(line(options, "ours", build)), flush=True)


if __name__ == "__main__":
    main()
