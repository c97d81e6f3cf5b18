"""From runs to tables: means with 95% intervals over seeds, differences paired by seed.

Rows are {arm: [numbers of one run per seed]}, as experiment.run_all and lab/results/*.json hold
them. No correction for many comparisons is made: one star in twenty is chance.
"""
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131)  # 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom
NO_SHARES = {"kl_policy", "kl_base", "kl_text", "length", "nll", "cost", "mib"}  # others: per cent
Rows = Mapping[str, Sequence[Mapping[str, float]]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95% t-interval); infinitely wide for one value."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.inf
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return mean, STUDENT[count - 2] * math.sqrt(variance / count)


def difference(a: Sequence[Mapping], b: Sequence[Mapping], name: str) -> tuple[float, float]:
    """Mean of a - b over seeds, and the half width of its interval."""
    return interval([x[name] - y[name] for x, y in zip(a, b, strict=True)])


def best_of(values: Sequence[float]) -> list[float]:
    """Expected best of k of the values, k = 1, 2, ..., drawn without putting back.

    Of n sorted values the i-th is the best of k with probability C(i - 1, k - 1) / C(n, k).
    """
    n = len(values)
    return [sum(v * math.comb(i, k - 1) for i, v in enumerate(sorted(values))) / math.comb(n, k)
            for k in range(1, n + 1)]


def cell(mean: float, half: float, column: str, signed: bool = False) -> str:
    """`12.3 +- 1.2`, in per cent for shares; a signed one has a star where it excludes zero."""
    scale = 1 if column in NO_SHARES else 100
    digits = {"kl_text": 3}.get(column, 2 if column in NO_SHARES else 1)
    text = f"{scale * mean:{'+' if signed else ''}.{digits}f}"
    text += f" +- {scale * half:.{digits}f}" * math.isfinite(half)
    return text + "*" * (signed and abs(mean) > half)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def table(rows: Rows, columns: Sequence[str], head: str = "arm") -> str:
    """One line per arm: mean and interval of every column."""
    return markdown([head, *columns], [
        [name, *(cell(*interval([r[c] for r in runs]), c) for c in columns)]
        for name, runs in rows.items()])


def differences(rows: Rows, pairs: Sequence[tuple[str, str]], columns: Sequence[str]) -> str:
    """One line per pair (a, b): a - b, paired by seed."""
    return markdown(["paired difference", *columns], [
        [f"{a} - {b}", *(cell(*difference(rows[a], rows[b], c), c, True) for c in columns)]
        for a, b in pairs])


def machine() -> str:
    """What made the numbers, without naming anyone's computer."""
    return f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}, float32"


def save(name: str, value: dict) -> Path:
    """Writes lab/results/NAME.json; runs are rounded to six digits."""
    def rounded(x: object) -> object:
        if isinstance(x, dict):
            return {k: rounded(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [rounded(v) for v in x]
        return float(f"{x:.6g}") if isinstance(x, float) else x

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    lines = json.dumps(rounded(value), indent=1)
    path.write_text(lines + "\n", "utf-8")
    return path


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
