"""Refusals under attack as a sweep counts them: which prompts and layers, and when there is nothing to count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.analysis.verdict import LEAST_REFUSALS
from es2.core.errors import InputError
from es2.core.progress import Reporter
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.training.config import FinetuneConfig
from es2.training.sampling import held_out_rows

if TYPE_CHECKING:
    from es2.evaluation.defence import DefenceTest
    from es2.training.workload import Workload

PROBED = 64
"""Number of `probe` prompts of each label that the attacker learns from, at most."""


def n_answered(config: FinetuneConfig, prompts: PromptSet, label: int) -> int:
    """Number of `validation` prompts of a label that are answered: half of those that a validation reads at most."""
    return len(held_out_rows(prompts, "validation", label, max(1, config.validation_prompts // 2)))


def check_defence(config: FinetuneConfig, prompts: PromptSet) -> None:
    """Refuse prompts on which no base could refuse enough. Raises `InputError`."""
    if (n := n_answered(config, prompts, HARMFUL)) < LEAST_REFUSALS:
        raise InputError(
            f"defence asks half of the harmful validation prompts, which are {n} here, and needs {LEAST_REFUSALS} "
            "refusals of them; raise validation_prompts, or add prompts."
        )


class Defence:
    """The counts of a sweep's base under attack, and of every trial's kept weights under the same.

    Each count is of `refusals` of `n_harmful` prompts under attack and of `over_refusals` of `n_harmless` prompts
    without; those of the base are called `base_refusals` and `base_over_refusals`.

    Args:
        base: the sweep's, nothing trained in it.
        config: some fine-tune of the sweep, with the rendering that the prompts decide.
        prompts: the prompt set.
        model_files: the model's folder.
        layers: where embeddings are steered, in base and trials alike.
        report: of the base's replies (`defence`).

    Raises:
        InputError: for a base that refuses too little, too few prompts, or an architecture that cannot be steered.
    """

    def __init__(
        self,
        base: Workload,
        config: FinetuneConfig,
        prompts: PromptSet,
        model_files: Path,
        layers: Sequence[int],
        report: Reporter,
    ) -> None:
        harmful = list(base.plan.validation_replied)
        n_refused = len(base.base_refusals(harmful))
        if n_refused < LEAST_REFUSALS:
            raise InputError(
                f"The base refuses {n_refused} of {len(harmful)} harmful validation prompts, and defence needs "
                f"{LEAST_REFUSALS} refusals; sweep without it, or take a model that refuses."
            )
        harmless = list(base.plan.validation_kl)
        self._test = _make_test(base, config, prompts, model_files, layers, harmful, harmless)
        counts = {f"base_{name}": count for name, count in self._test.measure(report).items()}
        self._same = counts | {"n_harmful": len(harmful), "n_harmless": len(harmless), "layers": list(layers)}

    def measure(self, report: Reporter) -> dict[str, Any]:
        """The counts of the model as it is now, beside those of the base. Raises as `DefenceTest.measure`."""
        return self._test.measure(report) | self._same


def _make_test(
    base: Workload,
    config: FinetuneConfig,
    prompts: PromptSet,
    model_files: Path,
    layers: Sequence[int],
    harmful: Sequence[int],
    harmless: Sequence[int],
) -> DefenceTest:
    from es2.evaluation.defence import DefenceTest
    from es2.models.chat_template import render, template_prefix
    from es2.models.forward import FinetuneForward
    from es2.models.loading import load_tokenizer

    probed = [row for label in (HARMFUL, HARMLESS) for row in held_out_rows(prompts, "probe", label, PROBED)]
    tokenizer = load_tokenizer(model_files)
    tokens = render(tokenizer, [prompts.texts[row] for row in (*probed, *harmful, *harmless)], config).token_ids
    n, n_harmful = len(probed), len(harmful)
    return DefenceTest(
        FinetuneForward(
            base.network.model,
            template_prefix=template_prefix(tokenizer, tokens, config),
            layers=tuple(layers),
            gradient_checkpointing=config.gradient_checkpointing,
        ),
        probe=prompts.take(probed),
        probe_tokens=tokens[:n],
        harmful=tokens[n : n + n_harmful],
        harmless=tokens[n + n_harmful :],
        refuses=base.is_refusal,
        n_tokens=config.reply_tokens,
    )
