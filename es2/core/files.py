"""Files and folders that are whole or absent: atomic writes, digests, locks, and moving damage aside.

A folder is written under a temporary name, flushed and renamed, while its writer holds the lock of its key. The lock is
the kernel's and ends with the process, so a temporary folder without a held lock belongs to a killed writer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from es2.core.errors import InputError, MachineError, one_line

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 2**28
MAX_JSON_LEVELS = 64

_KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MAX_NAME_BYTES = 200  # the system's 255, less what a temporary name adds
_REMEMBER_FROM_BYTES = 2**20  # smaller files are hashed again faster than a memo is looked up
_INSTALLED = Path(__file__).resolve().parents[1] / "workbench"  # made by pyproject.toml's package-dir
_CLOCK_GRAIN_NS = 2 * 10**9  # a file that changed this recently can change again without a new modification time


class DamagedError(InputError):
    """An artifact is not what was written; it has been set aside under another name."""


def home() -> Path:
    """The folder that holds `cached_activations/` and `runs/`: `$ES2_HOME`, or else the current folder."""
    return Path(os.environ.get("ES2_HOME") or ".").absolute()


def program_root() -> Path:
    """The folder that holds `app/` and the showcase: the checkout, or `es2/workbench` of an installed package."""
    return _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1]


def app_script() -> Path:
    """The file that Streamlit runs; absent where the package was copied without the rest of its checkout."""
    return program_root() / "app" / "main.py"


def shipped() -> Path:
    """The read-only folder of sets and runs that come with the program.

    `$ES2_SHOWCASE`, or beside the app, or else below `home()`, where `es2 showcase` then writes it.
    """
    if chosen := os.environ.get("ES2_SHOWCASE"):
        return Path(chosen).absolute()
    root = program_root() if app_script().is_file() else home()
    return root / "cached_activations" / "showcase"


def is_installed(path: Path) -> bool:
    """Whether a file or folder is part of an installed package, which only an installer changes."""
    return path.is_relative_to(_INSTALLED)


def is_shipped(path: Path) -> bool:
    """Whether a file or folder comes with the program and may not be changed."""
    return path.is_relative_to(shipped())


def way_out(path: Path, usual: str) -> str:
    """The remedy for a damaged or outdated file: `usual`, or for a shipped one what brings it back."""
    if is_installed(path):
        return "install es2 again (`pip install --force-reinstall --no-deps`)"
    return "`es2 showcase` rebuilds it" if is_shipped(path) else usual


def user_cache() -> Path:
    """The folder that all projects of a user share (models, digests): `$ES2_CACHE`, or the system's choice."""
    return Path(os.environ.get("ES2_CACHE") or platformdirs.user_cache_dir("es2")).absolute()


def expanded(path: str | Path) -> str:
    """A path with the home folder for `~`; unchanged where there is no such home, or a NUL byte in it."""
    try:
        return os.path.expanduser(path)
    except ValueError:
        return str(path)


def machine_error(error: OSError, path: Path) -> MachineError:
    """The error for a write that the machine refused at `path`, with the variable that moves it elsewhere."""
    move = f"or set {'ES2_CACHE' if path.absolute().is_relative_to(user_cache()) else 'ES2_HOME'} to"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"No space is left on the disk for {path}; free some, {move} a folder on another disk.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineError(f"No permission to write {path}; make its folder writable, {move} one that is.")
    return MachineError(f"Cannot write {path} ({error.strerror or error}); check the folder, {move} another one.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes at `path`, into its `MachineError`."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, path) from error


def unreadable(error: OSError, path: Path) -> MachineError:
    """The error for a read that the machine refused."""
    return MachineError(f"Cannot read {path} ({error.strerror or error}); check the disk and the file's permissions.")


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted. Raises `OSError` where `Path.rglob` passes over an unreadable folder."""
    return sorted(file for _, files in _folders_of(folder) for file in files)


def _folders_of(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and those below it, the deepest first, each with the files in it."""

    def refuse(error: OSError) -> None:
        raise error

    for at, _, names in os.walk(folder, topdown=False, onerror=refuse):
        yield Path(at), [Path(at) / name for name in names]


