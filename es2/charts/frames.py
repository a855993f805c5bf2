"""Tables of numbers and of prompts, the same in the app's downloads and in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from es2.analysis.results import LayerNumbers
from es2.prompts.prompt_set import HARMFUL, LABEL_NAMES, PromptSet

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float, Int


Margins: TypeAlias = 'Mapping[str, Float[np.ndarray, "prompt"]]'
"""Signed distances to the boundary, + on the harmful side, by what their column is called; the last decides."""


def numbers_frame(models: Iterable[tuple[str, Sequence[LayerNumbers]]], *, intervals: bool = False) -> pd.DataFrame:
    """All numbers of all layers, a row for each layer of each of `models`, whose names may be equal.

    With `intervals` each number has its ends beside it, in columns `…_low` and `…_high`.
    """
    import pandas as pd

    ends = ("low", "high") if intervals else ()
    return pd.DataFrame(
        [
            {"layer": at.layer, "model": name}
            | {
                column: value
                for number, one in at.numbers.items()
                for column, value in ((number, one.value), *((f"{number}_{end}", getattr(one, end)) for end in ends))
            }
            for name, layers in models
            for at in layers
        ]
    )


def own_side(prompts: PromptSet, margins: Float[np.ndarray, "prompt"]) -> Float[np.ndarray, "prompt"]:
    """Distance to the boundary, + on each prompt's own side."""
    return np.where(prompts.labels == HARMFUL, margins, -margins)


def prompts_frame(
    prompts: PromptSet,
    rows: Int[np.ndarray, "row"],
    margins: Margins,
    more: Mapping[str, Float[np.ndarray, "row"]],
) -> pd.DataFrame:
    """The prompts of these rows with their margins; the side is the one they have under the last model, if any.

    `more` are further columns of numbers, one entry a row.
    """
    import pandas as pd  # half a second, in which the first visitor sees the figures already

    columns: dict[str, Any] = {
        "prompt": [prompts.texts[row] for row in rows],
        "label": [LABEL_NAMES[int(prompts.labels[row])] for row in rows],
        **{name: values[rows].astype(float) for name, values in margins.items()},
        **{name: values.astype(float) for name, values in more.items()},
    }
    if margins:
        own = own_side(prompts, list(margins.values())[-1])
        columns["side"] = ["correct" if own[row] > 0 else "wrong" for row in rows]
    columns |= {
        "category": [prompts.categories[row] for row in rows],
        "split": [prompts.splits[row] for row in rows],
        "pair": [prompts.pairs[row] for row in rows],
    }
    return pd.DataFrame(columns)
