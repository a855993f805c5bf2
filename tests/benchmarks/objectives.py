"""One short fine-tune per line of settings, judged on `validation` prompts, for `docs/experiments.md`.

    python tests/benchmarks/objectives.py results.jsonl "objective=fisher seed=0" "objective=margin layers=12,18"

Each argument is a set of `FinetuneConfig` fields. The probes are fitted on `probe`, the numbers are of `validation`, so
that whoever chooses defaults by this table can still be judged on `test`; `--final` does that. With `--transfer F` the
same is said of the prompts in `F`, of which every `--every`th is taken; that is for reporting, not for choosing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.models.adapters import apply_finetune
from es2.models.catalogue import resolve
from es2.models.chat_template import render, template_prefix
from es2.models.folders import model_folder
from es2.models.forward import FinetuneForward
from es2.models.loading import load_model, load_tokenizer
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import ArrayLayers, TestSet
from es2.training.config import FinetuneConfig
from es2.training.finetune import finetune

NUMBERS = (
    "fisher_ratio", "relative_distance", "mean_difference_margin", "margin_mean", "margin_harmful_q1",
    "probe_accuracy", "probe_auroc", "in_domain_auroc", "effective_rank", "orthogonal_std_ratio", "norm_ratio",
    "pairwise_distance", "direction_cosine",
)  # fmt: skip
SETTINGS = AnalysisConfig(n_bootstrap=200, n_shuffles=1)


def parse(text: str) -> dict[str, Any]:
    """`layers=16,22 learning_rate=1e-3` as fields of a config."""
    fields: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        usual = getattr(FinetuneConfig(layers=(0,)), name)
        if name == "layers":
            fields[name] = tuple(int(layer) for layer in value.split(","))
        elif name == "first_block":
            fields[name] = int(value)
        else:
            fields[name] = type(usual)(value)
    return {"layers": (16, 22), "allow_many_layers": True} | fields


class Model:
    """The default model, with or without what a fine-tune left, read at the target layers only."""

    def __init__(self, config: FinetuneConfig, adapter: Path | None) -> None:
        folder = model_folder(resolve(config.model))
        self.tokenizer = load_tokenizer(folder)
        model = load_model(folder, dtype=config.dtype, device=config.device)
        self.layers = config.targets
        head = template_prefix(self.tokenizer, [])
        self.network = FinetuneForward(model, template_prefix=head, layers=self.layers)
        if adapter is not None:
            apply_finetune(model, adapter)

    def read(self, prompts: PromptSet) -> ArrayLayers:
        """The embeddings of every prompt."""
        import torch

        with torch.no_grad():
            embeddings = self.network.embed(render(self.tokenizer, prompts.texts).token_ids)
        return ArrayLayers(embeddings.permute(1, 0, 2).cpu().numpy())


def validations(prompts: PromptSet) -> PromptSet:
    """`probe` as it is, and `validation` in the place of `test`."""
    part = prompts.select(prompts.in_split("probe") | prompts.in_split("validation"))
    return replace(part, splits=tuple("test" if split == "validation" else split for split in part.splits))


def numbers_of(analysis: Any, layers: tuple[int, ...]) -> dict[str, Any]:
    """Before and after at the target layers, with the ratio or the difference."""
    found: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        before, after = analysis.base_layers[index], analysis.tuned_layers[index]
        row: dict[str, Any] = {}
        for name in NUMBERS:
            if name in after.numbers:
                row[name] = [
                    round(before.numbers[name].value, 4) if name in before.numbers else None,
                    round(after.numbers[name].value, 4),
                ]
        found[str(layer)] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--transfer", action="append", default=[])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    prompts = load_prompts(arguments.prompts)
    judged = "test" if arguments.final else "validation"
    held_out = prompts.measured() if arguments.final else validations(prompts)
    others = {}
    for source in arguments.transfer:
        whole = load_prompts(source)
        others[Path(source).stem] = whole.select(np.arange(len(whole)) % arguments.every == 0)
    bases: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}
    for text in arguments.settings:
        config = FinetuneConfig(**parse(text))
        started = time.perf_counter()
        if config.targets not in bases:
            model = Model(config, None)
            bases[config.targets] = model.read(held_out), {name: model.read(other) for name, other in others.items()}
        base, base_others = bases[config.targets]
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()

            def report(stage: str, done: int, total: int, began: float = began, **numbers: float) -> None:
                if numbers:
                    shown = " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
                    print(f"{time.perf_counter() - began:6.0f} s  {stage} {done}/{total}  {shown}", file=sys.stderr)

            result = finetune(config, prompts, Path(folder), report)
            best = next(point for point in result.validations if point.step == result.best_step)
            model = Model(config, result.output)
            tuned = model.read(held_out)
            document: dict[str, Any] = {
                "settings": text,
                "status": result.status,
                "reason": result.reason,
                "steps": result.steps,
                "best_step": result.best_step,
                "kl_watch": [round(value, 4) for value in (best.kl_prompt, best.kl_reply)],
                "seconds": round(result.seconds),
                "seconds_per_step": round(result.seconds_per_step, 2),
                judged: numbers_of(analyze(held_out, base, tuned, config=SETTINGS), config.targets),
            }
            for name, other in others.items():
                test = TestSet(other, base_others[name], model.read(other))
                analysis = analyze(held_out, base, tuned, test=test, config=SETTINGS)
                document[name] = numbers_of(analysis, config.targets)
        document["wall"] = round(time.perf_counter() - started)
        with arguments.out.open("a") as file:
            file.write(json.dumps(document) + "\n")
        print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
