"""The separation terms by name, and mixtures of them as users write them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from es2.core.errors import InputError

OBJECTIVES = ("distance", "anchored", "fisher", "margin")
DEFAULT_OBJECTIVE = "20*margin"
LEARNING_RATES = {"distance": 1 / 192, "anchored": 1 / 192, "fisher": 1 / 192, "margin": 1 / 64}
"""The usual peak learning rate of LoRA under each term, in units of the typical size of the trained blocks' weights."""
MARGIN_TARGET = 0.15  # in units of the scale: this far out a prompt counts as separated


@dataclass(frozen=True)
class Term:
    """One term of a mixture: its weight and its name, one of `OBJECTIVES`."""

    weight: float
    name: str


def parse_objective(text: str) -> tuple[Term, ...]:
    """The terms of a mixture: `fisher`, `fisher+margin`, `1.0*margin+0.5*fisher`.

    Raises:
        InputError: for an unknown or repeated term and for a weight that is not a positive number.
    """
    terms: list[Term] = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        name = name.strip()
        if name not in OBJECTIVES:
            raise InputError(
                f"Unknown objective {part.strip()[:40]!r}; write one of {', '.join(OBJECTIVES)}, "
                "or a mixture such as 1.0*margin+0.5*fisher."
            )
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"The weight in {part.strip()[:40]!r} is not a positive number; write 0.5*{name}.")
        if any(term.name == name for term in terms):
            raise InputError(f"The objective {text[:80]!r} names {name} twice; give each term once.")
        terms.append(Term(weight, name))
    return tuple(terms)


def is_anchored(objective: str) -> bool:
    """Whether the separation needs the base embedding of each harmless prompt. Raises as `parse_objective`."""
    return any(term.name == "anchored" for term in parse_objective(objective))
