"""Capture against what a researcher would write otherwise, and against the least that the arithmetic takes.

All contestants give the embeddings at `last` of the same prompts at every layer. The two usual ways take batches of 16
in the order of the prompts, run every token of each and the head, keep everything and slice the last token afterwards.
The floor is the arithmetic of the tokens after the template's head, and of that head once, at the rate of large float32
matrix products, measured in the same rounds. (Ours also runs other common beginnings once, which the floor does not.)
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es2.capture.capture import CaptureRequest, capture
from es2.capture.residuals import _shared_tokens, capture_residuals
from es2.core.progress import Reporter
from es2.models.chat_template import Rendered, render
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.models.shape import Shape
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store
from tests.benchmarks.contest import Figure, Report, Settings, largest_error, ratio
from tests.builders import save_tiny_model, tiny_prompts

USUAL_BATCH = 16
FEW_AND_MANY = (600, 6000)  # prompts whose memory is compared; their embeddings are 20 and 197 MB
PRODUCT = 2048  # rows and columns of the products whose rate is measured

Tokens = Sequence[Sequence[int]]


def padded(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch filled up on the right: tokens, mask, and each prompt's last column."""
    width = max(map(len, tokens))
    input_ids, mask = torch.zeros(2, len(tokens), width, dtype=torch.long)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return input_ids, mask, mask.sum(dim=1) - 1


def with_cache(bridge: Any, tokens: Tokens) -> np.ndarray:
    """The usual TransformerLens way: cache everything, then slice."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), USUAL_BATCH):
            input_ids, mask, last = padded(tokens[start : start + USUAL_BATCH])
            _, cache = bridge.run_with_cache(input_ids, attention_mask=mask)
            rows = torch.arange(len(last))
            layers = [cache[f"blocks.{layer}.hook_out"][rows, last] for layer in range(bridge.cfg.n_layers)]
            parts.append(torch.stack(layers).numpy())
    return np.concatenate(parts, axis=1)


def with_hidden_states(model: Any, tokens: Tokens) -> np.ndarray:
    """The usual transformers way. The last of its states lies behind the final norm, so it is left out."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), USUAL_BATCH):
            input_ids, mask, last = padded(tokens[start : start + USUAL_BATCH])
            states = model(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
            rows = torch.arange(len(last))
            parts.append(torch.stack([layer[rows, last] for layer in states[1:-1]]).numpy())
    return np.concatenate(parts, axis=1)


def distinct_tokens(rendered: Rendered) -> int:
    """Tokens that have to be run: what all prompts begin with counts once."""
    shared = _shared_tokens(rendered, np.array([rendered.columns("last_instruction")]))
    return rendered.n_tokens - (len(rendered.token_ids) - 1) * shared


def flops(shape: Shape, tokens: int) -> float:
    """Multiplications and additions of all blocks, without attention's own, which is little for short prompts."""
    return 2.0 * shape.n_layers * shape.block_parameters * tokens


def product() -> None:
    """Large float32 products of `PRODUCT_FLOPS` operations."""
    left, right = torch.ones(2, PRODUCT, PRODUCT)
    for _ in range(4):
        left @ right


PRODUCT_FLOPS = 4 * 2.0 * PRODUCT**3


# --------------------------------------------------------------------------------------------------------------- memory


def _high_water(reset: bool = False) -> dict[str, float]:
    """Resident memory of this process now and at its highest since the last reset, in MB (10⁶ bytes)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[entry].split()[0]) * 1024 / 1e6 for name, entry in (("now", "VmRSS"), ("peak", "VmHWM"))}


def _loaded(model: torch.nn.Module) -> float:
    """Resident MB with all weights of the model read, from where the highest is measured anew.

    Weights are files that are mapped into memory: before their first use they are not resident, and the first forward
    pass would seem to need them beside the model.
    """
    with torch.no_grad():
        for weight in model.parameters():
            weight.sum()
    return _high_water(reset=True)["now"]


def _added_alone(who: str, folder: Path, prompts: PromptSet) -> float:
    """MB that a contestant adds at its highest to a process that has loaded the model."""
    rendered = render(load_tokenizer(folder), prompts.texts)
    before = 0.0
    if who == "ours":

        def read(reading: CaptureRequest, report: Reporter) -> dict[str, np.ndarray]:
            nonlocal before
            bridge = load_bridge(reading.folder, dtype=reading.dtype, device=reading.device)
            before = _loaded(bridge.original_model)
            return capture_residuals(bridge, rendered, reading.positions, into=reading.into, report=report)

        with tempfile.TemporaryDirectory() as home:
            capture(str(folder), prompts, store=Store(Path(home)), device="cpu", dtype="float32", read=read)
    elif who == "run_with_cache":
        bridge = load_bridge(folder, dtype="float32", device="cpu")
        before = _loaded(bridge.original_model)
        with_cache(bridge, rendered.token_ids)
    else:
        model = load_model(folder, dtype="float32", device="cpu")
        before = _loaded(model)
        with_hidden_states(model, rendered.token_ids)
    return _high_water()["peak"] - before


def added_memory(who: str, folder: Path, prompts: PromptSet) -> float:
    """`_added_alone` in a process of its own, since what a process once held says nothing about who held it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_added_alone, who, folder, prompts).result()


