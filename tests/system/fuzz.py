"""Every reader, fed with what nobody wrote: it gives a result or one sentence, never another exception, soon.

    python -m tests.system.fuzz --cases 100000

A case is a valid file with a few seeded changes: bytes flipped, cut, repeated and put in; JSON values swapped for
others of another kind, size or depth, keys doubled, lost and renamed; headers that lie. Where a digest stands guard the
change is also made behind its back, so that the code after it is reached. A case that ends in anything but a result or
a sentence, takes five seconds of the processor or a minute of waiting, or asks for gigabytes is an escape, printed with
what replays it:

    python -m tests.system.fuzz --reader prompts.csv --seed 0 --case 17
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any
from unittest.mock import patch

from es2.core.errors import Es2Error, MachineError
from tests.system.readers import READERS, Attempt

CPU_SECONDS, WALL_SECONDS = 5.0, 60.0
"""What a case may take: of the processor's time, and by the clock, since what waits for ever takes none of it."""
EXTRA_BYTES = 3 * 2**30
LONGEST_SENTENCE = 2000


class HangError(BaseException):
    """A case took too long; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class Escape:
    """A case that ended in neither."""

    reader: str
    seed: int
    case: int
    error: str
    where: str

    @property
    def replay(self) -> str:
        return f"python -m tests.system.fuzz --reader {self.reader} --seed {self.seed} --case {self.case}"


@dataclass
class Count:
    """What became of one reader's cases."""

    reader: str
    cases: int = 0
    results: int = 0
    sentences: int = 0
    escapes: list[Escape] = field(default_factory=list)
    slowest: float = 0.0


@contextmanager
def bounds() -> Iterator[None]:
    """No network, no log, no more than `EXTRA_BYTES` of memory beyond what is taken, and a signal that ends a hang."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    pages = Path("/proc/self/statm")
    taken = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    if taken:
        resource.setrlimit(resource.RLIMIT_AS, (taken + EXTRA_BYTES, before[1]))
    try:
        with (
            patch("es2.prompts.loading.read_hub_rows", _offline),
            patch("es2.prompts.benchmarks.read_hub_rows", _offline),
        ):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        logging.disable(level)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _offline(name: str, split: str) -> Any:
    raise MachineError("The Hub cannot be reached.")


def attempt(count: Count, seed: int, case: int, one: Attempt) -> None:
    """Run one case and count how it ended."""
    begun = time.perf_counter()
    count.cases += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            one()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        count.results += 1
    except Es2Error as error:
        sentence = str(error)
        if sentence.strip() and "\n" not in sentence and len(sentence) <= LONGEST_SENTENCE:
            count.sentences += 1
        else:
            count.escapes.append(Escape(count.reader, seed, case, f"no sentence: {sentence[:300]!r}", ""))
    except (Exception, HangError) as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        place = next((f"{frame.filename}:{frame.lineno}" for frame in frames if "/es2/" in frame.filename), "")
        count.escapes.append(Escape(count.reader, seed, case, f"{type(error).__name__}: {error}"[:300], place))
    count.slowest = max(count.slowest, time.perf_counter() - begun)


def run(
    cases: int,
    seed: int = 0,
    readers: Sequence[str] = (),
    only: int | None = None,
    tell: Callable[[Count], None] = lambda count: None,
) -> list[Count]:
    """About `cases` cases over the readers by their weights; `only` replays a single one.

    Args:
        cases: how many in all.
        seed: of the changes; the same seed gives the same cases, whatever else is run.
        readers: their names; all if not given.
        only: the number of the one case to run.
        tell: called with each reader's count when it is done.
    """
    chosen = {name: reader for name, reader in READERS.items() if not readers or name in readers}
    total = sum(reader.weight for reader in chosen.values())
    counts = []
    for name, reader in chosen.items():
        folder = Path(tempfile.mkdtemp(prefix="es2-fuzz-"))
        try:
            with _places(folder):
                draw = reader.prepare(folder)
                numbers = range(round(cases * reader.weight / total)) if only is None else (only,)
                count = Count(name)
                with bounds():
                    for case in numbers:
                        attempt(count, seed, case, draw(Random(f"{seed}:{name}:{case}")))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        tell(count)
        counts.append(count)
    return counts


@contextmanager
def _places(folder: Path) -> Iterator[None]:
    places: Mapping[str, str] = {"ES2_HOME": str(folder / "home"), "ES2_CACHE": str(folder / "cache")}
    with patch.dict(os.environ, places):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed every reader with damaged input.")
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[], choices=list(READERS), help="only this one")
    parser.add_argument("--case", type=int, help="replay this one case of the reader")
    parser.add_argument("--json", type=Path, help="where the counts are kept as JSON")
    options = parser.parse_args()
    out = sys.stdout
    out.write(f"{'reader':22}{'cases':>9}{'results':>9}{'sentences':>11}{'escapes':>9}{'slowest':>10}\n")

    def tell(count: Count) -> None:
        figures = f"{count.cases:9,}{count.results:9,}{count.sentences:11,}{len(count.escapes):9,}"
        out.write(f"{count.reader:22}{figures}{count.slowest:9.2f}s\n")
        out.flush()

    warnings.simplefilter("ignore")
    begun = time.perf_counter()
    counts = run(options.cases, options.seed, options.reader, options.case, tell)
    escapes = [escape for count in counts for escape in count.escapes]
    document = {
        "seed": options.seed,
        "cases": sum(count.cases for count in counts),
        "results": sum(count.results for count in counts),
        "sentences": sum(count.sentences for count in counts),
        "escapes": len(escapes),
        "seconds": round(time.perf_counter() - begun, 1),
        "readers": {
            count.reader: {"cases": count.cases, "results": count.results, "sentences": count.sentences}
            | {"escapes": [vars(escape) | {"replay": escape.replay} for escape in count.escapes[:20]]}
            for count in counts
        },
    }
    text = json.dumps(document, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    out.write(text + "\n")
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
