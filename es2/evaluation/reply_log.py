"""Replies of models in append-only JSONL files, so that none is generated twice.

Each is written when its batch is done, under a key of all that decides it. Those of a base are kept once for all its
runs (`base_log`), those of a fine-tune in the run's folder. A killed process leaves at worst half a line, which the
next process skips and generates again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from es2.core.files import (
    content_key,
    file_digest,
    home,
    parse_json,
    unreadable,
    verify_checksum,
    with_checksum,
    writing,
)

BASE_REPLIES = "base_replies"  # below `home()`


def base_log(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where a home keeps what a base replies, whichever runs it is compared with.

    Args:
        folder: of the base. Its generation config says which tokens end a reply.
        identity: the base's `Fingerprint`, of which an adapter is left out.
    """
    generation = folder / "generation_config.json"
    try:
        ends = file_digest(generation) if generation.is_file() else None
    except OSError as error:
        raise unreadable(error, generation) from error
    return home() / BASE_REPLIES / f"{content_key({**identity, 'adapter': None, 'generation': ends})}.jsonl"


class ReplyLog:
    """Replies that were generated, one JSON line each, by key; lines that are half or not what was written are skipped.

    Several processes may add to the same files.

    Args:
        path: the file of a run, or of all replies where there is no other.
        base: the file that replies of `base` are added to. They are looked for in both: earlier versions added them to
            the run's.

    Raises:
        MachineError: when a file is there and cannot be read.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self.base = base or path
        self._own = read_replies(path)
        self._records = self._own | (read_replies(base) if base else {})
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        self._asked.add(key)
        return self._records[key]

    def keep_asked(self) -> None:
        """Add to the evaluation's own file what it asked for and lies in the base's alone; raises `MachineError`."""
        if self.base == self.path:
            return
        missing = {key: self._records[key] for key in sorted(self._asked - self._own.keys())}
        _append(self.path, missing.values())
        self._own |= missing

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records in one piece and flush them to the disk; raises `MachineError` when it refuses."""
        records = list(records)
        for path, of_base in ((self.base, True), (self.path, False)):
            _append(path, [record for record in records if (record.get("model") == "base") is of_base])
        self._records.update({record["key"]: record for record in records})


def read_replies(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by key; none where there is no file. Raises `MachineError` when it cannot be read."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise unreadable(error, path) from error
    found: dict[str, dict[str, Any]] = {}
    for line in data.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and verify_checksum(record) and _is_record(record):
            found[record["key"]] = record
    return found


def _append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add lines to the end of a file, one process at a time; a half line that a killed one left there is ended."""
    lines = b"".join(json.dumps(with_checksum(record), ensure_ascii=False).encode() + b"\n" for record in records)
    if not lines:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            with suppress(OSError):  # of file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            ends_whole = not file.seek(0, os.SEEK_END) or (file.seek(-1, os.SEEK_END) >= 0 and file.read(1) == b"\n")
            file.write(lines if ends_whole else b"\n" + lines)
            file.flush()
            os.fsync(file.fileno())


def _is_record(record: dict[str, Any]) -> bool:
    """Whether the entries are of their kinds: a reply's `text` and `tokens`, a verdict, what the hooks `read`."""
    texts = all(isinstance(record.get(name, ""), str) for name in ("key", "text", "verdict"))
    tokens, read = record.get("tokens", []), record.get("read", {})
    lists = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
    numbers = isinstance(read, dict) and all(isinstance(number, (int, float)) for number in read.values())
    return "key" in record and texts and lists and numbers
