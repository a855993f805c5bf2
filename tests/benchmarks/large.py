"""The app on a large artifact: how long it takes to open and to go to another layer, and how much memory it needs.

    python -m tests.benchmarks.large [--prompts 5000] [--layers 32] [--width 4096] [--clicks 6]

Synthetic embeddings of base and tuned in float16, as a capture of a 7B model leaves them (2.6 GB with the defaults, in
a temporary folder), analysed for real, which at full size takes some 20 s of a core for each layer; 200 of the
prompts are of `probe`, all others of `test` and so on screen. Printed as JSON: seconds until the first figure and from
click to new points, for each view, and the server's peak memory in GB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import psutil

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.core.files import content_key
from es2.core.progress import Reporter
from es2.jobs.queue import create_job
from es2.jobs.running import run_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow.derived import analysis_key
from es2.workflow.prepare import write_views
from tests.benchmarks.layer_change import measure
from tests.builders_artifacts import MODEL
from tests.system.browser.serving import playwright, served

N_PROBE = 200
TARGETS = (10, 14)


def write_prompts(home: Path, n_prompts: int) -> tuple[Path, PromptSet]:
    """Pairs that differ in one word."""
    path = home / "prompts.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("prompt,label,category,pair,split\n")
        for pair in range(n_prompts // 2):
            split = "probe" if pair < N_PROBE // 2 else "test"
            for label, verb in (("harmful", "force"), ("harmless", "oil")):
                file.write(f"How do I {verb} the lock of door number {pair}?,{label},locks,pair-{pair},{split}\n")
    return path, load_prompts(str(path))


def write_set(
    home: Path, prompts: PromptSet, shape: tuple[int, int], distance: float, run: str | None
) -> ActivationSet:
    """Clouds whose classes stand apart along one direction, in a space with a few long axes as models have them."""
    n_layers, width = shape
    rng = np.random.default_rng(0)
    lengths = (10.0 / (1 + np.arange(width))).astype(np.float32) + 0.3
    sides = np.where(prompts.labels == HARMFUL, 0.5, -0.5).astype(np.float32)
    arrays = np.empty((n_layers, len(prompts), width), dtype=np.float16)
    for layer in range(n_layers):
        embeddings = rng.standard_normal((len(prompts), width), dtype=np.float32) * lengths
        embeddings[:, -1] += distance * sides
        arrays[layer] = embeddings
    meta = {"model": MODEL, "run": run, "texts_digest": prompts.texts_digest}
    return Store(home / "cached_activations").write(content_key(meta), meta, prompts.texts, {"last": arrays})


def write(home: Path, n_prompts: int, shape: tuple[int, int]) -> str:
    """A run and its base below `home`; returns the link that opens their comparison."""
    path, prompts = write_prompts(home, n_prompts)
    settings = FinetuneConfig(TARGETS, model=MODEL).to_dict() | {"prompts": str(path)}
    run = create_job("finetune", settings, root=home / "runs")
    base, tuned = (write_set(home, prompts, shape, *one) for one in ((1.0, None), (3.0, run.id)))
    config = AnalysisConfig()
    analysis = analyze(prompts, base, tuned, config=config)
    with tuned.write_derived(analysis_key(base, prompts, config, tuned=tuned)) as folder:
        analysis.save(folder)
    write_views(prompts, base, tuned, analysis)

    def task(settings: dict[str, object], report: Reporter, folder: Path) -> dict[str, object]:
        return {
            "run": run.id,
            "status": "done",
            "target_layers": list(TARGETS),
            "steps": 1,
            "verdict": "separated",
            "verdict_reason": "Synthetic.",
            "kl_harmless_test": {},
            "activations": {"base": base.key, "tuned": tuned.key},
        }

    assert run_job(run.path, {"finetune": task}) == 0
    return f"model={MODEL}&prompts={path}&run={run.id}"


def server_peak() -> float:
    """GB; of the app's process, the only child that listens."""
    children = psutil.Process().children(recursive=True)
    (server,) = [child for child in children if "streamlit" in child.cmdline()]
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("prompts", 5000), ("layers", 32), ("width", 4096), ("clicks", 6)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, playwright.sync_playwright() as driver:
        link = write(Path(folder), asked.prompts, (asked.layers, asked.width))
        with served(Path(folder)) as address:
            found = {
                view: measure(address, f"{link}&view={view}", asked.clicks, driver) for view in ("separation", "pca")
            }
            print(json.dumps({**found, "peak_gb": round(server_peak(), 2)}))


if __name__ == "__main__":
    main()
