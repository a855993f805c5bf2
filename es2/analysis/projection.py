"""Flat views of one layer's embeddings: separation, PCA and UMAP, in a frame shared by base and tuned.

Each model's embeddings are centred and divided by its own scale, and both models share one set of axes. UMAP takes
seconds a layer, so a job computes it for all layers; the other views are a few matrix products, made on request.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from es2.analysis.geometry import fit_frame, parts_of
from es2.analysis.probes import Probes
from es2.analysis.resampling import canonical
from es2.core.errors import InputError
from es2.core.progress import Reporter, silent
from es2.core.records import RecordFiles
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import LayerSource, read_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32


PROJECTION_FORMAT = 1
_FILES = RecordFiles(
    "umap.json", "umap.safetensors", PROJECTION_FORMAT, "are no readable UMAP coordinates", "run `es2 project` again"
)
MIN_UMAP_POINTS = 10
UMAP_NEIGHBOURS = 15
LANCZOS_FROM = 600
"""With more prompts and dimensions than this only the axes asked for are computed."""
LANCZOS_VECTORS = 24

FitOn = Literal["base", "both"]
Embeddings: TypeAlias = 'Float[np.ndarray, "prompt d_model"]'
Points: TypeAlias = 'Float[np.ndarray, "prompt 2"]'


@dataclass(frozen=True)
class View:
    """Points of a picture, base and tuned on the same axes.

    Attributes:
        kind: `separation`, `pca` or `umap` (`pca` also where there are too few points for UMAP).
        axes: titles of x and y, with their unit or that there is none.
        explained: the parts of the variance, 0 to 1, that x and y carry of the embeddings the axes were fitted on (of
            base's, for the separation view); None for UMAP.
        approximate: whether tuned was placed into a map fitted on base alone, which is only roughly right in UMAP.
    """

    kind: str
    base: Points
    tuned: Points | None
    axes: tuple[str, str]
    explained: tuple[float, float] | None
    approximate: bool = False


def separation_view(
    base: Embeddings,
    probes: Probes,
    layer: int,
    *,
    tuned: Embeddings | None = None,
    tuned_probes: Probes | None = None,
    fit: Bool[np.ndarray, "prompt"] | None = None,
    fit_on: FitOn = "base",
    raw: bool = False,
) -> View:
    """x: signed distance to the probe's hyperplane, + = harmful. y: first principal component of the rest.

    Each model's x is its own probe's margin, so the boundary is the line x = 0 for both. The rest is the embedding
    without its component along the probe's normal; y's axis is common to both models.

    Args:
        base, tuned: embeddings of the same prompts; `probes` and `tuned_probes` are of the same models.
        fit: the prompts on which y's axis is fitted, such as those of `test`; all if not given.
        fit_on: whether y's axis is fitted on base alone or on both models.
        raw: keep the models' own lengths instead of dividing each by its scale.
    """
    points, explained = separation_points(_models(base, probes, tuned, tuned_probes), layer, fit, fit_on, raw)
    moved = points[1] if len(points) > 1 else None
    return View("separation", points[0], moved, axes_of("separation", explained, raw=raw), explained)


def separation_points(
    models: Sequence[tuple[Embeddings, Probes]],
    layer: int,
    fit: Bool[np.ndarray, "prompt"] | None = None,
    fit_on: FitOn = "base",
    raw: bool = False,
) -> tuple[list[Points], tuple[float, float]]:
    """The points of `separation_view` under any number of models, base's first, and the parts of the variance.

    `fit_on` `both` fits y's axis on all of them.
    """
    xs, rests = [], []
    for embeddings, own in models:
        unit = own.frame(layer).scale if raw else 1.0
        xs.append(own.margin(embeddings, layer) * unit)
        rest = _normalised(embeddings, own, layer)  # a copy, changed in place
        normal = own.normal(layer).astype(rest.dtype)
        for part in parts_of(rest):
            part -= np.outer(part @ normal, normal)
        rest *= unit
        rests.append(rest)
    fitted = _fitted(rests, fit, fit_on)
    mean, axes, _ = principal_axes(fitted, 1)
    axes = axes * _sign_of_farthest(fitted, mean, axes)
    ys = [_coordinates(rest, mean, axes)[:, 0] for rest in rests]
    chosen = slice(None) if fit is None else fit
    along, beside = xs[0][chosen].var(), ys[0][chosen].var()
    total = along + _variance(fitted if fit_on == "base" else rests[0][chosen])
    explained = (float(along / total), float(beside / total)) if total > 0 else (0.0, 0.0)
    return [np.stack([x, y], axis=1) for x, y in zip(xs, ys, strict=True)], explained


def pca_view(
    base: Embeddings,
    probes: Probes,
    layer: int,
    *,
    tuned: Embeddings | None = None,
    tuned_probes: Probes | None = None,
    fit: Bool[np.ndarray, "prompt"] | None = None,
    fit_on: FitOn = "base",
    raw: bool = False,
) -> View:
    """The first two principal components, turned so that the probe's harmful side is right and up.

    Arguments as for `separation_view`; here both axes are fitted.
    """
    points, explained = pca_points(_models(base, probes, tuned, tuned_probes), layer, fit, fit_on, raw)
    moved = points[1] if len(points) > 1 else None
    return View("pca", points[0], moved, axes_of("pca", explained, raw=raw), explained)


def pca_points(
    models: Sequence[tuple[Embeddings, Probes]],
    layer: int,
    fit: Bool[np.ndarray, "prompt"] | None = None,
    fit_on: FitOn = "base",
    raw: bool = False,
) -> tuple[list[Points], tuple[float, float]]:
    """The points of `pca_view` under any number of models, as `separation_points`."""
    zs = [_normalised(embeddings, own, layer) for embeddings, own in models]
    if raw:
        for z, (_, own) in zip(zs, models, strict=True):
            z *= own.scale[layer]
    return _pca(zs, models[0][1].normal(layer), fit, fit_on)


@dataclass(frozen=True)
class UmapCoordinates:
    """UMAP of all layers, as computed by a job and read by the app.

    Attributes:
        points: `[layer, model, prompt, 2]`; model 0 is base, model 1 tuned where there is one.
        kind: `umap`, or `pca` where there were too few prompts.
        fit_on: the model or models that the maps were fitted on.
    """

    points: Float32[np.ndarray, "layer model prompt 2"]
    kind: str
    fit_on: FitOn

    def view(self, layer: int) -> View:
        """One layer's picture."""
        base, *others = self.points[layer]
        tuned = others[0] if others else None
        if self.kind == "umap":
            approximate = tuned is not None and self.fit_on == "base"
            return View("umap", base, tuned, ("UMAP 1 (no unit)", "UMAP 2 (no unit)"), None, approximate)
        axes = ("Principal component 1 (too few prompts for UMAP)", "Principal component 2 (too few prompts for UMAP)")
        return View("pca", base, tuned, axes, None)

    def save(self, folder: Path) -> None:
        """Write `umap.safetensors` and `umap.json` into an existing folder."""
        _FILES.save(folder, {"kind": self.kind, "fit_on": self.fit_on}, {"points": self.points})

    @classmethod
    def load(cls, folder: Path) -> UmapCoordinates:
        """Read what `save` wrote.

        Raises:
            InputError: when the folder holds no coordinates, or some of a newer format.
        """
        with _FILES.load(folder) as (about, arrays):
            kind, fit_on, points = about["kind"], about["fit_on"], arrays["points"]
            known = kind in ("umap", "pca") and fit_on in ("base", "both")
            if not (known and points.ndim == 4 and points.shape[1] in (1, 2) and points.shape[3] == 2):
                raise ValueError("not what was written")
            return cls(points, kind, fit_on)


def umap_all_layers(
    prompts: PromptSet,
    base: LayerSource,
    tuned: LayerSource | None = None,
    *,
    position: str = "last",
    fit_on: FitOn = "both",
    seed: int = 0,
    report: Reporter = silent,
) -> UmapCoordinates:
    """UMAP of every layer, of all prompts whatever their split; PCA where there are fewer than ten.

    Args:
        prompts: the prompt set; its `probe` split gives each model's centre and scale.
        base, tuned: embeddings of all prompts.
        fit_on: `base` (tuned is then placed into base's map, approximately) or `both`.
        seed: the same seed gives the same map on one machine.
        report: called as `report("umap", layers done, layers)`; may raise to stop.

    Raises:
        InputError: when `probe` lacks a label, or embeddings are missing or not finite.
    """
    sources = {"base": base} if tuned is None else {"base": base, "tuned": tuned}
    everyone = np.arange(len(prompts))
    rows, probe = canonical(prompts, "probe")
    if len(set(probe.labels.tolist())) < 2:
        raise InputError(f"The `probe` split of {prompts.name!r} lacks a label; add prompts, or a `split` column.")
    kind = "umap" if len(prompts) >= MIN_UMAP_POINTS else "pca"
    points = np.zeros((base.n_layers, len(sources), len(prompts), 2), dtype=np.float32)
    report("umap", 0, base.n_layers)
    for layer in range(base.n_layers):
        zs, directions = [], []
        for name, source in sources.items():
            embeddings = read_rows(source, layer, position, len(prompts), everyone, name)
            frame = fit_frame(embeddings[rows], probe.labels)
            zs.append(frame.normalise(embeddings))
            directions.append(frame.direction)
        if kind == "umap":
            points[layer] = _umap_points(zs, fit_on, seed)
        else:
            points[layer], _ = _pca(zs, directions[0], None, fit_on)
        report("umap", layer + 1, base.n_layers)
    return UmapCoordinates(points, kind, fit_on)


def principal_axes(
    embeddings: Embeddings, n_axes: int
) -> tuple[Float[np.ndarray, "d_model"], Float[np.ndarray, "axis d_model"], Float[np.ndarray, "axis"]]:
    """The mean, the first `n_axes` principal axes (unit rows) and the part of the variance that each carries.

    Worked out in min(prompts, dimensions), above `LANCZOS_FROM` to six digits. Axes without variance, or beyond the
    number of dimensions, are zero.
    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    centred = embeddings - mean.astype(embeddings.dtype)
    wide = len(centred) < centred.shape[1]
    total = _squares(centred)
    axes = np.zeros((n_axes, centred.shape[1]))
    parts = np.zeros(n_axes)
    if total == 0:
        return mean, axes, parts
    values, vectors = _largest(centred if wide else centred.T, min(n_axes, *centred.shape))
    for index, (value, vector) in enumerate(zip(values[::-1], vectors.T[::-1], strict=True)):
        # Below this an eigenvalue is the rounding of the others, and its axis points anywhere.
        if value <= 1e-13 * total:
            break
        axis = vector.astype(centred.dtype) @ centred if wide else vector
        axes[index], parts[index] = axis / np.linalg.norm(axis), value / total
    return mean, axes, parts


def _largest(
    rows: Float[np.ndarray, "row column"], n_found: int
) -> tuple[Float[np.ndarray, "found"], Float[np.ndarray, "row found"]]:
    """The largest eigenvalues of `rows @ rows.T`, ascending, and their unit eigenvectors."""
    size = len(rows)
    if size <= LANCZOS_FROM:
        # All of them, which takes twice as long as scipy's few, but importing scipy takes a fifth of a second.
        values, vectors = np.linalg.eigh(rows @ rows.T)
        return values[-n_found:], vectors[:, -n_found:]
    from scipy.sparse.linalg import LinearOperator, eigsh

    def moments(vector: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        return (rows @ (vector.ravel().astype(rows.dtype) @ rows)).astype(np.float64)

    start = np.random.default_rng(0).normal(size=size)
    return eigsh(
        LinearOperator((size, size), matvec=moments, dtype=np.float64), n_found, v0=start, ncv=LANCZOS_VECTORS, tol=1e-6
    )


def _normalised(embeddings: Embeddings, probes: Probes, layer: int) -> Embeddings:
    """z, a copy; in single precision where a layer is large."""
    large = min(embeddings.shape) > LANCZOS_FROM
    return probes.frame(layer).normalise(embeddings, np.float32 if large else np.float64)


def _models(
    base: Embeddings, probes: Probes, tuned: Embeddings | None, tuned_probes: Probes | None
) -> list[tuple[Embeddings, Probes]]:
    if (tuned is None) != (tuned_probes is None):
        raise ValueError("Give tuned embeddings and tuned probes together.")
    models = [(base, probes)]
    if tuned is not None and tuned_probes is not None:
        models.append((tuned, tuned_probes))
    return models


def _fitted(
    zs: Sequence[Embeddings], fit: Bool[np.ndarray, "prompt"] | None, fit_on: FitOn
) -> Float[np.ndarray, "fitted d_model"]:
    chosen = zs if fit_on == "both" else zs[:1]
    parts = [z if fit is None else z[fit] for z in chosen]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _coordinates(
    embeddings: Embeddings, mean: Float[np.ndarray, "d_model"], axes: Float[np.ndarray, "axis d_model"]
) -> Float[np.ndarray, "prompt axis"]:
    """Coordinates on `axes`, seen from `mean`, without a centred copy of the embeddings."""
    return (embeddings @ axes.T.astype(embeddings.dtype)).astype(np.float64) - mean @ axes.T


def _variance(embeddings: Embeddings) -> float:
    """The variance of all dimensions together."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    return _squares(embeddings) / len(embeddings) - float(np.square(mean).sum())


def _squares(embeddings: Embeddings) -> float:
    """The sum of all squared entries."""
    return float(np.einsum("pd,pd->p", embeddings, embeddings).sum(dtype=np.float64))


def _sign_of_farthest(
    embeddings: Embeddings, mean: Float[np.ndarray, "d_model"], axes: Float[np.ndarray, "axis d_model"]
) -> Float[np.ndarray, "axis 1"]:
    """+1 or −1 for each axis, such that the prompt farthest out lies on its positive side."""
    coordinates = _coordinates(embeddings, mean, axes)
    farthest = coordinates[np.abs(coordinates).argmax(axis=0), np.arange(len(axes))]
    return np.where(farthest < 0, -1.0, 1.0)[:, None]


def _pca(
    zs: Sequence[Embeddings],
    upwards: Float[np.ndarray, "d_model"],
    fit: Bool[np.ndarray, "prompt"] | None,
    fit_on: FitOn,
) -> tuple[list[Points], tuple[float, float]]:
    mean, axes, parts = principal_axes(_fitted(zs, fit, fit_on), 2)
    axes = axes * np.where(axes @ upwards < 0, -1.0, 1.0)[:, None]
    return [_coordinates(z, mean, axes) for z in zs], (float(parts[0]), float(parts[1]))


def axes_of(kind: str, explained: tuple[float, float], *, raw: bool = False) -> tuple[str, str]:
    """The titles of both axes of a `separation` or `pca` view."""
    where = "the model's own units" if raw else "scale-free units"
    if kind == "separation":
        return (
            f"Distance to the probe's boundary, + = harmful ({where})",
            f"First principal component of the rest ({where})",
        )
    x, y = (f"Principal component {i} ({where}, {part:.0%} of the variance)" for i, part in enumerate(explained, 1))
    return x, y


def _umap_points(zs: Sequence[Embeddings], fit_on: FitOn, seed: int) -> list[Float32[np.ndarray, "prompt 2"]]:
    import umap

    fitted = _fitted(zs, None, fit_on).astype(np.float32)
    if not np.ptp(fitted, axis=0).any():
        return [np.zeros((len(z), 2), dtype=np.float32) for z in zs]  # one point many times over has no map
    neighbours = min(UMAP_NEIGHBOURS, len(fitted) - 1)
    reducer = umap.UMAP(n_neighbors=neighbours, n_jobs=1, random_state=seed)
    with warnings.catch_warnings():
        # Its spectral start falls back to a random one on small or disconnected sets, with a warning.
        warnings.filterwarnings("ignore", module=r"umap|sklearn")
        together = reducer.fit_transform(fitted)
        if fit_on == "base" and len(zs) > 1:
            return [together, reducer.transform(zs[1].astype(np.float32))]
    return np.split(together, len(zs)) if fit_on == "both" else [together]
