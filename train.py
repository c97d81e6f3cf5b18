"""Measure, then update: configuration, one optimizer step, the loop, the command line.

Every loss is one line of LOSSES and every step is the same: policy and reference on micro-batches,
the loss per term, one division by the step's own number of terms, backward, clip, AdamW.

    python train.py                                                    the demo, DEMO below
    python train.py --model DIR --data FILE --loss uft --template alpaca --max_length 512
"""
import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import evaluate
import exam
import lora
import losses
import mixture
import model
import page
import parallel
import reference
import report
import tokens
from config import Config, check_device, parse_flags

DEMO = ("--model lab/base --data lab/data/demonstrations.jsonl --data lab/data/feedback.jsonl "
        "--test lab/data/instructions.jsonl --test lab/data/truth.jsonl "
        "--test lab/data/truth_choices.jsonl --loss uft --beta 0.1 --lr 7e-3 --epochs 3 "
        "--batch_size 32 --max_length 96 --sample_tokens 24")
TIMEOUT = 600.0  # seconds that a process waits for another


class Terms(NamedTuple):
    """What a loss may read of one micro-batch, and the two constants of the whole step."""

    logps: Tensor  # (B,)
    ref_logps: Tensor | None  # (B,)
    token_logps: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    rewards: Tensor  # (B,)
    kinds: Sequence[str]  # B of "sft", "chosen", "rejected", "scored"
    z0: Tensor  # scalar, KTO's reference point
    tokens_per_row: float  # response tokens, averaged over the rows of the step
    config: Config


class Objective(NamedTuple):
    """A loss by name: which units it reads, whether it needs pi_ref, and its value per unit."""

    reads: str  # see data.units
    reference: bool
    loss: Callable[[Terms], Tensor]
    start: Callable[[Tensor, Config], Tensor | float] | None  # its value at policy == reference


def sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of rows that alternate."""
    return x[0::2], x[1::2]


def pair(t: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    return *sides(t.logps), *sides(t.ref_logps), t.config.beta


def row(t: Terms) -> tuple[Tensor, Tensor, Tensor, float]:
    return t.logps, t.ref_logps, t.rewards, t.config.beta


def means(t: Terms) -> tuple[Tensor, Tensor]:
    return sides(t.logps / t.mask.sum(-1))


LOSSES = {
    "uft": Objective("rows", True, lambda t: losses.uft(*row(t)),
                     lambda r, c: (0.5 - r).square()),
    "uft_bce": Objective("rows", True, lambda t: losses.uft_bce(*row(t)), lambda r, c: math.log(2)),
    "una_binary": Objective("labels", True, lambda t: losses.uft(*row(t)),
                            lambda r, c: (0.5 - r).square()),
    "una_pair": Objective("pairs", True, lambda t: losses.una_pair(*pair(t)),
                          lambda r, c: math.log(2)),
    "sft": Objective("demonstrations", False, lambda t: losses.sft(t.logps), None),
    "sft_token_mean": Objective(
        "demonstrations", False,
        lambda t: losses.sft_token_mean(t.token_logps, t.mask, t.tokens_per_row), None),
    "dpo": Objective("pairs", True, lambda t: losses.dpo(*pair(t), t.config.label_smoothing),
                     lambda r, c: math.log(2)),
    "ipo": Objective("pairs", True, lambda t: losses.ipo(*pair(t)),
                     lambda r, c: 1 / (2 * c.beta)**2),
    "bco_pair": Objective("pairs", True, lambda t: losses.bco_pair(*pair(t)),
                          lambda r, c: 2 * math.log(2)),
    "kto": Objective(
        "labels", True,
        lambda t: losses.kto(t.logps, t.ref_logps, t.rewards > 0.5, t.z0, t.config.beta,
                             t.config.desirable_weight, t.config.undesirable_weight),
        lambda r, c: torch.where(r > 0.5, c.desirable_weight, c.undesirable_weight) / 2),
    "orpo": Objective("pairs", False, lambda t: losses.orpo(*means(t), t.config.orpo_weight), None),
    "simpo": Objective(
        "pairs", False,
        lambda t: losses.simpo(*means(t), t.config.beta, t.config.simpo_gamma), None),
}


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up over the first warmup * steps steps, then half a cosine down to zero."""
    ramp = max(1, round(config.warmup * steps))
    if step < ramp:
        return config.lr * (step + 1) / ramp
    return config.lr * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp))) / 2


