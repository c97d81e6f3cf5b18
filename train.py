"""A run: from the command line to files, model and loop, and to what the run leaves.

update.py is one step of the loop, objectives.py what it minimises.

    python train.py                                                    the demo, DEMO below
    python train.py --model DIR --data FILE --loss uft --template alpaca --max_length 512
"""
import contextlib
import json
import math
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import anatomy
import checkpoint
import durable
import exam
import heads
import lora
import memory
import mixture
import model
import page
import parallel
import reference
import report
import rewards
import rollouts
import stops
import tokens
from config import Config, check_device, parse_flags
from objectives import CHOICES, LOSSES
from update import self_check, train_step

DEMO = ("--model lab/base --data lab/data/demonstrations.jsonl --data lab/data/feedback.jsonl "
        "--test lab/data/instructions.jsonl --test lab/data/truth.jsonl "
        "--test lab/data/truth_choices.jsonl --loss uft --beta 0.1 --lr 7e-3 --epochs 3 "
        "--batch_size 32 --max_length 96 --sample_tokens 24")


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up over the first warmup * steps steps, then half a cosine down to zero."""
    ramp = max(1, round(config.warmup * steps))
    if step < ramp:
        return config.lr * (step + 1) / ramp
    return config.lr * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp))) / 2


def run_folder(config: Config) -> Path:
    """config.out, or the next free runs/NNNN; ValueError where a new run may not write there."""
    if config.resume and not config.out:
        raise ValueError("--resume true needs --out RUN, the folder of the run to go on with")
    taken = [int(p.name) for p in Path("runs").glob("[0-9]*") if p.name.isdigit()]
    out = Path(config.out or f"runs/{max(taken, default=0) + 1:04}")
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    held = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {above} is not a folder that can be written to")
    if config.resume and "config.json" not in held:
        raise ValueError(f"cannot resume --out {out}: it holds no run (no config.json): start it "
                         "without --resume")
    if not config.resume and "config.json" in held:
        raise ValueError(f"--out {out} holds a run already: choose another, or --resume true")
    if not config.resume and (odd := [n for n in held if n != "lock" and n[:4] != "tmp-"]):
        raise ValueError(f"--out {out} holds other files ({min(odd)}): choose a new folder")
    return out


def open_chat(config: Config, folder: Path) -> tokens.Chat:
    """The model's tokenizer and template; ValueError where --max_length exceeds its context."""
    context = model.ModelConfig.from_folder(folder).max_position_embeddings
    if config.max_length > context:
        raise ValueError(f"--max_length {config.max_length} is more than the model's context of "
                         f"{context} tokens (max_position_embeddings): give --max_length {context}")
    return tokens.Chat(folder, config.template)


def adapted(config: Config, folder: Path) -> tuple[model.Transformer, torch.optim.Optimizer]:
    """The frozen model with fresh adapters, and the optimizer that trains them."""
    several = parallel.size() > 1
    net = model.load(folder, getattr(torch, config.dtype), "cpu" if several else config.device)
    torch.manual_seed(config.seed)
    targets = "all-linear" if config.lora_targets == ("all-linear",) else config.lora_targets
    lora.inject(net, config.lora_r, config.lora_alpha, targets, config.lora_dropout)
    for name, layer in lora.adapters(net).items():
        if config.lora_r > (most := min(layer.weight.shape)):
            raise ValueError(f"--lora_r {config.lora_r} is more than {name} can use: {most}")
    if (head := LOSSES[config.loss].head) == "score" and "lm_head" in lora.adapters(net):
        raise ValueError("--lora_targets: a reward model does not read lm_head: leave it out")
    if head:
        heads.attach(net, head)
    if several:
        parallel.shard(net, config.device)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=config.lr, weight_decay=config.weight_decay)


def check_online(config: Config) -> None:
    """ValueError where a loss that samples has no reward, or another one has."""
    online, name = LOSSES[config.loss].online, config.loss
    if online != bool(config.reward):
        raise ValueError(f"--loss {name} " + (
            "samples responses: say with --reward what they earn" if online else
            "samples nothing, so there is nothing to --reward: remove the flag"))
    if config.group < 2 and name in ("rloo", "grpo", "uft_hint", "uniapl"):
        raise ValueError(f"--loss {name} compares responses to one prompt: found --group "
                         f"{config.group}, expected 2 or more")
    flags = {f.name: f.default for f in fields(Config)}
    start, end = (list(flags).index(name) for name in ("group", "dtype"))
    odd = [n for n in list(flags)[start:end] if getattr(config, n) != flags[n] and not online]
    if odd:
        raise ValueError(f"--{odd[0]} is for losses that sample: --loss {name} does not read "
                         "it, remove the flag")
    if online and config.reference_cache:
        raise ValueError("--reference_cache keeps log-probs of rows that come again, and --loss "
                         f"{name} samples new ones: remove the flag")


