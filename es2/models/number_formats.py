"""The number formats of weights."""

from __future__ import annotations

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The number formats a model may run in, and the bytes of one weight in each."""
