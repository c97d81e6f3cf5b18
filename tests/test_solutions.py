"""The exercises of CONTRIBUTING.md have solutions that apply to this tree and prove themselves.

docs/solutions holds a diff each, with what it does and its proofs in front; `git apply` takes it as
it is. Where a test here fails because the code around a change has moved, make the diff again.
"""
import importlib
import re
import shutil
from pathlib import Path

import pytest
import red

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted(p.stem for p in ROOT.glob("docs/solutions/*.diff"))
every_solution = pytest.mark.parametrize("name", SOLUTIONS)


def text(name: str) -> str:
    return (ROOT / f"docs/solutions/{name}.diff").read_text("utf-8")


def hunks(diff: str) -> list[tuple[str, list[str]]]:
    """(file, lines with their mark) of every hunk."""
    parts = re.split(r"^diff --git a/(\S+) b/\S+\n", diff, flags=re.MULTILINE)
    return [(path, hunk.splitlines()[1:])
            for path, body in zip(parts[1::2], parts[2::2], strict=True)
            for hunk in re.split(r"^@@ ", body, flags=re.MULTILINE)[1:]]


def applied(diff: str) -> dict[str, str]:
    """{file: its changed text}.   ValueError where a hunk's old lines are not there, once."""
    out = {}
    for path, lines in hunks(diff):
        source = out.get(path) or (ROOT / path).read_text("utf-8")
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in marks)
                    for marks in (" -", " +"))
        if source.count(old) != 1:
            raise ValueError(f"{path} holds {source.count(old)} times, not once:\n{old}")
        out[path] = source.replace(old, new)
    return out


@every_solution
def test_every_solution_applies_to_the_current_tree(name):
    """Red: losses.py: `def dro(logps` -> `def dr0(logps`
    Red: data.py: `TOOLS = (` -> `TOOL = (`
    Red: model.py: `class MLP(nn.Module)` -> `class Mlp(nn.Module)`"""
    changed = applied(text(name))
    assert changed and all(new != (ROOT / path).read_text("utf-8")
                           for path, new in changed.items())


@every_solution
def test_no_solution_takes_more_than_forty_lines_or_three_files(name):
    """Red: tests/test_solutions.py:hunks: `hunk.splitlines()[1:]` -> `hunk.splitlines()[1:] * 9`"""
    marks = [line[:1] for _, lines in hunks(text(name)) for line in lines]
    assert 0 < marks.count("+") + marks.count("-") <= 40
    assert len({path for path, _ in hunks(text(name))}) <= 3


@every_solution
def test_every_mutation_that_a_solution_names_can_be_applied_to_it(name):
    """Red: tests/red.py:mutate: `return ` -> `raise ValueError(scope) or `
    Red: tests/test_solutions.py:applied: `source.replace(old, new)` -> `source`"""
    added = re.findall(r"^\+.*(Red: .*\.py:.*`)", text(name), re.MULTILINE)
    changed = applied(text(name))
    assert added
    for file, *more in (red.RED.fullmatch(line).groups() for line in added):
        red.mutate(changed[file], *more)


@every_solution
def test_every_solution_s_proofs_hold_behind_it(name, tmp_path):
    """In a copy of the sources and tests; the proofs are those that the diff names.
    Red: tests/test_solutions.py:applied: `source.replace(old, new)` -> `source`
    Red: data.py:read_pair: `(1.0, 0.0)` -> `(0.0, 1.0)`"""
    shutil.copytree(ROOT / "tests", tmp_path / "tests",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    for path, new in applied(text(name)).items():
        (tmp_path / path).write_text(new, "utf-8")
    proofs = re.findall(r"^Proof: (\S+)$", text(name), re.MULTILINE)
    run = red.pytest(tmp_path, *proofs)
    assert proofs and run.returncode == 0, run.stdout


def test_every_file_and_name_that_contributing_md_speaks_of_exists():
    """Files in backquotes, here or in tests/, `module.NAME`s, and links.
    Seen red: with `losses.py` written `loss.py` there, and with doubts.FEEDBACK renamed."""
    said = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    quoted = set(re.findall(r"`([\w/.]+)`", said)) | set(re.findall(r"\]\(([^)]+)\)", said))
    paths = {q for q in quoted if q.endswith((".py", "/", ".md", ".diff")) or "/" in q}
    assert len(paths) > 10
    assert [p for p in paths if not ((ROOT / p).exists() or (ROOT / "tests" / p).exists())] == []
    for module, name in (q.split(".") for q in quoted - paths if re.fullmatch(r"\w+\.\w+", q)):
        assert hasattr(importlib.import_module(module), name)
    assert set(SOLUTIONS) == {Path(p).stem for p in paths if p.endswith(".diff")}
