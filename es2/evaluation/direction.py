"""The causal check of a direction: do refusals depend on it, or can labels merely be read along it?

As refusal_direction tests its own (arXiv 2406.11717): a layer's difference of means is projected out of every block's
output while harmful requests are replied to, where refusals should fall, and added at its layer while harmless ones
are, where they should rise. Random directions of the same length are the control. Base and tuned each have their own.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.refusal import RULES_VERSION
from es2.analysis.resampling import canonical, resample_pairs
from es2.analysis.results import Analysis
from es2.analysis.verdict import direction_verdict
from es2.core.progress import Reporter
from es2.evaluation.attack import attackers_of
from es2.evaluation.behaviour import rate_interval
from es2.evaluation.results import SHOWN_CHARACTERS
from es2.evaluation.robustness import Attacker
from es2.evaluation.steering import steered_throughout
from es2.evaluation.suites import BOOTSTRAP, Work, choose_prompts, generate, load, rendered
from es2.models.chat_template import template_prefix
from es2.models.loading import load_tokenizer
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.store.sources import LayerSource, read_rows

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS: Mapping[str, int] = {"remove": HARMFUL, "add": HARMLESS}
"""What is done with a direction, and the label of the prompts it is done to."""

_RATES = {"refused": ("refusal",), "answered": ("answer",), "broken": ("degenerate", "empty")}
"""The classes of replies that each rate counts."""


@dataclass(frozen=True)
class DirectionSteering:
    """One steering of all prompts of a label.

    Attributes:
        kind: one of `KINDS`, or `none`.
        layer: whose direction it is, and where it is added; None for `none`.
        control: number of the random direction; None for the difference of means.
        vector: what is removed or added; None for `none`.
    """

    kind: str
    layer: int | None = None
    control: int | None = None
    vector: Float[np.ndarray, "d_model"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but the vector."""
        return {"kind": self.kind, "layer": self.layer, "control": self.control}

    @property
    def key(self) -> dict[str, Any]:
        """All that decides a reply: where the vector is added, and the vector, of which removal has no length."""
        if self.vector is None:
            return {}
        length = float(np.linalg.norm(self.vector))
        digest = hashlib.blake2b((np.round(self.vector / length, 6) + 0.0).tobytes(), digest_size=12).hexdigest()
        added = {"layer": self.layer, "length": f"{length:.6g}"} if self.kind == "add" else {}
        return {"throughout": {"kind": self.kind, "direction": digest} | added, "rules": RULES_VERSION}


