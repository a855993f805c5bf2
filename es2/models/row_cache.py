"""Rows that reply together, each at its own position of one cache: a row that has ended makes room for the next one.

Keys and values lie in one array a block, allocated once. A row's tokens are at their own positions in it, and a mask
hides what lies behind, so no padding is computed and no row depends on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from es2.models.batching import KeysAndValues, batches_by_length, cache_of, n_tokens_of, pad, positions_of, usual_tokens
from es2.models.blocks import decoder_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class _RowLayer(DynamicLayer):
    """One block's keys and values `[row, head, position, d_head]`; `update` adds one token to each of the first rows.

    Zeros where nothing was written yet: what the mask hides is still multiplied, by 0.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self._rows, self._width = shape
        self.keys: Any
        self.values: Any
        self.end = 0
        self.places: Tensor = torch.empty(0, dtype=torch.long)

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make both arrays, for tensors like these."""
        if not self.is_initialized:
            self.keys, self.values = (
                one.new_zeros(self._rows, one.shape[1], self._width, one.shape[3]) for one in (keys, values)
            )
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.allocate(key_states, value_states)
        n = len(key_states)
        rows = torch.arange(n, device=key_states.device)
        places = self.places.to(key_states.device)
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        return self.keys[:n, :, : self.end], self.values[:n, :, : self.end]

    def get_seq_length(self) -> int:
        return self.end - 1


class Rows:
    """The rows of one model that reply at the moment.

    Args:
        model: a transformers causal language model.
        n_rows: the most rows there may be.
        width: the most tokens of a prompt and its reply, less the reply's last one.
        shared: keys and values of the tokens that every prompt begins with, by block.

    Attributes:
        indices: which prompt each row replies to; callers' own numbers.
    """

    def __init__(self, model: Any, n_rows: int, width: int, shared: KeysAndValues) -> None:
        self.model = model
        self.indices: list[int] = []
        self._room = n_rows
        self._shared, self._n_shared = shared, n_tokens_of(shared)
        config = model.config.get_text_config()
        self._window: int | None = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self._kinds: set[str] = set(kinds) if kinds else set()
        self._layers = [_RowLayer((n_rows, width)) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._latest: Int[Tensor, "row"] = torch.empty(0, dtype=torch.long)
        self._places: Int[Tensor, "row"] = torch.empty(0, dtype=torch.long)  # of the latest token
        self._stems: dict[tuple[int, ...], tuple[KeysAndValues, int]] = {}

    @property
    def n_free(self) -> int:
        """Number of rows that may be added."""
        return self._room - len(self.indices)

    @torch.inference_mode()
    def add(self, prompts: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Add rows for (index, tokens of the prompt).

        Of each prompt all tokens but the last are read here, once for all of its rows; the last is a row's first step.
        """
        if not prompts:
            return
        wanted = {tokens for _, tokens in prompts}
        stems = {tokens: stem for tokens, stem in self._stems.items() if tokens in wanted}
        self._stems = stems | self._read(sorted(wanted - stems.keys()))
        first = len(self.indices)
        for batch in {id(stem): stem for stem, _ in self._stems.values()}.values():
            chosen = [
                (first + i, self._stems[tokens][1])
                for i, (_, tokens) in enumerate(prompts)
                if self._stems[tokens][0] is batch
            ]
            for layer, stem in zip(self._layers, batch, strict=False):
                layer.allocate(*stem)
                rows, places = torch.tensor(chosen, device=stem[0].device).T
                for kept, own in zip((layer.keys, layer.values), stem, strict=True):
                    kept[rows, :, : own.shape[2]] = own[places]
        device = self._latest.device
        self.indices += [index for index, _ in prompts]
        self._latest = torch.cat([self._latest, torch.tensor([tokens[-1] for _, tokens in prompts], device=device)])
        lengths = torch.tensor([len(tokens) - 1 for _, tokens in prompts], device=device)
        self._places = torch.cat([self._places, lengths])

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[KeysAndValues, int]]:
        """For each prompt, its batch's keys and values, the last token's left out, and its place in the batch."""
        device = self.model.device
        own = [tokens[self._n_shared : -1] for tokens in prompts]
        found: dict[tuple[int, ...], tuple[KeysAndValues, int]] = {}
        for batch in batches_by_length([len(tokens) for tokens in own], usual_tokens(device.type)):
            cache: Any = cache_of(self._shared, len(batch))
            if own[batch[0]]:
                tokens, mask = pad([own[row] for row in batch], n_before=self._n_shared)
                positions = positions_of(mask)[:, -tokens.shape[1] :]
                inputs = {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
                decoder_of(self.model)(tokens.to(device), past_key_values=cache, use_cache=True, **inputs)
            layers = [(layer.keys, layer.values) for layer in cache.layers]
            found |= {prompts[row]: (layers, place) for place, row in enumerate(batch)}
        return found

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "row vocab"]:
        """The logits of the next token of every row."""
        end = int(self._places.max()) + 1
        for layer in self._layers:
            layer.places, layer.end = self._places, end
        device = self.model.device
        inputs = {
            "attention_mask": self._masks(end),
            "position_ids": self._places[:, None].to(device),
            "past_key_values": self._cache,
        }
        return self.model(self._latest[:, None].to(device), use_cache=True, **inputs).logits[:, -1]

    def _masks(self, end: int) -> Any:
        """What each row's latest token attends to, added to the scores; by kind of layer where a model has several."""
        positions = torch.arange(end)
        seen = positions <= self._places[:, None]
        within = seen & (positions > self._places[:, None] - self._window) if self._window else seen
        masks = {
            kind: torch.zeros(part.shape)
            .masked_fill_(~part, float("-inf"))[:, None, None]
            .to(self.model.device, self.model.dtype)
            for kind, part in {"full_attention": seen, "sliding_attention": within}.items()
        }
        if len(self._kinds) > 1:
            return masks
        return masks["sliding_attention" if self._window and self._kinds != {"full_attention"} else "full_attention"]

    def go_on(self, tokens: Sequence[int]) -> None:
        """Every row's next token, for the next step."""
        self._latest, self._places = torch.tensor(tokens), self._places + 1

    @torch.inference_mode()
    def drop(self, rows: Iterable[int]) -> None:
        """Take rows away; rows from the end move into their places."""
        gone = sorted(rows)
        n_left = len(self.indices) - len(gone)
        free = [row for row in gone if row < n_left]
        moved = [row for row in range(n_left, len(self.indices)) if row not in set(gone)]
        if free:
            for layer in self._layers:
                for kept in (layer.keys, layer.values):
                    kept[free] = kept[moved]
            self._latest[free], self._places[free] = self._latest[moved], self._places[moved]
            for to, start in zip(free, moved, strict=True):
                self.indices[to] = self.indices[start]
        self.indices = self.indices[:n_left]
        self._latest, self._places = self._latest[:n_left], self._places[:n_left]


def key_bytes(model: Any, shared: KeysAndValues) -> int:
    """Bytes of the keys and values of one token in all blocks of a model."""
    if shared:
        return sum(one[:, :, 0].numel() * one.element_size() for pair in shared for one in pair)
    cache: Any = DynamicCache()
    decoder_of(model)(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    return sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))
