"""Separation and PCA of every layer, rendered by the job that analyses where a layer takes a second or two to read.

Axes are fitted on the `test` prompts under base, lengths are scale-free. Any other choice, and small layers, are
rendered on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.probes import Probes
from es2.analysis.projection import LANCZOS_FROM, View, axes_of, pca_view, separation_view
from es2.core.progress import Reporter, silent
from es2.core.records import RecordFiles
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import LayerSource

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64


VIEWS_FORMAT = 1
_REMEDY = "remove the folder and run `es2 analyze` again"
_FILES = RecordFiles("views.json", "views.safetensors", VIEWS_FORMAT, "are no readable views", _REMEDY)
RENDERS = {"separation": separation_view, "pca": pca_view}


def are_worthwhile(n_prompts: int, d_model: int) -> bool:
    """Whether a layer takes so long to render that its views are kept."""
    return min(n_prompts, d_model) > LANCZOS_FROM


@dataclass(frozen=True)
class LayerViews:
    """What `separation_view` and `pca_view` give at every layer, in single precision.

    Attributes:
        points: by kind of view, `[layer, model, prompt, 2]`; model 0 is base, model 1 tuned where there is one.
        explained: by kind of view, the parts of the variance that x and y carry, `[layer, 2]`.
    """

    points: Mapping[str, Float32[np.ndarray, "layer model prompt 2"]]
    explained: Mapping[str, Float64[np.ndarray, "layer 2"]]

    def view(self, kind: str, layer: int) -> View:
        """One layer's picture."""
        base, *tuned = self.points[kind][layer].astype(np.float64)
        x, y = self.explained[kind][layer].tolist()
        return View(kind, base, tuned[0] if tuned else None, axes_of(kind, (x, y)), (x, y))

    def margins(self, layer: int) -> list[Float64[np.ndarray, "prompt"]]:
        """Signed distance of each prompt to each model's own boundary, + on the harmful side, scale-free."""
        return list(self.points["separation"][layer, :, :, 0].astype(np.float64))

    def save(self, folder: Path) -> None:
        """Write `views.safetensors` and `views.json` into an existing folder."""
        arrays = {f"{kind}.points": points for kind, points in self.points.items()}
        arrays |= {f"{kind}.explained": parts for kind, parts in self.explained.items()}
        _FILES.save(folder, {}, arrays)

    @classmethod
    def load(cls, folder: Path) -> LayerViews:
        """Read what `save` wrote.

        Raises:
            InputError: when the folder holds no views, or some of a newer format.
        """
        with _FILES.load(folder) as (_, arrays):
            points = {kind: arrays[f"{kind}.points"] for kind in RENDERS}
            explained = {kind: arrays[f"{kind}.explained"] for kind in RENDERS}
            (shape,) = {array.shape for array in points.values()}
            sound = len(shape) == 4 and shape[1] in (1, 2) and shape[3] == 2
            if not sound or any(array.shape != (shape[0], 2) for array in explained.values()):
                raise ValueError("not what was written")
            return cls(points, explained)


def render_layers(
    prompts: PromptSet,
    base: LayerSource,
    probes: Probes,
    tuned: LayerSource | None = None,
    tuned_probes: Probes | None = None,
    *,
    position: str = "last",
    report: Reporter = silent,
) -> LayerViews:
    """Separation and PCA of every layer.

    Args:
        prompts: the prompts, in the order of the embeddings; axes are fitted on those of `test`.
        base, tuned: their embeddings; `probes` and `tuned_probes` are of the same models.
        report: called as `report("draw", layers done, layers)`; may raise to stop.
    """
    n_layers = base.n_layers
    shape = (n_layers, 1 if tuned is None else 2, len(prompts), 2)
    points = {kind: np.zeros(shape, dtype=np.float32) for kind in RENDERS}
    explained = {kind: np.zeros((n_layers, 2)) for kind in RENDERS}
    report("draw", 0, n_layers)
    for layer in range(n_layers):
        of_base = base.layer(layer, position)
        of_tuned = None if tuned is None else tuned.layer(layer, position)
        for kind, render in RENDERS.items():
            view = render(
                of_base, probes, layer, tuned=of_tuned, tuned_probes=tuned_probes, fit=prompts.in_split("test")
            )
            points[kind][layer, 0] = view.base
            if view.tuned is not None:
                points[kind][layer, 1] = view.tuned
            assert view.explained is not None  # only UMAP explains nothing
            explained[kind][layer] = view.explained
        report("draw", layer + 1, n_layers)
    return LayerViews(points, explained)
