"""Whether a capture takes more memory with more prompts: MB beside the loaded model, at its highest.

    python -m tests.benchmarks.memory [600 6000]

On the default model, each number of prompts in a process of its own: the built-in ones, and where that is not enough
the same with a number behind. Printed as one JSON line for each. 6,000 take some minutes.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from es2.models.catalogue import DEFAULT_MODEL, resolve
from es2.models.folders import model_folder
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from tests.benchmarks.capture import added_memory


def many(n_prompts: int) -> PromptSet:
    """So many different prompts; labels and splits do not matter here."""
    texts = load_prompts("builtin").texts
    rounds = range(-(-n_prompts // len(texts)))
    texts = tuple(f"{text} ({number})" if number else text for number in rounds for text in texts)[:n_prompts]
    labels = np.zeros(n_prompts, dtype=np.int8)
    pairs = tuple(f"pair-{row}" for row in range(n_prompts))
    return PromptSet("many", texts, labels, ("",) * n_prompts, pairs, ("test",) * n_prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", type=int, default=[600, 6000])
    folder = model_folder(resolve(DEFAULT_MODEL))
    for n_prompts in parser.parse_args().prompts:
        print(json.dumps({"prompts": n_prompts, "mb": added_memory("ours", folder, many(n_prompts))}), flush=True)


if __name__ == "__main__":
    main()
