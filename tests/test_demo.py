"""The demo as a new user runs it: `python train.py` without flags, in an empty folder."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(what it printed, its results.json, its folder), run in an empty folder."""
    here = tmp_path_factory.mktemp("demo")
    run = subprocess.run([sys.executable, str(ROOT / "train.py")], cwd=here, capture_output=True,
                         text=True, check=True)
    return run.stdout, json.loads((here / "runs/0001/results.json").read_text("utf-8")), here


def test_the_demo_turns_wrong_answers_into_right_ones(demo):
    """Three on the machine it was tuned on; a greedy word may fall otherwise elsewhere.
    Red: train.py: `--lr 7e-3 --epochs 3` -> `--lr 7e-5 --epochs 3`
    Red: losses.py:uft: `- rewards).square()` -> `- 1 + rewards).square()`"""
    _, results, _ = demo
    assert [s["right_before"] for s in results["samples"]] == [False] * 3
    assert sum(s["right_after"] for s in results["samples"]) >= 2


def test_the_demo_learns_to_follow_instructions_and_to_tell_the_truth(demo):
    """By 15 points each on questions it was not trained on, and the intervals say so. (Rounding
    decides single answers: 26 to 42 points in truth were seen with one and two threads.)
    Red: train.py: `--lr 7e-3 --epochs 3` -> `--lr 7e-5 --epochs 3`
    Red: losses.py:uft: `- rewards).square()` -> `- 1 + rewards).square()`"""
    _, results, _ = demo
    for name in ("instructions correct", "truth correct"):
        gain = results["tests"][name]
        assert gain["n"] >= 40 and gain["change"] > 0.15 and gain["interval"][0] > 0


def test_the_demo_says_what_it_runs_and_leaves_a_page(demo):
    """Red: train.py:main: `print(f"demo    python` -> `print(f"demo    pyhton`
    Red: train.py:run: `page.write(out)` -> `pass`"""
    printed, _, here = demo
    assert "demo    python" in printed.split("\n")[0] and "--loss uft" in printed.split("\n")[0]
    assert (here / "runs/0001/report.html").stat().st_size > 5000
