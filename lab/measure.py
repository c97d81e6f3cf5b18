"""What a policy of the small world can do, and how far it is from the base, as plain numbers.

    form       constraints kept (the answer is judged whole); form_demonstrations, form_feedback and
               form_mixed by what taught the constraints
    content    form, and the answer is right
    truth      contaminated facts of held-out entities answered truly; mc2 the same by probability
    sums, skills, facts   right answers; skills and facts are plain text
    kl_policy  KL(policy||base) of an answer, in nats: what the policy says that the base would not
    kl_base    KL(base||policy) of an answer: what the base says that the policy would not
    kl_text    KL(base||policy) per token of held-out pretraining text
    length     tokens of a sampled answer, its end included; ended: share that end within ANSWER
    nll        of held-out demonstrations, in nats a row; pairs: held-out pairs in score order
Both KLs are exact over the next token, along answers sampled from their first policy, one to each
of SAMPLES prompts, cut at ANSWER tokens: another draw moves kl_policy by 0.15 nats and length by
0.45 tokens (standard deviations; the records were drawn before sampling was made faster). Shares
are between 0 and 1. Answers are greedy unless said to be sampled.
"""
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import data
import generate
import model
import questions
import scoring
import tokens
from lab import pretrain, world

BASE = Path(__file__).parent / "base"
LENGTH, ANSWER, SAMPLES = 96, 40, 120  # tokens of a row, of an answer; prompts sampled from
SELECT = ("form", "content", "truth", "mc2", "sums", "skills")  # their mean chooses settings


@functools.cache
def chat(template: str = "checkpoint") -> tokens.Chat:
    return tokens.Chat(BASE, template)


@functools.cache
def base() -> model.Transformer:
    return model.load(BASE, torch.float32)


def encoded(rows: Iterable[dict]) -> list[tokens.Encoded]:
    """Rows of a file as train.py would read them."""
    examples = [e for i, r in enumerate(rows) for e in data.parse(r, f"row {i + 1}", (0, 1))[1]]
    return tokens.encode_all(examples, chat(), LENGTH)[0]


@functools.cache
def asked(split: str, name: str) -> list[questions.Question]:
    """The questions of one test."""
    return [questions.parse(row) for row in world.tests(world.build(0), split)[name]]


@functools.cache
def held_out(split: str) -> tuple[list[tokens.Encoded], list[tokens.Encoded]]:
    """(demonstrations, scored answers two by two) on prompts of the split."""
    here = world.build(0)
    return (encoded(world.demonstrations(here, 0, 200, split)),
            encoded(world.feedback(here, 0, 200, split)))


@functools.cache
def text() -> list[tokens.Encoded]:
    """Held-out pretraining text, every token scored."""
    batch = next(pretrain.packed(world.corpus(world.build(0), 999), chat().tokenizer))
    return [tokens.Encoded(ids, 1, 1.0, "sft", "", ()) for ids in batch.tolist()]


def sampled(net: model.Transformer, split: str) -> tuple[list[tokens.Encoded], float, float]:
    """(sampled answers as rows, their mean length, share that end within ANSWER tokens)."""
    generator, stop = torch.Generator().manual_seed(0), chat().stop_ids
    given = [chat().prompt_ids(q.prompt) for q in asked(split, "instructions")[:SAMPLES]]
    said = generate.sample(net, given, ANSWER, stop, 1.0, 1.0, generator)
    rows = [tokens.Encoded(p + s, len(p), 1.0, "sft", "", ())
            for p, s in zip(given, said, strict=True)]
    return rows, sum(map(len, said)) / len(said), sum(s[-1] in stop for s in said) / len(said)


@functools.cache
def base_sampled(split: str) -> list[tokens.Encoded]:
    return sampled(base(), split)[0]


@torch.no_grad()
def next_token_kl(p: model.Transformer, q: model.Transformer, rows: list) -> Tensor:
    """KL(p||q) over the next token, summed over the response positions of each row, (B,)."""
    batch = tokens.collate(rows)
    logp, logq = (n.logits(n(batch.ids))[:, :-1].log_softmax(-1) for n in (p, q))
    kl_BT = (logp.exp() * (logp - logq)).sum(-1)
    return (kl_BT * batch.response_mask[:, 1:]).sum(-1)


@torch.no_grad()
def logps(net: model.Transformer, rows: list[tokens.Encoded]) -> Tensor:
    return scoring.score(net, tokens.collate(rows), reference=False).logps


@functools.cache
def base_logps(split: str) -> Tensor:
    return logps(base(), held_out(split)[1])


def pair_accuracy(net: model.Transformer, split: str) -> float:
    """Share of held-out pairs whose log-ratios to the base are in the order of their scores."""
    scored = held_out(split)[1]
    gained = logps(net, scored) - base_logps(split)
    rewards = torch.tensor([e.reward for e in scored])
    ours, theirs = ((x[0::2] - x[1::2]).sign() for x in (gained, rewards))
    return ((ours * theirs)[theirs != 0] + 1).mean().item() / 2


def instruction_scores(net: model.Transformer, split: str) -> dict[str, float]:
    """form, form by what taught the constraints, content."""
    scores, said = questions.ask(net, chat(), asked(split, "instructions"), ANSWER)
    rows, kept = world.instruction_tests(world.build(0), split, 240), scores["correct"]
    taught = [next((name for name, kinds in world.TAUGHT.items()
                    if {*r["constraints"]} <= {*kinds}), "mixed") for r in rows]
    out = {"form": kept, "content": [
        bool(re.fullmatch(r["content"], s)) for r, s in zip(rows, said, strict=True)]}
    for name in (*world.TAUGHT, "mixed"):
        out[f"form_{name}"] = [k for k, t in zip(kept, taught, strict=True) if t == name]
    return {name: sum(x) / len(x) for name, x in out.items()}


def measure(net: model.Transformer, split: str) -> dict[str, float]:
    """Every number of a policy on a split; the file's opening says what each is."""
    out = instruction_scores(net, split)
    for name in ("truth", "sums", "skills", "facts"):
        how = chat("plain" if name in ("skills", "facts") else "checkpoint")
        found = questions.ask(net, how, asked(split, name), 12)[0]["correct"]
        out[name] = sum(found) / len(found)
    found = questions.ask(net, chat(), asked(split, "truth_choices"))[0]["mc2"]
    out["mc2"] = sum(found) / len(found)
    rows, out["length"], out["ended"] = sampled(net, split)
    out["kl_policy"] = next_token_kl(net, base(), rows).mean().item()
    out["kl_base"] = next_token_kl(base(), net, base_sampled(split)).mean().item()
    out["kl_text"] = next_token_kl(base(), net, text()).mean().item() / (pretrain.ROW - 1)
    out["nll"] = -logps(net, held_out(split)[0]).mean().item()
    out["pairs"] = pair_accuracy(net, split)
    out["select"] = sum(out[name] for name in SELECT) / len(SELECT)
    return out
