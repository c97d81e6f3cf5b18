"""What tests/test_parallel.py measures in several processes: forks them after one import of torch.

    python tests/processes.py FOLDER JOB WORLD [JOB WORLD ...]

All at once. Each leaves in FOLDER, under JOB-WORLD-RANK, what it found (.json) and what it printed
(.out, .err); ends.json holds each one's exit code and when it ended, by the machine's clock.
"""
import json
import os
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import test_train
import tiny
import torch
import torch.distributed.fsdp  # before the forks, which then need not
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector

import heads
import lora
import parallel
import stops
import tokens
import train
import update

TIMEOUT = 5
RULES = {"batch_size": 4}  # of settings, where only `start` reads them


def row(i, asked, said, reward=0.5):
    """A row of `asked` + `said` tokens that no other i shares."""
    ids = [3 + (7 * i + 5 * t * t) % (tiny.V - 3) for t in range(asked + said)]
    return (tokens.Encoded(ids, asked, reward, "scored", f"d:{i}", (("user", str(i)),)),)


ALIKE = [row(i, 3, 4, i / 4) for i in range(4)]
UNEVEN = [row(0, 20, 10), *(row(i, 4, 6, i / 5) for i in range(1, 5))]  # of 10 tokens: 1, 4 turns
MIXED = [row(i, 2 + i % 3, 3 + 5 * i % 7, i % 5 / 4) for i in range(9)]


def policy(dtype=torch.float64, noise=0.1, targets=lora.TARGETS, head="", **changes):
    """A tiny model whose adapters and head, if it has one, are random, cut over the processes where
    there are several."""
    net, generator = tiny.transformer(dtype=dtype, **changes), torch.Generator().manual_seed(0)
    lora.inject(net, 2, 4.0, targets, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(noise * torch.randn(layer.lora_B.shape, generator=generator))
    if head:
        drawn = torch.randn(1, tiny.D, generator=generator)
        heads.attach(net, head).weight.data.copy_(10 * noise * drawn)
    if parallel.size() > 1:
        parallel.shard(net, "cpu")
    return net


def steps(net, units, count, rate, optimizer=torch.optim.AdamW, **changes):
    """The metrics of each step, then the adapters."""
    setup, trained = test_train.settings(**changes), test_train.trained(net)
    optimizer = optimizer(trained, lr=rate)
    said = [train.train_step(net, optimizer, units, setup, rate) for _ in range(count)]
    return {"metrics": said, "weights": parameters_to_vector(trained).tolist()}


def losses():
    """One step of every loss, in float64: the gradient. In many processes of four of them."""
    names = train.LOSSES if parallel.size() < 4 else ("uft", "dpo", "kto", "ppo")
    return {loss: steps(policy(head=train.LOSSES[loss].head), test_train.units_of(loss), 1, 1.0,
                        torch.optim.SGD, loss=loss, micro_batch_tokens=24) for loss in names}


def refused(call):
    try:
        call()
    except (FloatingPointError, ValueError) as error:
        return str(error)


def broken():
    """A step whose last row has reward NaN: what is said, and whether the adapters moved."""
    net = policy()
    before = parameters_to_vector(test_train.trained(net)).tolist()
    said = refused(lambda: steps(net, [*ALIKE[:3], row(3, 3, 4, float("nan"))], 1, 1.0))
    return said, before == parameters_to_vector(test_train.trained(net)).tolist()


def sampled():
    """Eight greedy ids, by the cache."""
    net, ids, cache = policy(torch.float32), [5, 6, 7], None
    with torch.no_grad():
        for _ in range(8):
            hidden, cache = net.extend(torch.tensor([ids[-1:] if cache else ids]), cache)
            ids.append(net.logits(hidden[:, -1]).argmax().item())
    return ids


def weights():
    """Numbers of the frozen base in all, held here, and the most that were whole at one time."""
    net, whole = policy(torch.float32, num_hidden_layers=4), []
    base = [p for p in net.parameters() if not p.requires_grad]

    def count(*_):
        whole.append(sum(p.numel() for p in net.parameters()
                         if not p.requires_grad and not isinstance(p, DTensor)))
    for layer in net.model.layers:
        layer.mlp.register_forward_hook(count)
        layer.mlp.down_proj.lora_A.register_hook(count)
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in base)
    test_train.step(net, ALIKE, test_train.settings())
    return {"all": sum(p.numel() for p in base), "held": held, "whole": max(whole),
            "block": sum(p.numel() for p in net.model.layers[0].parameters()
                         if not p.requires_grad)}


