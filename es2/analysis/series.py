"""Several models of one base side by side: one frame for the points of all, and their numbers in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from es2.analysis.probes import Probes
from es2.analysis.projection import FitOn, Points, axes_of, pca_points, separation_points
from es2.analysis.results import NUMBERS, Analysis, LayerNumbers
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet

MAX_MEMBERS = 12
"""As many as are shown at once, base included."""
VIEWS = ("separation", "pca")


@dataclass(frozen=True)
class Member:
    """One model of a series: the base, a run, a checkpoint of a training, an adapter that was imported.

    Attributes:
        activations: its embeddings.
        name: what it is called.
        training: identifies what it is a step of; empty for base.
        step: of that training; 0 for base, None where it is not known.
        kl: from base on harmless test prompts, `prompt` and `reply`, in nats per token; None where it was not measured.
        analysis: of base alone, or of base and this model; None where there is none yet.
    """

    activations: ActivationSet
    name: str
    training: str = ""
    step: int | None = None
    kl: Mapping[str, float] | None = None
    analysis: Analysis | None = None

    @property
    def layers(self) -> tuple[LayerNumbers, ...]:
        """Its numbers; none without an analysis."""
        return self.analysis.layers if self.analysis is not None else ()

    @property
    def probes(self) -> Probes:
        """Its own probes. Raises `ValueError` without an analysis."""
        if self.analysis is None:
            raise ValueError(f"{self.name} is not analysed.")
        return self.analysis.tuned_probes or self.analysis.base_probes

    def to_dict(self, layer: int | None = None) -> dict[str, Any]:
        """What it is, and the numbers of one layer, or of all."""
        shown = self.layers if layer is None else self.layers[layer : layer + 1]
        return {
            "key": self.activations.key,
            "name": self.name,
            "training": self.training or None,
            "step": self.step,
            "run": self.activations.run,
            "kl_harmless_test": self.kl and dict(self.kl),
            "layers": [
                {"layer": at.layer} | {name: at.numbers[name].to_dict() for name in NUMBERS if name in at.numbers}
                for at in shown
            ],
        }


@dataclass(frozen=True)
class SeriesView:
    """Points of several models on the same axes.

    Attributes:
        kind: `separation` or `pca`.
        points: of each model, base's first.
        axes: titles of x and y, with their unit.
    """

    kind: str
    points: tuple[Points, ...]
    axes: tuple[str, str]


def series_view(
    members: Sequence[Member],
    prompts: PromptSet,
    layer: int,
    kind: str = "separation",
    *,
    position: str = "last",
    fit_on: FitOn = "base",
    raw: bool = False,
) -> SeriesView:
    """Where each prompt is under each model, in one frame.

    As for two models: each is centred and divided by its own scale, and in the separation view x is the margin of its
    own probe. Axes are fitted on the `test` prompts.

    Args:
        members: analysed models, base first.
        prompts: in the order of the embeddings.
        fit_on: `base`, or `both` for all models together.
        raw: keep the models' own lengths.
    """
    models = [(member.activations.layer(layer, position), member.probes) for member in members]
    place = {"separation": separation_points, "pca": pca_points}[kind]
    points, explained = place(models, layer, prompts.in_split("test"), fit_on, raw)
    return SeriesView(kind, tuple(points), axes_of(kind, explained, raw=raw))
