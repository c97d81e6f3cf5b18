"""No file, flag or setting a user can supply gives a traceback, a hang or a silent acceptance.

tests/faults/ holds the table; `make test-faults` runs all of it.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def faults(*flags: str) -> subprocess.CompletedProcess:
    """The fault table's runner with these flags, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tests.faults.run", *flags], cwd=ROOT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          check=False)


def test_a_spread_of_the_fault_table_passes():
    """Every fifteenth case.
    Red: architecture.py:ModelConfig.from_dict: `not 0 < eps < 1` -> `False`"""
    run = faults("--every", "15")
    assert run.returncode == 0, run.stdout + run.stderr
