"""A film's frames as points in a plane: one projection for all steps, so that what moves on the screen moved.

x is the base's mean-difference direction, y the first principal component of what base and the last step hold beside
it. Every step is centred and divided by its own scale, as both models of a comparison are; in raw lengths a residual
stream that only grew is seen to grow.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.geometry import Frame, fit_frame
from es2.analysis.projection import principal_axes
from es2.core.files import DamagedError
from es2.prompts.prompt_set import HARMFUL
from es2.store.film import FilmFrame

if TYPE_CHECKING:
    from jaxtyping import Float, Int

logger = logging.getLogger(__name__)


MAX_FRAMES = 60
"""Of more validations, this many are shown, evenly, the first and the last among them."""


@dataclass(frozen=True)
class FilmView:
    """The points of a film.

    Attributes:
        steps: of the frames; the first is the base's, unless that is lost.
        layers: the target layers.
        labels: of the prompts.
        texts: of the prompts; None for one that the prompt set does not hold any more.
        points: in the plane of each layer, the same at all steps.
        lengths: the scale of each layer at each step, in parts of the first step's.
        numbers: what each validation measured: `kl_prompt`, `kl_reply` (nats per token), `mean_difference_margin`.
        raw: whether lengths are the model's own, rather than in parts of each step's scale.
        n_lost: number of frames that are damaged and left out.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    labels: Int[np.ndarray, "prompt"]
    texts: tuple[str | None, ...]
    points: Float[np.ndarray, "step layer prompt 2"]
    lengths: Float[np.ndarray, "step layer"]
    numbers: tuple[dict[str, float], ...]
    raw: bool
    n_lost: int = 0

    @property
    def axes(self) -> tuple[str, str]:
        """The titles of x and y."""
        where = "the model's own units" if self.raw else "scale-free units"
        along, beside = "Along base's mean difference", "First principal component of the rest"
        return f"{along} ({where})", f"{beside} ({where})"


def film_view(
    frames: Sequence[FilmFrame], texts: Mapping[str, str] | None = None, *, raw: bool = False
) -> FilmView | None:
    """The points of a film; None where not even two of its frames can be read.

    Args:
        frames: of `read_film`.
        texts: of `texts_by_hash`, where the prompt set can be read.
        raw: keep the model's own lengths instead of dividing each step by its scale.

    Raises:
        MachineError: when a frame cannot be read.
    """
    if len(frames) > MAX_FRAMES:
        frames = [frames[place] for place in np.linspace(0, len(frames) - 1, MAX_FRAMES).round().astype(int)]
    first, last = _first_whole(frames), _first_whole(frames[::-1])
    if first is None or last is None or first[0].step == last[0].step:
        return None
    labels = np.array(first[0].labels, dtype=np.int8)
    axes = [_axes(*ends, labels, raw) for ends in zip(first[1], last[1], strict=True)]
    shown, points, scales = [], [], []
    for frame in frames:
        if (embeddings := _whole(frame)) is None:
            continue
        zs, own = zip(*(_normalised(layer, labels, raw) for layer in embeddings), strict=True)
        shown.append(frame)
        points.append([z @ plane.T for z, plane in zip(zs, axes, strict=True)])
        scales.append([one.scale for one in own])
    return FilmView(
        steps=tuple(frame.step for frame in shown),
        layers=first[0].layers,
        labels=labels,
        texts=tuple(map((texts or {}).get, first[0].prompts)),
        points=np.array(points),
        lengths=np.array(scales) / scales[0],
        numbers=tuple(frame.numbers for frame in shown),
        raw=raw,
        n_lost=len(frames) - len(shown),
    )


def _whole(frame: FilmFrame) -> Float[np.ndarray, "layer prompt d_model"] | None:
    """A frame's embeddings; None, with a warning, where they are damaged or not finite."""
    try:
        embeddings = frame.embeddings()
    except DamagedError as error:
        logger.warning("%s", error)
        return None
    if not np.isfinite(embeddings).all():
        logger.warning("The frame %s of the film holds what is no number and is left out.", frame.path)
        return None
    return embeddings


def _first_whole(frames: Sequence[FilmFrame]) -> tuple[FilmFrame, Float[np.ndarray, "layer prompt d_model"]] | None:
    """The first frame that can be shown, with its embeddings."""
    found = ((frame, _whole(frame)) for frame in frames)
    return next(((frame, embeddings) for frame, embeddings in found if embeddings is not None), None)


def _normalised(
    embeddings: Float[np.ndarray, "prompt d_model"], labels: Int[np.ndarray, "prompt"], raw: bool
) -> tuple[Float[np.ndarray, "prompt d_model"], Frame]:
    """One step's embeddings in its own frame, or in raw lengths only centred; and that frame."""
    own = fit_frame(embeddings, labels)
    z = own.normalise(embeddings)
    return (z * own.scale if raw else z), own


def _axes(
    base: Float[np.ndarray, "prompt d_model"],
    last: Float[np.ndarray, "prompt d_model"],
    labels: Int[np.ndarray, "prompt"],
    raw: bool,
) -> Float[np.ndarray, "2 d_model"]:
    """Unit vectors of x and y at one layer; the last step's harmful mean is on y's upper side."""
    (before, own), (after, _) = (_normalised(one, labels, raw) for one in (base, last))
    both = np.concatenate([before, after])
    _, axes, _ = principal_axes(both - np.outer(both @ own.direction, own.direction), 1)
    heights = after @ axes[0]
    upwards = heights[labels == HARMFUL].mean() >= heights[labels != HARMFUL].mean()
    return np.stack([own.direction, axes[0] if upwards else -axes[0]])
