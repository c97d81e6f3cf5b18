"""What a run asks a policy before and after training: held-out rows, tests, and three samples."""
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import evaluate
import generate
import model
import questions
import rewards
import rollouts
import strict
import tokens
from config import Config


class Exam(NamedTuple):
    """What a policy is asked before and after training."""

    held: Sequence[Sequence[tokens.Encoded]]  # held-out units
    tests: dict[str, list[questions.Question]]  # by name
    prompts: Sequence[tuple]  # to show answers to, where no test has patterns
    reward: rewards.Reward | None  # what sampled responses earn, if the run samples
    config: Config


def read_tests(config: Config) -> dict[str, list[questions.Question]]:
    """The --test files by name: a file's up to its first dot, its path where two share that."""
    stems = [Path(p).name.split(".")[0] for p in config.test]
    out = {stem if stems.count(stem) == 1 else path: questions.read(path)
           for path, stem in zip(config.test, stems, strict=True)}
    if not config.sample_tokens and any(asked[0].pattern for asked in out.values()):
        raise ValueError("--test asks for answers, and --sample_tokens 0 leaves them no room: give "
                         "--sample_tokens 48, or the length of the longest answer")
    return out


def check_room(tests: dict[str, list[questions.Question]], chat: tokens.Chat, context: int) -> None:
    """ValueError where a question leaves no room for an answer, or a choice does not fit."""
    for name, asked in tests.items():
        for q in asked:
            ends = [len(chat.response_ids(c)) for part in q.mc1[:1] + q.mc2[:1] for c in part]
            if (length := len(chat.prompt_ids(q.prompt)) + max(ends, default=1)) > context:
                raise ValueError(f"--test {name}: {strict.show(q.prompt[-1][1])} needs {length} "
                                 f"tokens, the model has a context of {context}: leave it out")


def mean_tokens(chat: tokens.Chat, texts: Sequence[str]) -> float:
    return sum(len(chat.response_ids(text)) for text in texts) / len(texts)


def examine(net: model.Transformer, chat: tokens.Chat, exam: Exam) -> dict:
    """held_out: numbers; scores: {test and metric: one number per question}; shown: three samples
    (prompt, answer, right), of questions with patterns, taken from the tests in turn, if any;
    lengths: {test, or "samples": mean tokens of an answer, its end token included}."""
    scores, answered, lengths = {}, [], {}
    for name, asked in exam.tests.items():
        found, texts = questions.ask(net, chat, asked, exam.config.sample_tokens)
        scores |= {f"{name} {metric}": values for metric, values in found.items()}
        answered.append([(q.prompt, text, right > 0) for q, text, right in zip(
            asked, texts, found["correct"], strict=True)] if texts else [])
        lengths |= {name: mean_tokens(chat, texts)} if texts else {}
    shown = [s for turn in itertools.zip_longest(*answered) for s in turn if s][:3]
    if not shown:
        texts = generate.complete(net, chat, exam.prompts, exam.config.sample_tokens)
        shown = [(prompt, text, None) for prompt, text in zip(exam.prompts, texts, strict=True)]
        lengths |= {"samples": mean_tokens(chat, texts)} if texts else {}
    held = rollouts.held_out(net, chat, exam.held, exam.reward, exam.config) if (
        exam.held and exam.reward) else evaluate.held_out(
            net, exam.held, exam.config.beta, exam.config.micro_batch_tokens) if exam.held else {}
    return {"held_out": held, "scores": scores, "shown": shown, "lengths": lengths}


def compare(before: dict, after: dict) -> dict:
    """Two examinations side by side: held-out numbers, the gain in every test, the samples."""
    samples = [{"prompt": prompt[-1][1], "before": a, "after": b, "right_before": was,
                "right_after": now} for (prompt, a, was), (_, b, now)
               in zip(before["shown"], after["shown"], strict=True)]
    return {"held_out": {"before": before["held_out"], "after": after["held_out"]},
            "lengths": {"before": before["lengths"], "after": after["lengths"]},
            "tests": {name: questions.gain(before["scores"][name], scores)
                      for name, scores in after["scores"].items()}, "samples": samples}