def train(config: Config) -> Path:
    """A whole run; returns its folder.   ValueError for whatever a user can set right."""
    check_device(config.device)
    check_online(config)
    config = replace(config, device=parallel.start(config))
    folder, out = model.resolve(config.model), run_folder(config)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"--out {out} lies in the model folder {folder}: choose another --out")
    chat, tests = open_chat(config, folder), exam.read_tests(config)
    exam.check_room(tests, chat, model.ModelConfig.from_folder(folder).max_position_embeddings)
    files, *loaded = mixture.load_data(config, chat, LOSSES[config.loss].reads)
    reward = rewards.load(config) if config.reward else None
    inputs = checkpoint.inputs(config, folder, model.weight_files(folder)) | rewards.inputs(
        config.reward)
    same = replace(config, device="", out=str(out))
    parallel.agree({"files": repr(inputs), "arguments": repr(same), "torch": torch.__version__},
                   config.device)
    kept = LOSSES[config.loss].reference and reference.store(config, folder)
    net, optimizer = adapted(config, folder)
    with checkpoint.locked(out) if not parallel.rank() else contextlib.nullcontext():
        if not parallel.rank():
            run_folder(replace(config, out=str(out)))  # another run may have been here meanwhile
            checkpoint.check_room(net, out)
        run(net, optimizer, chat, folder, out, config, tests, files, loaded, kept, inputs, reward)
    return out


def run(net: model.Transformer, optimizer: torch.optim.Optimizer, chat: tokens.Chat, folder: Path,
        out: Path, config: Config, tests: dict, files: list, loaded: list, kept: tuple,
        inputs: dict, reward: rewards.Reward | None) -> None:
    """Begins or goes on, trains, and measures before and after: all that writes into `out`."""
    began, (weights, held, told, dropped, size) = time.perf_counter(), loaded
    steps = config.steps or math.ceil(config.epochs * size / config.batch_size)
    state = {"step": 0, "num_tokens": 0, "place": (0, 0), "inputs": inputs}
    print(report.header(net, config, told, len(dropped), steps, out))
    print("".join(f"test    {name}: {len(asked)} questions\n" for name, asked in tests.items()),
          end="")
    if config.loss == "uft_hint" and config.hint_steps >= steps:
        print(f"note    hints are given until step {config.hint_steps}, the run ends at {steps}: "
              f"--hint_steps {3 * steps // 5} leaves it two fifths without, as in the paper")
    if config.resume:
        state, notes = checkpoint.resume(net, optimizer, out, config, state)
        print("\n".join(f"resume  {n}" for n in [
            *notes, f"after step {state['step']}, {state['num_tokens']} tokens seen"]))
        parallel.agree({"checkpoint": str(state["step"])}, config.device)
    listed = None if parallel.rank() else out / "dropped.jsonl"
    batches, first = (mixture.stream(files, weights, config, *more)
                      for more in ((state["place"], listed), ()))
    batches = reference.through(net, batches, *kept) if kept else batches
    if reward:
        batches = rollouts.through(net, chat, batches, reward, config, state["step"])
        first = first if state["step"] else rollouts.through(net, chat, first, reward, config, 0)
    first, _ = next(first)  # a reward that refuses it leaves a folder that is still free
    if listed and not config.resume:
        report.write_json(out / "config.json", asdict(config))
    if listed and not state["step"]:
        report.write_lines(listed, dropped)
    elif listed:
        report.keep_lines(listed)
    print(report.example(first[0][0], chat))
    if not state["step"]:
        print("check   " + self_check(net, first, config), flush=True)
    shown = 3 if config.sample_tokens and LOSSES[config.loss].head != "score" else 0
    prompts = [unit[0].prompt for unit in (held or first)][:shown]  # a reward model answers nothing
    asked = exam.Exam(held, tests, prompts, reward, config)
    with lora.disabled(net):
        before = exam.examine(net, chat, asked)
    with contextlib.closing(batches):
        run_steps(net, optimizer, batches, state, steps, size, config, out)
    results = exam.compare(before, exam.examine(net, chat, asked))
    results["rows"] = anatomy.rows(net, held, config)
    if parallel.rank():
        return
    with durable.folder(out / "adapter") as part:
        lora.save(net, part, config.model)
        chat.save(part)
    results |= {"verdict": report.verdict(*results["held_out"].values(), results["tests"]),
                "seconds": time.perf_counter() - began}
    report.write_json(out / "results.json", results)
    page.write(out)
    print(report.closing(results, folder, out))