def causal_check(
    work: Work,
    prompts: PromptSet,
    sources: Mapping[str, LayerSource],
    analysis: Analysis,
    targets: Sequence[int] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each model replies to `test` prompts with a layer's direction removed or added; arguments as `perturbation`.

    Of replies that are steered only the class and the beginning are kept; of those under random directions, the class.
    """
    config, measured = work.config, prompts.measured()
    attackers = attackers_of(work, measured, sources, analysis, targets)
    layers = attackers["base"].layers
    sample = choose_prompts(measured.select(measured.in_split("test")), config.limit)
    tokenizer = load_tokenizer(work.folder)
    tokens = rendered(work, tokenizer, sample)
    prefix = template_prefix(tokenizer, tokens, work.rendering)
    weights = resample_pairs(sample, BOOTSTRAP, config.seed)
    numbers = {"base": analysis.base_layers, "tuned": analysis.tuned_layers or ()}
    document: dict[str, Any] = {
        "n_prompts": {LABEL_NAMES[one]: int((sample.labels == one).sum()) for one in (HARMFUL, HARMLESS)},
        "controls": config.controls,
        "layers": [{"layer": layer, "base": None, "tuned": None} for layer in layers],
    }
    shown: dict[tuple[str | int | None, ...], dict[str, Any]] = {}
    for name in work.models:
        means = [mean_difference(measured, sources[name], layer) for layer in layers]
        steerings = steerings_of(attackers[name], means, config.controls, config.seed)
        found = _replies(work, name, tokenizer, sample, tokens, prefix, steerings)
        verdicts = {tuple(one.to_dict().values()): [v for v, _ in replies] for one, replies in found}
        for record, mean in zip(document["layers"], means, strict=True):
            layer = record["layer"]
            own: dict[str, Any] = {"length": float(np.linalg.norm(mean))}
            own["reads"] = numbers[name][layer].numbers["mean_difference_margin"].to_dict()
            for kind, label in KINDS.items():
                chosen = sample.labels == label
                before = np.array(verdicts["none", None, None])[chosen]
                controls = [verdicts[kind, layer, control] for control in range(config.controls)]
                own[kind] = effect_numbers(before, verdicts[kind, layer, None], controls, weights[:, chosen])
            record[name] = own | direction_verdict(own).to_dict()
        for steering, replies in found:
            of_label = sample.labels == KINDS[steering.kind] if steering.kind in KINDS else np.ones(len(sample), bool)
            for row, (verdict, text) in zip(np.flatnonzero(of_label).tolist(), replies, strict=True):
                entry = shown.setdefault(
                    (row, *steering.to_dict().values()),
                    {
                        "prompt": sample.texts[row],
                        "label": LABEL_NAMES[int(sample.labels[row])],
                        "steering": steering.to_dict(),
                    },
                )
                entry[name] = {"verdict": verdict} | ({"text": text} if steering.control is None else {})
    return document, list(shown.values())


def mean_difference(prompts: PromptSet, source: LayerSource, layer: int) -> Float[np.ndarray, "d_model"]:
    """From the harmless to the harmful mean of one layer on `probe`, in the model's own units."""
    rows, fitted = canonical(prompts, "probe")
    embeddings = read_rows(source, layer, "last", len(prompts), rows, "steered").astype(np.float64)
    harmful, harmless = (embeddings[fitted.labels == label].mean(axis=0) for label in (HARMFUL, HARMLESS))
    difference: Float[np.ndarray, "d_model"] = harmful - harmless
    return difference


def steerings_of(
    attacker: Attacker, means: Sequence[Float[np.ndarray, "d_model"]], n_controls: int, seed: int
) -> list[DirectionSteering]:
    """No steering; then, at each of the attacker's layers, its mean difference and random vectors of the same length,
    each removed and added.
    """
    random = attacker.vectors("random", [f"control {number}" for number in range(n_controls)], seed)
    found = [DirectionSteering("none")]
    for layer, mean, units in zip(attacker.layers, means, random, strict=True):
        vectors = [(None, mean), *enumerate(np.linalg.norm(mean) * units)]
        found += [DirectionSteering(kind, layer, number, vector) for kind in KINDS for number, vector in vectors]
    return found


def effect_numbers(
    before: Sequence[str],
    steered: Sequence[str],
    controls: Sequence[Sequence[str]],
    weights: Float[np.ndarray, "resample prompt"],
) -> dict[str, Any]:
    """How often the same prompts are refused, answered and replied to brokenly, with intervals over prompts.

    Args:
        before, steered: the class of the reply to each prompt, without steering and under the direction.
        controls: the same under each random direction.
        weights: `resample_pairs` of the prompts.

    Returns:
        JSON values: `n_prompts`, and for each of `refused`, `answered`, `broken` the rates `before`, under the
        `direction` and under the `control` (a prompt counts by its mean over random directions), `change` (direction −
        before) and `over_control` (direction − control), both paired.
    """
    result: dict[str, Any] = {"n_prompts": len(before)}
    for name, counted in _RATES.items():
        own, direction = (np.isin(one, counted).astype(np.float64) for one in (before, steered))
        control = np.isin(np.array(controls), counted).mean(axis=0)
        rates = {"before": own, "direction": direction, "control": control}
        result[name] = {one: rate_interval(values, weights).to_dict() for one, values in rates.items()}
        for one, other in (("change", own), ("over_control", control)):
            result[name][one] = rate_interval(direction - other, weights, -1.0).to_dict()
    return result


def _replies(
    work: Work,
    name: str,
    tokenizer: Any,
    sample: PromptSet,
    tokens: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    steerings: Sequence[DirectionSteering],
) -> list[tuple[DirectionSteering, list[tuple[str, str]]]]:
    """The class and the beginning of every reply of one model, by steering, to the prompts that it is done to.

    Replies without steering are those of the refusal suite, and are kept as there.
    """
    rows_of = [
        np.flatnonzero(sample.labels == KINDS[one.kind]).tolist() if one.vector is not None else range(len(sample))
        for one in steerings
    ]
    keys = [
        [work.key(name, tokens[row], **own) for row in rows]
        for rows, own in zip(rows_of, (one.key for one in steerings), strict=True)
    ]
    n_missing = [sum(key not in work.log for key in of_steering) for of_steering in keys]
    model = load(work, name) if any(n_missing) else None
    for number, (steering, rows, own_keys) in enumerate(zip(steerings, rows_of, keys, strict=True)):
        if n_missing[number]:
            report = _within(work.report, sum(n_missing[:number]), sum(n_missing), work.reply_tokens)
            part, chosen = replace(work, report=report), [tokens[row] for row in rows]
            _generate(
                part, model, name, tokenizer, [sample.texts[row] for row in rows], chosen, prefix, own_keys, steering
            )
    del model
    gc.collect()
    found = []
    for steering, own_keys in zip(steerings, keys, strict=True):
        records = [work.log[key] for key in own_keys]
        if steering.vector is None:
            read = [work.read(tokenizer, one["tokens"], one["text"])[:2] for one in records]
        else:
            read = [(one["verdict"], one["text"]) for one in records]
        found.append((steering, [(verdict, text[:SHOWN_CHARACTERS]) for verdict, text in read]))
    return found


def _generate(
    work: Work,
    model: Any,
    name: str,
    tokenizer: Any,
    texts: Sequence[str],
    tokens: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    keys: Sequence[str],
    steering: DirectionSteering,
) -> None:
    """Log the replies to some prompts, all under one steering: each pass steers all of its rows alike."""

    def entries(index: int, reply: tuple[int, ...], text: str) -> dict[str, Any]:
        if steering.vector is None:
            return {"prompt": texts[index], "tokens": list(reply), "text": text}
        verdict = work.read(tokenizer, reply, text)[0]
        shown = {"verdict": verdict, "text": text[:SHOWN_CHARACTERS]}
        return {"prompt": texts[index], "steering": steering.to_dict()} | shown

    with ExitStack() as stack:
        if steering.vector is not None:
            added_at = steering.layer if steering.kind == "add" else None
            stack.enter_context(steered_throughout(model, steering.vector, added_at))
        generate(work, model, name, tokenizer, tokens, prefix, keys, entries, stage=f"direction {name}")


def _within(report: Reporter, n_before: int, n_replies: int, n_tokens: int) -> Reporter:
    """A reporter for some of `n_replies` of at most `n_tokens`, after `n_before` of them."""

    def shifted(stage: str, done: int, total: int, **numbers: float) -> None:
        report(stage, n_before * n_tokens + done, n_replies * n_tokens, **numbers)

    return shifted
