"""What commit b0b27d8 read from the artifacts in `tests/data/b0b27d8`, and comparing with it what is read today."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es2.core.former import TODAY

EXPECTED: dict[str, Any] = json.loads((Path(__file__).with_name("data") / "b0b27d8" / "expected.json").read_text())
MODEL = "example/tiny-llama"
RUNS: dict[str, str] = {name: row["run"] for name, row in EXPECTED["runs"].items()}
"""The ids of the runs by what became of them."""

RENAMED: Mapping[str, str] = TODAY
"""Names in the old files and in what the old code printed, and what each is called today where it was renamed."""


def check(found: Any, expected: Any, rel: float = 1e-12, at: str = "") -> None:
    """Everything in `expected` must be in `found`, under today's names; an interval may be a list of three numbers.

    Args:
        found: what today's code gives.
        expected: what the old code gave, or wrote.
        rel: by how much a number may differ, relatively; absolutely by a tenth of that.
        at: where in the document this is, for the message.
    """
    if isinstance(expected, dict):
        for name, entry in expected.items():
            today = RENAMED.get(name, name)
            assert today in found, f"{at} has no {today!r}"
            check(found[today], entry, rel, f"{at}/{today}")
    elif isinstance(expected, list):
        values = [found["value"], found["low"], found["high"]] if isinstance(found, dict) else list(found)
        assert len(values) == len(expected), at
        for place, (value, entry) in enumerate(zip(values, expected, strict=True)):
            check(value, entry, rel, f"{at}/{place}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=rel, abs_tol=rel / 10), f"{at}: {found} is not {expected}"
    else:
        assert found == expected, f"{at}: {found!r} is not {expected!r}"


def written_today(home: Path) -> list[str]:
    """The files below `cached_activations/` and `runs/` that are not as the old code left them, less locks."""
    files = [path for name in ("cached_activations", "runs") for path in (home / name).rglob("*") if path.is_file()]
    new = [path for path in files if path.stat().st_mtime > 1_700_000_000 and path.suffix != ".lock"]
    return sorted(path.relative_to(home).as_posix() for path in new)
