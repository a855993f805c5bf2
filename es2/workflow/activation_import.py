"""Embeddings that were read elsewhere, taken in as an activation set with its analysis, as the app opens it.

The file says which model and prompts it is of; labels and splits come from the prompts, as everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.layers import analyze
from es2.analysis.results import Analysis, AnalysisConfig
from es2.analysis.setup import check_prompts
from es2.core.errors import InputError, one_line
from es2.core.files import content_key, expanded, file_digest, parse_json, unreadable
from es2.core.progress import Reporter, silent
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.sources import is_position
from es2.store.store import Store
from es2.workflow.activation_table import is_table, read_table, table_files
from es2.workflow.derived import analysis_key

if TYPE_CHECKING:
    from jaxtyping import Float

_NEEDED = "its metadata needs an entry `es2`, JSON with `model` and `texts` (docs/interop.md)"


def import_activations(
    file: str | Path, prompts: PromptSet, report: Reporter = silent
) -> tuple[ActivationSet, Analysis]:
    """Keep the measured prompts' embeddings of a file, or of a saved dataset, as an activation set, and analyse them.

    Args:
        file: safetensors, one tensor `[layer, prompt, d_model]` for each position, named by it, float32 or float16; in
            the metadata an entry `es2`, JSON with `model`, a name, and `texts`, the prompts in the tensors' order. Or
            a table (`es2.workflow.activation_table`).
        prompts: their prompt set; every measured prompt must be in the file.

    Raises:
        InputError: for a file that is not such a file or not of these prompts, or values that are not finite.
        MachineError: when the machine refuses.
    """
    path = Path(expanded(file)).absolute()
    measured = prompts.measured()
    check_prompts(prompts)
    digests = [file_digest(one) for one in table_files(path)] if is_table(path) else None
    about, arrays = _read(path)
    rows = {text: row for row, text in enumerate(about["texts"])}
    missing = sum(text not in rows for text in measured.texts)
    if missing:
        raise InputError(
            f"The file {path.name!r} lacks {missing:,} of the {len(measured):,} probe and test prompts of "
            f"{prompts.name!r}; give the prompts that it is of with --prompts."
        )
    order = [rows[text] for text in measured.texts]
    # Its run is on another machine, and its embeddings are not the base model's.
    name = f"{about['model']}, run {about['run']}" if about.get("run") else about["model"]
    meta = {"model": name, "run": None, "texts_digest": measured.texts_digest, "imported": path.name}
    meta |= {"rendering": about["rendering"]} if isinstance(about.get("rendering"), dict) else {}
    key = content_key({"kind": "imported", "file": digests or file_digest(path), "texts": measured.texts_digest})
    chosen = {position: np.ascontiguousarray(array[:, order]) for position, array in arrays.items()}
    activations = Store().write(key, meta, measured.texts, chosen)
    config = AnalysisConfig(position="last" if "last" in chosen else next(iter(chosen)))
    of_analysis = analysis_key(activations, measured, config)
    if (folder := activations.derived(of_analysis)) is not None:
        return activations, Analysis.load(folder)
    analysis = analyze(measured, activations, config=config, report=report)
    with activations.write_derived(of_analysis) as folder:
        analysis.save(folder)
    return activations, analysis


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Float[np.ndarray, "layer prompt d_model"]]]:
    """What the file is of, and its arrays by position."""
    from safetensors import SafetensorError, safe_open

    name = repr(path.name)
    if not path.exists():
        raise InputError(
            f"There is no file {str(path)!r}; give a safetensors or Parquet file, or what `Dataset.save_to_disk` wrote."
        )
    try:
        if is_table(path):
            about, arrays = read_table(path)
            _check(about, name)
        else:
            with safe_open(path, "numpy") as opened:
                about = _about((opened.metadata() or {}).get("es2"), name)
                arrays = {tensor: _array(opened, tensor, len(about["texts"]), name) for tensor in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"The file {name} is no readable safetensors file ({one_line(error)}).") from error
    except OSError as error:
        raise unreadable(error, path) from error
    for position, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{position} of {name} holds values that are not finite; capture it in float32.")
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len({array.dtype for array in arrays.values()}) != 1:
        raise InputError(
            f"The file {name} needs one tensor for each position, all of one shape and number format; it has "
            f"{', '.join(f'{tensor} {list(array.shape)}' for tensor, array in arrays.items()) or 'none'}."
        )
    return about, arrays


def _about(text: str | None, name: str) -> dict[str, Any]:
    try:
        about = parse_json(text or "null")
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise InputError(f"The file {name} does not say which model and prompts it is of; {_NEEDED}.")
    _check(about, name)
    return about


def _check(about: dict[str, Any], name: str) -> None:
    model, texts = about.get("model"), about.get("texts")
    if not (isinstance(model, str) and model.strip()):
        raise InputError(f"The file {name} does not name its model; {_NEEDED}.")
    if not (isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)):
        raise InputError(f"The file {name} does not list its prompts; {_NEEDED}.")


def _array(opened: Any, tensor: str, n_texts: int, name: str) -> Float[np.ndarray, "layer prompt d_model"]:
    if not is_position(tensor):
        raise InputError(
            f"The tensor {tensor[:40]!r} of {name} is named by no token position; call it last, last_instruction, "
            "last-1 … or mean."
        )
    entry = opened.get_slice(tensor)
    shape, dtype = entry.get_shape(), entry.get_dtype()
    if dtype not in ("F32", "F16"):
        raise InputError(f"The tensor {tensor} of {name} is {dtype}; write it as float32 or float16.")
    if len(shape) != 3 or shape[1] != n_texts or not all(shape):
        raise InputError(
            f"The tensor {tensor} of {name} is {shape}; [layers, {n_texts} prompts, width] is needed for its texts."
        )
    array: Float[np.ndarray, "layer prompt d_model"] = opened.get_tensor(tensor)
    return array
