"""How far, and along which directions, embeddings of harmful prompts are steered until a probe reads them as harmless.

The perturbation needed is a formula of a layer's probe (SCAV, arXiv 2404.12038), so activation sets suffice. Attackers
adapt: directions and probes are fitted anew on the tuned embeddings. Nothing here searches for prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.probes import Probes, lower_quartile
from es2.analysis.resampling import Interval, canonical, intervals, resample_pairs, safe_ratio
from es2.core.errors import InputError
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet, stable_hash
from es2.store.sources import LayerSource, read_rows

if TYPE_CHECKING:
    from jaxtyping import Float


DIRECTIONS = ("scav", "repe", "mean_difference", "random")
"""The probe's normal, RepE's reading vector, the difference of means, and the control."""

P0 = (0.5, 0.01)
"""The probabilities of harmful to be reached: 0.5, on the hyperplane, a distance that depends on the geometry alone;
0.01 as in SCAV, which also depends on the probe's slope and so only compares base with tuned (the same C)."""


@dataclass(frozen=True)
class Hyperplane:
    """A probe in the model's own units: logit = normal · e · slope + offset.

    Attributes:
        normal: unit vector towards harmful, `[d_model]`; zero where the probe reads nothing.
        slope: change of the logit per unit of length along the normal.
        offset: the logit of the zero vector.
    """

    normal: Float[np.ndarray, "d_model"]
    slope: float
    offset: float

    def logits(self, embeddings: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt"]:
        """Log-odds of harmful."""
        return np.asarray(embeddings, np.float64) @ self.normal * self.slope + self.offset

    def signed_shift(self, embeddings: Float[np.ndarray, "prompt d_model"], p0: float) -> Float[np.ndarray, "prompt"]:
        """SCAV's ε, `(logit p₀ − b − w·e) / ‖w‖`: with e′ = e + ε·normal the probe gives exactly p₀.

        Raises:
            InputError: when the probe reads nothing, so that no shift changes its answer.
        """
        if self.slope == 0:
            raise InputError("The probe reads nothing at this layer (its weights are zero); choose another layer.")
        return (logit(p0) - self.logits(embeddings)) / self.slope


def hyperplane(probes: Probes, layer: int) -> Hyperplane:
    """A layer's probe, which is fitted on z = (e − c)/scale, in raw space: w·z + b = (w/scale)·e + b − w·c/scale."""
    weights = probes.weights[layer].astype(np.float64) / float(probes.scale[layer])
    return Hyperplane(
        probes.normal(layer).astype(np.float64),
        float(np.linalg.norm(weights)),
        float(probes.bias[layer] - weights @ probes.centre[layer]),
    )


def logit(p: float) -> float:
    """log(p / (1 − p)); raises `InputError` unless 0 < p < 1."""
    if not 0 < p < 1:
        raise InputError(f"A probability to be reached lies between 0 and 1, not {p!r}.")
    return float(np.log(p) - np.log1p(-p))


def needed_perturbation(
    embeddings: Float[np.ndarray, "prompt d_model"], probes: Probes, layer: int, p0: float = 0.5
) -> tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
    """The perturbation of each embedding until the layer's probe gives at most `p0`.

    Returns:
        Length in the model's own units, and relative to ‖e‖; 0 for embeddings that are there already.

    Raises:
        InputError: for an impossible `p0`, and where the probe reads nothing.
    """
    shift = np.maximum(-hyperplane(probes, layer).signed_shift(embeddings, p0), 0)
    norms = np.linalg.norm(np.asarray(embeddings, np.float64), axis=1)
    return shift, shift / np.where(norms > 0, norms, 1)


@dataclass(frozen=True)
class NeededPerturbation:
    """The perturbation that harmful test prompts need at one layer, under base and tuned.

    Attributes:
        p0: the probability to be reached.
        base, tuned: by `relative` (mean of length / ‖e‖), `relative_q1` (its lower quartile: the easier attacks),
            `absolute` (mean length) and `already` (share that needs none); `tuned` is None without a tuned model.
        change: tuned − base of the same, and `relative_ratio`, tuned / base.
        values: every prompt's relative length by `base` and `tuned`, in the order of `texts`.
        texts: the harmful test prompts.
    """

    layer: int
    p0: float
    base: Mapping[str, Interval]
    tuned: Mapping[str, Interval] | None
    change: Mapping[str, Interval] | None
    values: Mapping[str, Float[np.ndarray, "prompt"]]
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without those of each prompt."""
        return {name: entry for name, entry in asdict(self).items() if name not in ("values", "texts")}


def needed_by_layer(
    prompts: PromptSet,
    base: LayerSource,
    base_probes: Probes,
    tuned: LayerSource | None = None,
    tuned_probes: Probes | None = None,
    *,
    p0s: Sequence[float] = P0,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> list[NeededPerturbation]:
    """The needed perturbation of the harmful `test` prompts at every layer, under each model's own probes.

    Args:
        base, tuned: embeddings of `prompts`.
        base_probes, tuned_probes: fitted on `probe` of the same model: the tuned model's attacker adapts.
        p0s: the probabilities to be reached.

    Returns:
        One record per layer and p0; layers where a probe reads nothing are left out.

    Raises:
        InputError: without harmful test prompts, or when embeddings are missing or not finite.
    """
    rows, measured = canonical(prompts, "test")
    is_harmful = measured.labels == HARMFUL
    if not is_harmful.any():
        raise InputError(f"{prompts.name!r} has no harmful prompt in its test split; add prompts, or a split column.")
    harmful = measured.select(is_harmful)
    weights = resample_pairs(harmful, n_bootstrap, seed)
    sources = {"base": (base, base_probes)}
    if tuned is not None and tuned_probes is not None:
        sources["tuned"] = (tuned, tuned_probes)
    found = []
    for layer in range(base.n_layers):
        if any(hyperplane(probes, layer).slope == 0 for _, probes in sources.values()):
            continue
        embeddings = {
            model: read_rows(source, layer, "last", len(prompts), rows[is_harmful], model).astype(np.float64)
            for model, (source, _) in sources.items()
        }
        for p0 in p0s:
            lengths = {
                model: needed_perturbation(embeddings[model], own, layer, p0) for model, (_, own) in sources.items()
            }
            replicates = {model: _replicates(*pair, weights) for model, pair in lengths.items()}
            before, after = replicates["base"], replicates.get("tuned")
            change = None
            if after is not None:
                differences = {name: after[name] - before[name] for name in before}
                ratio = safe_ratio(after["relative"], before["relative"], both_zero=1.0)
                change = intervals(differences | {"relative_ratio": ratio})
            numbers = {model: intervals(values) for model, values in replicates.items()}
            relative = {model: values for model, (_, values) in lengths.items()}
            found.append(
                NeededPerturbation(layer, p0, numbers["base"], numbers.get("tuned"), change, relative, harmful.texts)
            )
    return found


def _replicates(
    absolute: Float[np.ndarray, "prompt"],
    relative: Float[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> dict[str, Float[np.ndarray, "resample"]]:
    total = weights.sum(axis=1)
    return {
        "relative": weights @ relative / total,
        "relative_q1": lower_quartile(relative, weights),
        "absolute": weights @ absolute / total,
        "already": weights @ (absolute == 0) / total,
    }


def reading_vector(embeddings: Float[np.ndarray, "prompt d_model"], prompts: PromptSet) -> Float[np.ndarray, "d_model"]:
    """RepE's reading vector: the first principal component of recentred differences within pairs, towards harmful.

    Prompts without a twin are paired by hash. Every other difference changes its sign before recentring, which would
    otherwise remove the direction itself; Zou et al., arXiv 2310.01405, shuffle within their pairs for that reason.

    Returns:
        A unit vector; zero if all differences vanish.
    """
    couples = _couples(prompts)
    embeddings = np.asarray(embeddings, np.float64)
    differences = np.array([embeddings[harmful] - embeddings[harmless] for harmful, harmless in couples])
    differences[1::2] *= -1
    differences -= differences.mean(axis=0)
    if len(couples) == 1 or not np.abs(differences).max() > 0:
        differences = embeddings[couples[0][0]][None] - embeddings[couples[0][1]][None]
    _, singular, axes = np.linalg.svd(differences, full_matrices=False)
    if singular[0] == 0:
        return np.zeros(embeddings.shape[1])
    axis = axes[0]
    along = embeddings @ axis
    towards = along[prompts.labels == HARMFUL].mean() - along[prompts.labels == HARMLESS].mean()
    return axis if towards >= 0 else -axis


def _couples(prompts: PromptSet) -> list[tuple[int, int]]:
    """(harmful row, harmless row): the twins, then the others in the order of a hash."""
    by_pair: dict[str, tuple[list[int], list[int]]] = {}
    order = sorted(range(len(prompts)), key=lambda row: (stable_hash("repe:" + prompts.pairs[row]), prompts.texts[row]))
    for row in order:
        by_pair.setdefault(prompts.pairs[row], ([], []))[0 if prompts.labels[row] == HARMFUL else 1].append(row)
    couples = [couple for sides in by_pair.values() for couple in zip(*sides, strict=False)]
    used = {row for couple in couples for row in couple}
    harmful, harmless = (
        [row for row in order if prompts.labels[row] == label and row not in used] for label in (HARMFUL, HARMLESS)
    )
    couples += list(zip(harmful, harmless, strict=False))
    if not couples:
        raise InputError(f"{prompts.name!r} needs prompts of both labels in its probe split for a reading vector.")
    return couples


@dataclass(frozen=True)
class Attacker:
    """Directions learnt from one model's embeddings at some layers.

    Attributes:
        layers: where embeddings are steered, ascending.
        planes: the probe of each.
        directions: unit vectors towards harmful by name; without `random`, which is sampled for every prompt.
    """

    layers: tuple[int, ...]
    planes: tuple[Hyperplane, ...]
    directions: Mapping[str, Float[np.ndarray, "layer d_model"]]

    @property
    def digest(self) -> str:
        """Identifies layers, probes and directions, rounded to what a stored embedding resolves."""
        digest = hashlib.blake2b(digest_size=12)
        digest.update(repr(self.layers).encode())
        for plane in self.planes:
            digest.update(np.round([plane.slope, plane.offset], 9).tobytes())
        for name in sorted(self.directions):
            digest.update(name.encode() + np.round(self.directions[name], 6).tobytes())
        return digest.hexdigest()

    def vectors(self, name: str, texts: Sequence[str], seed: int) -> Float[np.ndarray, "layer prompt d_model"]:
        """The unit vectors of a direction for each prompt; `random` ones depend on seed, layer and text alone."""
        if name != "random":
            return np.repeat(self.directions[name][:, None], len(texts), axis=1)
        d_model = len(self.planes[0].normal)
        vectors = np.empty((len(self.layers), len(texts), d_model))
        for row, text in enumerate(texts):
            for index, layer in enumerate(self.layers):
                generator = np.random.default_rng([seed, layer, stable_hash("random:" + text) % 2**32])
                vectors[index, row] = generator.normal(size=d_model)
        return vectors / np.linalg.norm(vectors, axis=2, keepdims=True)


def make_attacker(prompts: PromptSet, source: LayerSource, probes: Probes, layers: Sequence[int]) -> Attacker:
    """The attacker that learns from the `probe` split of one model's embeddings.

    Args:
        source: embeddings of `prompts` under the attacked model.
        probes: fitted on the same.
        layers: where to steer.

    Raises:
        InputError: when a layer does not exist or its probe reads nothing.
    """
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= probes.n_layers:
        raise InputError(f"Layers to steer at must be among 0 to {probes.n_layers - 1}, not {list(layers)!r}.")
    rows, fitted = canonical(prompts, "probe")
    planes = tuple(hyperplane(probes, layer) for layer in chosen)
    for layer, plane in zip(chosen, planes, strict=True):
        if plane.slope == 0:
            raise InputError(f"The probe of layer {layer} reads nothing, so there is no direction; choose another one.")
    reading = [
        reading_vector(read_rows(source, layer, "last", len(prompts), rows, "attacked").astype(np.float64), fitted)
        for layer in chosen
    ]
    return Attacker(
        chosen,
        planes,
        {
            "scav": np.stack([plane.normal for plane in planes]),
            "repe": np.stack(reading),
            "mean_difference": np.stack([probes.direction[layer].astype(np.float64) for layer in chosen]),
        },
    )
