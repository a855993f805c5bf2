"""Two hundred accidents: `python -m tests.system.faults --cases 200 --seed 0`.

Each case puts a home folder into a known state, lets one operation meet one fault at a random point, and then asks what
a person would ask: is every artifact whole or absent, does every job say what is true, does the app open and tell, does
the next attempt succeed, and is what it makes what an undisturbed one makes? A case is a function of seed and number,
but for those that are killed at a time of the clock; `--case N` runs one alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from es2.jobs.job import ACTIVE
from tests.system.injected import CLOCKS, SIGNALS, Fault, Injected
from tests.system.onlooker import look
from tests.system.operations import (
    BUG,
    OPERATIONS,
    Ended,
    Operation,
    World,
    in_a_process,
    set_up,
    stub_umap,
    warm_umap,
)

LATER = {"killed at a time": "killed", "terminated at a time": "terminated"}
SMALL_DISK = "disk full (mounted)"
DAMAGES = ("byte flipped", "file cut short")
FAULTS = (*SIGNALS, *LATER, "disk full", SMALL_DISK, "no permission", *DAMAGES, "folder removed", *CLOCKS)
PAGES = ("", "layers", "series", "runs", "sweep", "behaviour", "robustness", "own")
APP_EVERY = 3
"""The app is opened after every third case: it takes as long as the operation itself."""


@dataclass(frozen=True)
class Stage:
    """A home folder to begin with.

    Attributes:
        path: where it is kept.
        artifacts: those that are whole in it, as paths from the home.
    """

    path: Path
    artifacts: frozenset[str]


@dataclass(frozen=True)
class Reference:
    """An operation that nothing disturbed: its duration, its requests of the home folder, and what it made."""

    seconds: float
    count: dict[str, int]
    outcome: dict[str, str | None]
    growth: int
    finished: Stage


@dataclass
class Case:
    """One accident and what came of it.

    Attributes:
        number: of the case.
        operation: what was disturbed.
        fault: by what.
        point: where, in words.
        problems: what should not be; empty when everything held.
        lost: artifacts that were whole before, were not hit themselves, and are not whole any more.
        wrong: jobs and readers that said what is not so.
        quarantine: damaged artifacts that were recognised.
        whole: artifacts that were whole after the fault.
        seconds: how long the case took.
    """

    number: int
    operation: str
    fault: str
    point: str = ""
    problems: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    quarantine: int = 0
    whole: int = 0
    app_opened: bool = False
    skipped: str | None = None
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        return not (self.problems or self.lost or self.wrong)


def plan(seed: int, cases: int, operations: Sequence[Operation]) -> list[tuple[Operation, str]]:
    """So many operations and faults: every combination once before any comes twice."""
    rng, chosen = random.Random(seed), []
    while len(chosen) < cases:
        round_ = list(product(operations, FAULTS))
        rng.shuffle(round_)
        chosen += round_
    return chosen[:cases]


class Suite:
    """The stages and references of one run of the suite, and its cases.

    Args:
        world: where everything lies.
        operations: what is disturbed.
    """

    def __init__(self, world: World, operations: Sequence[Operation]) -> None:
        self.world = world
        self.log = world.root / "log.txt"
        self.can_mount = _can_mount(world.root / "mounted")
        by_name = {operation.name: operation for operation in OPERATIONS}
        self._clear()
        self.stages = {"bare": self._keep("bare")}
        self.references: dict[str, Reference] = {}
        for stage, maker in (("captured", "capture"), ("tuned", "fine-tune"), ("shown", "showcase")):
            if stage == "shown" and all(operation.stage != stage for operation in operations):
                continue
            self._put_back(self.stages[by_name[maker].stage])
            self._undisturbed(by_name[maker])
            self.stages[stage] = self._keep(stage)
        for operation in operations:
            self._put_back(self.stages[operation.stage])
            before = _used(world.home)
            started = time.monotonic()
            count = self._undisturbed(operation)
            seconds, growth = time.monotonic() - started, _used(world.home) - before
            outcome = in_a_process(lambda o=operation: o.outcome(world), self.log).value
            if not outcome or None in outcome.values():
                raise RuntimeError(f"{operation.name} made {outcome}: {self.log.read_text()}")
            finished = self._keep(f"after {operation.name}")
            self.references[operation.name] = Reference(seconds, count, outcome, growth, finished)

    # ------------------------------------------------------------------------------------------------------- stages

    def _clear(self) -> None:
        self.world.home.mkdir(exist_ok=True)
        for path in self.world.home.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _put_back(self, stage: Stage) -> None:
        self._clear()
        shutil.copytree(stage.path, self.world.home, dirs_exist_ok=True)

    def _keep(self, name: str) -> Stage:
        """The home as it is, under a name."""
        path = self.world.root / "stages" / name
        shutil.copytree(self.world.home, path)
        seen = in_a_process(lambda: look(self.world), self.log).value
        if seen is None or seen["damaged"]:
            raise RuntimeError(f"The stage {name} is not whole: {seen} {self.log.read_text()}")
        return Stage(path, frozenset(seen["whole"]))

    def _undisturbed(self, operation: Operation) -> dict[str, int]:
        job = operation.prepare(self.world)

        def work() -> Any:
            injected = Injected(self.world.home)
            code = operation.work(self.world, job)
            return injected.count if code == 0 else code

        ended = in_a_process(work, self.log, launched=job)
        if not isinstance(ended.value, dict):
            raise RuntimeError(f"{operation.name} fails undisturbed ({ended.code}): {ended.log}")
        return ended.value

    # -------------------------------------------------------------------------------------------------------- a case

    def run(self, seed: int, number: int, operation: Operation, fault: str) -> Case:
        """Let it happen, and judge."""
        case = Case(number, operation.name, fault)
        rng = random.Random(f"{seed} {number}")
        started = time.monotonic()
        if fault == SMALL_DISK and not self.can_mount:
            case.skipped = "no right to mount a file system here"
            return case
        (self.world.root / "removed").unlink(missing_ok=True)
        with small_disk(self.world.home) if fault == SMALL_DISK else _nothing_special():
            before, excused, ended = self._suffer(case, rng, operation)
            self._judge(case, operation, before, excused, ended, page=rng.choice(PAGES))
            if fault == SMALL_DISK:
                _resize(self.world.home, 2**26)
            self._try_again(case, operation)
        case.seconds = time.monotonic() - started
        return case

    def _suffer(
        self, case: Case, rng: random.Random, operation: Operation
    ) -> tuple[frozenset[str], str | None, Ended | None]:
        """The fault. Returns the artifacts before it, the path that it hit itself, and how the process ended."""
        reference = self.references[operation.name]
        if case.fault in DAMAGES:
            self._put_back(reference.finished)
            case.point = damage(self.world.home, rng, cut=case.fault == "file cut short")
            return reference.finished.artifacts, str(Path(case.point).parent), None
        stage = self.stages[operation.stage]
        self._put_back(stage)
        job = operation.prepare(self.world)
        if case.fault in LATER:
            after = rng.uniform(0, reference.seconds)
            case.point = f"after {after:.3f} s"
            kill = (after, SIGNALS[LATER[case.fault]])
            ended = in_a_process(lambda: operation.work(self.world, job), self.log, launched=job, kill=kill)
        elif case.fault == SMALL_DISK:
            room = int(rng.uniform(0, 1) * reference.growth)
            case.point = f"{room // 1024} KiB free of {reference.growth // 1024} needed"
            _resize(self.world.home, _used(self.world.home) + room)
            ended = in_a_process(lambda: operation.work(self.world, job), self.log, launched=job)
        else:
            fault = Fault(
                case.fault,
                at=rng.randrange(reference.count["writes" if case.fault == "disk full" else "all"]),
                lasting=rng.random() < 0.7,
                seed=rng.randrange(2**31),
            )
            case.point = f"at request {fault.at}{' and from then on' if fault.lasting else ''}"

            def work() -> int:
                Injected(self.world.home, fault)
                return operation.work(self.world, job)

            ended = in_a_process(work, self.log, launched=job)
        removed = self.world.root / "removed"
        return stage.artifacts, removed.read_text() if removed.exists() else None, ended

    def _judge(
        self,
        case: Case,
        operation: Operation,
        before: frozenset[str],
        excused: str | None,
        ended: Ended | None,
        page: str,
    ) -> None:
        """What an onlooker finds after the fault."""
        app = page if case.number % APP_EVERY == 0 else None
        seen = in_a_process(lambda: look(self.world, app), self.log)
        if seen.value is None:
            case.problems.append(f"nobody can look at it ({seen.code}): {seen.log[-1500:]}")
            return
        case.app_opened = app is not None
        judge(case, seen.value, before, excused, ended)
        if ended is not None and ended.code == 0 and case.fault != "folder removed":
            self._compare(case, operation, "it says that it succeeded")

    def _compare(self, case: Case, operation: Operation, when: str) -> None:
        ended = in_a_process(lambda: operation.outcome(self.world), self.log)
        expected = self.references[operation.name].outcome
        for name, value in expected.items():
            if (made := (ended.value or {}).get(name)) != value:
                what = "is not there" if made is None else "is not what an undisturbed one makes"
                case.wrong.append(f"{when}, and its {name} {what} {ended.log[-1500:]}")

    def _try_again(self, case: Case, operation: Operation) -> None:
        ended = in_a_process(lambda: operation.work(self.world, None), self.log)
        if ended.code != 0:
            case.problems.append(f"the next attempt failed ({ended.code}): {ended.log[-1500:]}")
            return
        self._compare(case, operation, "the next attempt succeeded")
        # A JSON file of a few hundred bytes that was not renamed in time stays in its folder, where nobody reads it.
        names = (".tmp-*", ".former-*", ".deleted-*")
        found = [path for name in names for path in self.world.home.rglob(name) if ".json-" not in path.name]
        left = [str(path.relative_to(self.world.home)) for path in found]
        if left:
            case.problems.append(f"temporary things are left: {', '.join(sorted(left))}")


def judge(
    case: Case, found: Mapping[str, Any], before: frozenset[str], excused: str | None, ended: Ended | None
) -> None:
    """Note in `case` what should not be.

    Args:
        case: the accident.
        found: what `look` gave after it.
        before: the artifacts that were whole before it.
        excused: what it hit itself, as a path from the home.
        ended: how the process ended to which it happened.
    """
    said = ended.log[-1500:] if ended is not None else ""
    if ended is not None:
        if ended.code is None:
            case.problems.append("the process hung")
        if ended.code == BUG:
            case.problems.append(f"it ended with a traceback: {said}")
        if ended.left:
            case.problems.append("it left processes behind")
    case.whole, case.quarantine = len(found["whole"]), len(found["damaged"])
    gone = before - set(found["whole"])
    case.lost += [name for name in sorted(gone) if excused is None or not _touches(name, excused)]
    if excused is None:
        case.wrong += [f"{name} is there and not whole" for name in found["damaged"]]
    for job in found["jobs"]:
        told = f"{job['kind']} job {job['id']} is {job['status']}"
        if job["status"] in ACTIVE:
            case.wrong.append(f"{told}, and no process lives")
        disowned = job["status"] == "failed" and "makes them again" in job["error"]
        if (job["status"] in ("done", "stopped") or disowned) != job["result"]:
            case.wrong.append(f"{told}, and {'has' if job['result'] else 'has no'} result")
        if "unexpectedly" in (job["error"] or "") and excused is None:
            case.problems.append(f"{told} for no stated reason: {job['error']} {said}")
    case.problems += [f"the app: {problem}" for problem in found["app"]]


def _touches(name: str, hit: str) -> bool:
    """Whether an artifact lies in what was hit, or what was hit in it."""
    a, b = Path(name).parts, Path(hit).parts
    return a[: len(b)] == b[: len(a)]


def damage(home: Path, rng: random.Random, *, cut: bool) -> str:
    """Change one bit of a finished file, or cut it off somewhere; returns its path from the home.

    Locks and logs hold nothing, and what was exported is the user's, which nobody here reads again.
    """
    spared = ("lock", ".lock", "log.txt")
    kept = (path for path in home.rglob("*") if path.is_file() and home / "exported" not in path.parents)
    files = sorted(path for path in kept if not path.name.endswith(spared))
    hit = rng.choice([path for path in files if path.stat().st_size])
    content = bytearray(hit.read_bytes())
    place = rng.randrange(len(content))
    if cut:
        content = content[:place]
    else:
        content[place] ^= 1 << rng.randrange(8)
    hit.write_bytes(content)
    return str(hit.relative_to(home))


# ------------------------------------------------------------------------------------------------------------ the disk


def _can_mount(place: Path) -> bool:
    place.mkdir()
    try:
        with small_disk(place):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of its own at `place`, roomy at first."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


def _resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(4096, size)}", str(place)], check=True, capture_output=True)


@contextmanager
def _nothing_special() -> Iterator[None]:
    yield


def _used(folder: Path) -> int:
    """Bytes in whole pages of all files."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------------------- the report


