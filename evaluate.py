"""Measuring: numbers of a batch, of held-out rows, and the evaluation command.

Letters: B rows, T tokens.
    python evaluate.py --model DIR [--adapter DIR] --data FILE [--data FILE]
"""
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
import losses
import model
import questions
import scoring
import tokens
from command import Parser, check, low_high, number, stop, whole
from config import check_device, is_range


def measure(
    logps: Tensor, ref_logps: Tensor | None, rewards: Tensor, kinds: Sequence[str],
    pairs: Sequence[int], beta: float,
) -> dict[str, float]:
    """Means over rows, TRL's names where they exist; `pairs` are the first rows of pairs.

    rewards/* is the implicit reward, dlogp/* the log-prob change from the reference in nats, both
    per kind; target/mean the explicit reward, score_mse (sigmoid(r_theta) - r)^2 over rows that are
    no demonstrations. A pair is accurate when implicit and explicit rewards agree; a tie is half.
    """
    of = {k: torch.tensor([kind == k for kind in kinds]) for k in sorted(set(kinds))}
    out = {f"logps/{k}": logps[rows].mean().item() for k, rows in of.items()}
    out["target/mean"] = rewards.mean().item()
    if ref_logps is None:
        return out
    out |= {f"dlogp/{k}": (logps - ref_logps)[rows].mean().item() for k, rows in of.items()}
    if feedback := [i for i, kind in enumerate(kinds) if kind not in ("sft", "sampled")]:
        out["score_mse"] = losses.uft(logps, ref_logps, rewards, beta)[feedback].mean().item()
    u = losses.implicit_reward(logps, ref_logps, beta)
    return out | measure_rewards(u, rewards, kinds, pairs)


def measure_rewards(u: Tensor, rewards: Tensor, kinds: Sequence[str],
                    pairs: Sequence[int]) -> dict[str, float]:
    """The part of `measure` that asks for implicit rewards, or a reward model's scores, alone."""
    of = {k: torch.tensor([kind == k for kind in kinds]) for k in sorted(set(kinds))}
    out = {f"rewards/{k}": u[rows].mean().item() for k, rows in of.items()}
    out["rewards/mean"] = u.mean().item()
    first = torch.tensor([i for i in pairs if rewards[i] != rewards[i + 1]], dtype=torch.long)
    if len(first):
        margins = (u[first] - u[first + 1]) * (rewards[first] - rewards[first + 1]).sign()
        out["rewards/margins"] = margins.mean().item()
        out["rewards/accuracies"] = ((margins.sign() + 1) / 2).mean().item()
    return out


