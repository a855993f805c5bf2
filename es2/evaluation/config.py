"""What decides an evaluation. Imports no torch, so that forms and commands can read it."""

from __future__ import annotations

from typing import Any

from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.core.settings import setting
from es2.evaluation.judge import KEY_VARIABLE, check_endpoint
from es2.evaluation.robustness import DIRECTIONS, P0, logit
from es2.evaluation.soft_prompt import BUDGETS as SOFT_BUDGETS
from es2.evaluation.soft_prompt import LENGTHS as SOFT_LENGTHS
from es2.evaluation.soft_prompt import check_soft_sweep
from es2.evaluation.steering import BUDGETS, steering_sweep
from es2.models.catalogue import DEFAULT_MODEL
from es2.models.costs import DTYPES

ANSWER_BY = ("text", "letter")
SUITES = ("refusal", "kl", "perturbation", "soft_prompt", "ability", "direction")
_NOT_IN_ALL = ("direction",)  # costs as much as all others together


class EvaluateConfig(Rendering):
    """Everything that decides an evaluation, but the judge's key."""

    model: str = setting(
        DEFAULT_MODEL, "A catalogue name (`es2 models`), a Hub id, a local folder or a .gguf file.", group="own"
    )
    prompts: str = setting(
        "builtin",
        "builtin, a file (CSV, TSV, JSON, JSONL, TXT, Parquet; also .gz), hf:<dataset>[:split], or a benchmark: "
        "advbench, harmbench, jailbreakbench, strongreject, xstest, do-not-answer, or-bench, alpaca, mt-bench, "
        "sorry-bench, with :PATH for its published file. Of the prompts that the run was tuned on only "
        "the test split counts.",
        group="own",
    )
    run: str | None = setting(None, "A fine-tuning run (`es2 runs`) to compare with its base.", group="own")
    suite: str = setting(
        "all",
        "refusal (what both models reply), kl (KL, perplexity and agreement on harmless prompts), perturbation "
        "(attacks: replies while embeddings are steered towards harmless, and after a soft prompt), soft_prompt (that "
        "attack alone), ability (multiple-choice questions), all (these), or direction (replies with the difference of "
        "means removed or added, beside random directions), which all leaves out.",
        choices=(*SUITES, "all"),
        group="own",
    )
    limit: int = setting(
        48,
        "Prompts of each label that are replied to at most. A larger number adds prompts and moves none.",
        label="Prompts of each label",
        group="main",
        step=8,
        ge=1,
    )
    steering_limit: int = setting(
        12,
        "Harmful prompts that are steered at most; each is replied to once per steering and model.",
        label="Steered prompts",
        group="main",
        step=4,
        ge=1,
    )
    new_tokens: int = setting(
        64, "The longest reply, in tokens. Late refusals come after 20 to 30.", label="Reply tokens", step=8, ge=1
    )
    thinking_tokens: int = setting(
        512,
        "The longest thinking before a reply, in tokens, where the model thinks; a reply that still thinks then counts "
        "as unfinished. Reply tokens are those of the answer.",
        label="Thinking tokens",
        step=64,
        ge=1,
        implicit=True,
    )
    kl_tokens: int = setting(
        32, "Tokens of the base's reply that KL, perplexity and agreement cover.", label="KL tokens", step=8, ge=1
    )
    questions: str = setting(
        "builtin",
        "Multiple-choice questions: builtin (200 of our own), a file (CSV, TSV, JSON, JSONL, Parquet; also .gz) in the "
        "layout of MMLU-Pro, of GPQA or with columns question, A, B, C, D, answer, or hf:<dataset>[:split].",
    )
    question_limit: int = setting(
        200,
        "Questions that are asked at most. A larger number adds questions and moves none.",
        label="Questions at most",
        step=50,
        ge=1,
    )
    answer_by: str = setting(
        "text",
        "text (the log-likelihood of each option's words after the question, per character) or letter (the options are "
        "shown, and the log-likelihoods of their letters compared).",
        choices=ANSWER_BY,
    )
    layers: tuple[int, ...] | None = setting(
        None,
        "Where embeddings are steered, such as 12,18. Automatic: the run's target layers, else the recommended ones.",
        label="Steered layers",
        of="layer",
    )
    directions: tuple[str, ...] = setting(DIRECTIONS, "Directions of the sweep.", of="direction", choices=DIRECTIONS)
    budgets: tuple[float, ...] = setting(
        BUDGETS, "Lengths of a steering vector relative to the embedding's own.", of="budget"
    )
    p0s: tuple[float, ...] = setting(
        P0, "Probabilities of harmful that SCAV's steerings reach.", label="Probabilities to reach", of="probability"
    )
    soft_lengths: tuple[int, ...] = setting(
        SOFT_LENGTHS, "Numbers of vectors of a soft prompt.", label="Soft prompt's vectors", of="length"
    )
    soft_budgets: tuple[float, ...] = setting(
        SOFT_BUDGETS,
        "Lengths of a soft prompt's vectors relative to the mean length of a token's embedding; none leaves the soft "
        "prompt out.",
        label="Soft prompt's budgets",
        of="budget",
    )
    controls: int = setting(
        3,
        "Random directions beside the difference of means that is removed and added; each prompt is replied to under "
        "each.",
        label="Random directions",
        ge=1,
        implicit=True,
    )
    seed: int = setting(0, "Of the random directions, the soft prompt and the resamples.", ge=0)
    judge_url: str | None = setting(
        None, "An OpenAI-compatible endpoint to ask for a second opinion; replies are sent there.", label="Judge's URL"
    )
    judge_model: str | None = setting(None, "The model's name at that endpoint.", label="Judge's model")
    judge_key_variable: str = setting(
        KEY_VARIABLE, "The environment variable that holds the endpoint's key.", label="Variable of the judge's key"
    )
    judge_folder: str | None = setting(None, "A local text classifier to ask instead.", label="Judge's folder")
    judge_label: str | None = setting(None, "The classifier's class that means refusal.", label="Class of refusals")
    device: str | None = setting(None, "cuda, mps or cpu. Automatic: the best there is.")
    dtype: str | None = setting(
        None,
        "The model's number format. Automatic: bfloat16 on a CUDA device, else float32.",
        label="Number format",
        choices=tuple(DTYPES),
    )

    def model_post_init(self, _: Any) -> None:
        """Refuse what does not go together (`InputError`)."""
        for budget in self.budgets:
            if not 0 < budget <= 10:
                raise InputError(f"A budget is a length relative to the embedding's, between 0 and 10, not {budget!r}.")
        for p0 in self.p0s:
            logit(p0)
        steering_sweep(self.directions, self.budgets, self.p0s)
        check_soft_sweep(self.soft_lengths, self.soft_budgets)
        if self.suite == "soft_prompt" and not (self.soft_lengths and self.soft_budgets):
            raise InputError("A soft prompt needs a length (--soft-lengths) and a budget (--soft-budgets).")
        if self.judge_url and self.judge_folder:
            raise InputError("Give one judge: an endpoint (--judge-url) or a classifier's folder (--judge-folder).")
        if self.judge_url and not self.judge_model:
            raise InputError("A judge behind an endpoint needs its model's name there (--judge-model).")
        if self.judge_url:  # here, before anything of it is written down
            check_endpoint(self.judge_url, self.judge_key_variable)

    @property
    def suites(self) -> tuple[str, ...]:
        """Which parts are asked for; the soft prompt is one of the attacks."""
        whole = tuple(one for one in SUITES if one not in _NOT_IN_ALL)
        asked = {"all": whole, "perturbation": ("perturbation", "soft_prompt")}.get(self.suite, (self.suite,))
        return tuple(one for one in asked if one != "soft_prompt" or (self.soft_lengths and self.soft_budgets))
