"""Tokens, bytes and seconds behind every estimate and every check that memory suffices; measured unless noted.

"The default run" is one cold `es2 finetune` of SmolLM2-135M on two idle cores that each multiply at 93 · 10⁹ when
alone: 312 s, of which captures 38 and 49 s, base 49 s, steps and validations 154 s, analyses about 7 s.
"""

from __future__ import annotations

import math

CHARACTERS_PER_TOKEN = 4  # of English, where no tokenizer is at hand; assumed
TEMPLATE_PREFIX = 24  # tokens before the user's text, which are run once for all prompts; assumed
TEMPLATE_TAIL = 8  # tokens after it, of every prompt; assumed

BATCH_BYTES = 3.5e8  # of a batch that is captured: 0.9 GB with the runtime on the default model, rounded up to 1.0
FOUR_BIT_BYTES = 4 / 8 + 4 / 64  # of one weight in NF4: four bits, and a float32 scale for 64 of them
WORKING_SHARE = 1.2  # the weights once more for a moment, shard by shard, while they are read and cast
LEFT_FREE = 0.1  # of every device over which a model is laid, for what passes through it; assumed
LOGITS_AT_ONCE = 2**23  # of a chunk whose KL is taken: 32 MB in float32, 170 tokens of a vocabulary of 49,152
LOGIT_BYTES = 5 * 4 * LOGITS_AT_ONCE  # such a chunk in float32, and what is made of it (`es2.models.kl`)
# On the CPU; `docs/results/memory.md` has the peaks.
KEPT_PER_TOKEN = (17, 7)  # numbers that autograd needs of a block on the way back, in units of d_model and of d_ff
PASSING_PER_TOKEN = (6, 3)  # the same of a block that runs without autograd


def runtime_bytes(device: str) -> float:
    """Bytes of a process before any weight: interpreter, torch, TransformerLens; of a GPU (assumed) its context."""
    return 6.5e8 if device == "cpu" else 1e9


REFUSED_SHARE = 0.5  # of harmful prompts by a base; assumed

# Chosen together: the default run starts and loads three times in about 17 s.
START_SECONDS = 8.0  # of a process: interpreter, imports, set-up
LOAD_SECONDS = 3.0  # of a model or bridge, beside the reading of its weights
LOAD_BYTES_PER_SECOND = 1e9

# Parts of the rate at which large matrices are multiplied.
FINETUNE_EFFICIENCY = 0.37  # the default run
CAPTURE_EFFICIENCY = 0.62  # the same: large batches of like length, nothing kept for a way back
REPLY_EFFICIENCY = 0.6  # of an evaluation: 180 to 250 tokens/s with 135 M weights on two cores

ANALYSIS_PRODUCTS = 40  # per prompt, dimension and resample, over all numbers of both models; the default run


def weight_bytes_per_second(device: str) -> float:
    """Speed of reading weights, all of them for every decoded token; on a GPU that of 24 GB cards' data sheets."""
    return 1e10 if device == "cpu" else 1e12


def start_seconds(loads: int, weight_bytes: float) -> float:
    """Seconds of a process's start, with this many loads of a model."""
    return START_SECONDS + loads * (LOAD_SECONDS + weight_bytes / LOAD_BYTES_PER_SECOND)


def reply_seconds(
    n_replies: int, exchange: float, new_tokens: int, *, tokens_per_second: float, reading: float, rows: int
) -> float:
    """Seconds of greedy replies by one model.

    Args:
        exchange: number of tokens of a prompt and its reply.
        new_tokens: of the longest reply.
        tokens_per_second: read or said.
        reading: seconds to read all weights once; 0 where the speed counts that already.
        rows: number of replies at a time.
    """
    return n_replies * exchange / tokens_per_second + math.ceil(n_replies / rows) * new_tokens * reading


DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The number formats a model may run in, and the bytes of one weight in each."""
