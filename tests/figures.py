"""What the tests of figures draw, and how they read what was drawn."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from es2.projection import View
from es2.prompts import HARMFUL, HARMLESS, PromptSet


def six_pairs() -> PromptSet:
    """Six pairs: two of test, one of each other split but for tune, which has two."""
    splits = ("test", "test", "probe", "watch", "tune", "tune")
    return PromptSet(
        name="six",
        texts=tuple(f"{label} {pair}" for pair in range(6) for label in ("harmful", "harmless")),
        labels=np.array([HARMFUL, HARMLESS] * 6, dtype=np.int8),
        categories=("locks",) * 12,
        pairs=tuple(f"pair-{pair}" for pair in range(6) for _ in range(2)),
        splits=tuple(split for split in splits for _ in range(2)),
    )


def random_view() -> View:
    """A separation view of twelve points."""
    points = np.random.default_rng(1).normal(size=(12, 2))
    return View("separation", points, None, ("x (no unit)", "y (no unit)"), None)


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    """A figure's traces by name."""
    return {trace.name: trace for trace in figure.data}
