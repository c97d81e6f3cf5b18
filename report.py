"""What a run tells a person: its first lines, one line a step, samples, the table at the end.

Plain text, the same on a terminal and in a file.
"""
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import durable
import heads
import lora
import model
import strict
import tokens
from config import Config

KINDS = ("sft", "chosen", "rejected", "scored", "sampled")


def header(net: model.Transformer, config: Config, told: Sequence[str], dropped: int, steps: int,
           out: Path) -> str:
    """What is about to run: loss, model, data, where it goes."""
    kind, layers = net.config.model_type, lora.adapters(net)
    weights = sum(p.numel() for p in net.parameters() if not p.requires_grad) / 1e6
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6
    tied = "tied" if net.config.tie_word_embeddings else "untied"
    lines = [
        (f"UFT     loss={config.loss}  beta={config.beta:g}  lr={config.lr:g}  seed={config.seed}  "
         f"{steps} steps of {config.batch_size}  ->  {out}"),
        (f"model   {config.model}: {kind}, {weights:.2f} M weights, {tied}, {config.dtype}, "
         f"{config.device}"),
        (f"lora    {trained:.2f} M trainable weights, r={config.lora_r} "
         f"alpha={config.lora_alpha:g} on {len(layers)} layers ({', '.join(config.lora_targets)})"),
        *(f"data    {line}" for line in told)]
    lines += [f"dropped {dropped} rows, listed in {out / 'dropped.jsonl'}"] * bool(dropped)
    return "\n".join(lines)


def example(row: tokens.Encoded, chat: tokens.Chat) -> str:
    """One row as the model sees it: the prompt, then the scored part between markers."""
    prompt = chat.decode(row.ids[: row.prompt_len])
    answer = chat.decode(row.ids)[len(prompt):]
    shown = [strict.clean(line) for line in f"{prompt} >>>{answer}<<<".split("\n")]
    return (f"example {row.where}, reward {row.reward:.2f}: only the part in >>> <<< is trained, "
            f"it ends with token {row.ids[-1]}\n    " + "\n    ".join(shown))


def progress(steps: int, start: int, shown: bool) -> tqdm:
    """A bar on a terminal, if it is to be shown; elsewhere `step` prints plain lines instead."""
    return tqdm(total=steps, initial=start, disable=not (shown and sys.stderr.isatty()),
                unit="step")


