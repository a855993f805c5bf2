"""The title and the meaning of each number of a layer, shared by the app and the reports.

In the order of reading: accuracies, distances, what is left beside them, and last the raw lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from es2.analysis.resampling import Interval

UNITS = "scale-free units"


@dataclass(frozen=True)
class Term:
    """One number.

    Attributes:
        name: the key in `LayerNumbers.numbers`.
        definition: one or two sentences for a tooltip.
        digits: decimals that its intervals are worth.
        scale_free: whether inflating the residual stream leaves it alone.
    """

    name: str
    title: str
    definition: str
    digits: int = 3
    scale_free: bool = True

    def value(self, interval: Interval) -> str:
        """The number itself, as text."""
        return self._text(interval.value)

    def range(self, interval: Interval) -> str:
        """Its interval, as text."""
        return f"{self._text(interval.low)} to {self._text(interval.high)}"

    def _text(self, number: float) -> str:
        # Adding zero turns the −0 of rounding into 0; a true minus sign does not read as the dash of a range.
        return f"{round(number, self.digits) + 0.0:,.{self.digits}f}".replace("-", "−")


TERMS = (
    Term(
        "probe_accuracy",
        "Probe accuracy",
        "Balanced accuracy of the layer's linear probe on test prompts; 0.5 is chance.",
    ),
    Term(
        "probe_accuracy_control",
        "Shuffled labels",
        "The same accuracy after the labels were shuffled over pairs, averaged over several shuffles: what a probe of "
        "this strength reaches when there is nothing to find. It should stay near 0.5.",
    ),
    Term(
        "probe_auroc",
        "Probe AUROC",
        "How often the probe ranks a harmful test prompt above a harmless one, whatever the threshold; 0.5 is chance.",
    ),
    Term(
        "margin_mean",
        "Margin",
        "Mean distance of test prompts to the probe's boundary, + on the correct side, averaged per label. "
        "1 unit is the root mean square length of an embedding at this layer.",
        digits=4,
    ),
    Term(
        "margin_harmful_q1",
        "Margin, easier quarter",
        "Lower quartile of the same distance over harmful prompts: what the easier attacks have to travel. "
        "Negative when a quarter of the harmful prompts already stands on the harmless side.",
        digits=4,
    ),
    Term(
        "mean_difference_margin",
        "Mean-difference margin",
        "The mean distance from the midpoint along the line between the two class means: how far the clouds stand "
        "apart, whatever a cleverer boundary could do.",
        digits=4,
    ),
    Term(
        "relative_distance",
        "Relative distance",
        "Distance of the two class means divided by the length of an embedding, corrected for sampling bias.",
        digits=4,
    ),
    Term(
        "fisher_ratio",
        "Fisher ratio",
        "Distance of the two class means divided by the spread within the classes, corrected for sampling bias. "
        "Above about 2 the clouds hardly overlap.",
    ),
    Term(
        "effective_rank",
        "Effective rank",
        "How many directions the prompts of one label still spread over, the separating one left out: what is left "
        "for everything else the model knows about a prompt.",
        digits=1,
    ),
    Term(
        "centroid_distance",
        "Centroid distance",
        "Distance of the two class means in the model's own units. Not scale-free: it grows when the residual stream "
        "is merely inflated.",
        digits=2,
        scale_free=False,
    ),
    Term(
        "pairwise_distance",
        "Pairwise distance",
        "Mean distance of a harmful to a harmless prompt in the model's own units. Not scale-free: it grows when the "
        "residual stream is merely inflated.",
        digits=2,
        scale_free=False,
    ),
)

COMPARED = (
    Term(
        "norm_ratio",
        "Length ratio",
        "Mean length of an embedding, tuned over base. Above 1 the residual stream is longer, which separates nothing: "
        "the next block divides by it.",
    ),
    Term(
        "direction_cosine",
        "Direction cosine",
        "Cosine between base's and tuned's directions from the harmless to the harmful mean: 1 when the clouds still "
        "stand apart along the same line, 0 when along an unrelated one.",
    ),
    Term(
        "orthogonal_std_ratio",
        "Rest ratio",
        "Spread within the labels across the separating direction, relative to an embedding's length, tuned over base. "
        "Well below 1 the clouds shrank, and what else the model knew of a prompt went with it.",
    ),
)
"""Numbers of a tuned layer that compare it with base."""

BY_NAME = {term.name: term for term in (*TERMS, *COMPARED)}

TWO_MARGINS = (
    "The margin asks how far prompts stand from the best boundary a classifier finds; the mean-difference margin asks "
    "how far the two clouds stand apart. With fewer probe prompts than dimensions the first can stay small while the "
    "second grows many times over: both are true, and they answer different questions (an attacker with the best "
    "classifier; the geometry of the clouds)."
)
