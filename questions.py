"""Tests with a right answer: read them, ask a policy, say what a run has gained.

A question is answered or chosen. Answered: the WHOLE greedy answer must match a regular expression.
Chosen: the policy weighs given answers by their log-probability, as in TruthfulQA. A file holds
one kind, a row each: prompt + pattern; question + mc1_targets + mc2_targets; or TruthfulQA.csv's.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bounds
import data
import generate
import model
import records
import tokens
from strict import show

BATCH = 256  # prompts answered at a time
BUDGET = 8192  # tokens of choices weighed at a time
EXPECTED = ("A question has the columns prompt and pattern, or question, mc1_targets and "
            "mc2_targets, or those of TruthfulQA.csv")


@dataclass(frozen=True)
class Question:
    """A prompt with a pattern that the whole answer must match, or with choices to weigh."""

    prompt: data.Messages
    pattern: str = ""
    mc1: tuple = ()  # (choices, labels): a label is 1 where the choice is right, else 0
    mc2: tuple = ()


def is_questions(path: Path) -> bool:
    """Whether a file holds questions, as a feedback file does not."""
    first = next(records.rows(path), ("", {}))[1]
    return path.suffix == ".csv" or not first.keys().isdisjoint({"pattern", "mc1_targets"})


def hub_form(row: dict) -> dict:
    """A row of TruthfulQA.csv with the hub's columns: the best, or all true answers, and false."""
    best, true, false = ([a.strip() for a in row[k].split(";") if a.strip()]
                         for k in ("Best Answer", "Correct Answers", "Incorrect Answers"))
    true = best + [a for a in true if a not in best]
    return {"question": row["Question"]} | {
        name: {"choices": right + false, "labels": [1] * len(right) + [0] * len(false)}
        for name, right in (("mc1_targets", best), ("mc2_targets", true))}


def parse(row: dict) -> Question:
    """The question of a row; further columns are ignored."""
    if "pattern" in row:
        re.compile(data.text(row["pattern"], "pattern"))
        out = Question(data.turns(row["prompt"], "user", "prompt"), row["pattern"])
    else:
        row = hub_form(row) if "Best Answer" in row else row
        sets = [choices(row[name], name) for name in ("mc1_targets", "mc2_targets")]
        out = Question(data.turns(row["question"], "user", "question"), "", *sets)
    if not (out.prompt and out.prompt[-1][1].strip() and (out.pattern or out.mc1)):
        raise ValueError("an empty prompt or pattern")
    return out


def choices(value: object, name: str) -> tuple[tuple, tuple]:
    """(choices, labels) of {"choices": [...], "labels": [...]}.   ValueError names what is odd."""
    if not isinstance(value, dict) or not {"choices", "labels"} <= value.keys():
        raise ValueError(f"{name} must hold choices and labels, found {show(value)}")
    text, labels = (data.listed(value[part], f"{name}'s {part}") for part in ("choices", "labels"))
    if len(text) != len(labels) or any(n not in (0, 1) for n in labels) or len(set(labels)) < 2:
        raise ValueError(f"{len(text)} choices have the labels {show(labels)}: expected 0 or 1 "
                         "for each, and both of them")
    if not all(data.text(c, "a choice").strip() for c in text):
        raise ValueError(f"{name}: a choice is empty")
    return tuple(text), tuple(labels)


def read(path: str | Path) -> list[Question]:
    """The questions of a file, all of one kind.   ValueError names file and line."""
    out = []
    for where, row in records.rows(Path(path)):
        try:
            out.append(parse(row))
        except (KeyError, ValueError, re.error, OverflowError, RecursionError) as error:
            what = "no column " if isinstance(error, KeyError) else "" if isinstance(
                error, ValueError) else "the pattern is no regular expression: "
            raise ValueError(f"{where}: {what}{error}. {EXPECTED}") from None
        if bool(out[-1].pattern) != bool(out[0].pattern):
            raise ValueError(f"{where}: patterns and choices in one file: make two files of it")
    if not out:
        raise ValueError(f"{path} holds no question")
    return out


