"""Several processes, one run: what differs when `torchrun` starts train.py more than once.

All make the same batches and each works on its slice. The frozen base is cut over them, block by
block, and gathered for each forward pass (FSDP2). Adapters are whole everywhere, their gradients
summed once a step: nothing else need know. Without torchrun nothing here does anything.
"""
import atexit
import hashlib
import os
import sys
import warnings
from datetime import timedelta
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

import model
import tokens
from config import Config

ROOT = ("response_logps", "response_values", "end_states", "extend", "logits")  # that run it all


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def start(config: Config) -> str:
    """Meets the processes that torchrun started, within config.timeout s; the device of this one.
    Only the first prints on. ValueError for what several processes cannot do."""
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return config.device
    if config.reference_cache or config.device not in ("cpu", "cuda") or config.batch_size < world:
        raise ValueError(f"--batch_size {config.batch_size}, --device {config.device}: {world} pro"
                         f"cesses need {world} or more, cpu or cuda, and no --reference_cache")
    if cuda := config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    wait = timedelta(seconds=config.timeout)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait)
    except RuntimeError as error:
        raise ValueError(f"{world} processes did not meet within {config.timeout:g} s: start all "
                         f"of them, on a port that is free ({error})") from None
    atexit.register(dist.destroy_process_group)
    sys.stdout = open(os.devnull, "w") if rank() else sys.stdout  # noqa: SIM115  (for good)
    return f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"


def agree(facts: dict[str, str], device: str) -> None:
    """ValueError, on every process, that names whose facts are unlike the first one's, by hash."""
    own = [list(hashlib.sha256(fact.encode()).digest()) for fact in facts.values()]
    own = torch.tensor(own, dtype=torch.uint8, device=device)
    every = together(own, 32 * rank(), 32 * size()).split(32, 1)
    if odd := [f"{what} of rank {r}" for r, seen in enumerate(every)
               for what, a, b in zip(facts, seen, every[0], strict=True) if not torch.equal(a, b)]:
        raise ValueError(f"unlike rank 0: {', '.join(odd)}; start all with one command and files")


def shard(net: model.Transformer, device: str) -> None:
    """Cuts each block, then embedding, norm and head; what stays goes to `device`, one by one."""
    from torch.distributed import fsdp  # slow to import
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where the mesh looks
    trained = {p for p in net.parameters() if p.requires_grad}
    for p in trained:  # adapters stay whole
        p.data = p.data.to(device)
    mesh = dist.init_device_mesh(device.split(":")[0], (size(),))
    for part in (*net.model.layers, net):
        fsdp.fully_shard(part, mesh=mesh, ignored_params=trained)
        for name in ROOT if part is net else ("packed",):
            fsdp.register_fsdp_forward_method(part, name)


def share(units: list, world: int) -> list[int]:
    """0, the ends of `world` slices, none empty, nearest to equal parts of tokens, len(units)."""
    ends, cuts = list(accumulate(sum(len(e.ids) for e in unit) for unit in units)), [0]
    for i in range(1, world):
        free = range(cuts[-1] + 1, len(units) - world + i + 1)
        cuts.append(min(free, key=lambda n: abs(ends[n - 1] * world - ends[-1] * i)))
    return [*cuts, len(units)]


def turns(units: list, budget: int) -> tuple[list, int, int]:
    """(this process's micro-batches, how many of them count, rows before its own). Forward passes
    are collective: who has fewer than another runs its first again, for nothing."""
    cuts = share(units, size())
    every = [tokens.micro_batches(units[a:b], budget) for a, b in pairwise(cuts)]
    own, most = every[rank()], max(map(len, every))
    return own + own[:1] * (most - len(own)), len(own), sum(map(len, units[:cuts[rank()]]))


def together(x: torch.Tensor, start: int = 0, total: int = 0) -> torch.Tensor:
    """The sum over the processes of x (..., n), at `start` of `total` places, the others zero."""
    if size() > 1:
        x = torch.nn.functional.pad(x, (start, max(0, total - start - x.shape[-1])))
        dist.all_reduce(x)
    return x


def sum_gradients(trained: list[torch.nn.Parameter]) -> None:
    if size() > 1:
        each = [p.grad for p in trained]
        torch.nn.utils.vector_to_parameters(together(torch.cat([g.flatten() for g in each])), each)


def largest(number: int, device: str) -> int:
    """The largest of the processes' numbers."""
    if size() > 1:
        number = torch.tensor(number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)
