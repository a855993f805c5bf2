"""What embeddings become in Python: tables (`to_frame`) and the app's own figures (`plot`).

Nothing is copied out of an artifact before it is asked for, so a record of a large model is as cheap as one of a small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.layer_views import RENDERS
from es2.analysis.projection import UmapCoordinates, View
from es2.analysis.results import Analysis
from es2.api.tables import as_figure, ends_of
from es2.charts import compare_charts, layer_charts, pair_charts, projection_chart
from es2.charts.frames import numbers_frame, prompts_frame
from es2.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from jaxtyping import Float
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from es2.analysis.comparison import Comparison
    from es2.analysis.resampling import Interval
    from es2.prompts.prompt_set import PromptSet
    from es2.store.activation_set import ActivationSet

__all__ = ["Compared", "Embeddings", "Model", "Projection", "Separation"]


@dataclass(frozen=True)
class Model:
    """A model in memory, as transformers has it.

    Attributes:
        name: what other functions take.
        run: the run whose fine-tune is merged into it, if any.
        network: the transformers model, in evaluation mode.
        tokenizer: its tokenizer, with the chat template.
        n_layers, d_model: number of blocks, and width of the residual stream.
    """

    name: str
    run: str | None
    network: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    n_layers: int
    d_model: int


@dataclass(frozen=True)
class Embeddings:
    """Residual-stream embeddings at one position, read from disk when they are asked for.

    Attributes:
        activations: the set on disk, with every position that was captured.
        prompts: in the order of the axis `prompt`.
        position: of `values`.
        axes: the names of the axes of `values`.
    """

    activations: ActivationSet = field(repr=False)
    prompts: PromptSet = field(repr=False)
    position: str
    axes: tuple[str, str, str] = ("layer", "prompt", "d_model")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The lengths of the axes."""
        return (self.activations.n_layers, self.activations.n_prompts, self.activations.d_model)

    @cached_property
    def values(self) -> Float[np.ndarray, "layer prompt d_model"]:
        """All embeddings, in the model's own units, float32; `layer` reads one layer alone."""
        return np.stack([self.layer(l) for l in range(self.activations.n_layers)])

    @property
    def coordinates(self) -> dict[str, Sequence[Any]]:
        """The entries of each axis: layers by number, prompts by text, dimensions by number."""
        n_layers, _, d_model = self.shape
        return {"layer": range(n_layers), "prompt": self.prompts.texts, "d_model": range(d_model)}

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that was captured."""
        return self.activations.positions

    def at(self, position: str) -> Embeddings:
        """The embeddings at another captured position. Raises `InputError` for one that was not captured."""
        if position not in self.positions:
            raise InputError(f"Position {position!r} was not captured, only {', '.join(self.positions)}.")
        return Embeddings(self.activations, self.prompts, position)

    def layer(self, layer: int) -> Float[np.ndarray, "prompt d_model"]:
        """The embeddings of one layer, `0 ≤ layer < n_layers`. Raises `InputError` for another one."""
        return self.activations.layer(layer, self.position)

    def to_frame(self, layer: int | None = None) -> pd.DataFrame:
        """A row for each prompt; with a layer, its embedding in columns `0`, `1`, …"""
        import pandas as pd

        frame = prompts_frame(self.prompts, np.arange(len(self.prompts)), {}, {})
        return frame if layer is None else pd.concat([frame, pd.DataFrame(self.layer(layer))], axis=1)


@dataclass(frozen=True)
class Projection:
    """The prompts of every layer as points in a plane; of base and tuned in one frame where there is a run.

    Attributes:
        prompts: in the order of the points.
        base, tuned: their embeddings.
        analysis: whose probes say on which side a prompt is.
        kind: `separation`, `pca` or `umap`.
        position: whose embeddings are shown.
        umap: the coordinates of a UMAP.
    """

    prompts: PromptSet = field(repr=False)
    base: ActivationSet = field(repr=False)
    tuned: ActivationSet | None = field(repr=False)
    analysis: Analysis = field(repr=False)
    kind: str
    position: str
    umap: UmapCoordinates | None = field(default=None, repr=False)

    def view(self, layer: int | None = None) -> View:
        """The points of a layer, `[prompt, 2]` of `base` and of `tuned`; by default of the best layer."""
        layer = self._layer(layer)
        if self.umap is not None:
            return self.umap.view(layer)
        return RENDERS[self.kind](
            self.base.layer(layer, self.position),
            self.analysis.base_probes,
            layer,
            tuned=None if self.tuned is None else self.tuned.layer(layer, self.position),
            tuned_probes=self.analysis.tuned_probes,
            fit=self.prompts.in_split("test"),
        )

    def margins(self, layer: int | None = None) -> tuple[Float[np.ndarray, "prompt"], ...]:
        """By model, each prompt's signed distance to its boundary, + on the harmful side, in scale-free units."""
        layer = self._layer(layer)
        models = ((self.base, self.analysis.base_probes), (self.tuned, self.analysis.tuned_probes))
        return tuple(
            probes.margin(source.layer(layer, self.position), layer)
            for source, probes in models
            if source is not None and probes is not None
        )

    def to_frame(self, layer: int | None = None) -> pd.DataFrame:
        """A row for each prompt of a layer: where it is (`x`, `y`, of tuned `x_tuned`, `y_tuned`), and its margins."""
        view, margins = self.view(layer), self.margins(layer)
        points = {"x": view.base[:, 0], "y": view.base[:, 1]}
        if view.tuned is not None:
            points |= {"x_tuned": view.tuned[:, 0], "y_tuned": view.tuned[:, 1]}
        names = ("margin",) if len(margins) == 1 else ("margin", "margin_tuned")
        everyone = np.arange(len(self.prompts))
        return prompts_frame(self.prompts, everyone, dict(zip(names, margins, strict=True)), points)

    def plot(self, layer: int | None = None, *, arrangement: str = "overlay", others: bool = False) -> go.Figure:
        """The prompts of a layer in a plane; with a run, lines from where base has them to where tuned has them.

        Args:
            layer: by default the best one.
            arrangement: with a run, `overlay` (one frame for both), `base` or `tuned`.
            others: whether to show the `probe` split too, as hollow markers.
        """
        view, margins = self.view(layer), self.margins(layer)
        if len(margins) == 1:
            return as_figure(projection_chart.projection(view, self.prompts, margins=margins[0], others=others))
        sides = ("base", "tuned")
        if arrangement not in ("overlay", *sides):
            raise InputError(f"Unknown arrangement {arrangement!r}; one of overlay, base, tuned.")
        drawn = pair_charts.pair(
            view,
            self.prompts,
            margins=margins,
            names=("Base", "Tuned"),
            arrangement="overlay" if arrangement == "overlay" else "side",
            others=others,
        )
        return as_figure(drawn[sides.index(arrangement) if arrangement in sides else 0])

    def _layer(self, layer: int | None) -> int:
        layer = self.analysis.best_layer if layer is None else layer
        if not 0 <= layer < self.base.n_layers:
            raise InputError(f"There is no layer {layer}: the model's layers are 0 to {self.base.n_layers - 1}.")
        return layer


