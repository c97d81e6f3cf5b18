"""Nothing is lost: runs killed at random and at chosen calls, failed writes, the order of calls.

A short version of `make test-crash`. Where strace cannot trace, the same faults are planted in
functions of os, which reach every call but the writes of compiled code.
"""
import os
import random
import re
import signal
from collections import Counter

import pytest
from crash import disk, faults, points, run, start, trace, trial

OUT = "/run/1"
SAVE = f"""
7 mkdir("{OUT}/checkpoints/tmp-step-2-7", 0777) = 0
7 openat(AT_FDCWD</home>, "{OUT}/checkpoints/tmp-step-2-7/.tmpA", O_RDWR|O_CREAT, 0600) = 4</x>
8 write(4<{OUT}/checkpoints/tmp-step-2-7/.tmpA>, ""..., 9 <unfinished ...>
7 write(1</dev/null>, "step 2"..., 6) = 6
8 <... write resumed>) = 9
7 renameat(AT_FDCWD</home>, "{OUT}/checkpoints/tmp-step-2-7/.tmpA", AT_FDCWD</home>, \
"{OUT}/checkpoints/tmp-step-2-7/a") = 0
7 openat(AT_FDCWD</home>, "{OUT}/checkpoints/tmp-step-2-7/b", O_WRONLY|O_CREAT, 0666) = 4</x>
7 write(4<{OUT}/checkpoints/tmp-step-2-7/b>, ""..., 3) = 3
7 fsync(4<{OUT}/checkpoints/tmp-step-2-7/a>) = 0
7 fsync(4<{OUT}/checkpoints/tmp-step-2-7/b>) = 0
7 fsync(4<{OUT}/checkpoints/tmp-step-2-7>) = 0
7 rename("{OUT}/checkpoints/tmp-step-2-7", "{OUT}/checkpoints/step-2") = 0
7 fsync(4<{OUT}/checkpoints>) = 0
7 rename("{OUT}/checkpoints/step-1", "{OUT}/checkpoints/tmp-old.step-1-7") = 0
""".strip().splitlines()
NAMES = ("a", "b", "tmp-step-2-7", "checkpoints")
FSYNC = {name: i for i, line in enumerate(SAVE) for name in NAMES
         if line.startswith("7 fsync") and line.endswith(f"/{name}>) = 0")}
RENAME = next(i for i, line in enumerate(SAVE) if line.startswith("7 rename("))
POINTS = (  # call, part of a path, fault; its stand-in without strace
    ("write", r"step-4-\d+/manifest", "KILL", "fsync", "tmp-step-4"),
    ("rename", r"^checkpoints/step-4$", "KILL", "rename", "tmp-step-4"),
    ("fsync", r"^checkpoints$", "KILL", "fsync", "/run/checkpoints"),
    ("fsync", r"^checkpoints/tmp-step-4-\d+$", "EIO", "fsync", "tmp-step-4"),
    ("write", r"step-6-\d+/\.tmp", "ENOSPC", "mkdir", "tmp-step-6"),
    ("rename", r"^adapter$", "KILL", "rename", "tmp-adapter"))


def complaints(lines):
    return trace.complaints(trace.calls("\n".join(lines)), points.Path(OUT))


