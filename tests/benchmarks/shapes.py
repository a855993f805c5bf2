"""The step and the replies on other architectures: random models of about 100 million weights, by `model_type`.

    python -m tests.benchmarks.shapes [--architectures qwen3,phi3] [--repeats 1] [--replies]

Whether prompts share a prefix and reply in rows is found out by a trial, so all of them should be as fast as those that
tests name. Printed as JSON, one line an architecture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from es2.models.batching import may_share
from es2.models.loading import load_model
from es2.prompts.loading import load_prompts
from es2.training.config import FinetuneConfig
from tests.benchmarks import replies, step
from tests.benchmarks.contest import Settings
from tests.builders import save_tiny_model

_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
_WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 6}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "qwen3": _HEADS,
    "gemma3_text": _HEADS | _WINDOW,
    "phi3": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "olmo2": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "gpt_oss": _HEADS | _WINDOW | _EXPERTS | {"intermediate_size": 384},
    "qwen3_moe": _HEADS | _EXPERTS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--replies", action="store_true", help="replies instead of steps")
    arguments = parser.parse_args()
    prompts = load_prompts("builtin")
    for architecture in arguments.architectures.split(","):
        with tempfile.TemporaryDirectory() as folder:
            shape = {"n_layers": 12, "d_model": 768, "intermediate_size": 2048, "initializer_range": 0.02}
            save_tiny_model(Path(folder), architecture, **shape | SHAPES[architecture])
            settings = Settings(Path(folder), prompts, 96, arguments.repeats)
            if arguments.replies:
                report = replies.measure(settings)
            else:
                config = FinetuneConfig(layers=(5, 8), first_block=2, steps=arguments.repeats, pairs_per_step=12)
                report = step.measure(settings, config)
            model = load_model(Path(folder), dtype="float32", device="cpu")
            weights = sum(parameter.numel() for parameter in model.parameters())
            found = {figure.what: round(figure.value, 4) for figure in report.figures}
        print(
            json.dumps({"architecture": architecture, "weights": weights, "shares": may_share(model)} | found),
            flush=True,
        )


if __name__ == "__main__":
    main()
