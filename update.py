"""One optimizer step: forward, the loss per term, one division, backward, clip, AdamW.

Every loss is one line of objectives.py and every step is the same. Measure, then update: nothing is
changed before loss and gradient are known to be finite.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import lora
import losses
import model
import parallel
import reference
import scoring
import tokens
from config import Config
from objectives import LOSSES, Terms, weights


def reference_point(net: model.Transformer, units: list, config: Config) -> tuple[Tensor, list]:
    """KTO's z0 from mismatched rows of the whole step, no gradient; 0 for every other loss.

    Also the units: z0's reference pass is theirs as well, and runs each prompt once.
    """
    rows = [e for unit in units for e in unit]
    others = tokens.mismatch(rows) if config.loss == "kto" else []
    if not others:
        return torch.zeros((), device=next(net.parameters()).device), units
    filled = reference.fill(net, list(zip(rows, others, strict=True)), {},
                            config.micro_batch_tokens)
    groups = tokens.micro_batches([[other] for _, other in filled], config.micro_batch_tokens)
    with torch.no_grad():
        found = [scoring.score(net, tokens.collate([e for e, in group]), reference=True)
                 for group in groups]
    logps, ref_logps = (torch.cat([f[i] for f in found]) for i in (0, 1))
    return losses.kto_z0(logps, ref_logps), [(row,) for row, _ in filled]


def read(net: model.Transformer, batch: tokens.Batch, config: Config, z0: Tensor,
         tokens_per_row: float) -> Terms:
    """What the loss may read of a batch: policy, reference and head, or a reward model's scores."""
    objective, device = LOSSES[config.loss], next(net.parameters()).device
    if objective.head == "score":
        scores = scoring.judge(net, batch, config.gradient_checkpointing), *[None] * 4
    else:
        scores = scoring.score(net, batch, objective.reference, config.gradient_checkpointing,
                               config.temperature if objective.online else 1.0)
    sampled = batch.sampled and tokens.Sampled(*(x.to(device) for x in batch.sampled))
    return Terms(*scores, sampled, batch.rewards.to(device, non_blocking=True), batch.kinds, z0,
                 tokens_per_row, config)


def train_step(
    net: model.Transformer, optimizer: torch.optim.Optimizer, units: list, config: Config,
    rate: float,
) -> dict[str, float]:
    """One update of the adapters on `units`, and its metrics.

    The gradient is that of sum(loss of every unit) / len(units), however the units are cut into
    micro-batches, and of lora_l1's penalty. FloatingPointError before the update if loss or
    gradient is not finite.
    loss/start is what the same units cost the reference.
    """
    objective = LOSSES[config.loss]
    z0, units = reference_point(net, units, config)
    rows = [e for unit in units for e in unit]
    counts = [len(e.ids) - e.prompt_len - sum(e.sampled.given if e.sampled else ()) for e in rows]
    tokens_per_row = max(1, sum(counts)) / len(rows)  # without hints
    found, (groups, own, before) = [], parallel.turns(units, config.micro_batch_tokens)
    for number, group in enumerate(groups):
        batch = tokens.collate([e for unit in group for e in unit])
        terms = read(net, batch, config, z0, tokens_per_row)
        each = objective.loss(terms)
        (each.sum() * float(number < own) / len(units)).backward()
        each = F.pad(each, (0, len(batch.ids) - len(each)))  # pairs have half as many as rows
        kept = each, weights(objective, terms), *terms[:2]
        found.append(torch.stack([x for x in kept if x is not None]).detach())
    penalty = 0.0
    if config.lora_l1:  # every process has it whole, and their gradients are summed
        added = config.lora_l1 * lora.l1(net)
        (added / parallel.size()).backward()
        penalty = added.item()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if lost := [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]:
        raise FloatingPointError(f"{len(lost)} adapter tensors get no gradient, first {lost[0]}")
    parallel.sum_gradients(trained)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    each, weight, logps, *refs = parallel.together(torch.cat(found[:own], 1), before, len(rows))
    loss = each.sum().item() / len(units) + penalty
    if not math.isfinite(loss) or not norm.isfinite():
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        bad = [n for n, g in grads.items() if not g.isfinite().all()]
        if not bad and not norm.isfinite():  # finite numbers, whose squares are not
            bad = [max(grads, key=lambda n: grads[n].abs().max().item())]
        raise FloatingPointError(f"loss is {loss}, gradient norm {norm.item()}, first bad tensor "
                                 f"{bad[0] if bad else 'none'}, rows {[e.where for e in rows]}")
    torch.nn.utils.clip_grads_with_norm_(trained, config.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    about = (torch.tensor([e.reward for e in rows]), [e.kind for e in rows],
             evaluate.pair_starts(units))
    start = {"loss/start": torch.as_tensor(objective.start(about[0], config)).float().mean().item()
             } if objective.start else {}
    logps, refs, judged = logps.cpu(), refs[0].cpu() if refs else None, objective.head == "score"
    u = logps if judged or refs is None else losses.implicit_reward(logps, refs, config.beta)
    return {"loss": loss, "grad_norm": norm.item(), "learning_rate": rate} | start | (
        evaluate.measure_rewards(u, *about) if judged else
        evaluate.measure(logps, refs, *about, config.beta)) | (
        evaluate.measure_kinds(None if refs is None and not judged else u, weight.cpu(), about[1]))


@torch.no_grad()
def self_check(net: model.Transformer, units: list, config: Config) -> str:
    """Before the first update implicit reward or score is exactly 0, the loss its closed form.

    ValueError when not: then policy and reference differ for another reason than training.
    """
    objective, zero = LOSSES[config.loss], torch.zeros((), device=next(net.parameters()).device)
    group = tokens.micro_batches(units, config.micro_batch_tokens)[-1]
    batch = tokens.collate([e for unit in group for e in unit])
    terms = read(net, batch, config, zero, batch.response_mask.sum(-1).float().mean().item())
    what, u = "score" if objective.head == "score" else "implicit reward", terms.logps
    if what != "score":
        refs = terms.ref_logps if objective.reference else scoring.reference_logps(net, batch)
        u = losses.implicit_reward(u, refs if objective.reference else refs.sum(-1), config.beta)
    u, loss = u.abs().max().item(), objective.loss(terms).mean().item()
    said, wrong = f"{what} at step 0: {u:g} (expected 0)   loss {loss:.6f}", u != 0
    if objective.start:
        start = objective.start(terms.rewards, config)
        expected = torch.as_tensor(start).float().mean().item()
        said += f" (expected {expected:.6f})"
        wrong |= abs(loss - expected) > 1e-5 * max(1, abs(expected))
    if wrong:
        raise ValueError(f"self-check failed: {said}. Policy and reference differ before training")
    return said + "   ok"
