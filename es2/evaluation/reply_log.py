"""Replies of models in an append-only JSONL file, so that none is generated twice.

Each is written when its batch is done, under a key of all that decides it. A killed process leaves at worst half a
line, which the next process skips and generates again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from es2.core.files import parse_json, unreadable, verify_checksum, with_checksum, writing


class ReplyLog:
    """Replies that were generated, one JSON line each, by key; lines that are half or not what was written are skipped.

    Raises:
        MachineError: when the file is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise unreadable(error, path) from error
        self._ends_whole = not data or data.endswith(b"\n")
        for line in data.splitlines():
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict) and verify_checksum(record) and _is_record(record):
                self._records[record["key"]] = record

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records in one piece and flush them to the disk; raises `MachineError` when it refuses."""
        records = list(records)
        lines = b"".join(json.dumps(with_checksum(record), ensure_ascii=False).encode() + b"\n" for record in records)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write((b"" if self._ends_whole else b"\n") + lines)
                file.flush()
                os.fsync(file.fileno())
        self._ends_whole = True
        self._records.update({record["key"]: record for record in records})


def _is_record(record: dict[str, Any]) -> bool:
    """Whether the entries are of their kinds: a reply's `text` and `tokens`, a verdict, what the hooks `read`."""
    texts = all(isinstance(record.get(name, ""), str) for name in ("key", "text", "verdict"))
    tokens, read = record.get("tokens", []), record.get("read", {})
    lists = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
    numbers = isinstance(read, dict) and all(isinstance(number, (int, float)) for number in read.values())
    return "key" in record and texts and lists and numbers