def train_step(
    net: model.Transformer, optimizer: torch.optim.Optimizer, units: list, config: Config,
    rate: float,
) -> dict[str, float]:
    """One update of the adapters on `units`, and its metrics.

    The gradient is that of sum(loss of every unit) / len(units), however the units are cut into
    micro-batches. FloatingPointError before the update if loss or gradient is not finite.
    """
    objective, device = LOSSES[config.loss], next(net.parameters()).device
    z0, units = evaluate.reference_point(net, units, config)
    rows = [e for unit in units for e in unit]
    tokens_per_row = sum(len(e.ids) - e.prompt_len for e in rows) / len(rows)
    found, (groups, own, before) = [], parallel.turns(units, config.micro_batch_tokens)
    for number, group in enumerate(groups):
        batch = tokens.collate([e for unit in group for e in unit])
        scores = evaluate.score(net, batch, objective.reference, config.gradient_checkpointing)
        rewards = batch.rewards.to(device, non_blocking=True)
        each = objective.loss(Terms(*scores, rewards, batch.kinds, z0, tokens_per_row, config))
        (each.sum() * float(number < own) / len(units)).backward()
        each = F.pad(each, (0, len(rewards) - len(each)))  # pairs have half as many as rows
        found.append(torch.stack([x for x in (each, *scores[:2]) if x is not None]).detach())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.sum_gradients(trained)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    each, logps, *refs = parallel.together(torch.cat(found[:own], 1), before, len(rows))
    loss = each.sum().item() / len(units)  # only kto has waited for the device till now
    if not math.isfinite(loss) or not norm.isfinite():
        bad = [n for n, p in net.named_parameters()
               if p.grad is not None and not p.grad.isfinite().all()]
        raise FloatingPointError(f"loss is {loss}, gradient norm {norm.item()}, first bad tensor "
                                 f"{bad[0] if bad else 'none'}, rows {[e.where for e in rows]}")
    torch.nn.utils.clip_grads_with_norm_(trained, config.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    rewards = torch.tensor([e.reward for e in rows])
    return {"loss": loss, "grad_norm": norm.item(), "learning_rate": rate} | evaluate.measure(
        logps.cpu(), refs[0].cpu() if refs else None, rewards, [e.kind for e in rows],
        evaluate.pair_starts(units), config.beta)


@torch.no_grad()
def self_check(net: model.Transformer, units: list, config: Config) -> str:
    """Before the first update the implicit reward is exactly 0 and the loss its closed form.

    ValueError when not: then policy and reference differ for another reason than training.
    """
    objective, device = LOSSES[config.loss], next(net.parameters()).device
    group = tokens.micro_batches(units, config.micro_batch_tokens)[-1]
    batch = tokens.collate([e for unit in group for e in unit])
    scores, rewards = evaluate.score(net, batch, reference=True), batch.rewards.to(device)
    u = losses.implicit_reward(scores.logps, scores.ref_logps, config.beta).abs().max().item()
    z0, tokens_per_row = torch.zeros((), device=device), scores.mask.sum(-1).float().mean().item()
    terms = Terms(*scores, rewards, batch.kinds, z0, tokens_per_row, config)
    loss = objective.loss(terms).mean().item()
    said, wrong = f"implicit reward at step 0: {u:g} (expected 0)   loss {loss:.6f}", u != 0
    if objective.start:
        expected = torch.as_tensor(objective.start(rewards, config)).float().mean().item()
        said += f" (expected {expected:.6f})"
        wrong |= abs(loss - expected) > 1e-5 * max(1, abs(expected))
    if wrong:
        raise ValueError(f"self-check failed: {said}. Policy and reference differ before training")
    return said + "   ok"


def run_folder(config: Config) -> Path:
    """config.out, or the next free runs/NNNN; ValueError where a run lies there already."""
    if config.resume and not config.out:
        raise ValueError("--resume true needs --out RUN, the folder of the run to go on with")
    taken = [int(p.name) for p in Path("runs").glob("[0-9]*") if p.name.isdigit()]
    out = Path(config.out or f"runs/{max(taken, default=0) + 1:04}")
    if (out / "config.json").exists() and not config.resume:
        raise ValueError(f"--out {out} holds a run already: choose another, or --resume true")
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
    if several:
        parallel.shard(net, config.device)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=config.lr, weight_decay=config.weight_decay)


