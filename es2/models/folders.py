"""The local folder of a resolved model, fetched or converted when needed."""

from __future__ import annotations

from pathlib import Path

from es2.core.errors import MachineError
from es2.core.progress import Reporter, silent
from es2.models.catalogue import CATALOGUE, DEFAULT_MODEL, ModelSpec
from es2.models.costs import DTYPES, WORKING_SHARE
from es2.models.default_model import default_folder, make_default
from es2.models.device import require_memory
from es2.models.gguf_files import convert_gguf, count_gguf_parameters, gguf_folder, head_doubt
from es2.models.mirror import MIRRORS, has_mirrored, make_mirrored, mirror_folder, require_yes
from es2.models.model_files import fetch_snapshot, find_snapshot, first_line, is_unreachable, make_folder


def is_cached(spec: ModelSpec) -> bool:
    """Whether the model's folder is complete on this machine, so that `model_folder` needs no network."""
    if spec.kind == "folder":
        return True
    if spec.kind == "gguf":
        return gguf_folder(Path(spec.location)).is_dir()
    if spec.name == DEFAULT_MODEL:
        return default_folder().is_dir()
    return has_mirrored(spec.name) or find_snapshot(spec.location) is not None


def model_folder(spec: ModelSpec, report: Reporter = silent, *, allow_mirror: bool = False) -> Path:
    """The local folder of the model (safetensors, configuration, tokenizer), fetched or converted when needed.

    Args:
        allow_mirror: whether a mirror may stand in for a Hub that is not reached (`es2.models.mirror`); the environment
            can allow it, too.

    Raises:
        InputError: when the source holds no such model, or not in a form that is read here.
        MachineError: when network, disk or memory refuse, or a mirror would do and is not allowed.
    """
    if spec.kind == "folder":
        return Path(spec.location)
    if spec.kind == "gguf":
        gguf = Path(spec.location)
        return make_folder(gguf_folder(gguf), lambda folder: _convert(gguf, folder, report))
    if spec.name == DEFAULT_MODEL:
        return make_folder(default_folder(), lambda folder: make_default(folder, report))
    if has_mirrored(spec.name):  # before the Hub's copy, or the base of earlier runs would change under them
        return mirror_folder(spec.name)
    if (snapshot := find_snapshot(spec.location)) is not None:
        return snapshot
    try:
        return fetch_snapshot(spec.location, report)
    except MachineError as error:
        if spec.name not in MIRRORS or error.__cause__ is None or not is_unreachable(error.__cause__):
            raise
        require_yes(spec.name, first_line(error.__cause__), allow_mirror)
    return make_folder(mirror_folder(spec.name), lambda folder: _make_mirrored(spec.name, folder, report))


def _make_mirrored(name: str, folder: Path, report: Reporter) -> None:
    parameters = next(entry.parameters for entry in CATALOGUE if entry.name == name)
    require_memory(parameters * DTYPES["float32"] * WORKING_SHARE, "float32", "cpu", name)  # before the download
    make_mirrored(name, folder, report)


def model_doubts(spec: ModelSpec) -> list[str]:
    """Sentences on a model whose folder is there and that may have lost a part of itself, for all that can be read."""
    if spec.kind != "gguf":
        return []
    gguf = Path(spec.location)
    doubt = head_doubt(gguf_folder(gguf), gguf.name)
    return [] if doubt is None else [doubt]


def _convert(gguf: Path, folder: Path, report: Reporter) -> None:
    require_memory(count_gguf_parameters(gguf) * DTYPES["float32"] * WORKING_SHARE, "float32", "cpu", gguf.name)
    convert_gguf(gguf, folder, report)
