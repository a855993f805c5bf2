"""What `es2 plan` says beside what a capture and a fine-tune then take: peak memory of the process, and seconds.

    python -m tests.benchmarks.plan_check --model M --pairs 60 --layers 16,22 --settings '{}' '{"accumulate": 4}'

Every run is a process of its own with an empty home, so that nothing is found on disk, and its peak is what the kernel
says of it (`ru_maxrss`). On the CPU only: a GPU's peak is not the process's. Printed as one JSON line for each run. A
random model of any size is made by `--random FOLDER --shape d_model,d_ff,n_layers,n_heads`, with the tokenizer of M.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.models.loading import load_tokenizer
from es2.models.shape import local_folder
from es2.prompts.loading import load_prompts
from es2.training.config import FinetuneConfig
from es2.workflow.plan import plan
from tests.builders import write_prompts

CAPTURE = (
    "import sys; from es2.capture.capture import capture; from es2.prompts.loading import load_prompts;"
    "capture(sys.argv[1], load_prompts(sys.argv[2]).measured(), positions=('last',), device='cpu')"
)
FINETUNE = (
    "import json, sys; from pathlib import Path; from es2.training.finetune import FinetuneConfig, finetune;"
    "from es2.prompts.loading import load_prompts;"
    "finetune(FinetuneConfig.from_dict(json.loads(sys.argv[3])), load_prompts(sys.argv[2]), Path(sys.argv[4]))"
)


def measured(script: str, *arguments: str) -> dict[str, float]:
    """Peak memory in GB (10⁹ bytes) and seconds of a script in a process of its own, with an empty home."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"ES2_HOME": home}
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", script, *arguments, home], env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"A run failed: {arguments}")
    return {"gb": usage.ru_maxrss * 1024 / 1e9, "seconds": time.perf_counter() - started}


def make_random(folder: Path, shape: str, like: str) -> None:
    """Save a random Llama of the given sizes with another model's tokenizer and vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    d_model, d_ff, n_layers, n_heads = map(int, shape.split(","))
    tokenizer = load_tokenizer(model_folder(resolve(like)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 2,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--pairs", type=int, help="only so many pairs of the prompts, from the first on")
    parser.add_argument("--layers", default="16,22")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=["{}"], help="settings of fine-tunes, each a JSON object")
    parser.add_argument("--random", type=Path)
    parser.add_argument("--shape")
    chosen = parser.parse_args()
    model = chosen.model
    if chosen.random:
        make_random(chosen.random, chosen.shape, model)
        model = str(chosen.random)
    prompts, source = load_prompts(chosen.prompts), chosen.prompts
    if chosen.pairs:
        first = list(dict.fromkeys(prompts.pairs))[: chosen.pairs]
        few = prompts.select(np.array([pair in first for pair in prompts.pairs]))
        source = str(write_prompts(Path(tempfile.mkdtemp()) / "few.csv", few))
        prompts = load_prompts(source)
    layers = tuple(map(int, chosen.layers.split(",")))

    def told(what: str, planned: dict[str, float], found: dict[str, float]) -> None:
        line: dict[str, Any] = {"model": model, "what": what, "planned": planned, "measured": found}
        ratios = {name: planned[name] / found[name] for name in planned}
        print(json.dumps(line | {"planned / measured": ratios}, default=float), flush=True)

    for number, text in enumerate(chosen.settings):
        config = FinetuneConfig(layers=layers, model=model, steps=chosen.steps, device="cpu", **json.loads(text))
        config = config.replace(replies=False)  # `finetune` alone is measured
        made = plan(config, prompts, local_folder(model))
        per_start = made.seconds["start"] / 3
        if number == 0:
            planned = {"gb": made.needs_gb["capture"], "seconds": made.seconds["base capture"] + per_start}
            told("capture", planned, measured(CAPTURE, model, source))
        stages = ("replies", "steps", "validation")
        planned = {
            "gb": max(made.needs_gb["replies"], made.needs_gb["steps"]),
            "seconds": sum(made.seconds[stage] for stage in stages) + per_start,
        }
        told(f"finetune {text}", planned, measured(FINETUNE, model, source, json.dumps(config.to_dict())))


if __name__ == "__main__":
    main()
