"""docs/results.md is what the recorded runs give, and its verdicts are what its numbers show."""
import re
from pathlib import Path

import pytest

from lab import results, summary

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("tables", "scores", "mixture", "shapes", "beta", "saturation", "optimum", "online",
             "hints")
ROWS = {"a": [{"truth": 0.5}, {"truth": 0.6}], "b": [{"truth": 0.1}, {"truth": 0.2}],
        "c": [{"truth": 0.5}, {"truth": 0.65}]}


def test_the_results_page_is_made_from_the_recorded_runs():
    """Red: lab/summary.py:cell: `scale * half` -> `half`
    Red: lab/results.py:page: `for c in CLAIMS])` -> `for c in CLAIMS[1:]])`"""
    assert results.PAGE.read_text("utf-8") == results.page()


@pytest.mark.parametrize(("a", "b", "shown"), [
    ("a", "b", {1}), ("b", "a", {-1}), ("a", "a", {"same"}), ("a", "c", {"open"})])
def test_a_verdict_that_its_numbers_do_not_show_is_refused(a, b, shown):
    """Red: lab/results.py:check: `if abs(mean) > half` -> `if abs(mean) > -1`
    Red: lab/results.py:check: `abs(mean) + half <= MARGIN` -> `abs(mean) <= MARGIN`
    Red: lab/results.py:check: `{1 if mean > 0 else -1}` -> `{1}`"""
    for wanted in (1, -1, "same", "open"):
        claim = results.Claim("a claim", "reproduced", "", ((a, b, "truth", wanted),))
        if wanted in shown:
            results.check(claim, ROWS)
        else:
            with pytest.raises(ValueError, match="rewrite the verdict in lab/results.py"):
                results.check(claim, ROWS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_says_what_was_asked_expected_run_and_found(name):
    """Red: lab/results.py:opening: `+= " " + line.strip()` -> `= ""`
    Red: lab/optimum.py: `Runtime     4 s` -> `Took     4 s`"""
    parts = results.opening(name)
    assert {"Title", *results.HEADS} == parts.keys()
    assert all(len(text) > 3 and not text.isupper() for text in parts.values())
    assert f"python -m lab.{name}" in parts["Command"]
    assert "bandit: one prompt" not in parts["Answer"]


@pytest.mark.parametrize("name", [n for n in QUESTIONS if n not in ("optimum", "saturation")])
def test_every_recorded_arm_has_a_run_for_every_seed(name):
    """Red: lab/summary.py:load: `RESULTS / f"{name}.json"` -> `RESULTS / f"{name[::-1]}.json"`"""
    rows = summary.load(name)["rows"]
    counts = {len(runs) for arm, runs in rows.items() if arm != "base"}
    assert len(counts) == 1 and counts.pop() >= {"tables": 8}.get(name, 3)


def test_every_figure_on_the_page_is_there_and_draws_no_date():
    """Red: lab/results.py:figure: `figures/{name}.svg` -> `figure/{name}.svg`"""
    named = re.findall(r"\(figures/(\w+\.svg)\)", results.page())
    assert len(named) >= 6
    for name in named:
        assert "<dc:date>" not in (ROOT / "docs/figures" / name).read_text("utf-8")
