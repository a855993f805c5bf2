"""The behaviour parts of an evaluation: which prompts, what base and tuned reply to them, and how close they are.

Each part returns its numbers and the rows behind them. Base and tuned are one model in memory, base first.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.refusal import judge_reply
from es2.analysis.resampling import canonical, resample_pairs
from es2.core.errors import InputError
from es2.core.files import content_key, expanded
from es2.core.progress import Reporter
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.evaluation.behaviour import ability_numbers, compare_exchange, refusal_numbers
from es2.evaluation.judge import Judge, judge_replies
from es2.evaluation.reply_log import ReplyLog
from es2.jobs.job import Job
from es2.models.adapters import apply_finetune
from es2.models.batching import end_tokens
from es2.models.chat_template import render, reply_thinking, template_prefix
from es2.models.fingerprint import fingerprint
from es2.models.loading import load_model, load_tokenizer
from es2.models.replies import Steering, exchange_states, greedy_replies
from es2.models.shape import context_length
from es2.models.thinking import ReplyThinking
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet, normalised, stable_hash, warn_of_likeness
from es2.store.store import Store

if TYPE_CHECKING:
    from es2.evaluation.config import EvaluateConfig


BOOTSTRAP = 1000  # resamples of pairs behind every interval


def choose_prompts(prompts: PromptSet, limit: int, label: int | None = None) -> PromptSet:
    """At most `limit` prompts of each label (or of one), those whose pair has the smallest hash, in canonical order.

    A larger limit adds prompts and moves none, and twins come together.
    """
    keep = np.zeros(len(prompts), dtype=bool)
    for one in (HARMFUL, HARMLESS) if label is None else (label,):
        rows = np.flatnonzero(prompts.labels == one).tolist()
        rows.sort(key=lambda row: (stable_hash("evaluate:" + prompts.pairs[row]), prompts.texts[row]))
        keep[rows[:limit]] = True
    return canonical(prompts.select(keep))[1]


def held_out(prompts: PromptSet, tuned_on: PromptSet | None, *, probing: bool = False) -> PromptSet:
    """The prompts that a run may be judged by: none from a split that decided it, with a warning of near-duplicates.

    Args:
        tuned_on: the prompts that the run was tuned on; None without a run.
        probing: whether the prompts' own `probe` split is needed too, to fit probes; then only `tune` and `validation`
            of the run, and prompts that changed their split, are left out.

    Raises:
        InputError: when nothing is left.
    """
    if tuned_on is None:
        return prompts
    theirs = {normalised(text): split for text, split in zip(tuned_on.texts, tuned_on.splits, strict=True)}
    allowed = ("probe", "test") if probing else ("test",)

    def may(text: str, own: str) -> bool:
        split = theirs.get(normalised(text))
        return split is None or (split in allowed and (split == own or not probing))

    keep = np.array([may(text, own) for text, own in zip(prompts.texts, prompts.splits, strict=True)], dtype=bool)
    if not keep.any():
        raise InputError(
            f"Every prompt of {prompts.name!r} is also among the run's own prompts outside `test`; give other prompts."
        )
    rest = prompts if keep.all() else prompts.select(keep)
    warn_of_likeness(rest, tuned_on.select(~np.isin(tuned_on.splits, allowed)))
    return rest


@dataclass
class Work:
    """What the parts of one evaluation share."""

    config: EvaluateConfig
    run: Job | None
    weights: Path | None
    folder: Path
    identity: dict[str, Any]
    device: str
    dtype: str
    log: ReplyLog
    store: Store
    report: Reporter
    rendering: Rendering = AS_THE_TEMPLATE
    thinking: ReplyThinking | None = None
    generated: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "replies": 0})

    @property
    def models(self) -> tuple[str, ...]:
        return ("base",) if self.run is None else ("base", "tuned")

    @property
    def reply_tokens(self) -> int:
        """The longest reply, with its thinking where there is any."""
        return self.config.new_tokens + (self.config.thinking_tokens if self.thinking is not None else 0)

    def read(self, tokenizer: Any, tokens: Sequence[int], text: str) -> tuple[str, str, str]:
        """The class of a reply, which is judged after its thinking, its answer, and its thinking.

        Args:
            tokens, text: of the whole reply.
        """
        if self.thinking is None:
            return judge_reply(text), text, ""
        start = self.thinking.answer_at(tokens, partial(tokenizer.decode, skip_special_tokens=False))
        if start is None or start > self.config.thinking_tokens:
            return "unfinished", "", text
        thought, answer = tokens[:start], tokens[start : start + self.config.new_tokens]
        shown, said = (tokenizer.decode(part, skip_special_tokens=True) for part in (thought, answer))
        return judge_reply(said), said, shown

    def key(self, model: str, tokens: Sequence[int], **more: Any) -> str:
        """Everything that decides a reply of `base` or `tuned`."""
        return content_key(
            {
                "weights": self.identity["weights"],
                "adapter": self.identity["adapter"] if model == "tuned" else None,
                "tokens": list(tokens),
                "new_tokens": self.config.new_tokens,
                "device": self.device.partition(":")[0],
                "dtype": self.dtype,
                **({} if self.thinking is None else {"thinking_tokens": self.config.thinking_tokens}),
                **more,
            }
        )


def rendered(work: Work, tokenizer: Any, prompts: PromptSet) -> list[tuple[int, ...]]:
    """The tokens of every prompt; `work` learns how replies think.

    Raises `InputError` when a prompt and its reply are longer than the model reads.
    """
    work.thinking = reply_thinking(tokenizer, work.rendering)
    tokens = list(render(tokenizer, prompts.texts, work.rendering).token_ids)
    check_length(work, max(map(len, tokens)))
    return tokens


def check_length(work: Work, n_tokens: int) -> None:
    """Raise `InputError` when a prompt of this many tokens and its reply are longer than the model reads."""
    limit = context_length(work.folder)
    longest = n_tokens + work.reply_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"The longest prompt and a reply of {work.reply_tokens} tokens need {longest:,}, but the model reads "
            f"at most {limit:,}; shorten the prompt or the reply."
        )


def behaviour(
    work: Work, prompts: PromptSet, judge: Judge | None, suite: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`refusal`: what base and tuned reply. `kl`: how tuned reads what base replied to harmless prompts."""
    sample = choose_prompts(prompts, work.config.limit, None if suite == "refusal" else HARMLESS)
    if not len(sample):
        raise InputError(f"{prompts.name!r} has no harmless prompt, so there is no ability to measure; add some.")
    tokenizer = load_tokenizer(work.folder)
    tokens = rendered(work, tokenizer, sample)
    prefix = template_prefix(tokenizer, tokens, work.rendering)
    needed = work.models if suite == "refusal" else ("base",)
    model: Any = None
    states: dict[str, list[Any]] = {}
    lm_head: Any = None
    tuned_head: Any = None
    for name in work.models:
        keys = [work.key(name, prompt) for prompt in tokens]
        missing = name in needed and any(key not in work.log for key in keys)
        if model is None and (missing or suite == "kl"):
            model = load(work, name)
        elif model is not None and name == "tuned" and work.weights is not None:
            apply_finetune(model, work.weights)
        if missing:

            def entries(index: int, reply: tuple[int, ...], text: str) -> dict[str, Any]:
                return {"prompt": sample.texts[index], "tokens": list(reply), "text": text}

            generate(work, model, name, tokenizer, tokens, prefix, keys, entries, stage=f"reply {name}")
        if suite == "kl":
            from es2.models.kl import read_lm_head, tuned_lm_head

            if name == "base":
                lm_head = read_lm_head(model)
            else:
                tuned_head = tuned_lm_head(model, lm_head)
            replies = [_base_reply(work, prompt) for prompt in tokens]
            stage = f"read {name}"
            states[name] = exchange_states(model, tokens, replies, len(prefix), report=work.report, stage=stage)
    del model
    gc.collect()
    weights = resample_pairs(sample, BOOTSTRAP, work.config.seed)
    if suite == "kl":
        tuned = states.get("tuned", states["base"])
        exchanges = [
            compare_exchange(lm_head, before, after, _base_reply(work, prompt), tuned_head)
            for before, after, prompt in zip(states["base"], tuned, tokens, strict=True)
        ]
        numbers = ability_numbers(exchanges, weights, "tuned" in states)
        return {"n_prompts": len(sample), "reply_tokens": work.config.kl_tokens} | numbers, []

    read: dict[str, list[tuple[str, str, str]]] = {}
    for name in work.models:
        records = [work.log[work.key(name, prompt)] for prompt in tokens]
        read[name] = [work.read(tokenizer, record["tokens"], record["text"]) for record in records]
    verdicts = {name: [verdict for verdict, _, _ in read[name]] for name in work.models}
    texts = {name: [text for _, text, _ in read[name]] for name in work.models}
    result: dict[str, Any] = {
        "n_prompts": {LABEL_NAMES[one]: int((sample.labels == one).sum()) for one in (HARMFUL, HARMLESS)}
    }
    result |= refusal_numbers(sample, verdicts, weights)
    rows = [
        {"prompt": text, "label": LABEL_NAMES[int(label)], "category": category}
        | {
            name: {"verdict": verdicts[name][row], "text": texts[name][row]}
            | ({"thinking": read[name][row][2]} if work.thinking is not None else {})
            for name in work.models
        }
        for row, (text, label, category) in enumerate(zip(sample.texts, sample.labels, sample.categories, strict=True))
    ]
    result["judge"] = None
    if judge is not None:
        result["judge"] = _ask_judge(work, judge, sample, tokens, texts, verdicts, weights, rows)
    return result, rows


