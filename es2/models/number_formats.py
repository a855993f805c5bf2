"""The number formats of weights, and the memory that weights take in them."""

from __future__ import annotations

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The number formats a model may run in, and the bytes of one weight in each."""


RUNTIME_BYTES = 10**9  # interpreter, torch, TransformerLens and one batch: 0.9 GB on the default model
FOUR_BIT_BYTES = 0.6  # of one weight, with the scales and the parts that stay as they are
WORKING_SHARE = 1.2  # the weights once more for a moment, shard by shard, while they are read and cast
