"""Writing so that a kill, a full disk or a power cut leaves the old or the new, never half of it.

Whatever is written lies aside under a name of its own (tmp-*), is fsynced, and is then renamed;
the fsync of its folder makes the rename itself last. A manifest of sizes and SHA-256 shows later
that a folder is what was written.
"""
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
ASIDE = re.compile(r"tmp-.+-\d+")  # tmp-NAME-PROCESS, nobody else's


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file (a write, an fsync) names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's names.   Windows has none for folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network and shared folders cannot, and have no need
    finally:
        os.close(handle)


def aside(final: Path) -> Path:
    return final.with_name(f"tmp-{final.name}-{os.getpid()}")


def write(path: Path, content: bytes | str) -> None:
    """The file `path` with this content, in place of an old one.   OSError where it cannot be."""
    part = aside(path)
    try:
        with named(path):
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, line: str) -> None:
    """Adds a line to a log, on disk after `sync`.   OSError names the file."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(line)


@contextlib.contextmanager
def folder(final: Path, manifest: bool = False) -> Iterator[Path]:
    """A new folder to fill; it appears as `final` after the block, complete, or not at all.

    OSError, also for what safetensors could not write; whatever lay there before is then kept.
    """
    part = aside(final)
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True)
        sync(final.parent.parent)
    try:
        part.mkdir()
        with named(final):
            yield part
            if manifest:
                write_manifest(part)
        for file in part.iterdir():
            file.chmod(part.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            sync(file)
        sync(part)
        exchange(part, final)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"writing {final} failed: {error}") from error
        raise
    sync(final.parent)


def exchange(part: Path, final: Path) -> None:
    """Renames `part` to `final`; old content goes only then. For an instant neither is there: this
    replaces only what can be made again (an adapter, a damaged checkpoint)."""
    old = remove(final, keep=True) if final.is_dir() else None
    try:
        os.rename(part, final)
    except OSError:
        if old:
            os.rename(old, final)
        raise
    if old:
        shutil.rmtree(old)


def remove(path: Path, keep: bool = False) -> Path:
    """Takes a folder away, renamed first, so that nobody finds half of it; with keep only that."""
    gone = path.with_name(f"tmp-old.{path.name}-{os.getpid()}")
    os.rename(path, gone)
    if not keep:
        try:
            shutil.rmtree(gone)
        except OSError as error:  # it names the file alone
            raise OSError(error.errno, error.strerror, str(gone)) from None
    return gone


def sweep(parent: Path) -> None:
    """Removes what a killed process left aside in `parent`; call it under the folder's lock."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if ASIDE.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def digests(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file in hex, several at a time."""
    def digest(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = list(files)
    try:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(digest, files))
    except RuntimeError:  # no memory for a thread
        return list(map(digest, files))


def write_manifest(parent: Path) -> None:
    """parent/manifest.json: {name: [bytes, SHA-256]} of every file in it."""
    files = sorted(parent.iterdir())
    listed = {p.name: [p.stat().st_size, d] for p, d in zip(files, digests(files), strict=True)}
    (parent / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n", "utf-8")


def damage(parent: Path) -> str | None:
    """What differs between a folder and its manifest, in words; None where nothing does."""
    try:
        listed = json.loads((parent / MANIFEST).read_text("utf-8"))
        files = sorted(p for p in parent.iterdir() if p.name != MANIFEST)
        if names := sorted(listed.keys() ^ {p.name for p in files}):
            return f"{names[0]} is {'missing' if names[0] in listed else 'not of its manifest'}"
        for path, digest in zip(files, digests(files), strict=True):
            if listed[path.name] != [path.stat().st_size, digest]:
                return f"{path.name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None
