"""durable.py: at every instant the old or the new lies there, and damage is seen."""
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import durable

REAL = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}


def fill(final, text="new", manifest=True):
    with durable.folder(final, manifest) as part:
        (part / "a.txt").write_text(text)
        save_file({"x": torch.zeros(3)}, part / "b.safetensors")
    return final


@pytest.fixture
def calls(monkeypatch):
    """The names that fsync, rename and replace are given, in order."""
    seen = []

    def fsync(handle):
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        REAL["fsync"](handle)

    def move(a, b):
        seen.append(("rename", Path(b).name))
        REAL["rename"](a, b)

    for name, fake in (("fsync", fsync), ("rename", move), ("replace", move)):
        monkeypatch.setattr(os, name, fake)
    return seen


def test_every_file_then_its_folder_are_on_disk_before_the_rename_and_the_parent_after(
        tmp_path, calls):
    """Red: durable.py:folder: `            sync(file)` -> `            pass`
    Red: durable.py:folder: `        sync(part)` -> `        pass`
    Red: durable.py:folder: `    sync(final.parent)` -> `    pass`"""
    fill(tmp_path / "step-1")
    part = f"tmp-step-1-{os.getpid()}"
    assert sorted(calls[:3]) == [("fsync", n) for n in ("a.txt", "b.safetensors", "manifest.json")]
    assert calls[3:] == [("fsync", part), ("rename", "step-1"), ("fsync", tmp_path.name)]


