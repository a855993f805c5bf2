"""Atomic writes, digests and their memo, keys, locks."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from es2.core.errors import InputError, MachineError
from es2.core.files import (
    bring_back,
    checked_key,
    content_key,
    file_digest,
    home,
    lock,
    machine_error,
    new_folder,
    read_json,
    user_cache,
    write_json,
)

LARGE = 2 * 2**20
LONG_AGO_NS = 10**18


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def independent_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()


def old_large_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"w" * LARGE)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return path


def test_places_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache() == tmp_path / "cache"
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("ES2_HOME")
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path
    monkeypatch.delenv("ES2_CACHE")
    assert user_cache().is_absolute()
    assert user_cache().name == "es2"


def test_content_key_depends_on_content_alone() -> None:
    key = content_key({"weights": "ab", "positions": ["last"], "nested": {"x": 1, "y": 2}})
    assert key == content_key({"nested": {"y": 2, "x": 1}, "positions": ("last",), "weights": "ab"})
    assert key != content_key({"weights": "ab", "positions": ["last"], "nested": {"x": 1, "y": 3}})
    assert len(key) == 24
    assert checked_key(key) == key
    with pytest.raises(ValueError, match="Out of range"):
        content_key({"x": float("nan")})


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "a/b", "/etc", "Abc", "ab.damaged-1", ".tmp-a-1", "a\n", "a" * 65]
)
def test_a_key_never_becomes_a_path(key: str) -> None:
    with pytest.raises(InputError, match="no key"):
        checked_key(key)


def test_digest_of_a_small_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x")
    assert file_digest(path) == independent_digest(path)
    assert not cache.exists()


def test_a_large_file_is_read_once(tmp_path: Path) -> None:
    path = old_large_file(tmp_path)
    digest = file_digest(path)
    assert digest == independent_digest(path)
    path.write_bytes(b"v" * LARGE)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert file_digest(path) == digest, "same path, size and time: remembered, not read"
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    assert file_digest(path) == independent_digest(path) != digest
    path.write_bytes(b"v" * (LARGE + 1))
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    assert file_digest(path) == independent_digest(path)


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "fresh"
    path.write_bytes(b"w" * LARGE)
    assert file_digest(path) == independent_digest(path)
    assert not cache.exists()


def test_an_unwritable_cache_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "file" / "cache"))
    path = old_large_file(tmp_path)
    assert file_digest(path) == independent_digest(path)
    assert "not remembered" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"digest": "00"}', b'{"digest": 3}'])
def test_a_damaged_memo_is_not_believed(tmp_path: Path, cache: Path, damage: bytes) -> None:
    path = old_large_file(tmp_path)
    digest = file_digest(path)
    (memo,) = (cache / "digests").iterdir()
    memo.write_bytes(damage)
    assert file_digest(path) == digest


def test_a_memo_that_cannot_be_read_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_large_file(tmp_path)
    digest = file_digest(path)
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EACCES))
    assert file_digest(path) == digest


def refuse(number: int):
    def refused(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"text": "ü", "n": 1})
    assert read_json(path) == {"text": "ü", "n": 1}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"n": float("inf")})
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"text": "ü", "n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_reads_as_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None


def test_unreadable_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EACCES))
    with pytest.raises(MachineError, match=r"Cannot read .*permissions"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space"),
        (errno.EDQUOT, "No space"),
        (errno.EROFS, "No permission"),
        (errno.EIO, "Cannot write"),
    ],
)
@pytest.mark.parametrize(("place", "setting"), [("cache/models/x", "ES2_CACHE"), ("runs/x", "ES2_HOME")])
def test_refusals_name_the_thing_and_the_fix(
    number: int, words: str, place: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    sentence = str(machine_error(OSError(number, os.strerror(number)), tmp_path / place))
    assert sentence.startswith(words)
    assert place in sentence
    assert setting in sentence


def test_a_lock_excludes_others_but_not_its_holder(tmp_path: Path) -> None:
    class GaveUp(Exception):  # noqa: N818
        pass

    def give_up() -> None:
        raise GaveUp

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(tmp_path, "a"), lock(tmp_path, "a"):
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    with pytest.raises(GaveUp), lock(tmp_path, "a", while_waiting=give_up):
        pass
    with lock(tmp_path, "b", while_waiting=give_up):
        pass
    done.set()
    holder.join()
    with lock(tmp_path, "a", while_waiting=give_up):
        pass


def test_a_folder_whose_block_fails_vanishes(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path, tmp_path, "a") as folder:
            (folder / "x").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_all_of_a_new_folder_is_flushed_or_it_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, flush, listed = set[int](), os.fsync, os.scandir

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def scandir(folder: Any = ".") -> Any:
        if str(folder).endswith("refused"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listed(folder)

    def written(key: str, below: str) -> None:
        with new_folder(tmp_path, tmp_path, key) as folder:
            (folder / below).mkdir()
            (folder / below / "file").touch()

    monkeypatch.setattr(os, "fsync", fsync)
    written("a", "below")
    assert {path.stat().st_ino for path in (tmp_path / "a", *(tmp_path / "a").rglob("*"))} < flushed
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(MachineError, match="No permission"):
            written("b", "refused")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "a"]


def test_a_folder_that_was_being_replaced_is_brought_back(tmp_path: Path) -> None:
    """A process that was killed after it had moved the old folder away, and one that was killed a moment later."""
    for name in (".former-a-00112233", ".former-b-00112233", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    for key in ("a", "b", "c"):
        bring_back(tmp_path / key, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "a", "b"]
    assert (tmp_path / "a" / "content").read_text() == ".former-a-00112233"
    assert (tmp_path / "b" / "content").read_text() == "b"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import es2.core.files, es2.store.store, es2.jobs.job, es2.jobs.queue\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'streamlit', 'pandas', 'sklearn', 'pyarrow'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