def train(config: Config) -> Path:
    """A whole run; returns its folder.   ValueError for whatever a user can set right."""
    began = time.perf_counter()
    config = replace(config, device=parallel.start(config, TIMEOUT))
    check_device(config.device)
    folder, out = model.resolve(config.model), run_folder(config)
    chat, tests = open_chat(config, folder), exam.read_tests(config)
    files, weights, held, told, dropped, size = mixture.load_data(
        config, chat, LOSSES[config.loss].reads)
    kept = LOSSES[config.loss].reference and reference.store(config, folder)
    net, optimizer = adapted(config, folder)
    steps = config.steps or math.ceil(config.epochs * size / config.batch_size)
    state = {"step": 0, "num_tokens": 0, "place": (0, 0)}
    parallel.agree({
        "arguments": repr(replace(config, device="", out=str(out))), "data": repr((told, size)),
        "model": repr([(p.name, p.stat().st_size) for p in model.weight_files(folder)]),
        "torch": torch.__version__}, config.device)
    if config.resume:
        state = checkpoint.resume(net, optimizer, out, asdict(config))
    elif not parallel.rank():
        out.mkdir(parents=True, exist_ok=True)
        report.write_json(out / "config.json", asdict(config))
        report.write_lines(out / "dropped.jsonl", dropped)
    print(report.header(net, config, told, len(dropped), steps, out))
    print("".join(f"test    {name}: {len(asked)} questions\n" for name, asked in tests.items()),
          end="")
    if state["step"]:
        print(f"resume  after step {state['step']}, {state['num_tokens']} tokens seen")
    batches = mixture.stream(files, weights, config, state["place"],
                             None if parallel.rank() else out / "dropped.jsonl")
    batches = reference.through(net, batches, *kept) if kept else batches
    first, _ = next(mixture.stream(files, weights, config))
    print(report.example(first[0][0], chat))
    if not config.resume:
        print("check   " + self_check(net, first, config), flush=True)
    prompts = [unit[0].prompt for unit in (held or first)][:3 if config.sample_tokens else 0]
    asked = exam.Exam(held, tests, prompts, config.sample_tokens, config.beta,
                      config.micro_batch_tokens)
    with lora.disabled(net):
        before = exam.examine(net, chat, asked)
    with contextlib.closing(batches):
        run_steps(net, optimizer, batches, state, steps, size, config, out)
    if not parallel.rank():
        lora.save(net, out / "adapter", str(config.model))
        chat.save(out / "adapter")
    results = exam.compare(before, exam.examine(net, chat, asked))
    if parallel.rank():
        return out
    results |= {"verdict": report.verdict(results["held_out"]["after"], results["tests"]),
                "seconds": time.perf_counter() - began}
    report.write_json(out / "results.json", results)
    page.write(out)
    print(report.closing(results, folder, out))
    return out


def run_steps(
    net: model.Transformer, optimizer: torch.optim.Optimizer, batches: Iterator[tuple], state: dict,
    steps: int, size: int, config: Config, out: Path,
) -> None:
    """Trains from state["step"] to `steps`: a line of metrics.jsonl each, then a checkpoint."""
    kept = Path(os.devnull) if parallel.rank() else out / "metrics.jsonl"
    report.keep_lines(kept, state["step"])
    bar, began = report.progress(steps, state["step"]), time.perf_counter()
    start = state["step"]
    with bar, open(kept, "a", encoding="utf-8") as log:
        for step in range(start, steps):
            clock, units, rate = time.perf_counter(), [], learning_rate(step, steps, config)
            try:
                units, place = next(batches)
                metrics = train_step(net, optimizer, units, config, rate)
            except (FloatingPointError, RuntimeError) as error:
                raise stopped(error, step, units, config, out) from error
            count = sum(len(e.ids) for unit in units for e in unit)
            state = {"step": step + 1, "num_tokens": state["num_tokens"] + count}
            now = time.perf_counter()
            metrics = state | metrics | {
                "epoch": (step + 1) * config.batch_size / size,
                "tokens_per_s": count / (now - clock), "mem_mib": report.memory_mib(config.device)}
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            left = (now - began) / (step + 1 - start) * (steps - step - 1)
            report.step(bar, metrics, steps, left)
            due = step + 1 == steps or config.save_every and (step + 1) % config.save_every == 0
            if due and not parallel.rank():
                checkpoint.save(net, optimizer, out, state | {"place": place})


def stopped(error: Exception, step: int, units: list, config: Config, out: Path) -> Exception:
    """What a user is told when a step fails: numbers or memory; other errors are ours."""
    if isinstance(error, FloatingPointError):
        if not parallel.rank():
            report.write_lines(out / "bad_batch.jsonl", [asdict(e) for u in units for e in u])
        return ValueError(f"step {step + 1}: {error}. Usual causes: --lr {config.lr} too high, "
                          f"damaged weights. The batch is saved in {out / 'bad_batch.jsonl'}")
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return ValueError(
            f"out of memory at step {step + 1}. Try in this order: --micro_batch_tokens "
            f"{config.micro_batch_tokens // 2}, --gradient_checkpointing true, --dtype bfloat16, "
            f"--max_length {config.max_length // 2}")
    return parallel.told(error, f"at step {step + 1}", TIMEOUT)


def demo_flags() -> list[str]:
    """The words of DEMO, its lab/ paths from where the command was given."""
    here = Path(__file__).resolve().parent
    return [os.path.relpath(here / word) if word.startswith("lab/") else word
            for word in DEMO.split()]


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # of 1024, half a MiB each
    names = {"loss": tuple(LOSSES), "template": ("checkpoint", *tokens.TEMPLATES),
             "dtype": ("float32", "bfloat16")}
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        argv = demo_flags()
        print(f"demo    python {os.path.relpath(__file__)} {shlex.join(argv)}", flush=True)
    config = parse_flags(argv, names)
    try:
        train(config)
    except (ValueError, OSError, RuntimeError) as error:
        told = parallel.told(error, "before or after training", TIMEOUT)
        if isinstance(told, RuntimeError):
            raise
        parallel.fail(told)
    except KeyboardInterrupt:
        print("train.py: stopped; --out RUN --resume true goes on from its newest checkpoint",
              file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
