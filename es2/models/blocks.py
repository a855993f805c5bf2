"""Where a transformers model has its blocks, and hooks on them under the names that TransformerLens gives.

Multimodal wrappers, and decoders inside decoders (OPT), keep their blocks further in than `model.base_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def decoder_of(model: Any) -> Any:
    """The module that runs a model's blocks, from tokens to the states before the LM head; raises as `find_blocks`."""
    return _find(model)[0]


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks in `decoder_of(model)`, and the list; `InputError` when there is none."""
    return _find(model)[1:]


def _find(model: Any) -> tuple[Any, str, nn.ModuleList]:
    from torch import nn

    n_layers = model.config.get_text_config().num_hidden_layers
    base = model.base_model
    # A wrapper's tower for images may have as many blocks as its decoder, so the decoder is asked for first.
    for start, deep in ((base, False), (model.get_decoder(), True), (base.get_decoder(), True), (base, True)):
        waiting = [start]
        while waiting:
            module = waiting.pop(0)
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                    return module, name, child
            if deep:
                waiting += [child for child in module.children() if not isinstance(child, nn.ModuleList)]
    raise InputError(
        f"The blocks of the {model.config.model_type!r} model cannot be found; use a decoder-only architecture."
    )


def output_of(output: Any) -> torch.Tensor:
    """The residual stream `[row, token, d_model]` in what a block returns; `InputError` where it is none."""
    states: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    if states.ndim != 3:
        raise InputError(
            f"The blocks of this model return a tensor of {states.ndim} dimensions, no residual stream; use another "
            "architecture."
        )
    return states


def with_output(output: Any, states: torch.Tensor) -> Any:
    """What a block returns, with another residual stream in it."""
    return type(output)([states, *output[1:]]) if isinstance(output, (tuple, list)) else states


@dataclass(frozen=True)
class BlockHooks:
    """A plain transformers model with hooks on its own blocks, used as a TransformerLens bridge is.

    Attributes:
        original_model: with the attention that people run it with.
    """

    original_model: Any

    @property
    def blocks(self) -> Any:
        """The model's own blocks."""
        return find_blocks(self.original_model)[1]

    @property
    def cfg(self) -> SimpleNamespace:
        """Number of layers, and the width of the residual stream."""
        config = self.original_model.config.get_text_config()
        return SimpleNamespace(n_layers=len(self.blocks), d_model=config.hidden_size)

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[BlockHooks]:
        """Run functions of (activation, hook) at `blocks.{l}.hook_out`; what they return takes its place."""

        def call(function: Callable[..., Any], name: str, block: Any, inputs: Any, output: Any) -> Any:
            changed = function(output_of(output), hook=SimpleNamespace(name=name))
            return None if changed is None else with_output(output, changed)

        blocks = self.blocks
        handles = [
            blocks[int(name.split(".")[1])].register_forward_hook(partial(call, function, name))
            for name, function in fwd_hooks
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