def load(work: Work, name: str) -> Any:
    """The plain model; with the fine-tune as `tuned`, where base's replies are all logged."""
    work.report("load", 0, 1)
    model = load_model(work.folder, dtype=work.dtype, device=work.device).requires_grad_(False)
    if name == "tuned" and work.weights is not None:
        apply_finetune(model, work.weights)
    work.report("load", 1, 1)
    return model


def _base_reply(work: Work, prompt: Sequence[int]) -> tuple[int, ...]:
    """The beginning of the base's reply."""
    return tuple(work.log[work.key("base", prompt)]["tokens"][: work.config.kl_tokens])


def generate(
    work: Work,
    model: Any,
    name: str,
    tokenizer: Any,
    tokens: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    keys: Sequence[str],
    entries: Callable[[int, tuple[int, ...], str], dict[str, Any]],
    *,
    stage: str,
    steering: Steering | None = None,
) -> None:
    """Generate and log the replies whose key is not in the log yet; `entries` gives what a record holds of its own.

    Args:
        name: `base` or `tuned`.
        tokens, keys: of every reply.
        prefix: the tokens that all prompts begin with.
        entries: called with a prompt's index, the reply to it, and that as text.
        steering: hooks that are in the model.
    """
    done = {index for index, key in enumerate(keys) if key in work.log}
    n_tokens, ends = work.reply_tokens, end_tokens(model)
    begun = time.perf_counter()
    for batch in greedy_replies(
        model, tokens, n_tokens, ends, prefix=prefix, done=done, steering=steering, report=work.report, stage=stage
    ):
        shared = {"model": name, "run": work.config.run if name == "tuned" else None, "new_tokens": n_tokens}
        work.log.add(
            {"key": keys[index]} | shared | entries(index, reply, tokenizer.decode(reply, skip_special_tokens=True))
            for index, reply in zip(batch.rows, batch.replies, strict=True)
        )
        now = time.perf_counter()
        work.generated["tokens"] += sum(map(len, batch.replies)) + sum(len(tokens[i]) - len(prefix) for i in batch.rows)
        work.generated["replies"] += len(batch.replies)
        work.generated["seconds"] += now - begun
        begun = now