def measure_kinds(u: Tensor | None, weights: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Of every kind: rewards/KIND/p10 and p90, between which lie 8 in 10 implicit rewards (or
    scores) `u`; weight/KIND, the mean |dL/dlogps|, left out where the loss has none (NaN)."""
    out = {}
    for kind in sorted(set(kinds)):
        rows = torch.tensor([k == kind for k in kinds])
        for tenths in (1, 9) if u is not None else ():
            out[f"rewards/{kind}/p{tenths}0"] = u[rows].quantile(tenths / 10).item()
        if not (weight := weights[rows].mean()).isnan():
            out[f"weight/{kind}"] = weight.item()
    return out


def pair_starts(units: Sequence[Sequence]) -> list[int]:
    """Index of the first row of every two-row unit, rows counted across units."""
    places = [(place, len(unit)) for unit in units for place in range(len(unit))]
    return [row for row, place in enumerate(places) if place == (0, 2)]


def check_finite(logps: Tensor, rows: Sequence[tokens.Encoded]) -> None:
    """ValueError names the first row whose log-prob is no number: no mean may hold it."""
    if bad := (~logps.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"{rows[bad[0]].where}: the log-prob of this response is not finite (and "
                         f"of {len(bad) - 1} more): weights or adapter are damaged, or too large "
                         "for this --dtype")


@torch.no_grad()
def held_out(
    net: model.Transformer, units: Sequence[Sequence[tokens.Encoded]], beta: float, budget: int
) -> dict[str, float]:
    """`measure` over all rows, with uft_loss (Eq. 7), nll_per_token and two constant baselines.

    score_mse/mean is what the best constant would score on these rows, score_mse/half what 1/2
    would: a policy above the first has learned less than the mean. A reward model is measured by
    `measure_rewards`.
    """
    training, rows = net.training, [e for unit in units for e in unit]
    net.eval()
    batches = (tokens.collate([e for u in group for e in u])
               for group in tokens.micro_batches(units, budget))
    judged = hasattr(net, "score")
    parts = [[scoring.judge(net, batch)] if judged else scoring.score(net, batch, True)[:2]
             for batch in batches]
    net.train(training)
    logps, *others = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    check_finite(sum(others, logps), rows)
    rewards, kinds = torch.tensor([e.reward for e in rows]), [e.kind for e in rows]
    if judged:
        return measure_rewards(logps, rewards, kinds, pair_starts(units))
    ref_logps, = others
    out = measure(logps, ref_logps, rewards, kinds, pair_starts(units), beta)
    demo = torch.tensor([k in ("sft", "chosen") for k in kinds])
    count = torch.tensor([len(e.ids) - e.prompt_len for e in rows])
    out["uft_loss"] = losses.uft(logps, ref_logps, rewards, beta).mean().item()
    if demo.any():
        out["nll_per_token"] = -(logps[demo].sum() / count[demo].sum()).item()
    if len(given := rewards[[kind != "sft" for kind in kinds]]):
        out["score_mse/mean"] = given.var(correction=0).item()
        out["score_mse/half"] = (given - 0.5).square().mean().item()
    return out


def main(argv: list[str] | None = None) -> None:
    parser = Parser("evaluate.py", description="Numbers of a policy.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model folder or Hugging Face id")
    parser.add_argument("--adapter", help="PEFT adapter folder; the reference is the model itself")
    parser.add_argument("--data", action="append", required=True, help="feedback, or questions")
    parser.add_argument("--template", default="checkpoint")
    parser.add_argument("--beta", type=number, default=0.01, help="as the adapter was trained")
    parser.add_argument("--max_length", type=whole,
                        help="longer rows are dropped; default: the model's context, up to 2048")
    parser.add_argument("--micro_batch_tokens", type=whole, default=8192)
    parser.add_argument("--limit", type=whole, help="rows or questions read of each file")
    parser.add_argument("--max_new_tokens", type=whole, default=48, help="of one answer")
    parser.add_argument("--score_range", type=low_high, default=(0.0, 1.0),
                        help="LOW,HIGH of a `score` column")
    parser.add_argument("--normalise", action="store_true", help="mc1/mc2 by mean log-probs")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    args = parser.parse_args(argv)
    try:
        check(args, (
            ("a number above 0", lambda x: 0 < x < math.inf, "beta"),
            ("1 or more", lambda x: x is None or x >= 1, "micro_batch_tokens limit max_new_tokens"),
            ("2 or more", lambda x: x is None or x > 1, "max_length"),
            ("two numbers LOW,HIGH with LOW < HIGH", is_range, "score_range")))
        check_device(args.device)
        folder = model.resolve(args.model)
        chat = tokens.Chat(folder, args.template, args.adapter)
        net = model.load(folder, getattr(torch, args.dtype), args.device).eval()
        if args.adapter:
            lora.load(net, args.adapter)
        context = net.config.max_position_embeddings
        longest = args.max_length or min(2048, context)
        if longest > context:
            raise ValueError(f"--max_length {longest} is more than the model's context of {context}"
                             f" tokens (max_position_embeddings): give --max_length {context}")
        for path in map(Path, args.data):
            if asked := questions.is_questions(path):
                rows, dropped, lost = questions.read(path)[: args.limit], [], []
            else:
                examples, lost, _ = data.read(path, args.score_range)
                rows, dropped = tokens.encode_all(examples[: args.limit], chat, longest)
            print(f"{path}: {len(rows)} {'questions' if asked else 'rows'}, {len(dropped)} too "
                  f"long, {len(lost)} unusable; beta {args.beta:g}")
            if not rows:
                raise ValueError(f"{path} holds nothing of up to {longest} tokens")
            if asked:
                found = questions.ask(net, chat, rows, args.max_new_tokens, args.normalise)[0]
                out = {name: sum(values) / len(rows) for name, values in found.items()}
            else:
                out = held_out(net, data.grouped(rows), args.beta, args.micro_batch_tokens)
            note = {"correct": f" of {len(rows)} questions"}
            print("".join(f"  {name:<20} {value:.4f}{note.get(name, '')}\n"
                          for name, value in sorted(out.items())), flush=True)
    except (ValueError, OSError) as error:
        stop(parser.prog, error)
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
