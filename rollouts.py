"""On-policy data: prompts are answered by the policy itself, judged, and handed on as rows.

    units of prompts -> G responses each -> rewards -> log-probs of policy and reference ->
    advantages -> units of one Encoded row, as mixture.py gives them for data from a file

What follows is what every offline loss does too. Tokens are drawn from softmax(logits /
temperature), and log-probs, the reference's as well, are those of that very distribution. The draws
are a function of seed and step. Several processes all sample the same.
Letters: P prompts, G responses to each, B = P G rows, T tokens.
"""
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import generate
import model
import parallel
import policy_gradients
import scoring
import tokens
from config import Config
from rewards import Reward


def seeded(config: Config, step: int, what: str) -> torch.Generator:
    """A generator of its own for every step and purpose."""
    draw = random.Random(f"{config.seed} {step} {what}")
    return torch.Generator().manual_seed(draw.getrandbits(48))


def hints(asked: Sequence[tokens.Encoded], config: Config, step: int) -> list[list[int]]:
    """The beginning of each solution that is given away, empty but for uft_hint."""
    if config.loss != "uft_hint":
        return [[] for _ in asked]
    share = policy_gradients.hint_probability(step, config.hint_low, config.hint_high,
                                              config.hint_steps)
    generator, solutions = seeded(config, step, "hints"), [r.ids[r.prompt_len:] for r in asked]
    return [s[:policy_gradients.hint_length(len(s), config.hint_parts, share, generator)]
            for s in solutions]


def respond(net: model.Transformer, chat: tokens.Chat, asked: Sequence[tokens.Encoded],
            given: Sequence[list[int]], config: Config, step: int) -> list[list[int]]:
    """G responses to each prompt, hint included; none is added where the hint ends the answer."""
    ended = [hint[-1:] == row.ids[-1:] and len(row.ids) == row.prompt_len + len(hint)
             for row, hint in zip(asked, given, strict=True)]
    prompts = [row.ids[:row.prompt_len] + hint
               for row, hint, end in zip(asked, given, ended, strict=True) if not end]
    drawn = iter(generate.sample(
        net, prompts, config.response_tokens, chat.stop_ids, config.temperature, 1.0,
        seeded(config, step, "draws"), config.group))
    return [hint + ([] if end else next(drawn)) for hint, end in zip(given, ended, strict=True)
            for _ in range(config.group)]


def collect(net: model.Transformer, chat: tokens.Chat, asked: Sequence[tokens.Encoded],
            reward: Reward, config: Config, step: int) -> list[tuple[tokens.Encoded]]:
    """One step's units: a row for each response and, for uniapl, one for each demonstration.

    ValueError for a reward outside [0, 1] where the loss squashes r_theta.
    """
    given = hints(asked, config, step)
    said = respond(net, chat, asked, given, config, step)
    many = [pair for pair in zip(asked, given, strict=True) for _ in range(config.group)]
    texts = [chat.answer(row.ids[:row.prompt_len], ids)
             for (row, _), ids in zip(many, said, strict=True)]
    earned = reward([row.prompt for row, _ in many], texts, [row.answer for row, _ in many])
    if parallel.size() > 1:  # a user's function may tell each process something else
        first = torch.tensor(earned, device=config.device) * (parallel.rank() == 0)
        earned = parallel.together(first).tolist()
    if config.loss == "una_online" and config.una_target == "score" and not all(
            0 <= r <= 1 for r in earned):
        raise ValueError(f"--reward {config.reward} gives {min(earned):g} to {max(earned):g}, but "
                         "una_online wants 0 to 1: give --una_target reward")
    rows = [replace(row, ids=row.ids[:row.prompt_len] + ids, reward=r, kind="sampled",
                    ref_logps=None) for (row, _), ids, r in zip(many, said, earned, strict=True)]
    taught = list(asked) if config.loss == "uniapl" else []
    found = credited(net, [*rows, *taught], [len(hint) for _, hint in many], config)
    return [(row,) for row in found]