def report(cases: Sequence[Case], seed: int, seconds: float) -> dict[str, Any]:
    """The counts of all cases, as JSON values."""
    ran = [case for case in cases if case.skipped is None]
    return {
        "seed": seed,
        "cases": len(ran),
        "faults": dict(Counter(case.fault for case in ran)),
        "operations": dict(Counter(case.operation for case in ran)),
        "survivors": sum(case.held for case in ran),
        "artifacts_whole": sum(case.whole for case in ran),
        "artifacts_lost": sum(len(case.lost) for case in ran),
        "wrong_states": sum(len(case.wrong) for case in ran),
        "damaged_recognised": sum(case.quarantine for case in ran),
        "app_opened": sum(case.app_opened for case in ran),
        "skipped": dict(Counter(case.skipped for case in cases if case.skipped)),
        "seconds": round(seconds, 1),
        "failed": [vars(case) for case in ran if not case.held],
    }


def table(cases: Sequence[Case]) -> str:
    """Faults down, operations across; survivors of all."""
    operations = list(dict.fromkeys(case.operation for case in cases))
    rows = [["fault", *operations, "all"]]
    for fault in FAULTS:
        of_fault = [case for case in cases if case.fault == fault]
        groups = [[case for case in of_fault if case.operation == name] for name in operations] + [of_fault]
        rows.append([fault, *(f"{sum(case.held for case in group)}/{len(group)}" if group else "" for group in groups)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--quick", action="store_true", help="PCA in the place of UMAP, whose compiler takes a while")
    parser.add_argument("--out", type=Path, help="write the counts here as JSON, too")
    options = parser.parse_args()
    started = time.monotonic()
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # the one that survives a fork
    n_cases = options.cases if options.case is None else options.case + 1
    chosen = list(enumerate(plan(options.seed, n_cases, OPERATIONS)))[options.case or 0 :]
    with tempfile.TemporaryDirectory(prefix="es2-faults-") as folder:
        world = World(Path(folder).resolve())
        set_up(world)
        stub_umap() if options.quick else warm_umap()
        names = {operation.name for _, (operation, _) in chosen}
        suite = Suite(world, [operation for operation in OPERATIONS if operation.name in names])
        cases = []
        for number, (operation, fault) in chosen:
            case = suite.run(options.seed, number, operation, fault)
            cases.append(case)
            if not case.held:
                sys.stderr.write(f"\nCase {number} ({operation.name}, {fault} {case.point}):\n")
                sys.stderr.write("\n".join([*case.problems, *case.wrong, *(f"lost: {name}" for name in case.lost)]))
                sys.stderr.write(f"\nReplay: python -m tests.system.faults --seed {options.seed} --case {number}\n")
    found = report(cases, options.seed, time.monotonic() - started)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    sys.stdout.write(f"{table(cases)}\n{json.dumps({k: v for k, v in found.items() if k != 'failed'}, indent=1)}\n")
    sys.exit(0 if found["survivors"] == found["cases"] else 1)


if __name__ == "__main__":
    main()
