"""What the tests of figures draw, and how they read what was drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import plotly.graph_objects as go
from streamlit.testing.v1 import AppTest

from es2.analysis.projection import View
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet


def six_pairs() -> PromptSet:
    """Six pairs: two of test, one of each other split but for tune, which has two."""
    splits = ("test", "test", "probe", "validation", "tune", "tune")
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
    points = np.round(np.random.default_rng(1).normal(size=(12, 2)), 3)  # as figures have them (`canvas.rounded`)
    return View("separation", points, None, ("x (no unit)", "y (no unit)"), None)


class Checked:
    """A module of figures, each of which plotly checks: a name or a value that it does not know is an error.

    The app draws unchecked ones, since checking takes most of the time that a figure takes.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        return checked(found) if callable(found) else found


def checked(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose figures and traces come as plotly's objects."""

    def made(*arguments: Any, **settings: Any) -> Any:
        one = draw(*arguments, **settings)
        if not isinstance(one, dict):
            return one
        return go.Figure(one) if "layout" in one else go.Scatter(one)

    return made


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    """A figure's traces by name."""
    return {trace.name: trace for trace in figure.data}


def charts_of(at: AppTest) -> dict[str, list[dict[str, Any]]]:
    """What is drawn on a page, by the key of its widget: the figures, of which most widgets have one."""
    plots = [one.proto for one in at.get("bidi_component") if one.proto.component_name == "es2_plots"]
    return {one.id.split("-")[-1]: [_parsed(each) for each in json.loads(one.json)[0]["figures"]] for one in plots}


def _parsed(figure: dict[str, str]) -> dict[str, Any]:
    return {part: json.loads(text) for part, text in figure.items()}