@torch.no_grad()
def credited(net: model.Transformer, rows: list[tokens.Encoded], hinted: list[int],
             config: Config) -> list[tokens.Encoded]:
    """The rows with log-probs under policy and reference, and, if sampled, with advantages.

    hinted: how many tokens of a response were a hint, for the sampled rows, which come first.
    """
    training, count = net.training, len(hinted)
    net.eval()
    batches = [tokens.collate([e for e, in group]) for group in tokens.micro_batches(
        [(row,) for row in rows], config.micro_batch_tokens)]
    parts = [scoring.score(net, b, False, False, config.temperature) for b in batches]
    refs = [scoring.reference_logps(net, b, config.temperature) for b in batches]
    net.train(training)
    old, ref, mask = (stack(x) for x in ([s.token_logps for s in parts], refs,
                                         [s.mask for s in parts]))
    said = torch.zeros_like(old) if parts[0].heads is None else stack([s.heads for s in parts])
    values = said if said.ndim == 2 else torch.zeros_like(old)
    starts = torch.tensor([[row.prompt_len] for row in rows[:count]])
    hint = mask[:count] & (torch.arange(mask.shape[1]) < starts + torch.tensor(hinted)[:, None])
    earned = torch.tensor([row.reward for row in rows[:count]])
    if config.loss == "uniapl":
        earned = earned + config.discriminator_weight * said[:count]
    advantages, returns = credit(earned, old[:count], ref[:count], values[:count],
                                 mask[:count] & ~hint, config)
    tables = torch.stack((old[:count], ref[:count], advantages, values[:count], returns, hint))
    anchored = config.loss == "una_online" and config.anchor == "old"
    sums = torch.cat([s.logps if anchored else r.sum(-1)
                      for s, r in zip(parts, refs, strict=True)]).tolist()
    return [replace(row, ref_logps=sums[i], sampled=tokens.Sampled(
        *tables[:, i, mask[i]].tolist()) if i < count else None) for i, row in enumerate(rows)]


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Batches one behind the other on the CPU, padded on the right to one width."""
    width = max(x.shape[-1] for x in parts)
    return torch.cat([F.pad(x, (0, width - x.shape[-1])) if x.ndim == 2 else x
                      for x in parts]).cpu()


def credit(earned_B: Tensor, old: Tensor, ref: Tensor, values: Tensor, mask: Tensor,
           config: Config) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T), of responses that earned `earned_B`.

    RLOO and PPO take beta KL(pi || pi_ref), estimated by k1, off the reward; the GRPO family has it
    in the loss. una_online needs no advantages: its loss compares the reward itself.
    """
    k1, nothing = policy_gradients.kl(old, ref, "k1") * mask, torch.zeros_like(old)
    if config.loss == "una_online":
        return nothing, nothing
    if config.loss == "ppo":
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rewards = -config.beta * k1 + F.one_hot(last, mask.shape[1]) * earned_B[:, None]
        advantages, returns = policy_gradients.gae(rewards, values, mask, config.ppo_gamma,
                                                   config.ppo_lam)
        return policy_gradients.whiten(advantages, mask), returns
    if config.loss == "rloo":
        earned_PG = (earned_B - config.beta * k1.sum(-1)).view(-1, config.group)
        advantages = policy_gradients.rloo_advantages(earned_PG)
    else:
        earned_PG = earned_B.view(-1, config.group)
        advantages = policy_gradients.grpo_advantages(earned_PG, config.grpo_scale)
    return advantages.view(-1, 1) * mask, nothing


def through(net: model.Transformer, chat: tokens.Chat, batches: Iterator[tuple], reward: Reward,
            config: Config, step: int) -> Iterator[tuple]:
    """mixture.stream's (units of prompts, place) as (units of sampled rows, place), from `step`
    on. Each is sampled when it is asked for, from the policy as it is then."""
    for number, (units, place) in enumerate(batches, step):
        yield collect(net, chat, [unit[0] for unit in units], reward, config, number), place


def measure(rows: Sequence[tokens.Encoded], group: int) -> dict[str, float]:
    """Numbers of sampled rows, {} where there are none; TRL's names where they exist.

    reward, of responses with a drawn token; reward_std, within a prompt; kl, k1 from the reference
    in nats a response; tokens of a response; hints left out, hint/share is theirs of all tokens.
    Of the policy that sampled them, before the step's updates.
    """
    if not (rows := [row for row in rows if row.sampled]):
        return {}
    earned, given = torch.tensor([row.reward for row in rows]), [r.sampled.given for r in rows]
    own = [row.reward for row, hint in zip(rows, given, strict=True) if not all(hint)]
    share = sum(map(sum, given)) / sum(map(len, given))
    k1 = [old - ref for row in rows for old, ref, *_, given in zip(*row.sampled, strict=True)
          if not given]
    spread = {"reward_std": earned.view(-1, group).std(1).mean().item()} if group > 1 else {}
    spread |= {"hint/share": share} if share else {}
    return spread | {"reward": sum(own) / len(own) if own else math.nan, "kl": sum(k1) / len(rows),
                     "completions/mean_length": len(k1) / len(rows)}


def held_out(net: model.Transformer, chat: tokens.Chat, units: Sequence, reward: Reward,
             config: Config) -> dict[str, float]:
    """`measure` of one response to each held-out prompt, without hints, always of one seed; as many
    at a time as a step samples, which takes as much memory."""
    alone = replace(config, group=1, loss="una_online", una_target="reward", anchor="ref", beta=1.0)
    asked, many = [unit[0] for unit in units], config.batch_size * config.group
    parts = [collect(net, chat, asked[i : i + many], reward, alone, i)
             for i in range(0, len(asked), many)]
    return measure([row for part in parts for row, in part], 1)