@dataclass(frozen=True)
class Separation:
    """How far harmful and harmless prompts stand apart at every layer, of base, or of base and tuned.

    Attributes:
        analysis: every number with its interval, the probes, and which layers are recommended.
        prompts: the measured prompts.
        base, tuned: their embeddings.
    """

    analysis: Analysis = field(repr=False)
    prompts: PromptSet = field(repr=False)
    base: ActivationSet = field(repr=False)
    tuned: ActivationSet | None = field(repr=False)

    @property
    def recommended(self) -> tuple[int, ...]:
        """The two layers that ES2 should act on, chosen on the `probe` split."""
        return self.analysis.recommended

    @property
    def best_layer(self) -> int:
        """The layer of the least cross-validated loss on the `probe` split."""
        return self.analysis.best_layer

    @property
    def reason(self) -> str:
        """Why these layers, in a sentence."""
        return self.analysis.reason

    def to_frame(self) -> pd.DataFrame:
        """A row for each layer of each model: every number of docs/numbers.md, with `…_low` and `…_high`."""
        models = [("base", self.analysis.base_layers)]
        if self.analysis.tuned_layers is not None:
            models.append(("tuned", self.analysis.tuned_layers))
        return numbers_frame(models, intervals=True)

    def plot(self, what: str = "accuracy", *, layer: int | None = None) -> go.Figure:
        """`accuracy` (of the probes) or `margins` over the layers; a line marks `layer`, by default the best one."""
        return _strip(self.analysis, what, self.best_layer if layer is None else layer, self.recommended)

    def projection(self, kind: str = "separation") -> Projection:
        """The same prompts in a plane, `separation` or `pca`; for UMAP see `es2.project`."""
        if kind not in RENDERS:
            raise InputError(f"Unknown view {kind[:40]!r}; one of {', '.join(RENDERS)}, or es2.project for umap.")
        position = self.analysis.config.position
        return Projection(self.prompts, self.base, self.tuned, self.analysis, kind, position)


