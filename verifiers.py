"""Rewards that a rule decides: `exact`, or a function of the user's, MODULE:FUNCTION."""
import importlib
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real

import strict

RULE = "reward module "  # before its name among the inputs of a run: the one that may be mended
Rule = Callable[[str, str, str], float]  # of the last turn's text, a response, the answer


def final(text: str) -> str:
    """What follows the last ####, as in GSM8K, else the whole text; blanks around it and commas
    between thousands do not count."""
    said = text.rpartition("####")[2].strip()
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", said)


def exact(_: str, response: str, answer: str) -> float:
    if not answer.strip():
        raise ValueError("the record has no answer to compare with")
    return float(final(response) == final(answer))


def each(function: Rule, name: str) -> Callable[..., list[float]]:
    """A rewards.Reward that asks `function` about one response at a time.

    ValueError for no number, and for whatever the function raises, with its place.
    """
    def reward(prompts: Sequence, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One number each; a response is shown where its number is none."""
        out = []
        for prompt, response, answer in zip(prompts, responses, answers, strict=True):
            try:
                earned = function(prompt[-1][1], response, answer)
                finite = isinstance(earned, Real) and math.isfinite(earned)
            except Exception as error:  # a user's function may raise any
                at = traceback.extract_tb(error.__traceback__)[-1]
                raise ValueError(f"--reward {name} fails on the response {strict.show(response)}: "
                                 f"{error!r} ({at.filename}:{at.lineno})") from error
            if not finite:
                raise ValueError(f"--reward {name}: {strict.show(earned)} is what it gives the "
                                 f"response {strict.show(response)}, expected a finite number")
            out.append(float(earned))
        return out

    return reward


def found(name: str) -> Rule:
    """The rule of that name, imported if need be.   ValueError where there is none."""
    module, colon, function = name.rpartition(":")
    if name == "exact":
        return exact
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", module):
        raise ValueError(f"--reward: found {strict.show(name)}, expected exact, a folder, or "
                         "MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.append("")  # modules of the folder that the command is given in
    try:
        rule = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise any
        raise ValueError(f"--reward {name} cannot be imported: {error!r}") from error
    if not callable(rule):
        raise ValueError(f"--reward {name} is {strict.show(rule)}, which is no function")
    return rule
