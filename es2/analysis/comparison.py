"""Two models side by side: what the compare page and the report are about.

A comparison is the same record wherever its parts come from (a run's folder, a second run, the showcase). KLs compare a
fine-tune with its base, so there are none where another run takes the base's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from es2.analysis.results import Analysis
from es2.analysis.verdict import KL_BUDGET, Behaviour, Verdict, layer_verdict, run_verdict
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet


@dataclass(frozen=True)
class Comparison:
    """Base and a run's tuned model, or two runs.

    Attributes:
        prompts: the prompts that are shown, in the order of the embeddings: `measured` ones, or a part of them.
        base, tuned: their embeddings under the model at the left (base, or another run) and at the right.
        analysis: of both; its numbers are of all test prompts, also where a part is shown.
        names: of left and right.
        targets, result, run: the target layers, `result.json` and id of the run at the right.
        config: that run's settings, `FinetuneConfig.to_dict()` and `prompts`, the source of the prompts.
        behaviours: what each run that is compared did to replies, against its own base: one, or that at the left first.
    """

    prompts: PromptSet
    base: ActivationSet
    tuned: ActivationSet
    analysis: Analysis
    position: str
    names: tuple[str, str]
    targets: tuple[int, ...]
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    run: str
    behaviours: tuple[Behaviour, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies everything that decides a figure."""
        return (self.base.key, self.tuned.key, self.prompts.digest, self.position, str(self.analysis.config))

    @property
    def is_of_two_runs(self) -> bool:
        """Whether another run takes the place of base."""
        return self.base.run is not None

    @property
    def kl(self) -> Mapping[str, float] | None:
        """The run's KLs on harmless test prompts, `prompt` and `reply`; None between two runs."""
        return None if self.is_of_two_runs else self.result.get("kl_harmless_test")

    @property
    def kl_budget(self) -> float:
        """The run's budget for each of its KLs; the usual one for an adapter that was made elsewhere."""
        return float(self.config.get("kl_budget", KL_BUDGET))

    @property
    def run_verdict(self) -> Verdict:
        """The verdict on the run: the gravest of its target layers."""
        return run_verdict(self.analysis, self.targets, self.kl, self.kl_budget)

    def verdict(self, layer: int) -> Verdict:
        """The verdict on one layer."""
        return layer_verdict(self.analysis.layers[layer], self.kl, self.kl_budget)

    @property
    def outcome(self) -> str:
        """The verdict on the run with that on its behaviour; two runs do not share the base that this is against."""
        verdict = self.run_verdict.name
        return verdict if self.is_of_two_runs else self.behaviours[-1].outcome(verdict)

    @property
    def warnings(self) -> list[str]:
        """What to warn of in the behaviour of each run; between two runs the name of the run is in front."""
        named = zip(self.names[-len(self.behaviours) :], self.behaviours, strict=True)
        found = [(name, behaviour.warning) for name, behaviour in named if behaviour.warning]
        return [f"{name}: {warning}" if self.is_of_two_runs else warning for name, warning in found]
