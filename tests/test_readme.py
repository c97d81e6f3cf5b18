"""Every command that README.md prints is run, in its order, in one folder, as a reader would.

Names in capitals are stood for by the bundled model and small files. Runs are cut to two steps;
what takes minutes (make, torchrun, lab.tables) is tested elsewhere, and here known to be there.
"""
import gzip
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import generate
import lora
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MAINS = {"train.py": train.main, "generate.py": generate.main, "evaluate.py": evaluate.main,
         "lora.py": lora.main}
SHORT = {"train.py": ("--steps 2 --held_out 4 --sample_tokens 2 --max_length 96 --lora_r 2 "
                      "--batch_size 2 --micro_batch_tokens 512"),
         "generate.py": "--max_new_tokens 2", "evaluate.py": "--limit 4 --max_new_tokens 2"}


def commands():
    """The lines inside fences, as words."""
    fenced = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(".venv/bin/python ")]


def stand_in(place):
    """What the names in capitals stand for; `lab` is the repository's."""
    (place / "lab").symlink_to(ROOT / "lab")
    (place / "MODEL").symlink_to(ROOT / "lab/base")
    data = {name: (ROOT / f"lab/data/{name}.jsonl").read_text("utf-8").splitlines()[:40]
            for name in ("demonstrations", "feedback")}
    (place / "DEMONSTRATIONS.json").write_text("\n".join(data["demonstrations"]), "utf-8")
    (place / "HELD_OUT.jsonl").write_text("\n".join(data["feedback"]), "utf-8")
    with gzip.open(place / "FEEDBACK.jsonl.gz", "wt") as file:
        file.write("\n".join(data["feedback"]))
    (place / "TruthfulQA.csv").write_text("Question,Best Answer,Correct Answers,Incorrect Answers\n"
                                          "what ?,this,this; that,nothing\n", "utf-8")


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """In the order of the page: a later one uses what an earlier one left.
    Red: lora.py:main: `"--weight", type=number` -> `"--weight", "--density", type=number`
    Red: verifiers.py:found: `if not callable(rule)` -> `if callable(rule)`
    Red: rewards.py:sources: `folder / "adapter" if` -> `folder if`"""
    stand_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = []
    for _, *words in commands():
        small = "--response_tokens 4 --group 2" if "--reward" in words else ""
        MAINS[words[0]]([*words[1:], *shlex.split(f"{SHORT.get(words[0], '')} {small}")])
        ran.append(words[0])
    assert {name: ran.count(name) for name in MAINS} == {
        "train.py": 4, "generate.py": 1, "evaluate.py": 1, "lora.py": 1}
    rows = [json.loads(line) for line in Path("runs/0003/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and "reward" in rows[0] and "Error" not in capsys.readouterr().out


def test_every_module_and_make_target_of_the_readme_exists():
    """Seen red with the target test-crash renamed in the Makefile."""
    modules = set(re.findall(r"python -m ((?:lab|bench|tests)\.[\w.]+)", README))
    assert len(modules) >= 2 and all(importlib.util.find_spec(name) for name in modules)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {word for line in re.findall(r"`?make ([a-z][a-z -]*)", README)
             for word in line.split() if word in targets or "-" in word}
    assert {"demo", "test", "results", "bench", "test-crash", "test-faults"} <= named <= targets


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_of_the_readme_leads_somewhere(name):
    """Seen red with a letter more in the link to docs/math.md."""
    assert (ROOT / name).exists()
