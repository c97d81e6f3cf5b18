"""Rewards of the small world that a rule decides, for --reward lab.verifier:NAME.

    form      1 where the answer keeps every constraint of its prompt, else 0
    content   1 where it is also right, else 0: sparse, the base earns it seldom
    graded    the mean of the two
`answer` is that of lab/data/prompts.jsonl: a pattern for each on a line of its own.
"""
import re


def kept(response: str, answer: str) -> list[float]:
    """[form, content] of a response.   ValueError where the record holds no two patterns."""
    if len(patterns := answer.split("\n")) != 2:
        raise ValueError("answer is not two lines of patterns, as in lab/data/prompts.jsonl")
    return [float(re.fullmatch(pattern, response) is not None) for pattern in patterns]


def form(_: str, response: str, answer: str) -> float:
    return kept(response, answer)[0]


def content(_: str, response: str, answer: str) -> float:
    return kept(response, answer)[1]


def graded(_: str, response: str, answer: str) -> float:
    return sum(kept(response, answer)) / 2