def ask(
    net: model.Transformer, chat: tokens.Chat, questions: Sequence[Question],
    max_new_tokens: int = 48, normalise: bool = False,
) -> tuple[dict[str, list[float]], list[str]]:
    """(scores by question, answers): "correct" and the texts; or "mc1" and "mc2", and no text.

    An answer cut at max_new_tokens is judged as it is; normalise weighs choices by mean log-probs.
    """
    if questions[0].pattern:
        texts = answer(net, chat, questions, max_new_tokens)
        try:
            with bounds.deadline(1):  # seconds: a repeated repeat may need ages
                right = [re.fullmatch(q.pattern, text, re.DOTALL) is not None
                         for q, text in zip(questions, texts, strict=True)]
        except TimeoutError as error:
            raise ValueError(f"patterns: {error}; repeat nothing that repeats itself") from None
        return {"correct": [float(r) for r in right]}, texts
    logps = weigh(net, chat, questions, normalise)
    return {name: [multiple_choice(of, *getattr(q, name))[place]
                   for of, q in zip(logps, questions, strict=True)]
            for place, name in enumerate(("mc1", "mc2"))}, []


def answer(net: model.Transformer, chat: tokens.Chat, questions: Sequence[Question],
           max_new_tokens: int) -> list[str]:
    """The greedy answer to every question, BATCH prompts of about one length at a time."""
    order = sorted(range(len(questions)), key=lambda i: len(chat.prompt_ids(questions[i].prompt)))
    out = {}
    for start in range(0, len(order), BATCH):
        prompts = [questions[i].prompt for i in order[start : start + BATCH]]
        texts = generate.complete(net, chat, prompts, max_new_tokens)
        out |= zip(order[start : start + BATCH], texts, strict=True)
    return [out[i] for i in range(len(questions))]


@torch.no_grad()
def weigh(net: model.Transformer, chat: tokens.Chat, questions: Sequence[Question],
          normalise: bool) -> list[dict[str, float]]:
    """{choice: its log-prob as a response, or the mean over its tokens} of every question."""
    training, out = net.training, [{} for _ in questions]
    asked = [(i, c) for i, q in enumerate(questions) for c in dict.fromkeys(q.mc1[0] + q.mc2[0])]
    encoded = [tokens.encode(data.Example(questions[i].prompt, c, 1.0, "sft", str(n)), chat, 10**9)
               for n, (i, c) in enumerate(asked)]
    net.eval()
    for group in tokens.micro_batches([[e] for e in encoded], BUDGET):
        batch = tokens.collate([e for e, in group])
        if batch.ids.shape[1] > net.config.max_position_embeddings:
            raise ValueError(f"a choice needs {batch.ids.shape[1]} tokens, beyond the context")
        logps, mask = net.response_logps(batch.ids, batch.response_mask)
        totals = logps.sum(-1) / (mask.sum(-1) if normalise else 1)
        if not totals.isfinite().all():
            raise ValueError("the log-prob of a choice is not finite: weights or adapter damaged")
        for (e,), total in zip(group, totals.tolist(), strict=True):
            i, choice = asked[int(e.where)]
            out[i][choice] = total
    net.train(training)
    return out


def multiple_choice(logps: dict[str, float], choices: Sequence[str],
                    labels: Sequence[int]) -> tuple[float, float]:
    """(mc1, mc2) of one question from the log-probs of its choices.   TruthfulQA 2.3

    mc1: is the likeliest choice right? mc2: probability of the right choices among all.
    """
    weighed = torch.tensor([logps[c] for c in choices], dtype=torch.float64)
    right = torch.tensor(labels).bool()
    return float(right[weighed.argmax()]), weighed.softmax(-1)[right].sum().item()


def gain(before: Sequence[float], after: Sequence[float]) -> dict:
    """Means of the same questions before and after, and the change with its 95% interval:
    change +- 1.96 sd / sqrt(n), sd (over n - 1) of the n paired changes; None for one question."""
    n, changes = len(before), [b - a for a, b in zip(before, after, strict=True)]
    change = sum(changes) / n
    error = (sum((c - change) ** 2 for c in changes) / max(1, n - 1) / n) ** 0.5
    return {"before": sum(before) / n, "after": sum(after) / n, "change": change,
            "interval": [change - 1.96 * error, change + 1.96 * error] if n > 1 else None, "n": n}
