"""Refusals under one attack, measured alike of a base and of what it is tuned to, in seconds: what a sweep compares.

Harmful prompts are answered while their embeddings are steered away from harmful, by a fixed part of their own length,
along the normals of probes that are fitted anew on the model's own embeddings: an attacker who adapts. In the same pass
harmless prompts are answered without steering, since a model that refuses everything defends against everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.geometry import fit_frame
from es2.analysis.probes import Probes, cross_validate, fit_path
from es2.analysis.resampling import canonical, fold_of
from es2.analysis.results import AnalysisConfig
from es2.core.progress import Reporter, silent
from es2.evaluation.robustness import Attacker, hyperplane
from es2.evaluation.steering import Steered, Steering
from es2.models.batching import Tokens, end_tokens
from es2.models.forward import FinetuneForward
from es2.models.replies import greedy_replies
from es2.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float

ATTACK = Steering("scav", 0.2)
"""At this length it takes refusals of a base, and random directions none (`docs/experiments.md`)."""


class DefenceTest:
    """One attack, to be made on several states of one model.

    Args:
        network: the model as it is now, which is the base: it decides how much the probes are regularised; `layers` are
            those that are attacked.
        probe: the prompts that the attacker learns from.
        probe_tokens: of each of them.
        harmful, harmless: the prompts that are answered.
        refuses: whether a reply refuses.
        n_tokens: of the longest reply.

    Raises:
        InputError: when the attacker's prompts are too few.
    """

    def __init__(
        self,
        network: FinetuneForward,
        *,
        probe: PromptSet,
        probe_tokens: Sequence[Tokens],
        harmful: Sequence[Tokens],
        harmless: Sequence[Tokens],
        refuses: Callable[[Tokens], bool],
        n_tokens: int,
    ) -> None:
        rows, self._probe = canonical(probe)
        self._probe_tokens = [probe_tokens[row] for row in rows]
        self._network = network
        self._prompts = [*harmful, *harmless]
        self._cases = [ATTACK] * len(harmful) + [Steering("none", 0.0)] * len(harmless)
        self._refuses = refuses
        self._n_tokens = n_tokens
        config = AnalysisConfig()
        folds = fold_of(self._probe, config.n_folds)
        self._Cs = [
            config.Cs[cross_validate(features, self._probe.labels, folds, config.Cs).best]
            for features in map(self._features, self._embed())
        ]

    def measure(self, report: Reporter = silent) -> dict[str, int]:
        """Count refusals of the model as it is now: `refusals` of harmful prompts under attack, `over_refusals`.

        Args:
            report: called at every token (`defence`); it may raise to stop.

        Raises:
            InputError: for an architecture that cannot be steered.
            MachineError: when memory runs out.
        """
        model = self._network.model
        model.eval()
        steered = Steered(model, self._attacker(), self._cases, [""] * len(self._cases))
        refused = dict.fromkeys((True, False), 0)
        with steered, self._network.precision():
            for batch in greedy_replies(
                model, self._prompts, self._n_tokens, end_tokens(model), prefix=self._network.template_prefix,
                steering=steered, report=report, stage="defence",
            ):  # fmt: skip
                for row, reply in zip(batch.rows, batch.replies, strict=True):
                    refused[self._cases[row] is ATTACK] += self._refuses(reply)
        return {"refusals": refused[True], "over_refusals": refused[False]}

    def _embed(self) -> Float[np.ndarray, "layer prompt d_model"]:
        import torch

        with torch.no_grad():
            return self._network.embed(self._probe_tokens).transpose(0, 1).double().cpu().numpy()

    def _features(self, embeddings: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt d_model"]:
        return fit_frame(embeddings, self._probe.labels).normalise(embeddings)

    def _attacker(self) -> Attacker:
        """An attacker who knows the model as it is now."""
        planes = []
        for embeddings, C in zip(self._embed(), self._Cs, strict=True):
            frame = fit_frame(embeddings, self._probe.labels)
            weights, bias = fit_path(frame.normalise(embeddings), self._probe.labels, (C,))
            one = np.array([frame.scale]), np.array([C]), frame.direction[None]
            planes.append(hyperplane(Probes(weights, bias, frame.centre[None], *one), 0))
        return Attacker(self._network.layers, tuple(planes), {"scav": np.stack([plane.normal for plane in planes])})