def next_batch(batches: Iterator[tuple], keep: Callable[[], None]) -> tuple:
    """The next (units, place); where a row or a reward is refused, `keep` is called first."""
    try:
        return next(batches)
    except ValueError:
        keep()
        raise


def run_steps(
    net: model.Transformer, optimizer: torch.optim.Optimizer, batches: Iterator[tuple], state: dict,
    steps: int, size: int, config: Config, out: Path,
) -> None:
    """Trains from state["step"] to `steps`: a line of metrics.jsonl each, then a checkpoint.

    stops.Stopped after a signal, behind a checkpoint. Dropout is drawn from seed and step.
    """
    log, start, began = out / "metrics.jsonl", state["step"], time.perf_counter()
    if first := not parallel.rank():
        report.keep_lines(log, start)

    def keep() -> None:
        """What was learned since the last checkpoint."""
        saved = [0, *map(checkpoint.number, checkpoint.steps(out))]
        if first and state["step"] not in saved:
            durable.sync(log)
            checkpoint.save(net, optimizer, out, state, config)

    with report.progress(steps, start, first) as bar, stops.signals() as caught:
        for step in range(start, steps):
            clock, units, rate = time.perf_counter(), [], learning_rate(step, steps, config)
            dropout = random.Random(f"{config.seed} {step} {parallel.rank()}")
            torch.manual_seed(dropout.getrandbits(32))
            try:
                units, place = next_batch(batches, keep)
                for _ in range(config.updates):
                    metrics = train_step(net, optimizer, units, config, rate)
                metrics |= rollouts.measure([e for unit in units for e in unit], config.group)
                count = sum(len(e.ids) for unit in units for e in unit)
                state |= {"step": step + 1, "num_tokens": state["num_tokens"] + count,
                          "place": place}
                now = time.perf_counter()
                metrics = {k: state[k] for k in ("step", "num_tokens")} | metrics | {
                    "epoch": (step + 1) * config.batch_size / size,
                    "tokens_per_s": count / (now - clock),
                    "mem_mib": report.memory_mib(config.device)}
                if first:
                    durable.append(log, json.dumps(metrics) + "\n")
                due = (step + 1) % (config.save_every or steps) == 0 or step + 1 == steps
                number = parallel.largest(max(caught, default=0), config.device)
                if first and (due or number):
                    durable.sync(log)
                    checkpoint.save(net, optimizer, out, state, config)
                left = (now - began) / (step + 1 - start) * (steps - step - 1)
                report.step(bar, metrics, steps, left)  # behind the save: a broken pipe ends here
            except (FloatingPointError, RuntimeError, MemoryError) as error:
                raise stops.explain(error, step, units, config, out) from error
            if number:
                break
        if number := parallel.largest(max(caught, default=0), config.device):
            raise stops.Stopped(f"stopped after step {state['step']} of {steps}, which is saved; go"
                                f" on with the same flags, --out {out} --resume true", number)


def demo_flags() -> list[str]:
    """The words of DEMO, its lab/ paths from where the command was given."""
    here = Path(__file__).resolve().parent
    return [os.path.relpath(here / word) if word.startswith("lab/") else word
            for word in DEMO.split()]


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # of 1024, half a MiB each
    names = CHOICES | {"template": ("checkpoint", *tokens.TEMPLATES),
                       "dtype": ("float32", "bfloat16")}
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        argv = demo_flags()
        print(f"demo    python {os.path.relpath(__file__)} {shlex.join(argv)}", flush=True)
    config = parse_flags(argv, names)
    try:
        if config.memory_estimate:
            return print(memory.told(config, model.resolve(config.model)))
        train(config)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if stops.no_memory(error):
            stops.fail(f"out of memory before or after training: {error}", 2)
        known = stops.told(error, "before or after training", config.timeout)
        if isinstance(known, RuntimeError):
            raise
        stops.fail(str(known), 2)
    except stops.Stopped as stop:
        stops.fail("" if parallel.rank() else stop.args[0], 128 + stop.args[1])
    except KeyboardInterrupt:
        stops.fail("stopped; if the run has a checkpoint, --resume true goes on from it", 130)


if __name__ == "__main__":
    main()