def output_path(path: Path) -> Path:
    """The absolute path of a file or folder to write. Raises `InputError` for an impossible name."""
    try:
        absolute = os.path.abspath(os.path.expanduser(path))
        length = len(os.fsencode(os.path.basename(absolute)))
    except ValueError:
        length = 0
    if not 0 < length <= _MAX_NAME_BYTES or "\0" in absolute:
        raise InputError(f"{str(path)[:80]!r} cannot be the name of a file or folder; give another one.")
    return Path(absolute)


def give_usual_mode(*paths: Path) -> None:
    """Give files the permissions that a new file beside them has. Raises `OSError`.

    Safetensors 0.8 makes its files for the owner alone, whatever the umask (its issue 782).
    """
    for path in paths:
        beside = path.with_name(f".tmp-mode-{secrets.token_hex(4)}")
        try:
            beside.touch(exist_ok=False)
            usual = beside.stat().st_mode & 0o777
        finally:
            beside.unlink(missing_ok=True)
        if path.stat().st_mode & 0o777 != usual:
            path.chmod(usual)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file as `write_text` does; raises `ValueError` for NaN and infinities, too."""
    write_text(path, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file by rename, so that readers see the old content or the new.

    Raises:
        OSError: as the machine gives it; nothing is left behind.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def parse_json(data: bytes | str) -> Any:
    """The JSON value in `data`.

    Raises `ValueError` for invalid JSON, numbers that are not finite, and nesting deeper than `MAX_JSON_LEVELS`.
    """
    try:
        value = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[Any] = [value]
    for _ in range(MAX_JSON_LEVELS):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = list(chain.from_iterable(inside))
    if level:
        raise ValueError("nested too deeply")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number")
    return number


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is absent, larger than `MAX_JSON_BYTES`, or holds anything else.

    Raises `MachineError` when the file exists and cannot be read.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None
        document = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(error, path) from error
    return document if isinstance(document, dict) else None


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a new `digest` of its other entries, which is computed alike in all versions of a format."""
    rest = {name: entry for name, entry in document.items() if name != "digest"}
    plain = json.loads(json.dumps(rest, allow_nan=False))  # keys as they will be read
    return plain | {"digest": content_key(plain)}


def verify_checksum(document: Mapping[str, Any]) -> bool:
    """Whether an object is what `with_checksum` made; one without a digest is older than digests, and accepted."""
    rest = {name: entry for name, entry in document.items() if name != "digest"}
    return "digest" not in document or document["digest"] == content_key(rest)


def content_key(parts: Mapping[str, Any]) -> str:
    """24 hexadecimal characters that identify `parts` (JSON values): equal for equal content, whatever the order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Inode, modification time and size, which tell a file from its successor; None where there is none to be read."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def file_digest(path: Path) -> str:
    """The BLAKE2b digest (64 hexadecimal characters) of a file's bytes. Raises `OSError`.

    Digests of files above 1 MB are remembered in `user_cache()` by path, size and modification time, so that 14 GB of
    weights are read once; but not of files that changed within the last two seconds, the grain of the clock.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < _REMEMBER_FROM_BYTES:
        return _digest(path)
    identity = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memo = user_cache() / "digests" / f"{content_key({'path': str(path)})}.json"
    if (known := _recall(memo, identity)) is not None:
        return known
    digest = _digest(path)
    settled = abs(time.time_ns() - stat.st_mtime_ns) > _CLOCK_GRAIN_NS
    if settled and path.stat().st_mtime_ns == stat.st_mtime_ns:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, identity | {"digest": digest})
        except OSError as error:
            logger.warning("The digest of %s is not remembered (%s), so it is read again next time.", path, error)
    return digest


def _recall(memo: Path, identity: Mapping[str, Any]) -> str | None:
    try:
        known = read_json(memo) or {}
    except MachineError as error:
        logger.warning("%s", error)
        return None
    digest = known.pop("digest", None)
    return digest if isinstance(digest, str) and known == identity else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