def test_a_file_is_on_disk_before_it_replaces_the_old_one(tmp_path, calls):
    """Red: durable.py:write: `        sync(part)` -> `        pass`
    Red: durable.py:write: `    sync(path.parent)` -> `    pass`"""
    durable.write(tmp_path / "x", "text")
    assert calls == [("fsync", f"tmp-x-{os.getpid()}"), ("rename", "x"), ("fsync", tmp_path.name)]
    assert (tmp_path / "x").read_text() == "text"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_call_that_fails_leaves_the_old_folder_and_nothing_aside(tmp_path, monkeypatch, call):
    """Each fsync and each rename in turn, until one save works.
    Red: durable.py:folder: `shutil.rmtree(part, ignore_errors=True)` -> `pass`
    Red: durable.py:exchange: `            os.rename(old, final)` -> `            pass`"""
    for turn in range(9):
        fill(tmp_path / "step-1", "old")
        left = [turn]

        def fail(a, *b, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            return REAL[call](a, *b)

        monkeypatch.setattr(os, call, fail)
        try:
            fill(tmp_path / "step-1")
        except OSError as error:
            text = "new" if turn == 4 and call == "fsync" else "old"  # the parent's comes last
            assert "No space left" in str(error)
        else:
            text = "new"
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
        assert (tmp_path / "step-1/a.txt").read_text() == text
        assert durable.damage(tmp_path / "step-1") is None
    assert left[0] >= 0  # the last turn ran through


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """Red: durable.py:write: `part.unlink(missing_ok=True)` -> `pass`
    Red: durable.py:named: `error.strerror, str(path)` -> `error.strerror`
    Red: durable.py:sync: `with named(path)` -> `with contextlib.nullcontext()`"""
    def fsync(_):
        raise OSError(5, "Input/output error")

    durable.write(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="error: .*tmp-x-"):
        durable.write(tmp_path / "x", b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_what_safetensors_cannot_write_is_an_os_error(tmp_path):
    """Red: durable.py:folder: `if isinstance(error, SafetensorError)` -> `if False`"""
    with pytest.raises(OSError, match="writing .*step-1 failed"), \
            durable.folder(tmp_path / "step-1") as part:
        save_file({"x": torch.zeros(3)}, part / "no/such/folder.safetensors")
    assert not [*tmp_path.iterdir()]


DAMAGE = {
    "a.txt is missing": lambda p: (p / "a.txt").unlink(),
    "c is not of its manifest": lambda p: (p / "c").touch(),
    "a.txt is not as it was written": lambda p: (p / "a.txt").write_text("nex"),
    "b.safetensors is not as it was written": lambda p: os.truncate(p / "b.safetensors", 9),
    "manifest.json cannot be read": lambda p: (p / "manifest.json").unlink(),
    "manifest.json cannot be read: Expecting": lambda p: os.truncate(p / "manifest.json", 0),
    "manifest.json cannot be read: 'list'": lambda p: (p / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_damage_is_named_whatever_it_is(tmp_path, told):
    """Red: durable.py:damage: `st_size, digest]:` -> `st_size, listed[path.name][1]]:`
    Red: durable.py:damage: `listed.keys() ^ {` -> `listed.keys() - {`
    Red: durable.py:damage: `listed.keys() ^ {p.name for p in files}` -> `()`
    Red: durable.py:damage: `(OSError, ValueError, AttributeError)` -> `(OSError, AttributeError)`
    Red: durable.py:damage: `(OSError, Va` -> `(Va`
    Red: durable.py:damage: `(OSError, ValueError, AttributeError)` -> `(OSError, ValueError)`"""
    folder = fill(tmp_path / "step-1")
    assert durable.damage(folder) is None
    DAMAGE[told](folder)
    assert durable.damage(folder).startswith(told)


@pytest.mark.parametrize("mask, mode", [(0o027, 0o640), (0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_readable_as_the_user_asked(tmp_path, mask, mode):
    """None can be executed.
    Red: durable.py:folder: `file.chmod(` -> `(lambda mode: 0)(`
    Red: durable.py:folder: `& 0o666` -> `& 0o667`"""
    before = os.umask(mask)
    try:
        modes = {stat.S_IMODE(p.stat().st_mode) for p in fill(tmp_path / "x").iterdir()}
    finally:
        os.umask(before)
    assert modes == {mode}


def test_a_folder_is_made_with_those_above_it_and_holds_no_manifest_unasked(tmp_path):
    """Red: durable.py:folder: `manifest: bool = False` -> `manifest: bool = True`
    Red: durable.py:folder: `mkdir(parents=True)` -> `mkdir()`"""
    with durable.folder(tmp_path / "run/checkpoints/adapter") as part:
        (part / "a").touch()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["adapter"]
    assert [p.name for p in (tmp_path / "run/checkpoints/adapter").iterdir()] == ["a"]


def test_the_first_error_is_told_though_nothing_is_left_to_remove(tmp_path):
    """Red: durable.py:folder: `ignore_errors=True` -> `ignore_errors=False`"""
    with pytest.raises(KeyError, match="mine"), durable.folder(tmp_path / "x") as part:
        part.rmdir()
        raise KeyError("mine")


def test_sweeping_takes_only_what_a_process_left_aside(tmp_path):
    """Red: durable.py:sweep: `ASIDE.fullmatch(path.name)` -> `path.name.startswith("tmp-")`
    Red: durable.py:sweep: `and not path.is_symlink()` -> ``
    Red: durable.py:sweep: `else path.unlink()` -> `else None`"""
    mine = ("step-1", "tmp-notes", "tmp", "tmp-old-x")
    for name in (*mine, "tmp-step-2-77", "tmp-old.step-1-77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "tmp-config.json-9").touch()
    (tmp_path / "tmp-link-5").symlink_to(tmp_path / "step-1")
    durable.sweep(tmp_path)
    durable.sweep(tmp_path / "missing")
    assert {p.name for p in tmp_path.iterdir()} == {*mine, "tmp-link-5"}
    assert (tmp_path / "step-1/file").exists()


def test_a_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    """Red: durable.py:remove: `error.strerror, str(gone)` -> `error.strerror, error.filename`"""
    def rmtree(_):
        raise OSError(5, "Input/output error", "state.json")

    fill(tmp_path / "step-1")
    monkeypatch.setattr(durable.shutil, "rmtree", rmtree)
    with pytest.raises(OSError, match="error: .*tmp-old.step-1-"):
        durable.remove(tmp_path / "step-1")


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    """Red: durable.py:write: `with named(path)` -> `with contextlib.nullcontext()`
    Red: durable.py:folder: `with named(final)` -> `with contextlib.nullcontext()`
    Red: durable.py:append: `with named(path), ` -> `with `"""
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space.*step-1"), durable.folder(tmp_path / "step-1"):
        full()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="space.*/x'"):
        durable.write(tmp_path / "x", b"new")
    with pytest.raises(OSError, match="space.*/dev/full"):
        durable.append(Path("/dev/full"), "line")


def test_digests_need_no_thread(tmp_path, monkeypatch):
    """Red: durable.py:digests: `except RuntimeError` -> `except KeyError`"""
    def start(*_):
        raise RuntimeError("can't start new thread")

    (tmp_path / "a").write_text("abc")
    monkeypatch.setattr(durable.ThreadPoolExecutor, "submit", start)
    assert durable.digests([tmp_path / "a"])[0].startswith("ba7816bf8f01")


def test_digests_are_sha_256_in_the_order_of_the_files(tmp_path):
    """Red: durable.py:digests: `pool.map(digest, files)` -> `pool.map(digest, sorted(files))`
    Red: durable.py:digests: `"sha256"` -> `"sha512"`"""
    for name, text in (("b", ""), ("a", "abc")):
        (tmp_path / name).write_text(text)
    found = durable.digests([tmp_path / "b", tmp_path / "a"])
    assert re.fullmatch("e3b0c442.*b7852b855", found[0]) and found[1].startswith("ba7816bf8f01")
