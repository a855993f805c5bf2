"""What decides an evaluation. Imports no torch, so that forms and commands can read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from es2.core.errors import InputError
from es2.evaluation.judge import KEY_VARIABLE, check_endpoint
from es2.evaluation.robustness import DIRECTIONS, P0, logit
from es2.evaluation.steering import BUDGETS, pushes
from es2.models.catalogue import DEFAULT_MODEL

SUITES = ("refusal", "kl", "perturbation")


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides an evaluation, but the judge's key.

    Attributes:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        prompts: the source of the prompt set, as `es2.prompts.loading.load_prompts` understands it.
        run: id of the fine-tuning run to compare with its base; None for the base alone.
        suite: one of `SUITES`, or `all`.
        limit: at most so many prompts of each label are replied to.
        new_tokens: the longest reply. Late refusals come after 20 to 30 tokens.
        kl_tokens: tokens of the base's reply that KL, perplexity and agreement cover, as in a fine-tune.
        push_limit: at most so many harmful prompts are pushed; each is replied to once per push and model.
        layers: where embeddings are pushed; by default the run's target layers, else the recommended ones.
        directions: some of `es2.evaluation.robustness.DIRECTIONS`.
        budgets: lengths of a push relative to the embedding's own.
        p0s: probabilities of harmful to be reached.
        seed: of the random directions and the resamples.
        device: a torch device; by default the best there is.
        dtype: the model's number format; by default what suits the device.
        judge_url: an OpenAI-compatible endpoint that is asked for a second opinion; None for none.
        judge_model: the model's name there.
        judge_key_variable: the environment variable that holds the key.
        judge_folder: a local text classifier to ask instead.
        judge_label: the classifier's class that means refusal.
    """

    model: str = DEFAULT_MODEL
    prompts: str = "builtin"
    run: str | None = None
    suite: str = "all"
    limit: int = 48
    new_tokens: int = 64
    kl_tokens: int = 32
    push_limit: int = 12
    layers: tuple[int, ...] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    budgets: tuple[float, ...] = BUDGETS
    p0s: tuple[float, ...] = P0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = KEY_VARIABLE
    judge_folder: str | None = None
    judge_label: str | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "directions", "budgets", "p0s"):  # JSON has lists only
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.suite not in (*SUITES, "all"):
            raise InputError(f"Unknown suite {self.suite[:40]!r}; one of {', '.join(SUITES)}, all.")
        for name in ("limit", "new_tokens", "kl_tokens", "push_limit"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")
        for budget in self.budgets:
            if not 0 < budget <= 10:
                raise InputError(f"A budget is a length relative to the embedding's, between 0 and 10, not {budget!r}.")
        for p0 in self.p0s:
            logit(p0)
        pushes(self.directions, self.budgets, self.p0s)
        if self.judge_url and self.judge_folder:
            raise InputError("Give one judge: an endpoint (--judge-url) or a classifier's folder (--judge-folder).")
        if self.judge_url and not self.judge_model:
            raise InputError("A judge behind an endpoint needs its model's name there (--judge-model).")
        if self.judge_url:  # here, before anything of it is written down
            check_endpoint(self.judge_url, self.judge_key_variable)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EvaluateConfig:
        """The config in a JSON object; entries of other names belong to somebody else and are left alone."""
        return cls(**{entry.name: document[entry.name] for entry in fields(cls) if entry.name in document})

    @property
    def suites(self) -> tuple[str, ...]:
        """Which parts are asked for."""
        return SUITES if self.suite == "all" else (self.suite,)