def memory_by_prompts(pairs: tuple[int, ...]) -> dict[int, float]:
    """MB that our capture adds to a process on a random model of 16 layers and 256 dimensions, by prompts."""
    with tempfile.TemporaryDirectory() as root:
        folder = save_tiny_model(Path(root) / "model", n_layers=16, d_model=256, initializer_range=0.05)
        return {2 * n: added_memory("ours", folder, tiny_prompts(n)) for n in pairs}


# -------------------------------------------------------------------------------------------------------------- measure


def measure(settings: Settings, memory: bool = True) -> Report:
    """Time and memory of our capture and of the two usual ways."""
    prompts = settings.sample()
    rendered = render(load_tokenizer(settings.folder), prompts.texts)
    bridge = load_bridge(settings.folder, dtype="float32", device="cpu")
    plain = load_model(settings.folder, dtype="float32", device="cpu")
    seconds, found = settings.alternate(
        {
            "ours": lambda: capture_residuals(bridge, rendered)["last"],
            "run_with_cache": lambda: with_cache(bridge, rendered.token_ids),
            "output_hidden_states": lambda: with_hidden_states(plain, rendered.token_ids),
            "products": product,
        }
    )
    rate = PRODUCT_FLOPS / statistics.median(seconds["products"])
    distinct = distinct_tokens(rendered)
    floor = flops(Shape.of_folder(settings.folder), distinct) / rate
    ours = statistics.median(seconds["ours"])
    figures = [
        Figure("run_with_cache ÷ ours", ratio(seconds, "run_with_cache", "ours"), "×", at_least=3.3),
        Figure("output_hidden_states ÷ ours", ratio(seconds, "output_hidden_states", "ours"), "×", at_least=3.0),
        Figure("ours ÷ floor", ours / floor, "×", at_most=1.3),
        Figure("ours", rendered.n_tokens / ours, "tokens/s"),
    ]
    details: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": rendered.n_tokens,
        "distinct_tokens": distinct,
        "seconds": seconds,
        "floor_seconds": floor,
        "gflops": rate / 1e9,
        "largest_error": {
            "run_with_cache": largest_error(found["ours"], found["run_with_cache"]),
            "output_hidden_states": largest_error(found["ours"][:-1], found["output_hidden_states"]),
        },
    }
    if memory:
        added = {
            who: added_memory(who, settings.folder, prompts)
            for who in ("ours", "run_with_cache", "output_hidden_states")
        }
        few, many = FEW_AND_MANY
        grown = memory_by_prompts((few // 2, many // 2))
        figures.append(Figure("memory beside the model", added["ours"], "MB", at_most=400))
        figures.append(Figure(f"memory at {many} prompts − at {few}, small model", grown[many] - grown[few], "MB"))
        details |= {"memory_mb": added, "memory_mb_by_prompts": grown}
    return Report("capture", tuple(figures), details)
