"""The separation terms by name, and mixtures of them as users write them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from es2.core.errors import InputError

OBJECTIVES = ("distance", "anchored", "fisher", "margin")
REFUSAL = "refusal"
"""The term of first words; it separates no embeddings, so it goes with one of `OBJECTIVES`."""
DEFAULT_OBJECTIVE = "20*margin+2*refusal"
LEARNING_RATES = {"distance": 3 / 256, "anchored": 3 / 256, "fisher": 3 / 256, "margin": 3 / 128, REFUSAL: 3 / 128}
"""The usual peak learning rate of LoRA under each term, in units of the size of weights (`automatic_learning_rate`)."""
MARGIN_TARGET = 0.15  # in units of the scale: this far out a prompt counts as separated


@dataclass(frozen=True)
class Term:
    """One term of a mixture: its weight and its name, one of `OBJECTIVES` or `REFUSAL`."""

    weight: float
    name: str


def parse_objective(text: str) -> tuple[Term, ...]:
    """The terms of a mixture: `fisher`, `fisher+margin`, `1.0*margin+0.5*fisher`, `20*margin+2*refusal`.

    Raises:
        InputError: for an unknown or repeated term, a weight that is not a positive number, and `refusal` alone.
    """
    terms: list[Term] = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        name = name.strip()
        if name not in (*OBJECTIVES, REFUSAL):
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
    if [term.name for term in terms] == [REFUSAL]:
        raise InputError(
            f"The objective {text[:80]!r} moves no embeddings; add a separation, such as 20*margin+{text}."
        )
    return tuple(terms)


def is_anchored(objective: str) -> bool:
    """Whether the separation needs the base embedding of each harmless prompt. Raises as `parse_objective`."""
    return _has(objective, "anchored")


def reads_refusals(objective: str) -> bool:
    """Whether the separation needs the first words of replies. Raises as `parse_objective`."""
    return _has(objective, REFUSAL)


def _has(objective: str, name: str) -> bool:
    return any(term.name == name for term in parse_objective(objective))
