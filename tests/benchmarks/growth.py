"""How the cost grows: capture, training step and analysis at three sizes of prompts, layers and width.

On random models, since a real one has one size. What is fitted is the exponent: 1 where twice the size costs twice the
time. The smallest size is large enough that the arithmetic outweighs the calls. Linear algebra among prompts (a probe
is worked out in n × n) grows faster than their number by nature, so no exponent is asked of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.capture.residuals import capture_residuals
from es2.models.chat_template import render
from es2.models.loading import load_bridge, load_tokenizer
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import ArrayLayers
from es2.training.config import FinetuneConfig
from tests.benchmarks.contest import Figure, Report, Settings, exponent
from tests.benchmarks.step import Ours
from tests.builders import save_tiny_model, tiny_prompts

Sizes = dict[str, int]
FACTORS = (1, 2, 4)
SMALLEST: dict[str, Sizes] = {
    "capture": {"prompts": 64, "layers": 3, "width": 128},
    "step": {"prompts": 8, "layers": 3, "width": 128},
    "analysis": {"prompts": 100, "layers": 2, "width": 64},
}


def _capture(folder: Path, prompts: PromptSet, sizes: Sizes) -> Callable[[], Any]:
    rendered = render(load_tokenizer(folder), prompts.texts[: sizes["prompts"]])
    bridge = load_bridge(folder, dtype="float32", device="cpu")
    return lambda: capture_residuals(bridge, rendered)


def _step(folder: Path, prompts: PromptSet, sizes: Sizes, repeats: int) -> Callable[[], Any]:
    last = sizes["layers"] - 1
    config = FinetuneConfig(
        layers=(last - 1, last), steps=repeats, pairs_per_step=sizes["prompts"], first_block=0, reply_tokens=4
    )
    return Ours(Settings(folder, prompts, 0, repeats), config).step


def _analysis(prompts: PromptSet, sizes: Sizes) -> Callable[[], Any]:
    rows = np.zeros(len(prompts), dtype=bool)
    rows[np.flatnonzero(prompts.in_split("probe"))[: sizes["prompts"]]] = True
    rows[np.flatnonzero(prompts.in_split("test"))[: sizes["prompts"]]] = True
    chosen = prompts.select(rows)
    clouds = np.random.default_rng(0).normal(size=(sizes["layers"], len(chosen), sizes["width"]))
    clouds[..., 0] += chosen.labels
    return lambda: analyze(chosen, ArrayLayers(clouds), config=AnalysisConfig(n_bootstrap=200, n_shuffles=2))


def measure(settings: Settings, smallest: dict[str, Sizes] | None = None, n_pairs: int = 2200) -> Report:
    """The exponent of each cost in each size."""
    smallest = smallest or SMALLEST
    prompts = tiny_prompts(n_pairs)
    figures, details = [], {}
    with tempfile.TemporaryDirectory() as root:
        for what, sizes in smallest.items():
            for axis in sizes:
                contestants: dict[str, Callable[[], Any]] = {}
                for factor in FACTORS:
                    own = sizes | {axis: factor * sizes[axis]}
                    folder = Path(root) / f"{own['layers']}-{own['width']}"
                    if what != "analysis" and not folder.exists():
                        save_tiny_model(folder, n_layers=own["layers"], d_model=own["width"], initializer_range=0.05)
                    if what == "capture":
                        contestants[str(own[axis])] = _capture(folder, prompts, own)
                    elif what == "step":
                        contestants[str(own[axis])] = _step(folder, prompts, own, settings.repeats)
                    else:
                        contestants[str(own[axis])] = _analysis(prompts, own)
                seconds, _ = settings.alternate(contestants)
                fitted = exponent([int(size) for size in seconds], [float(np.median(s)) for s in seconds.values()])
                limit = 1.1 if axis != "width" and (what, axis) != ("analysis", "prompts") else None
                figures.append(Figure(f"{what}, exponent in {axis}", fitted, "", at_most=limit))
                details[f"{what}, {axis}"] = seconds
    return Report("growth", tuple(figures), details)
