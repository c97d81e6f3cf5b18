"""What a run did to its held-out rows, one by one: "rows" of results.json, which its page draws.

Letters: B rows, T tokens.
"""
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import data
import losses
import model
import scoring
import tokens
import update
from config import Config
from objectives import LOSSES, weights

ROWS, POSITIONS = 400, 256  # looked at, at most


def short(values: Tensor) -> list:
    """Six digits of every number, which is more than a page shows."""
    return [short(v) if v.ndim else float(f"{v:.6g}") for v in values]


@torch.no_grad()
def rows(net: model.Transformer, units: Sequence[Sequence[tokens.Encoded]], config: Config) -> dict:
    """Of the held-out rows that the loss can read, as it reads them:
    kind, reward, implicit_reward, length and weight = |dL/dlogps|, a list each;
    positions, see below; reference_loss, the reference's own, where objectives.py has no formula.

    weight is left out of a loss that reads single tokens. {} where rows are sampled, or a reward
    model scores them: nothing of this can be said then.
    """
    objective, training = LOSSES[config.loss], net.training
    units, _ = data.units([e for unit in units for e in unit], objective.reads)
    if not units or objective.online or objective.head == "score":
        return {}
    net.eval()
    units = units[: max(1, ROWS // len(units[0]))]
    z0, units = update.reference_point(net, units, config)
    every = [e for unit in units for e in unit]
    lengths = [len(e.ids) - e.prompt_len for e in every]
    changes, found, start = [], [], 0.0
    for group in tokens.micro_batches(units, config.micro_batch_tokens):
        batch = tokens.collate([e for unit in group for e in unit])
        refs = scoring.reference_logps(net, batch)
        terms = update.read(net, replace(batch, ref_logps=refs.sum(-1)), config, z0,
                            sum(lengths) / len(lengths))
        changes += [c[m] for c, m in zip((terms.token_logps - refs).cpu(), terms.mask.cpu(),
                                         strict=True)]
        found.append(torch.stack((losses.implicit_reward(terms.logps, refs.sum(-1), config.beta),
                                  weights(objective, terms))).cpu())
        start += objective.loss(terms._replace(logps=refs.sum(-1), token_logps=refs)).sum().item()
    net.train(training)
    u, weight = torch.cat(found, 1)
    out = {"kind": [e.kind for e in every], "reward": [e.reward for e in every],
           "implicit_reward": short(u), "length": lengths}
    out |= {} if weight.isnan().any() else {"weight": short(weight)}
    out |= {} if objective.start else {"reference_loss": start / len(units)}
    return out | {"positions": positions(changes, out["kind"])}


def positions(changes: Sequence[Tensor], kinds: Sequence[str]) -> dict[str, list]:
    """{kind: [[mean, p10, p90] of the log-prob change of the first, second, ... response token]},
    as far as a fifth of its rows reach, and two."""
    out = {}
    for kind in sorted(set(kinds)):
        some = [c for c, k in zip(changes, kinds, strict=True) if k == kind]
        out[kind] = []
        for place in range(min(POSITIONS, max(map(len, some)))):
            here = torch.stack([c[place] for c in some if len(c) > place])
            if len(here) < max(2, len(some) / 5):
                break
            out[kind].append(short(torch.stack(
                (here.mean(), here.quantile(0.1), here.quantile(0.9)))))
    return out