@dataclass(frozen=True)
class Compared:
    """A run beside its base, or beside another run.

    Attributes:
        comparison: prompts, embeddings, analysis, names, target layers and the verdict's parts.
    """

    comparison: Comparison = field(repr=False)

    @property
    def outcome(self) -> str:
        """The verdict on the embeddings with that on behaviour, such as `separated, refuses less`."""
        return self.comparison.outcome

    @property
    def reason(self) -> str:
        """Why this verdict, in a sentence."""
        return self.comparison.run_verdict.reason

    @property
    def warnings(self) -> list[str]:
        """What to warn of: lost refusals, broken replies."""
        return self.comparison.warnings

    @property
    def targets(self) -> tuple[int, ...]:
        """The target layers."""
        return self.comparison.targets

    def to_frame(self) -> pd.DataFrame:
        """A row for each number of each layer: `base`, `tuned`, `difference` and `ratio`, with `…_low` and `…_high`."""
        import pandas as pd

        analysis = self.comparison.analysis
        rows = []
        for before, after in zip(analysis.base_layers, analysis.layers, strict=True):
            for name, number in after.numbers.items():
                row: dict[str, Any] = {"layer": after.layer, "target": after.layer in self.targets, "number": name}
                change = (after.change or {}).get(name)
                found: dict[str, Interval | None] = {"base": before.numbers.get(name), "tuned": number}
                found |= {"difference": change.difference, "ratio": change.ratio} if change else {}
                for column in ("base", "tuned", "difference", "ratio"):
                    interval = found.get(column)
                    row |= ends_of(column, None if interval is None else interval.to_dict())
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, what: str = "overview", *, layer: int | None = None) -> go.Figure:
        """A figure of the page *Compare*.

        Args:
            what: `overview` (every number and layer, and the verdicts), `accuracy` or `margins` over the layers,
                `projection` (both clouds of a layer) or `distribution` (of its prompts along the probe's direction).
            layer: by default the last target layer.
        """
        shown = self.comparison
        layer = self.targets[-1] if layer is None else layer
        if what == "overview":
            verdicts = {one.layer: shown.verdict(one.layer).name for one in shown.analysis.layers}
            return as_figure(
                compare_charts.overview(shown.analysis, verdicts, chosen=layer, targets=self.targets, names=shown.names)
            )
        if what == "projection":
            return self._projection.plot(layer)
        if what == "distribution":
            test = shown.prompts.in_split("test")
            margins = tuple(values[test] for values in self._projection.margins(layer))
            return as_figure(pair_charts.histograms(margins, shown.prompts.labels[test], shown.names))
        return _strip(shown.analysis, what, layer, self.targets, ("overview", "projection", "distribution"))

    @property
    def _projection(self) -> Projection:
        shown = self.comparison
        return Projection(shown.prompts, shown.base, shown.tuned, shown.analysis, "separation", shown.position)


def _strip(analysis: Analysis, what: str, layer: int, targets: Sequence[int], others: Sequence[str] = ()) -> go.Figure:
    of_one = {"accuracy": layer_charts.accuracy_strip, "margins": layer_charts.margin_strip}
    of_two = {"accuracy": compare_charts.accuracy_strip, "margins": compare_charts.margin_strip}
    if what not in of_one:
        raise InputError(f"Unknown figure {what[:40]!r}; one of {', '.join((*of_one, *others))}.")
    if not 0 <= layer < len(analysis.layers):
        raise InputError(f"There is no layer {layer}: the model's layers are 0 to {len(analysis.layers) - 1}.")
    if analysis.tuned_layers is None:
        return as_figure(of_one[what](analysis.layers, chosen=layer, recommended=targets))
    return as_figure(of_two[what](analysis, ("Base", "Tuned"), chosen=layer, targets=targets))
