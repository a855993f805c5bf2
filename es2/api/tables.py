"""From the app's figures and the numbers of artifacts to plotly's figures and the columns of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go


def as_figure(figure: Mapping[str, Any]) -> go.Figure:
    """One of the app's figures as plotly's object, in the reader's own template."""
    import plotly.graph_objects as go

    return go.Figure(figure)


def ends_of(name: str, number: Mapping[str, float] | None) -> dict[str, float | None]:
    """A number and the ends of its interval, by column; None where there is none."""
    found = number or {}
    return {name: found.get("value"), f"{name}_low": found.get("low"), f"{name}_high": found.get("high")}
