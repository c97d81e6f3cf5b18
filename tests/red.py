"""Shows that the tests can fail: breaks the code one line at a time and expects a red test.

A test's docstring names the mutations it must notice, each at the end of a line, as in
    Red: losses.py:uft: `before` -> `after`
with FILE:FUNCTION, FILE:Class.method, or FILE alone; `before` occurs exactly once in that piece of
source. Each runs in its own copy of the repository; tests/peers and tests/properties, which need
more installed, only if PATTERN says "peers" or "properties".
"""
import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RED = re.compile(r"Red: ([\w/.]+\.py)(?::([\w.]+))?: `([^`]+)` -> `([^`]*)`")


def tests(pattern: str) -> dict[str, list[str]]:
    """{test id: its Red lines} for every test function whose id contains `pattern`."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            name = f"{path.relative_to(ROOT).as_posix()}::{getattr(node, 'name', '')}"
            wanted = pattern in name and all(
                part in pattern or f"/{part}/" not in name for part in ("peers", "properties"))
            if "::test_" in name and wanted:
                found[name] = re.findall(r"Red:.*", ast.get_docstring(node) or "")
    return found


def mutate(source: str, scope: str | None, before: str, after: str) -> str:
    """`source` with `before` replaced inside `scope`, a dotted name or None for all of it."""
    node, piece = ast.parse(source), source
    for part in scope.split(".") if scope else ():
        node = {n.name: n for n in node.body if hasattr(n, "name")}[part]
        piece = ast.get_source_segment(source, node)
    if piece.count(before) != 1:
        raise ValueError(f"{before!r} occurs {piece.count(before)} times")
    return source.replace(piece, piece.replace(before, after), 1)


def pytest(folder: Path, *names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-Bm", "pytest", "-xqp", "no:cacheprovider", *names]
    return subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=600, check=False)


def verdict(name: str, line: str) -> str:
    """"red", "green", or what is wrong with the entry."""
    if not (match := RED.fullmatch(line)):
        return "wrong: not of the form Red: FILE:FUNCTION: `before` -> `after`"
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tests", "lab", "bench", "docs"):
            shutil.copytree(ROOT / part, f"{folder}/{part}", ignore=lambda *_: {"__pycache__"})
        for path in filter(Path.is_file, [*ROOT.glob("*.*"), ROOT / "Makefile"]):
            shutil.copy(path, folder)
        try:
            path = Path(folder, match[1])
            path.write_text(mutate(path.read_text("utf-8"), *match.groups()[1:]), "utf-8")
            code = pytest(Path(folder), name).returncode
        except (KeyError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            return f"wrong: {error!r}"
    return {0: "green", 1: "red"}.get(code, f"wrong: pytest ended with {code}, the test never ran")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", default="", help="a part of tests/FILE.py::NAME")
    parser.add_argument("-j", dest="workers", type=int, default=2, help="mutations at a time")
    args = parser.parse_args()
    found, verdicts = tests(args.pattern), []
    todo = [(name, line) for name in found for line in found[name]]
    if todo and (run := pytest(ROOT, *(name for name in found if found[name]))).returncode:
        sys.exit(f"{run.stdout}The tests must pass before the code is broken.")
    with ThreadPoolExecutor(args.workers) as pool:
        for (name, line), result in zip(todo, pool.map(lambda t: verdict(*t), todo), strict=True):
            print(f"{result:5}  {name}  {line}", flush=True)
            verdicts.append(result)
    print("".join(f"no mutation named: {name}\n" for name in found if not found[name]), end="")
    red, green = verdicts.count("red"), verdicts.count("green")
    print(f"{len(verdicts) - red - green} wrong, {red} red, {green} green")
    sys.exit(red < len(verdicts) or not found)


if __name__ == "__main__":
    main()
