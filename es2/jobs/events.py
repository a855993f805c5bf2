"""Events of a job, a JSON object a line, whose last line may be partial while a process writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es2.core.files import parse_json
from es2.core.former import todays_names

logger = logging.getLogger(__name__)

_TAIL_BYTES = 2**16


def tail(path: Path) -> bytes:
    """The last 64 KB of a file, from the beginning of a line on; empty if it is absent."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return b""
    return data if size <= _TAIL_BYTES else data.partition(b"\n")[2]


def parse_events(lines: bytes, path: Path) -> list[dict[str, Any]]:
    """The events in whole lines of `path`; damaged lines are skipped with a warning."""
    events = []
    for line in lines.splitlines():
        try:
            event = parse_json(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and _is_event(event):
            events.append(todays_names(event))
        else:
            logger.warning("Skipped a damaged line in %s.", path)
    return events


def _is_event(event: Mapping[str, Any]) -> bool:
    """Whether a line is an event; in one with a stage, all but `event` and `stage` are numbers or None."""
    if not isinstance(event.get("event"), str):
        return False
    if event["event"] != "progress" and "stage" not in event:
        return True
    numbers = [event.get(name) for name in ("time", "done", "total")]
    numbers += [entry for name, entry in event.items() if name not in ("event", "stage") and entry is not None]
    return isinstance(event.get("stage"), str) and all(isinstance(number, (int, float)) for number in numbers)
