"""One run of the small world: an arm is a list of stages, a run is an arm with a seed, measured.

Everything but `sft_kl` is trained by train.train_step, on rows read by data.py; the lab adds only
losses that the paper does not have (OWN). A later stage starts from the merged weights of the one
before, which are its reference; every stage of a seed draws the same adapters at the start. Runs
are cached in runs/lab by their settings, so that what was interrupted goes on and what two tables
share is run once.
"""
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import config
import data
import lora
import losses
import model
import objectives
import tokens
import train
from lab import world
from lab.measure import BASE, LENGTH, encoded, measure

CACHE = BASE.parent.parent / "runs/lab"
VERSION = 1  # raise it when a change of code, here or in what is imported, makes cached runs untrue
BATCH = 32


@dataclass(frozen=True)
class Stage:
    """One training run on one file, or on both; rows are drawn anew for every seed."""

    loss: str  # a name in objectives.LOSSES or OWN
    rows: str  # demonstrations, feedback, both, or good: demonstrations and scores of .75 or more
    lr: float
    beta: float = 0.1
    steps: int = 0  # 0: one pass
    sizes: tuple[int, int] = (1536, 1536)  # demonstrations, scored answers
    scores: str = "given"  # or binary, shuffled (within a prompt), constant, centred
    batch: int = BATCH
    alternate: bool = False  # a step of demonstrations, then one of feedback
    clip: float = 1.0  # the largest norm of a gradient


def is_demonstration(t: objectives.Terms) -> Tensor:
    return torch.tensor([k == "sft" for k in t.kinds], device=t.logps.device)


def row_loss(loss: Callable[[objectives.Terms], Tensor]) -> objectives.Objective:
    return objectives.Objective("rows", True, loss, None)


OWN = {
    # beta/4 is the weight that Eq. 7 gives a demonstration at the first step
    "sft_una": row_loss(lambda t: torch.where(
        is_demonstration(t), t.config.beta / 4 * losses.sft(t.logps),
        losses.uft(*objectives.row(t)))),
    # the limit beta -> 0 of Eq. 7: SFT with weight r - 1/2
    "weighted_sft": row_loss(
        lambda t: t.config.beta / 2 * (t.rewards - 0.5) * losses.sft(t.logps)),
    # SFT, BCE and KTO at the same first gradient as Eq. 7
    "sft_quarter": row_loss(lambda t: t.config.beta / 4 * losses.sft(t.logps)),
    "uft_bce_half": row_loss(lambda t: losses.uft_bce(*objectives.row(t)) / 2),
    "kto_rows": row_loss(lambda t: losses.kto(  # z0 = 0
        t.logps, t.ref_logps, t.rewards > 0.5, torch.zeros(()), t.config.beta)),
    # SFT that stops, row by row, at a gain of 2/beta nats, where Eq. 7 has faded to a tenth
    "sft_stop": row_loss(lambda t: torch.where(
        t.config.beta * (t.logps - t.ref_logps) < 2, t.config.beta / 4, 0.0) * losses.sft(t.logps)),
}


# Data