def numbers():
    """Everything that ends well."""
    one = partial(steps, count=1, rate=1.0, optimizer=torch.optim.SGD)
    setup = test_train.settings()
    facts = {"arguments": "same", "data": str(parallel.rank() == 1)}
    return {
        **losses(),
        "curve": steps(policy(torch.float32), MIXED, 20, 0.01, micro_batch_tokens=16),
        **{str(dtype): steps(policy(dtype), ALIKE, 5, 0.01, micro_batch_tokens=14)
           for dtype in (torch.float64, torch.float32, torch.bfloat16)},
        "checkpointing": one(policy(), MIXED, gradient_checkpointing=True),
        "tied": one(policy(tie_word_embeddings=True), MIXED),
        "head": one(policy(targets=(*lora.TARGETS, "lm_head")), MIXED),
        "qwen": one(policy(model_type="qwen2"), MIXED),
        "uneven": one(policy(), UNEVEN, micro_batch_tokens=10),
        "start": [update.self_check(policy(dtype, 0.0), MIXED, setup)
                  for dtype in (torch.float32, torch.bfloat16)],
        "sampled": sampled(), "broken": broken(), "weights": weights(),
        "agree": refused(lambda: parallel.agree(facts, "cpu"))}


def fault(kind):
    """Steps for ever; in the third, rank 1 does what `kind` says."""
    net, setup = policy(torch.float32), test_train.settings()
    optimizer = torch.optim.AdamW(test_train.trained(net))
    for step in range(100000):
        if step == 2 and parallel.rank() == 1:
            Path(f"{kind}.json").write_text(json.dumps(time.monotonic()), "utf-8")
            if kind == "fail":
                raise ValueError("no room")
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        try:
            train.train_step(net, optimizer, ALIKE, setup, 0.0)
        except RuntimeError as error:
            raise stops.told(error, f"at step {step + 1}", TIMEOUT) from None


def work(job, world):
    """One process: `numbers`, a fault, or for a job run... the command by the flags in its file."""
    if job.startswith("run"):
        flags = json.loads(Path(f"{job}.json").read_text("utf-8"))
        return train.main([*flags, "--timeout", "60", "--out", f"{job}{world}"])
    try:
        Path(f"{job}.json").write_text(json.dumps(time.monotonic()), "utf-8")
        parallel.start(test_train.settings(**RULES, timeout=30.0 if job == "numbers" else TIMEOUT))
        return numbers() if job == "numbers" else fault(job)
    except ValueError as error:
        return stops.fail(str(stops.told(error, "twice", TIMEOUT)), 2)


def child(name, job, world, rank, port):
    """Runs in a fork: never returns."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT, 0o600), stream)
    code = 1
    try:
        found = work(job, world)
        Path(f"{name}.json").write_text(json.dumps(found), "utf-8")
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception:  # noqa: BLE001  (whatever it is, it is told)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(folder, *jobs):
    os.chdir(folder)
    running, ends, held = {}, {}, []
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports more, before the forks too
    for job, world in zip(jobs[::2], map(int, jobs[1::2]), strict=True):
        free = socket.create_server(("127.0.0.1", 0))
        port = free.getsockname()[1]
        held.append(free) if job == "port" else free.close()
        for rank in range(1 if job in ("alone", "port") else world):
            name = f"{job}-{world}-{rank}"
            if not (pid := os.fork()):
                child(name, job, world, rank, port)
            running[pid] = name
    limit = time.monotonic() + 200
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ends[running.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
        for pid, name in running.items():
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
            elif name == "stop-2-1" and "stop-2-0" in ends:
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    Path("ends.json").write_text(json.dumps(ends), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