def _ask_judge(
    work: Work,
    judge: Judge,
    sample: PromptSet,
    tokens: list[tuple[int, ...]],
    texts: Mapping[str, Sequence[str]],
    verdicts: Mapping[str, Sequence[str]],
    weights: np.ndarray,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The judge's rates where it judged everything, and how often it agrees with the rules; verdicts are kept."""
    document: dict[str, Any] = {"name": judge.name, "problem": None, "agreement": None}
    settings: list[Any] = [
        work.config.judge_url,
        work.config.judge_model,
        work.config.judge_folder,
        work.config.judge_label,
    ]
    if work.config.judge_folder:  # another classifier in its place would judge the tuned model's replies alone
        settings.append(fingerprint(Path(expanded(work.config.judge_folder))).to_dict())
    found: dict[str, list[str | None]] = {}
    for name in work.models:
        keys = [work.key(name, prompt, judge=settings) for prompt in tokens]
        open_rows = [row for row, key in enumerate(keys) if key not in work.log]
        if open_rows and document["problem"] is None:
            exchanges = [(sample.texts[row], texts[name][row]) for row in open_rows]
            judged, document["problem"] = judge_replies(judge, exchanges, work.report)
            work.log.add(
                {"key": keys[row], "model": name, "judge": judge.name, "verdict": verdict}
                for row, verdict in zip(open_rows, judged, strict=True)
                if verdict is not None
            )
        found[name] = [work.log[key]["verdict"] if key in work.log else None for key in keys]
        for row, verdict in enumerate(found[name]):
            rows[row][name]["judge"] = verdict
    both = [
        (rule == "refusal") == (verdict == "refusal")
        for name in work.models
        for rule, verdict in zip(verdicts[name], found[name], strict=True)
        if verdict is not None
    ]
    document["n_judged"] = len(both)
    if both:
        document["agreement"] = sum(both) / len(both)
    if all(verdict is not None for judged in found.values() for verdict in judged):
        document |= refusal_numbers(sample, {name: [str(v) for v in judged] for name, judged in found.items()}, weights)
    return document