@pytest.fixture(scope="module")
def calls(place):
    """(call, number, path) of each call that changes the run folder in the short run; by strace."""
    file = points.plain(place, False)
    return points.candidates(points.mine(file), place.root / "run"), file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The warm process, the model, the data, a quiet run of six steps and a torn one."""
    made = points.Place(start.Warm(), tmp_path_factory.mktemp("crash"))
    points.prepared(made)
    yield made
    made.warm.close()


def test_a_save_that_syncs_everything_before_its_rename_has_no_complaints():
    """Red: tests/crash/trace.py:calls: `rest = open_calls.pop(pid, "") + resumed[1]` -> `continue`
    Red: tests/crash/trace.py:history: `del found[path]` -> `pass`
    Red: tests/crash/trace.py:Call.paths: `str(Path(folder) / name) for` -> `name for`
    Red: tests/crash/trace.py:complaints: `or "/tmp-" in` -> `or "/none-" in`"""
    assert complaints(SAVE) == []
    assert [c.result for c in trace.calls("\n".join(SAVE)) if c.pid == 8] == ["9"]
    assert trace.Call(7, "unlinkat", f'4<{OUT}/a>, "b", 0', "0").paths() == [f"{OUT}/a/b"]
    assert trace.checkpoints(trace.calls("\n".join(SAVE)), points.Path(OUT)) == ["step-2"]


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda s: s[:FSYNC["a"]] + s[FSYNC["a"] + 1:], "/a is not synced after its last change"),
    (lambda s: [*s[:RENAME], s[7], *s[RENAME:]], "/b is not synced after its last change"),
    (lambda s: s[:FSYNC["tmp-step-2-7"]] + s[FSYNC["tmp-step-2-7"] + 1:], "-7 is not synced"),
    (lambda s: [*s[:FSYNC["b"]], s[FSYNC["tmp-step-2-7"]], s[FSYNC["b"]], *s[RENAME:]],
     "the folder is synced before b"),
    (lambda s: s[:FSYNC["checkpoints"]] + s[FSYNC["checkpoints"] + 1:], "before .* is synced"),
    (lambda s: s[:FSYNC["checkpoints"]], "checkpoints is never synced afterwards"),
    (lambda s: [line.replace("tmp-step-2-7>) = 0", "tmp-step-2-7>) = -1 EIO (Input/output error)")
                for line in s], "-7 is not synced"),
    (lambda s: s[RENAME:], "nothing was written before the rename")])
def test_a_save_that_syncs_too_little_or_too_late_is_told_apart(spoil, said):
    """Red: tests/crash/trace.py:complaints: `if e.synced < e.changed` -> `if False`
    Red: tests/crash/trace.py:complaints: `e.synced > folder.synced` -> `False`
    Red: tests/crash/trace.py:complaints: `if not below:` -> `if False:`
    Red: tests/crash/trace.py:parent_faults: `call.name in RENAMES + REMOVES and` -> `False and`
    Red: tests/crash/trace.py:parent_faults: `return [f"{parent} is` -> `return not [f"{parent} is`
    Red: tests/crash/trace.py:history: `if call.failed() or not paths` -> `if not paths`"""
    assert re.search(said, "\n".join(complaints(spoil(SAVE))))


def test_files_folder_rename_parent_is_the_order_of_every_save_of_a_real_run(place, request):
    """Three checkpoints, the adapter, config.json, results.json, report.html: from its own calls.
    Red: durable.py:folder: `            sync(file)` -> `            pass`
    Red: durable.py:folder: `        sync(part)` -> `        pass`
    Red: durable.py:folder: `    sync(final.parent)` -> `    pass`
    Red: durable.py:write: `    sync(path.parent)` -> `    pass`"""
    out = place.root / "run"
    if points.may_trace():
        file = request.getfixturevalue("calls")[1]
    else:
        file = place.root / "recorded.trace"
        place.prepare(False)
        start.go(place.warm, place.job() | {"record": str(file)})
    found = trace.calls(file.read_text("utf-8"))
    assert trace.complaints(found, out) == []
    assert trace.checkpoints(found, out) == ["step-2", "step-4", "step-6"]
    named = {call.paths()[-1] for call in found if call.name in trace.RENAMES}
    assert {f"{out}/{name}" for name in ("adapter", *trial.FINAL[2:])} <= named


def test_calls_recorded_in_the_process_show_a_file_that_is_never_synced(place, monkeypatch):
    """What stands in for strace's own trace: it must not be blind.
    Red: tests/crash/faults.py:record: `> synced.setdefault(path, 0)` -> `< 0`"""
    here, file = place.root / "here", place.root / "here.trace"
    (here / "tmp-a-1").mkdir(parents=True)
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, getattr(os, name))  # put back at the end
    faults.record(str(file))
    (here / "tmp-a-1/x").write_text("x", "ascii")
    os.rename(here / "tmp-a-1", here / "a")
    said = trace.complaints(trace.calls(file.read_text("utf-8")), here)
    assert [line.split(": ")[1] for line in said] == [
        "tmp-a-1 is not synced after its last change",
        "tmp-a-1/x is not synced after its last change", f"{here} is never synced afterwards"]


def test_a_run_killed_six_times_at_random_ends_as_if_nobody_had_killed_it(place, monkeypatch):
    """Every number of the log, rows of each step, adapter, newest checkpoint: bit for bit.
    Red: train.py:run_steps: `torch.manual_seed(` -> `abs(`
    Red: checkpoint.py:restore: `optimizer.state[weights[name]][part] = tensor.to(place)` -> `pass`
    Red: train.py:run_steps: `report.keep_lines(log, start)` -> `pass`"""
    monkeypatch.setattr(run, "REAL", 0)  # `python train.py` makes the second of the quiet runs
    flags, draw, tally = ("--steps", "12"), random.Random(0), Counter()
    wrong = run.quiet(place.warm, place.root, flags)
    while tally["kills"] < 6:
        wrong += run.trial_run(place.warm, place.root, draw, 6 - tally["kills"], tally, flags)
    assert wrong == []
    assert tally["kills"] == 6 and not tally["unusable folders"] and not tally["hand work"]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[2]} at {p[0]} {p[4]}")
def test_a_kill_or_an_error_at_a_call_of_a_save_loses_nothing(place, point, request):
    """Red: durable.py:folder: `        part.mkdir()` -> `        part = final; part.mkdir()`
    Red: durable.py:folder: `shutil.rmtree(part, ignore_errors=True)` -> `pass`"""
    name, path, fault, stand_in, part = point
    if points.may_trace():
        found, _ = request.getfixturevalue("calls")
        when = next(k for call, k, below in found if call == name and re.search(path, below))
        said, wrong = points.outcome(place, points.Point(name, when, fault, False))
        assert wrong == [], said
    else:
        place.prepare(False)
        planted = {"call": stand_in, "when": 1, "fault": fault, "path": part}
        code = start.go(place.warm, place.job() | {"faults": [planted]})
        assert code == (-signal.SIGKILL if fault == "KILL" else 2)
        assert points.judged(place, code, fault == "KILL") == []


@pytest.mark.parametrize("name", ["tmpfs full", "RLIMIT_FSIZE"])
def test_a_save_that_the_disk_refuses_harms_nothing_and_says_what_it_needs(place, name):
    """RLIMIT_FSIZE stands in for the small disk where none can be mounted.
    Red: durable.py:folder: `shutil.rmtree(part, ignore_errors=True)` -> `pass`
    Red: checkpoint.py:save: `it needs {need:.2f} MB` -> `it needs more`"""
    if name == "tmpfs full" and not disk.may_mount():
        name = "RLIMIT_FSIZE"
    assert disk.CASES[name](place) == []
