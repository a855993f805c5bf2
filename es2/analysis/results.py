"""The records of an analysis, as files hold them and as the command line prints them.

One flat dictionary per layer, each number under its own name with its interval, and never a NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from es2.analysis.probes import Probes
from es2.analysis.resampling import Interval
from es2.core.errors import InputError
from es2.core.records import RecordFiles
from es2.core.settings import Settings, setting
from es2.store.sources import check_position

ANALYSIS_FORMAT = 1
_FILES = RecordFiles(
    "analysis.json", "probes.safetensors", ANALYSIS_FORMAT, "is no readable analysis", "run `es2 analyze` again"
)

NUMBERS = (
    "centroid_distance",
    "pairwise_distance",
    "mean_norm",
    "norm_ratio",
    "relative_distance",
    "fisher_ratio",
    "orthogonal_std",
    "orthogonal_std_ratio",
    "effective_rank",
    "probe_accuracy",
    "probe_accuracy_control",
    "probe_auroc",
    "probe_auroc_control",
    "margin_mean",
    "margin_harmful_q1",
    "mean_difference_margin",
    "direction_cosine",
    "in_domain_accuracy",
    "in_domain_auroc",
)
"""Every number of a layer (`docs/numbers.md`); `mean_norm` and `orthogonal_std` are what its two ratios divide."""

LENGTHS = (
    "centroid_distance",
    "pairwise_distance",
    "mean_norm",
    "relative_distance",
    "fisher_ratio",
    "orthogonal_std",
    "effective_rank",
)
"""The numbers that cannot be negative and have a natural zero, so that tuned over base means something."""


class AnalysisConfig(Settings):
    """Everything that decides an analysis but its embeddings and prompts."""

    Cs: tuple[float, ...] = setting(
        tuple(10.0**power for power in range(-4, 5)),
        "The probe's inverse regularisation strengths C to choose from, ascending.",
        of="C",
    )
    n_folds: int = setting(5, "Folds of the cross-validation that chooses C.", ge=2)
    n_bootstrap: int = setting(1000, "Resamples behind every interval.", ge=1)
    n_shuffles: int = setting(10, "Probes fitted to shuffled labels, averaged in the control.", ge=1)
    confidence: float = setting(0.95, "Of the intervals.", gt=0)
    seed: int = setting(0, "Of the resamples and the shuffles.", ge=0)
    position: str = setting(
        "last",
        "last (last prompt token), last-1, last-2 … (tokens before it, after the request), last_instruction (last "
        "token of the request) or mean (over the request's tokens).",
    )

    def model_post_init(self, _: Any) -> None:
        """Refuse what does not go together (`InputError`)."""
        check_position(self.position)
        if not self.Cs or list(self.Cs) != sorted(set(self.Cs)) or self.Cs[0] <= 0:
            raise InputError(f"The Cs must be positive and ascending, not {self.Cs}.")
        if self.confidence >= 1:
            raise InputError(f"The confidence must lie between 0 and 1, not {self.confidence!r}.")


@dataclass(frozen=True)
class CostPoint:
    """The main numbers of one layer at one C.

    Attributes:
        log_loss: cross-validated inside `probe`, class-balanced, in nats; None for tuned, which uses base's C.
        numbers: `probe_accuracy`, `probe_auroc`, `margin_mean` and `margin_harmful_q1` on the test prompts.
    """

    C: float
    log_loss: float | None
    numbers: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Flat: C, log_loss, and each number with its interval."""
        return {"C": self.C, "log_loss": self.log_loss} | {k: v.to_dict() for k, v in self.numbers.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostPoint:
        """The inverse of `to_dict`."""
        return cls(float(data["C"]), _or_none(data["log_loss"]), _intervals(data))


@dataclass(frozen=True)
class Change:
    """What the fine-tune did to one number, paired over the same resamples.

    Attributes:
        difference: tuned − base.
        ratio: tuned / base, for numbers that cannot be negative (`LENGTHS`), at most 1e6; 1 where both are zero.
    """

    difference: Interval
    ratio: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Both intervals by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Change:
        """The inverse of `to_dict`."""
        return cls(_interval(data["difference"]), None if data["ratio"] is None else _interval(data["ratio"]))


@dataclass(frozen=True)
class LayerNumbers:
    """One layer of one model.

    Attributes:
        C: the probe's inverse regularisation strength, chosen on `probe` of the base.
        scale: the length of one scale-free unit, in the model's own units.
        log_loss: of the base's probe, cross-validated inside `probe`, class-balanced, in nats; None for tuned.
        cv_accuracy: balanced accuracy of the same held-out prompts; None for tuned.
        numbers: by name (`NUMBERS`), on the test prompts; `norm_ratio`, `orthogonal_std_ratio` and `direction_cosine`
            are 1 for base; `in_domain_…` only with a test set of other origin.
        by_C: the curve of the main numbers over C.
        change: base → tuned of every number that both have; None for base.
    """

    layer: int
    C: float
    scale: float
    log_loss: float | None
    cv_accuracy: float | None
    numbers: Mapping[str, Interval]
    by_C: tuple[CostPoint, ...]
    change: Mapping[str, Change] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat: each number under its own name as `{"value", "low", "high"}`, beside `by_C` and `change`."""
        return {
            "layer": self.layer,
            "C": self.C,
            "scale": self.scale,
            "log_loss": self.log_loss,
            "cv_accuracy": self.cv_accuracy,
            **{name: self.numbers[name].to_dict() for name in NUMBERS if name in self.numbers},
            "by_C": [point.to_dict() for point in self.by_C],
            "change": self.change and {name: change.to_dict() for name, change in self.change.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerNumbers:
        """The inverse of `to_dict`."""
        return cls(
            index(data["layer"]),
            float(data["C"]),
            float(data["scale"]),
            _or_none(data["log_loss"]),
            _or_none(data["cv_accuracy"]),
            _intervals(data),
            tuple(CostPoint.from_dict(point) for point in data["by_C"]),
            data["change"] and {name: Change.from_dict(change) for name, change in data["change"].items()},
        )


def _intervals(data: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: _interval(data[name]) for name in NUMBERS if name in data}


def _interval(data: Mapping[str, Any]) -> Interval:
    return Interval(float(data["value"]), float(data["low"]), float(data["high"]))


def _or_none(number: float | None) -> float | None:
    return None if number is None else float(number)


@dataclass(frozen=True)
class Analysis:
    """All layers of a model, or of base and tuned.

    Attributes:
        recommended: two target layers in ascending order (a single one if the model has but one layer).
        best_layer: the layer of the least cross-validated log-loss on `probe`; `reason` is of both.
        test_name: the name of the prompt set that gave the numbers.
        n_prompts: by `probe` and `test`, the number of prompts of each label.
    """

    base_layers: tuple[LayerNumbers, ...]
    tuned_layers: tuple[LayerNumbers, ...] | None
    recommended: tuple[int, ...]
    best_layer: int
    reason: str
    base_probes: Probes
    tuned_probes: Probes | None
    test_name: str
    n_prompts: Mapping[str, Mapping[str, int]]
    config: AnalysisConfig

    @property
    def layers(self) -> tuple[LayerNumbers, ...]:
        """Tuned's layers where there is a tuned model, else base's."""
        return self.tuned_layers or self.base_layers

    def to_dict(self) -> dict[str, Any]:
        """`layers` (tuned's, with base's as `base_layers`, where there is a tuned model) and the rest; no probes."""
        document: dict[str, Any] = {"layers": [layer.to_dict() for layer in self.layers]}
        if self.tuned_layers:
            document["base_layers"] = [layer.to_dict() for layer in self.base_layers]
        return document | {
            "recommended": list(self.recommended),
            "best_layer": self.best_layer,
            "reason": self.reason,
            "test_name": self.test_name,
            "n_prompts": {split: dict(counts) for split, counts in self.n_prompts.items()},
            "config": self.config.to_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write `analysis.json` and `probes.safetensors` into an existing folder."""
        models = {"base": self.base_probes} | ({"tuned": self.tuned_probes} if self.tuned_probes else {})
        arrays = {
            f"{model}.{field.name}": getattr(probes, field.name)
            for model, probes in models.items()
            for field in fields(Probes)
        }
        _FILES.save(folder, self.to_dict(), arrays)

    @classmethod
    def load(cls, folder: Path) -> Analysis:
        """Read what `save` wrote.

        Raises:
            InputError: when the folder holds no analysis, or one of a newer format.
        """
        with _FILES.load(folder) as (document, arrays):
            layers = tuple(LayerNumbers.from_dict(layer) for layer in document["layers"])
            base_layers = tuple(LayerNumbers.from_dict(layer) for layer in document.get("base_layers", ()))
            _check_layers(layers, base_layers, (*document["recommended"], document["best_layer"]))
            config = AnalysisConfig.read(document["config"], str(folder / _FILES.document))
            return cls(
                base_layers=base_layers or layers,
                tuned_layers=layers if base_layers else None,
                recommended=tuple(map(index, document["recommended"])),
                best_layer=index(document["best_layer"]),
                reason=str(document["reason"]),
                base_probes=_probes(arrays, "base", len(layers)),
                tuned_probes=_probes(arrays, "tuned", len(base_layers)) if base_layers else None,
                test_name=str(document["test_name"]),
                n_prompts={
                    split: {label: index(count) for label, count in counts.items()}
                    for split, counts in document["n_prompts"].items()
                },
                config=config,
            )


def _check_layers(layers: Sequence[LayerNumbers], base_layers: Sequence[LayerNumbers], named: Sequence[int]) -> None:
    """Raise `ValueError` where a layer or a number is missing; only a test set of other origin has `in_domain_…`."""
    needed = {name for name in NUMBERS if not name.startswith("in_domain_")}
    for model in (layers, base_layers or layers):
        sound = [layer.layer for layer in model] == list(range(len(layers))) and set(named) <= set(range(len(layers)))
        if not sound or any(needed - layer.numbers.keys() for layer in model):
            raise ValueError("a layer or a number is missing")
    if not 1 <= len(named) - 1 <= len(layers):
        raise ValueError("no layer is recommended")
    changed = needed - {"norm_ratio", "orthogonal_std_ratio", "direction_cosine"}  # which are changes themselves
    for layer in layers if base_layers else ():
        change = layer.change or {}
        if changed - change.keys() or any(change[name].ratio is None for name in LENGTHS):
            raise ValueError("a change is missing")


def _probes(arrays: Mapping[str, np.ndarray], model: str, n_layers: int) -> Probes:
    found = {field.name: arrays[f"{model}.{field.name}"] for field in fields(Probes)}
    wide = found["weights"].shape[1:]
    for name, array in found.items():
        shape = (n_layers, *wide) if name in ("weights", "centre", "direction") else (n_layers,)
        if array.shape != shape or len(wide) != 1:
            raise ValueError(f"the probes' {name} is not what it should be")
    return Probes(**found)
