"""Every peer of the benchmark runs our rows, id by id, and begins with our loss.

    python -m pytest tests/peers/test_bench_peers.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run, work

ROOT = Path(__file__).resolve().parents[2]
MINI = ["--steps", "2", "--warmup", "1", "--batch", "2"]
PEERS = [(c.task, c.left, c.right) for c in run.COMPARISONS
         if c.title and not (c.left != "ours" and not (ROOT / "reference.py").is_file())]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return work.make("tiny", tmp_path_factory.mktemp("bench"), rows=4)


def said(driver, task, folder, home, *flags):
    """The line that a driver prints of two steps of two rows."""
    module, *own = run.PROGRAMS[driver]
    command = [sys.executable, "-m", f"bench.{module}", "--model", str(folder), "--task", task,
               *own, *MINI, *flags]
    env = run.environment(str(home)) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("task", "left", "right"), PEERS)
def test_a_peer_runs_the_same_ids_and_begins_with_the_same_loss(task, left, right, tiny, tmp_path):
    """Red: bench/peer_loop.py:encode: `+ [tokenizer.eos_token_id]` -> ``
    Red: bench/peer_loop.py:main: `policy - reference` -> `policy`
    Red: bench/peer_trl.py:rows: `!= -100` -> `!= -1`"""
    ours, peer = (said(driver, task, tiny, tmp_path) for driver in (left, right))
    assert (ours["driver"], peer["driver"]) == (left, right)
    assert run.why_void(ours, peer) == ""
    assert ours.keys() == peer.keys()
    for key in ("tokens", "response_tokens", "steps", "warmup", "threads"):
        assert ours[key] == peer[key], key
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], abs=1e-4)


@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--checkpointing",)])
def test_the_same_holds_in_bfloat16_and_with_checkpointing(flags, tiny, tmp_path):
    """Red: bench/peer_trl.py:rows: `!= -100` -> `!= -1`"""
    ours, peer = (said(driver, "sft", tiny, tmp_path, *flags)
                  for driver in ("ours", "TRL, padding free"))
    assert run.why_void(ours, peer) == ""
    assert (ours["dtype"], ours["checkpointing"]) == (peer["dtype"], peer["checkpointing"])