def step(bar: tqdm, metrics: Mapping[str, float], steps: int, seconds_left: float) -> None:
    """Shows loss, implicit reward and log-prob change (nats) per kind, tokens per second.

    A loss without a reference shows log-probs instead; rollouts what they earned, KL and length.
    """
    parts = [f"loss {metrics['loss']:.4f}"]
    if "reward" in metrics:
        parts += [f"reward {metrics['reward']:.3f}", f"kl {metrics['kl']:.2f}",
                  f"length {metrics['completions/mean_length']:.1f}"]
    for name, text, digits in (("rewards/", "implicit reward", 3), ("dlogp/", "dlogp", 2)) \
            if "rewards/mean" in metrics else (("logps/", "logp", 2),):
        by_kind = [f"{k.removeprefix(name)} {v:+.{digits}f}" for k, v in metrics.items()
                   if k.startswith(name) and k.removeprefix(name) in KINDS]
        parts += [f"{text} {' '.join(by_kind)}"] * bool(by_kind)
    line = " | ".join([*parts, f"{metrics['tokens_per_s']:.0f} tok/s"])
    bar.set_postfix_str(line, refresh=False)
    bar.update()
    if bar.disable and (metrics["step"] % max(1, steps // 20) == 0 or metrics["step"] == steps):
        print(f"step {metrics['step']:>5}/{steps} | {line} | {seconds_left:.0f} s left", flush=True)


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Held-out numbers at start and end."""
    lines = [f"{'held out':<22}{'start':>12}{'end':>12}{'change':>12}"]
    for name in sorted(after):
        a, b = before[name], after[name]
        lines.append(f"{name:<22}{a:>12.4f}{b:>12.4f}{b - a:>+12.4f}")
    return "\n".join(lines)


def test_table(gains: Mapping[str, Mapping]) -> str:
    """Tests at start and end in percent, with the 95% interval of the change in points."""
    wide = max(22, *map(len, gains))
    lines = [f"{'tests':<{wide}}   start     end   change      95% interval   questions"]
    for name, g in gains.items():
        ends = [f"{100 * x:+.1f}" for x in g["interval"] or ()]
        lines.append(f"{name:<{wide}}{g['before']:>8.1%}{g['after']:>8.1%}"
                     f"{100 * g['change']:>+9.1f}{' to '.join(ends) or 'unknown':>18}{g['n']:>12}")
    return "\n".join(lines)


def verdict(before: Mapping[str, float], after: Mapping[str, float],
            gains: Mapping[str, Mapping]) -> str:
    """Tests and held-out numbers in words; a test moved if its interval leaves out zero."""
    lines = []
    for name, g in gains.items():
        low, high = g["interval"] or (0, 0)
        way = "rose" if low > 0 else "fell" if high < 0 else "did not clearly move"
        lines.append(f"{name} {way}, {g['before']:.1%} to {g['after']:.1%}")
    if "reward" in after:
        lines.append(f"reward of held-out prompts, one answer each, {before['reward']:.3f} to "
                     f"{after['reward']:.3f}, {after['kl']:.2f} nats from the reference")
    for kind in KINDS:
        if (change := after.get(f"dlogp/{kind}")) is not None:
            way = "rose" if change > 0 else "fell"
            lines.append(f"log-prob of {kind} rows {way} by {abs(change):.2f} nats")
    if "score_mse" in after:
        best = "below" if after["score_mse"] < after["score_mse/mean"] else "not below"
        lines.append(f"score_mse {after['score_mse']:.4f} is {best} the best constant's "
                     f"{after['score_mse/mean']:.4f}")
    if "rewards/accuracies" in after:
        lines.append(f"{after['rewards/accuracies']:.0%} of pairs in the right order")
    return "; ".join(lines)


def samples(shown: Sequence[Mapping]) -> str:
    """Prompts with the greedy answer before and after training, marked where there is a test."""
    mark = {None: "", True: "right  ", False: "wrong  "}
    return "\n".join(f"prompt  {s['prompt']!r}\n"
                     f"before  {mark[s['right_before']]}{s['before']!r}\n"
                     f"after   {mark[s['right_after']]}{s['after']!r}" for s in shown)


def closing(results: Mapping, folder: Path, out: Path) -> str:
    """Samples, both tables, the verdict and what to do next: all that a run prints at its end."""
    held, tests = results["held_out"], results["tests"]
    parts = [samples(results["samples"]), test_table(tests) if tests else "",
             table(**held) if held["after"] else "", results["verdict"],
             next_commands(folder, out)]
    return "\n".join(part for part in parts if part)


def next_commands(folder: Path, out: Path) -> str:
    """How to use what the run left."""
    use = (f"reward  python train.py --loss ppo --reward {out} --model ..."
           if "score.weight" in heads.read(out / "adapter") else
           f"sample  python generate.py --model {folder} --adapter {out / 'adapter'} --prompt TEXT")
    return (f"adapter {out / 'adapter'}   metrics {out / 'metrics.jsonl'}\n"
            f"report  {out / 'report.html'}\n{use}\n"
            f"merge   python lora.py merge --model {folder} --adapter {out / 'adapter'} "
            f"--out {out / 'merged'}")


def memory_mib(device: str) -> float:
    """Peak memory: of the GPU if the run is on one, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0  # it has no such figure
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_json(path: Path, value: object) -> None:
    durable.write(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, values: Iterable[object]) -> None:
    durable.write(path, "".join(json.dumps(v) + "\n" for v in values))


def keep_lines(path: Path, count: int | None = None) -> None:
    """Cuts a JSONL file to its first `count` lines, or to its whole ones; makes it if need be.

    ValueError where it has fewer: a checkpoint is only made when its lines are on disk.
    """
    path.touch()
    durable.sync(path.parent)
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if count and len(whole) < count:
        raise ValueError(f"{path} has {len(whole)} lines, the checkpoint was made after {count}: "
                         "put the file back, or start a new run with another --out")
    os.truncate(path, sum(map(len, whole[:count])))