def rescored(rows: list[tokens.Encoded], scores: str, seed: int) -> list[tokens.Encoded]:
    """Scored rows with their scores kept, cut at 1/2, swapped within a prompt, all the mean, or
    moved so that their mean is 1/2."""
    rewards = [e.reward for e in rows]
    mean = sum(rewards) / max(1, len(rewards))
    if scores == "binary":
        rewards = [float(r > 0.5) for r in rewards]
    if scores == "constant":
        rewards = [mean] * len(rewards)
    if scores == "centred":
        rewards = [r - mean + 0.5 for r in rewards]
    if scores == "shuffled":
        flip = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.5
        rewards = [rows[i ^ 1].reward if flip[i // 2] else r for i, r in enumerate(rewards)]
    return [replace(e, reward=r) for e, r in zip(rows, rewards, strict=True)]


def units(stage: Stage, seed: int) -> list[tuple]:
    """What the stage trains on, one loss term each."""
    here, (demos, scored) = world.build(0), stage.sizes
    taught = encoded(world.demonstrations(here, seed, demos)) * (stage.rows != "feedback")
    given = encoded(world.feedback(here, seed, scored // 2)) * (stage.rows != "demonstrations")
    if stage.rows == "good":
        given = [replace(e, kind="chosen", reward=1.0) for e in given if e.reward >= 0.75]
    reads = "rows" if stage.loss == "sft_kl" else (OWN | objectives.LOSSES)[stage.loss].reads
    return data.units(taught + rescored(given, stage.scores, seed), reads)[0]


def count_steps(stage: Stage, given: list[tuple]) -> int:
    return stage.steps or math.ceil(len(given) / stage.batch)


# Training

def settings(stage: Stage, seed: int) -> config.Config:
    return config.Config(model=str(BASE), data=("the small world",), loss=stage.loss, lr=stage.lr,
                         beta=stage.beta, batch_size=stage.batch, max_length=LENGTH, seed=seed,
                         micro_batch_tokens=512, max_grad_norm=stage.clip)


def stream(given: list[tuple], count: int, seed: int) -> Iterator[list[tuple]]:
    """Batches for ever, in data.order's order, as in train.py."""
    picks = (given[row] for epoch in itertools.count()
             for _, row in data.order([len(given)], [1.0], seed, epoch))
    while True:
        yield list(itertools.islice(picks, count))


def halves(given: list[tuple]) -> list[list[tuple]]:
    """Demonstrations, and the rest."""
    return [[u for u in given if (u[0].kind == "sft") == taught] for taught in (True, False)]


def penalised_step(net: model.Transformer, optimizer: torch.optim.Optimizer, group: list,
                   wanted: config.Config, rate: float) -> None:
    """beta/4 (SFT + KL(policy||reference)), the KL exact over the next token, summed along each
    demonstration (not along samples). One batch, no clipping."""
    batch = tokens.collate([e for u in group for e in u])
    mask_BT, target_BT = batch.response_mask[:, 1:], batch.ids[:, 1:]
    with torch.no_grad(), lora.disabled(net):
        reference = net.logits(net(batch.ids)[:, :-1]).log_softmax(-1)
    logp = net.logits(net(batch.ids)[:, :-1]).log_softmax(-1)
    kl_BT = (logp.exp() * (logp - reference)).sum(-1)
    said_BT = logp.gather(-1, target_BT[..., None])[..., 0]
    (wanted.beta / 4 * ((kl_BT - said_BT) * mask_BT).sum() / len(group)).backward()
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def fit(net: model.Transformer, stage: Stage, seed: int,
        watch: Callable[[int, model.Transformer], None] | None = None) -> None:
    """Trains fresh adapters on `net` and merges them; watch(step, net) is called after each step.

    FloatingPointError where loss or gradient is not finite.
    """
    objectives.LOSSES.update(OWN)
    given, wanted = units(stage, seed), settings(stage, seed)
    steps = count_steps(stage, given)
    lora.inject(net, 16, 16, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=stage.lr, weight_decay=0.0)
    batches = [stream(part, stage.batch, seed) for part in
               (halves(given) if stage.alternate else [given])]
    for step in range(steps):
        rate = train.learning_rate(step, steps, wanted)
        update = penalised_step if stage.loss == "sft_kl" else train.train_step
        update(net, optimizer, next(batches[step % len(batches)]), wanted, rate)
        if watch:
            watch(step, net)
    lora.merge(net)
    lora.remove(net)
    net.requires_grad_(False)


def key(stages: Sequence[Stage], seed: int, split: str = "") -> str:
    """A name for a run: equal stages, seed, split, world and VERSION give equal names."""
    text = json.dumps([VERSION, world_hash(), [asdict(s) for s in stages], seed, split])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def world_hash() -> str:
    """Of the base's folder and of what the generator gives: training rows and tests."""
    here = world.build(0)
    made = [world.demonstrations(here, 0, 100), world.feedback(here, 0, 100),
            *(world.tests(here, split) for split in ("validation", "test"))]
    parts = [p.read_bytes() for p in sorted(BASE.iterdir())] + [json.dumps(made).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def policy(stages: Sequence[Stage], seed: int) -> model.Transformer:
    """The base trained through the stages; what comes before the last one is cached."""
    net = model.load(BASE, torch.float32)
    if not stages:
        return net
    path = CACHE / f"{key(stages[:-1], seed)}.safetensors"
    if len(stages) > 1 and path.exists():
        net.load_state_dict(load_file(path))
    elif len(stages) > 1:
        net = policy(stages[:-1], seed)
        part = path.with_suffix(f".{os.getpid()}")
        save_file(net.state_dict(), part)
        part.replace(path)
    fit(net, stages[-1], seed)
    return net


# Many runs

def run(stages: Sequence[Stage], seed: int, split: str) -> dict[str, float]:
    """The numbers of one run, from the cache if it was run before."""
    path = CACHE / f"{key(stages, seed, split)}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    found = measure(policy(stages, seed), split)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found), "utf-8")
    part.replace(path)
    return found


def start_worker(cache: Path) -> None:
    """One thread, and the cache of whoever asks."""
    global CACHE
    torch.set_num_threads(1)
    CACHE = cache


def run_all(jobs: Sequence[tuple], workers: int, label: str) -> list[dict[str, float]]:
    """`run` of every (stages, seed, split), in order, on several processes, with a progress bar."""
    CACHE.mkdir(parents=True, exist_ok=True)
    once, found = {repr(job): job for job in jobs}, {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (CACHE,)) as pool:
        waiting = {pool.submit(run, *job): name for name, job in once.items()}
        try:
            for done in tqdm(as_completed(waiting), total=len(once), desc=label, unit="run"):
                found[waiting[done]] = done.result()
        except BaseException:  # Ctrl-C too: finish the two runs at hand, start no other
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[repr(job)] for job in jobs]


def run_arms(arms: Mapping[str, Sequence[Stage]], seeds: Sequence[int], split: str, workers: int,
             label: str) -> dict[str, list[dict[str, float]]]:
    """{arm: the numbers of its runs, one per seed}."""
    jobs = [(stages, seed, split) for stages in arms.values() for seed in seeds]
    found = iter(run_all(jobs, workers, label))
    return {name: [next(found) for _ in seeds] for name in arms}
