"""This repository's training step: the parts that train.py runs on, and its own train_step.

    python -m bench.ours --model runs/bench/small --task uft

Rows come in file order instead of shuffled, gradients are not clipped, the rate is constant.
"""
import argparse
import os

import data
import tokens
import train
from bench import clock, work
from config import Config

LOSS = {"uft": "uft", "sft": "sft_token_mean", "dpo": "dpo", "kto": "kto"}


def settings(options: argparse.Namespace) -> Config:
    """The Config of a run with clock.py's constants; --micro_batch_tokens 0 leaves the default."""
    given = {"micro_batch_tokens": options.micro_batch_tokens} if options.micro_batch_tokens else {}
    return Config(
        model=str(options.model), data=(str(options.model / f"{work.FILES[options.task]}.jsonl"),),
        loss=LOSS[options.task], beta=clock.BETA, lr=clock.RATE, lora_r=clock.RANK,
        lora_alpha=clock.ALPHA, max_length=clock.MAX_LENGTH, max_grad_norm=1e9, template="plain",
        batch_size=options.batch, dtype=options.dtype,
        gradient_checkpointing=options.checkpointing, **given)


def read_units(config: Config, steps: int) -> list:
    """What `steps` steps read, in file order.   ValueError where the file holds too little."""
    chat = tokens.Chat(config.model, config.template)
    examples = data.read(config.data[0])[0]
    rows = tokens.encode_all(examples, chat, config.max_length)[0]
    units = data.units(rows, train.LOSSES[config.loss].reads)[0][:steps * config.batch_size]
    if len(units) < steps * config.batch_size:
        raise ValueError(f"{config.data[0]} holds {len(units)} units, {steps} steps of "
                         f"{config.batch_size} were asked for")
    return units


def main() -> None:
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # as train.main does
    parser = clock.parser(__doc__, tuple(LOSS))
    parser.add_argument("--micro_batch_tokens", type=int, default=0, help="0: train.py's default")
    options = parser.parse_args()
    watch = clock.Clock(options, "ours, cached" if options.cached else "ours")
    config = settings(options)
    net, optimizer = train.adapted(config, options.model)
    units = read_units(config, options.steps)
    if options.cached:
        import reference  # only this path needs it
        units = reference.fill(net, units, {}, config.micro_batch_tokens)
    for start in range(0, len(units), options.batch):
        step = units[start:start + options.batch]
        watch.count([(e.ids, len(e.ids) - e.prompt_len) for unit in step for e in unit])
        watch.tick(train.train_step(net, optimizer, step, config, clock.RATE)["loss"])
    watch.report()


if __name__ == "__main__":
    main()
