"""Whether the effect of a layer, measured before any run, predicts what fine-tunes at pairs of layers come to.

    python -m tests.benchmarks.layer_effect --sweep ID [--pairs 24] [--step 0.01]

Of a finished sweep that searched the layers alone, such as `es2 sweep --objective fisher --kl-weight 10 --rank 16
--rate-factors 1`, the trials that took all their steps. `effect_of_layers` is measured on the base and `tune`
prompts; printed is one line of JSON with Spearman's rank correlation between each prediction for a trial's pair of
layers, and the trial's separation, its KL, and its separation per root of KL, with 95 % intervals by resampling trials.

- `of_blocks`: the separation at both layers, at the KL budget, when every trained block takes the best part of the
  step: gains add up and KLs do, so it is √(budget · Σ gain² / KL) over the trained blocks.
- `of_layers`: the gain of the two layers' own blocks at the KL budget, their mean.
- `kl_of_layers`: the KL of equal steps of the two layers' own blocks, their mean.
- `readability`: what the recommendation goes by today, −log-loss of the base's probes, the mean of both layers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from es2.core.errors import Es2Error, InputError
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.training.config import FinetuneConfig
from es2.training.sampling import held_out_rows
from es2.workflow.sweep_space import Space, first_config
from es2.workflow.sweeps import open_sweep, sweep_document
from tests.benchmarks.effect_of_layers import STEP, LayerEffect, layer_effects

RESAMPLES = 2000
LEAST_TRIALS = 5


def trials_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials of a sweep over layers alone that took all their steps; one of each pair, whose runs are alike.

    Raises `InputError` for another sweep.
    """
    searched = document["space"]["searched"]
    others = [name for name, bounds in searched.items() if name != "layers" and len(set(bounds)) > 1]
    if "layers" not in searched or others:
        what = f"searched {', '.join(others)}, too" if "layers" in searched else "did not search the layers"
        raise InputError(f"Sweep {document['sweep']} {what}; take one in which the layers alone differ.")
    done = [trial for trial in document["trials"] if trial["status"] == "done" and trial["numbers"]]
    trials = list({tuple(trial["settings"]["layers"]): trial for trial in done}.values())
    if len(trials) < LEAST_TRIALS:
        raise InputError(
            f"Sweep {document['sweep']} has whole trials of {len(trials)} pairs; {LEAST_TRIALS} are needed."
        )
    return trials


def effects_of(config: FinetuneConfig, prompts: PromptSet, n_pairs: int, step: float) -> list[LayerEffect]:
    """The effect of every block of the base, on some harmful `tune` prompts and as many harmless ones, twins if any."""
    from es2.models.catalogue import resolve
    from es2.models.chat_template import render, template_prefix
    from es2.models.folders import model_folder
    from es2.models.loading import load_model, load_tokenizer

    config = config.replace(**dict(prompts.rendered_as(config)))
    folder = model_folder(resolve(config.model))
    rows = [row for label in (HARMFUL, HARMLESS) for row in held_out_rows(prompts, "tune", label, n_pairs)]
    tokenizer = load_tokenizer(folder)
    tokens = render(tokenizer, [prompts.texts[row] for row in rows], config).token_ids
    model = load_model(folder, dtype="float32", device=config.device)
    n_prefix = len(template_prefix(tokenizer, tokens, config))
    return layer_effects(model, tokens, prompts.labels[rows].tolist(), n_prefix=n_prefix, step=step)


def predictions(
    config: FinetuneConfig, effects: Sequence[LayerEffect], log_losses: Sequence[float | None]
) -> dict[str, float]:
    """What is predicted for one trial; the docstring of this module says how."""
    targets, budget = config.targets, config.kl_budget
    worth = 0.0
    for block in config.blocks:
        effect = effects[block]
        gain = sum(effect.gains.get(layer, 0.0) for layer in targets) / len(targets)
        worth += max(gain, 0.0) ** 2 / effect.kl if effect.kl > 0 else 0.0
    found = {
        "of_blocks": math.sqrt(budget * worth),
        "of_layers": float(np.mean([effects[layer].gain_at(budget) for layer in targets])),
        "kl_of_layers": float(np.mean([effects[layer].kl for layer in targets])),
    }
    losses = [loss for layer in targets if (loss := log_losses[layer]) is not None]
    return found | {"readability": -float(np.mean(losses))}


def spearman(one: Sequence[float], other: Sequence[float], seed: int = 0) -> dict[str, float | None]:
    """The rank correlation, and its 95 % interval by resampling; None where a side has a single value."""
    pairs = np.array([one, other], dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    drawn[0] = np.arange(pairs.shape[1])
    ranks = rankdata(pairs[:, drawn], axis=2)
    ranks -= ranks.mean(axis=2, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=2).prod(axis=0)
    known = lengths > 0
    found = np.clip(ranks.prod(axis=0).sum(axis=1)[known] / lengths[known], -1, 1).tolist()
    if not known[0]:
        return dict.fromkeys(("rho", "low", "high"))
    low, high = np.quantile(found[1:], [0.025, 0.975]).tolist()
    return {"rho": found[0], "low": low, "high": high}


def measure(sweep: str, n_pairs: int, step: float) -> dict[str, Any]:
    """The rank correlations of one sweep, and the numbers that they are of."""
    from es2.workflow.prepare import prepare

    job = open_sweep(sweep)
    trials = trials_of(sweep_document(job))
    space = Space.from_dict(job.config["space"], f"The config.json of sweep {job.id}")
    prompts, config = load_prompts(job.config["prompts"]), first_config(space)
    base = prepare(config.model, prompts, rendering=config, device=config.device, dtype=config.dtype)
    log_losses = [layer.log_loss for layer in base.analysis.base_layers]
    started = time.perf_counter()
    effects = effects_of(config, prompts, n_pairs, step)
    seconds = time.perf_counter() - started
    rows = []
    for trial in trials:
        numbers = {name: float(trial["numbers"][name]) for name in ("separation", "kl")}
        numbers["separation_per_root_kl"] = numbers["separation"] / math.sqrt(max(numbers["kl"], 1e-9))
        predicted = predictions(space.config(trial["settings"]), effects, log_losses)
        rows.append({"trial": trial["number"], "layers": trial["settings"]["layers"], **numbers, **predicted})
    outcomes = list(numbers)
    correlations = {
        name: {outcome: spearman([row[name] for row in rows], [row[outcome] for row in rows]) for outcome in outcomes}
        for name in predicted
    }
    about = {"sweep": job.id, "model": config.model, "n_trials": len(rows), "pairs": n_pairs, "step": step}
    by_layer = [effect.to_dict() | {"gain_at_budget": effect.gain_at(config.kl_budget)} for effect in effects]
    return about | {"seconds": seconds, "spearman": correlations, "trials": rows, "effects": by_layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", required=True, metavar="ID")
    parser.add_argument("--pairs", type=int, default=24, help="of `tune` prompts")
    parser.add_argument("--step", type=float, default=STEP, help="length of a block's step relative to its weights")
    arguments = parser.parse_args()
    try:
        print(json.dumps(measure(arguments.sweep, arguments.pairs, arguments.step)))
    except Es2Error as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
