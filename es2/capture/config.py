"""What decides a capture. Imports no torch, so that forms and commands can read it."""

from __future__ import annotations

from typing import Any

from es2.core.rendering import Rendering
from es2.core.settings import setting
from es2.models.catalogue import DEFAULT_MODEL
from es2.models.costs import DTYPES
from es2.store.sources import POSITIONS, check_position


class CaptureConfig(Rendering):
    """Everything that decides a capture but its prompts."""

    model: str = setting(
        DEFAULT_MODEL, "A catalogue name (`es2 models`), a Hub id, a local folder or a .gguf file.", group="own"
    )
    positions: tuple[str, ...] = setting(
        POSITIONS,
        "Which tokens are read: last (last prompt token), last-1, last-2 … (tokens before it, after the request), "
        "last_instruction (last token of the request), mean (over the request's tokens).",
        of="position",
    )
    device: str | None = setting(None, "cuda, mps or cpu, or auto (all GPUs). Automatic: the best there is.")
    dtype: str | None = setting(
        None, "The model's number format. Automatic: bfloat16 on a CUDA device, else float32.", choices=tuple(DTYPES)
    )

    def model_post_init(self, _: Any) -> None:
        """Refuse what is no position (`InputError`)."""
        for position in self.positions:
            check_position(position)
