"""The ability part of an evaluation: which option of multiple-choice questions base and tuned find most likely.

The model's turn begins with "Answer:", and the log-likelihoods of the options are compared, as the LM Evaluation
Harness does (`output_type: multiple_choice` with `gen_prefix`). Nothing is generated.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.evaluation.behaviour import rate_interval
from es2.evaluation.results import SHOWN_CHARACTERS
from es2.evaluation.suites import BOOTSTRAP, Work, load
from es2.models.adapters import apply_finetune
from es2.models.chat_template import render, template_prefix
from es2.models.choices import score_options
from es2.models.loading import load_tokenizer
from es2.models.shape import context_length
from es2.prompts.questions import LETTERS, Question, QuestionSet

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedTokenizerBase

OPENING = "Answer:"


def ability(work: Work, questions: QuestionSet) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The share of questions whose right option is the likeliest, under base and tuned, and the rows behind it.

    Raises:
        InputError: when a question is longer than the model reads, or its template does not take it.
    """
    asked = questions.choose(work.config.question_limit)
    tokenizer = load_tokenizer(work.folder)
    by = work.config.answer_by
    contexts, tokens = tokens_of(tokenizer, asked, by, work.rendering)
    _check_lengths(work, asked, tokens)
    prefix = template_prefix(tokenizer, contexts, work.rendering)
    found: dict[str, list[int]] = {}
    model: Any = None
    for name in work.models:
        keys = [_key(work, name, options) for options in tokens]
        missing = [row for row, key in enumerate(keys) if key not in work.log]
        if missing and model is None:
            model = load(work, name)
        elif missing and work.weights is not None:
            apply_finetune(model, work.weights)
        for scores in score_options(
            model,
            [contexts[row] for row in missing],
            [tokens[row] for row in missing],
            prefix=prefix,
            report=work.report,
            stage=f"answer {name}",
        ):
            if not np.isfinite([one for likelihoods in scores.values() for one in likelihoods]).all():
                raise InputError(f"The {name} model's log-likelihoods are not finite: its weights are damaged.")
            work.log.add(
                {"key": keys[missing[row]], "model": name, "read": dict(zip(LETTERS, likelihoods, strict=False))}
                for row, likelihoods in scores.items()
            )
        read = [list(work.log[key]["read"].values()) for key in keys]
        found[name] = [chosen(question, likelihoods, by) for question, likelihoods in zip(asked, read, strict=True)]
    del model
    gc.collect()
    rows = [
        {
            "question": question.text[:SHOWN_CHARACTERS],
            "subject": question.subject,
            "answer": LETTERS[question.answer],
            **{name: LETTERS[found[name][row]] for name in work.models},
        }
        for row, question in enumerate(asked)
    ]
    numbers = accuracy_numbers(asked, found, work.config.seed)
    return {"questions": questions.name, "n_questions": len(asked), "answer_by": by} | numbers, rows


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    by: str,
    rendering: Rendering = AS_THE_TEMPLATE,
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]]]:
    """Of each question, the tokens up to `OPENING`, and of each of its options, these and the option's own."""
    texts = [question_text(question, by) for question in asked]
    contexts = render(tokenizer, texts, rendering, [OPENING] * len(asked)).token_ids
    pairs = [(text, f"{OPENING} {one}") for text, of in zip(texts, asked, strict=True) for one in answers(of, by)]
    said, begun = zip(*pairs, strict=True)
    every = iter(render(tokenizer, said, rendering, begun).token_ids)
    return list(contexts), [[next(every) for _ in question.options] for question in asked]


def question_text(question: Question, by: str) -> str:
    """What the user says: the question, and where answers are letters its options, as MMLU is usually asked."""
    if by == "text":
        return question.text
    return "\n".join([question.text, *(f"{letter}. {option}" for letter, option in _lettered(question))])


def answers(question: Question, by: str) -> list[str]:
    """What may follow `OPENING`."""
    return list(question.options) if by == "text" else [letter for letter, _ in _lettered(question)]


def n_characters(question: Question, by: str) -> int:
    """Number of characters that are read of a question, which by `text` is read anew for every option."""
    readings = len(question.options) if by == "text" else 1
    return readings * len(question_text(question, by)) + sum(map(len, answers(question, by)))


def _lettered(question: Question) -> list[tuple[str, str]]:
    return list(zip(LETTERS, question.options, strict=False))


def chosen(question: Question, likelihoods: Sequence[float], by: str) -> int:
    """The place of the likeliest option; texts are compared per character, since a long one has more to lose."""
    lengths = [len(answer) for answer in answers(question, by)]
    return int(np.argmax([one / length for one, length in zip(likelihoods, lengths, strict=True)]))


def accuracy_numbers(asked: Sequence[Question], found: Mapping[str, Sequence[int]], seed: int) -> dict[str, Any]:
    """Accuracy by model and base → tuned, paired, with intervals over resamples of the questions.

    Args:
        asked: the questions.
        found: the place of the option that each model chose, by `base` and, where there is one, `tuned`.
        seed: of the resamples.

    Returns:
        JSON values. `chance`: what guessing gets. By model: `accuracy` with its interval and `subjects`, the number of
        questions and of right answers by subject; `tuned` is None without a tuned model. `change`: `accuracy`, tuned −
        base, or None.
    """
    n = len(asked)
    weights: Float[np.ndarray, "resample question"] = np.ones((1 + BOOTSTRAP, n))
    weights[1:] = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)
    right = {
        model: np.array([place == one.answer for place, one in zip(places, asked, strict=True)], dtype=np.float64)
        for model, places in found.items()
    }
    subjects = {name: [one.subject == name for one in asked] for name in sorted({one.subject for one in asked})}
    numbers: dict[str, Any] = {
        "chance": float(np.mean([1 / len(one.options) for one in asked])),
        "base": None,
        "tuned": None,
        "change": None,
    }
    for model, values in right.items():
        numbers[model] = {
            "accuracy": rate_interval(values, weights).to_dict(),
            "subjects": {
                name: {"questions": sum(rows), "right": int(values[rows].sum())} for name, rows in subjects.items()
            },
        }
    if "tuned" in right:
        change = rate_interval(right["tuned"] - right["base"], weights, -1.0)
        numbers["change"] = {"accuracy": change.to_dict()}
    return numbers


def _key(work: Work, model: str, options: Sequence[tuple[int, ...]]) -> str:
    """Everything that decides the log-likelihoods of a question's options."""
    return work.key(
        model, [token for option in options for token in option], new_tokens=None, options=[*map(len, options)]
    )


def _check_lengths(work: Work, asked: Sequence[Question], tokens: Sequence[Sequence[tuple[int, ...]]]) -> None:
    limit = context_length(work.folder)
    for question, options in zip(asked, tokens, strict=True):
        if limit is not None and (longest := max(map(len, options))) > limit:
            raise InputError(
                f"The question {question.text[:60]!r} needs {longest:,} tokens, but the model reads at most {limit:,}; "
                "leave it out, or use another model."
            )