@contextmanager
def lock(root: Path, key: str, while_waiting: Callable[[], None] | None = None, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of `key`; the thread that holds it may take it again. Raises `Timeout`."""
    path = root / ".locks" / f"{checked_key(key)}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, is_singleton=True)
        while True:
            try:
                held.acquire(timeout=timeout if while_waiting is None else 0.5)
                break
            except Timeout:
                if while_waiting is None:
                    raise
                while_waiting()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        raise machine_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
    try:
        yield
    finally:
        held.release()


@contextmanager
def new_folder(parent: Path, root: Path, key: str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `parent/key` when the block succeeds and vanishes when it does not.

    If `parent/key` exists by then it stays, since equal keys mean equal content, unless it is to be replaced.
    """
    final = parent / key
    with lock(root, key):
        temporary = parent / f".tmp-{key}-{secrets.token_hex(4)}"
        try:
            parent.mkdir(exist_ok=True)
            bring_back(final, root)
            _sweep(parent, root)
            temporary.mkdir()
            yield temporary
            for within, files in _folders_of(temporary):
                for path in (*files, within):
                    _flush(path)
            if not final.exists():
                temporary.rename(final)
                _flush(parent)
            elif replace:
                _swap(final, temporary)
                _flush(parent)
        except (OSError, SafetensorError) as error:
            raise machine_error(numbered(error, parent), final) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(final: Path, successor: Path) -> None:
    """Put `successor` in the place of `final`; if that fails, one of them is there or can be brought back."""
    former = final.with_name(f".former-{final.name}-{secrets.token_hex(4)}")
    final.rename(former)
    try:
        successor.rename(final)
    except OSError:
        former.rename(final)
        raise
    shutil.rmtree(former, ignore_errors=True)


def bring_back(final: Path, root: Path) -> None:
    """Put a folder back in its place when the process that was replacing it was killed. Raises `MachineError`."""
    formers = sorted(final.parent.glob(f".former-{final.name}-*"))
    if not formers:
        return
    with lock(root, final.name):
        for former in formers:
            with writing(final):
                if final.exists():
                    shutil.rmtree(former, ignore_errors=True)
                else:
                    former.rename(final)


def numbered(error: Exception, folder: Path) -> OSError:
    """The error with its number, which numpy and safetensors leave out when the disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    full = "No space left" in str(error) or shutil.disk_usage(folder).free < 2**16
    return OSError(errno.ENOSPC if full else 0, str(error))


def _sweep(parent: Path, root: Path) -> None:
    """Remove temporary folders of killed writers: those whose key is not locked."""
    for stale in parent.glob(".tmp-*"):
        key = stale.name.removeprefix(".tmp-").rpartition("-")[0]
        if not is_key(key):
            continue
        try:
            with lock(root, key, timeout=0):
                shutil.rmtree(stale, ignore_errors=True)
        except Timeout:
            continue


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quarantine(path: Path, inode: int, problem: str) -> DamagedError:
    """The error for a damaged folder, which is renamed unless it is shipped or another process has done so."""
    what = f"{path.parent.parent.name}/{path.name}" if path.parent.name == "derived" else path.name
    damage = f"is damaged ({one_line(problem)})"
    if is_shipped(path):
        return DamagedError(f"The artifact {what} in {shipped()} {damage}; {way_out(path, '')}.")
    where = "was set aside"
    try:
        if path.stat().st_ino == inode:
            number = 1
            while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
                number += 1
            path.rename(aside)
            where = f"was set aside as {aside.name}"
    except FileNotFoundError:
        pass  # another process set it aside
    except OSError as error:
        where = f"cannot be set aside ({error.strerror})"
    return DamagedError(f"The artifact {what} {damage} and {where}; compute it again.")


def is_key(name: str) -> bool:
    """Whether a folder of this name can be an artifact; temporary and set-aside ones cannot."""
    return _KEY.fullmatch(name) is not None


def checked_key(key: str) -> str:
    """`key` itself. Raises `InputError` where it could be a path."""
    if not is_key(key):
        raise InputError(f"{key[:80]!r} is no key of an artifact; keys are lower-case letters and digits.")
    return key
