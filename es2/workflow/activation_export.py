"""An activation set for other tools: a table with a row for each prompt, or its tensors with all that describes them.

Labels, pairs and splits are no part of an activation set, so they come from the prompts that it was captured of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from es2.analysis.probes import Probes
from es2.analysis.results import Analysis
from es2.core.errors import InputError
from es2.core.files import checked_key, give_usual_mode, machine_error, numbered, output_path
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import LABEL_NAMES, PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.workflow.compared import AbsentError, find_comparison
from es2.workflow.derived import find_analysis, find_umap
from es2.workflow.runs import open_run

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float

FORMATS = ("parquet", "safetensors")


@dataclass(frozen=True)
class _Derived:
    """What is on disk of one set's model: the analysis of its own or of its run, and a map of all layers."""

    analysis: Analysis | None = None
    probes: Probes | None = None
    points: Float[np.ndarray, "layer prompt 2"] | None = None
    kind: str = ""


def export_activations(
    key: str,
    out: Path,
    *,
    format: str = "parquet",
    prompts: str = "builtin",
    position: str = "last",
    layer: int | None = None,
    embeddings: bool = False,
) -> dict[str, Any]:
    """Write an activation set as one file, whole or not at all; returns what was written.

    Args:
        key: the set's key, or its folder.
        out: the file; it must not exist.
        format: `parquet`, a row for each prompt (`prompt_table`), or `safetensors`, all positions and layers.
        prompts: the source of the prompts that were captured.
        position: whose coordinates and margins a table holds.
        layer: whose coordinates; by default the first recommended one.
        embeddings: whether a table holds this layer's embeddings, too.

    Raises:
        InputError: for a set, a format, a layer or a position that is not there, prompts that are not the set's, or a
            file that exists.
        MachineError: when the machine refuses.
    """
    if format not in FORMATS:
        raise InputError(f"Unknown format {format[:40]!r}; one of {', '.join(FORMATS)}.")
    out = output_path(out)
    if out.exists():
        raise InputError(f"{str(out)!r} exists; give another name.")
    activations = open_set(key)
    if position not in activations.positions:
        raise InputError(
            f"The activation set {activations.key} has no position {position[:40]!r}; one of "
            f"{', '.join(activations.positions)}."
        )
    if layer is not None and not 0 <= layer < activations.n_layers:
        raise InputError(f"There is no layer {layer}: the set's layers are 0 to {activations.n_layers - 1}.")
    source = load_prompts(prompts)
    shown = prompts_of(activations, source)
    document = {"path": str(out), "format": format, "key": activations.key, "n_prompts": len(shown)}
    temporary = out.with_name(f".tmp-{os.getpid()}-{out.name[:40]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if format == "parquet":
            document |= _write_table(activations, source, shown, temporary, position, layer, embeddings)
        else:
            document |= _write_tensors(activations, shown, temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise machine_error(numbered(error, out.parent), out) from error
    finally:
        temporary.unlink(missing_ok=True)
    return document


def open_set(key: str) -> ActivationSet:
    """The activation set of a key or in a folder of that name; raises `InputError` as `Store.open` does."""
    folder = Path(key)
    if folder.is_dir():
        return Store(folder.absolute().parent).open(checked_key(folder.absolute().name))
    return Store().open(checked_key(key))


def prompts_of(activations: ActivationSet, source: PromptSet) -> PromptSet:
    """The prompts of a set in its order, with their labels from the source; `InputError` where it lacks one."""
    rows = {text: row for row, text in enumerate(source.texts)}
    missing = sum(text not in rows for text in activations.texts)
    if missing:
        raise InputError(
            f"{missing:,} of the {activations.n_prompts:,} prompts of the activation set {activations.key} are not in "
            f"the prompts {source.name!r}; give the ones that were captured with --prompts."
        )
    return source.take([rows[text] for text in activations.texts])


def _derived(activations: ActivationSet, source: PromptSet, shown: PromptSet, position: str) -> _Derived:
    if activations.run is None:
        analysis = find_analysis(activations, shown, position)
        umap = find_umap(activations, shown, position)
        points = None if umap is None else umap.points[:, 0]
        probes = None if analysis is None else analysis.base_probes
        return _Derived(analysis, probes, points, umap.kind if umap else "")
    try:
        both = find_comparison(open_run(activations.run), source.measured(), position)
    except AbsentError:
        return _Derived()
    if both.tuned.key != activations.key:
        return _Derived()
    umap = find_umap(both.base, both.prompts, position, both.tuned)
    points = None if umap is None else umap.points[:, 1]
    return _Derived(both.analysis, both.analysis.tuned_probes, points, umap.kind if umap else "")


def _write_table(
    activations: ActivationSet,
    source: PromptSet,
    shown: PromptSet,
    file: Path,
    position: str,
    layer: int | None,
    embeddings: bool,
) -> dict[str, Any]:
    import pyarrow.parquet as pq

    found = _derived(activations, source, shown, position)
    if layer is None:
        if found.analysis is None:
            raise InputError(
                f"The activation set {activations.key} has no analysis that recommends a layer; give --layer, or run "
                "`es2 analyze` first."
            )
        layer = found.analysis.recommended[0]
    states = activations.layer(layer, position)
    kind = found.kind or "pca"
    points = found.points[layer] if found.points is not None else pca_points(states)
    columns: dict[str, Any] = {
        "prompt": shown.texts,
        "label": [LABEL_NAMES[int(label)] for label in shown.labels],
        "category": shown.categories,
        "pair": shown.pairs,
        "split": shown.splits,
        "x": points[:, 0].astype(np.float32),
        "y": points[:, 1].astype(np.float32),
    }
    if found.probes is not None:
        for l in range(activations.n_layers):
            columns[f"margin_{l}"] = found.probes.margin(activations.layer(l, position), l).astype(np.float32)
    if embeddings:
        columns["embedding"] = list(states.astype(np.float32))
    about = {
        "model": activations.model,
        "run": activations.run,
        "position": position,
        "layer": layer,
        "coordinates": kind,
        "margins": found.probes is not None,
    }
    pq.write_table(_table(columns, about | {"key": activations.key}), file)
    return about


def pca_points(states: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt 2"]:
    """The first two principal components of embeddings."""
    from es2.analysis.projection import principal_axes

    mean, axes, _ = principal_axes(states, 2)
    return (states - mean) @ axes.T


def _table(columns: Mapping[str, Any], about: Mapping[str, Any]) -> pa.Table:
    import pyarrow as pa

    table = pa.table(dict(columns))
    return table.replace_schema_metadata({"es2": json.dumps(about)})


def _write_tensors(activations: ActivationSet, shown: PromptSet, file: Path) -> dict[str, Any]:
    from safetensors.numpy import save_file

    about = {
        "model": activations.model,
        "run": activations.run,
        "given_as": activations.given_as,
        "rendering": activations.rendering,
        "texts": shown.texts,
        "labels": [LABEL_NAMES[int(label)] for label in shown.labels],
        "categories": shown.categories,
        "pairs": shown.pairs,
        "splits": shown.splits,
    }
    tensors = {
        position: np.stack([activations.layer(l, position) for l in range(activations.n_layers)])
        for position in activations.positions
    }
    save_file(tensors, file, {"es2": json.dumps(about)})
    give_usual_mode(file)
    return {"model": activations.model, "run": activations.run, "positions": list(activations.positions)}
