"""On-policy runs of the small world, for online.py and hints.py: train, answer, many runs.

A run is trained by rollouts.collect and train.train_step, as train.py does, and measured in a
process of its own, so that its peak of memory is nobody else's. What it gives is kept in
experiment.CACHE by its settings and goes on from there after an interruption.
"""
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import heads
import lora
import model
import questions
import rewards
import rollouts
import tokens
import train
from config import Config
from lab import experiment, verifier, world
from lab.measure import BASE, asked, base, chat, encoded, next_token_kl

ASKED = 240
RULES = ("form", "content", "graded")


def settings(special: dict, lr: float, beta: float, seed: int, steps: int) -> Config:
    """The Config of a run: 8 prompts a step, 4 answers to each, unless `special` says otherwise."""
    usual = {"model": str(BASE), "data": ("the small world",), "reward": "lab", "max_length": 96,
             "response_tokens": 24, "group": 4}
    return Config(**(usual | special), lr=lr, beta=beta, seed=seed, steps=steps)


def fresh(wanted: Config) -> tuple[model.Transformer, torch.optim.Optimizer]:
    """The base with new adapters, and a head where the loss wants one, and their optimizer."""
    net = model.load(BASE, torch.float32)
    lora.inject(net, 16, 16, generator=torch.Generator().manual_seed(wanted.seed))
    if head := train.LOSSES[wanted.loss].head:
        heads.attach(net, head)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=wanted.lr, weight_decay=0.0)


def learn(net: model.Transformer, optimizer: torch.optim.Optimizer, wanted: Config,
          rows: Sequence[tokens.Encoded], reward: rewards.Reward) -> None:
    """wanted.steps steps as train.py takes them, on the rows in turn."""
    for step in range(wanted.steps):
        at = step * wanted.batch_size % len(rows)
        given = rows[at:at + wanted.batch_size]
        online = train.LOSSES[wanted.loss].online
        units = rollouts.collect(net, chat(), given, reward, wanted, step) if online else [
            (row,) for row in given]
        for _ in range(wanted.updates if online else 1):
            train.train_step(net, optimizer, units, wanted,
                             train.learning_rate(step, wanted.steps, wanted))


def answered(net: model.Transformer, split: str, reward: rewards.Reward) -> dict[str, float]:
    """What a policy does on a split.

    reward, and form, content, graded as lab/verifier.py judges them, kl_policy and length: of one
    sampled answer to each of ASKED prompts. truth, sums: greedy, as in lab/measure.py.
    """
    rows = encoded(world.prompts(world.build(0), 0, ASKED, split))
    seen = {name: [] for name in ("reward", *RULES)}

    def judge(prompts: Sequence, said: Sequence[str], answers: Sequence[str]) -> list[float]:
        seen["reward"] += reward(prompts, said, answers)
        for name in RULES:
            rule = getattr(verifier, name)
            seen[name] += [rule("", s, a) for s, a in zip(said, answers, strict=True)]
        return seen["reward"]

    alone = {"loss": "una_online", "una_target": "reward", "group": 1}
    said = [e for e, in rollouts.collect(net, chat(), rows, judge,
                                         settings(alone, 1e-3, 0.1, 0, 0), 0)]
    out = {name: sum(values) / len(values) for name, values in seen.items()}
    for name in ("truth", "sums"):
        found = questions.ask(net, chat(), asked(split, name), 12)[0]["correct"]
        out[name] = sum(found) / len(found)
    return out | {"kl_policy": next_token_kl(net, base(), said).mean().item(),
                  "length": sum(len(e.ids) - e.prompt_len for e in said) / len(said)}


# Many runs

def kept(job: tuple, version: int, page: str, run: Callable[..., dict], cache: Path) -> dict:
    """run(*job), from the cache if it was run before."""
    experiment.start_worker(cache)
    text = json.dumps([page, version, experiment.world_hash(), job])
    path = cache / f"{page}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        found = run(*job)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found), "utf-8")
        part.replace(path)
    return json.loads(path.read_text("utf-8"))


def run_all(run: Callable[..., dict], jobs: Sequence[tuple], version: int, page: str,
            workers: int) -> list[dict]:
    """The results of the jobs, in order."""
    context, cache = multiprocessing.get_context("forkserver"), experiment.CACHE
    context.set_forkserver_preload(["lab.rolling"])  # imports torch once for all
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(kept, job, version, page, run, cache) for job in jobs]
        try:
            for done in tqdm(as_completed(waiting), total=len(jobs), desc=page, unit="run"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done.result() for done in waiting]


def costed(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs with their `cost`: CPU seconds over those of the arm `grpo` with the same seed."""
    spent = [r["seconds"] for r in rows["grpo"]]
    return {name: [r | {"cost": r["seconds"] / s} for r, s in zip(runs, spent, strict=True)]
            for name, runs in rows.items()}
