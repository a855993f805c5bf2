"""How prompts share a forward pass in capture, fine-tune and evaluation. Imports no torch by itself.

The prefix that all prompts share is run once; every batch then attends to its keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from es2.models.blocks import decoder_of
from es2.models.placement import free_bytes

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor


logger = logging.getLogger(__name__)

Tokens = Sequence[int]

KeysAndValues = list[tuple["torch.Tensor", "torch.Tensor"]]
"""Of the shared tokens, in every block; empty where nothing is shared."""

SHARING_VERIFIED = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox", "gemma")
"""Architectures (`model_type`) for which running a shared prefix once was tested to change nothing."""

ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Differences of states or logits, relative to their size, that are rounding."""


def rounding_of(model: Any) -> float:
    """The difference that is rounding in the number format of a model."""
    return ROUNDING[str(model.dtype).removeprefix("torch.")]


def trial_tokens(model: Any, n_tokens: int) -> list[int]:
    """Tokens of the model's vocabulary, the same for every model of that size, to try something out on."""
    size = model.get_input_embeddings().weight.shape[0]
    return [(37 * place + 11) % size for place in range(n_tokens)]


_tried: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

REPLY_BYTES = 900_000_000
"""Of keys and values on a CPU."""

_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
"""What configurations call the length that some layers attend to."""

REPLIES_AT_ONCE = 3  # times as many prompts of a fine-tune reply together: a token at a time costs less for each


def is_verified(model: Any) -> bool:
    """Whether prompts of this transformers model may follow a shared prefix that was run once, as tests have shown."""
    return model.config.model_type in SHARING_VERIFIED


def may_share(model: Any) -> bool:
    """Whether prompts may follow a shared prefix that was run once, and be padded on the right.

    An architecture without tests is tried out, once a model.
    """
    if is_verified(model):
        return True
    if model not in _tried:
        _tried[model] = _sharing_is_exact(model)
    return _tried[model]


def _sharing_is_exact(model: Any) -> bool:
    """Whether the final states of two prompts are the same, to rounding, alone and after a prefix that is run once."""
    import torch

    tokens = trial_tokens(model, 24)
    prompts = [(*tokens[:12], *tokens[12:17]), (*tokens[:12], *tokens[17:])]
    try:
        with torch.no_grad():  # what a model keeps of a pass in inference mode could not be trained through
            plain = [
                decoder_of(model)(torch.tensor([prompt], device=model.device), use_cache=False) for prompt in prompts
            ]
            shared = keys_and_values(decoder_of(model), tokens[:12], model.device)
            own, mask = pad([prompt[12:] for prompt in prompts], n_before=12)
            inputs = {"attention_mask": mask.to(model.device), "past_key_values": cache_before(shared)}
            found = decoder_of(model)(own.to(model.device), use_cache=True, **inputs).last_hidden_state
            errors = [
                (found[row, : len(prompt) - 12] - alone.last_hidden_state[0, 12:]).norm()
                / alone.last_hidden_state.norm()
                for row, (prompt, alone) in enumerate(zip(prompts, plain, strict=True))
            ]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        logger.debug("Prompts of a %s model share nothing: %s", model.config.model_type, error)
        return False
    return all(float(error) <= rounding_of(model) for error in errors)


def may_pad(model: Any, longest: int) -> bool:
    """Whether a prompt of up to `longest` tokens may share a row or a padded batch with others.

    Not so where a sliding window would count padding or tokens of another prompt.
    """
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    return all(longest <= window for window in windows) and may_share(model)


def usual_tokens(device: str) -> int:
    """How many tokens a forward pass reads at once on this kind of torch device, where memory is not the limit."""
    return 640 if device == "cpu" else 16_384  # more is slower on a CPU: the batch outgrows the caches


def usual_reply_tokens(device: str) -> int:
    """As `usual_tokens`, where prompts are replied to: tokens of prompts and replies together."""
    return 9_600 if device == "cpu" else 16_384  # on a CPU a hundred short exchanges, about 0.5 GB of keys


def rows_that_fit(device: str, bytes_per_row: int) -> int:
    """How many prompts reply at a time, by the memory of a row's keys and values; more gain nothing on a CPU."""
    free = free_bytes(device)
    room = min(REPLY_BYTES, free // 4) if device == "cpu" else free // 3
    return max(1, min(512, room // max(1, bytes_per_row)))


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of like length and at most `budget` padded tokens (at least one prompt).

    The longest come first, so that too little memory shows at once.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def reply_batches(lengths: Sequence[int], budget: int, pads: bool) -> Iterator[list[int]]:
    """Indices of prompts that reply together: as `batches_by_length`, or without `pads` those of equal length only."""
    if pads:
        yield from batches_by_length(lengths, budget)
        return
    for length in sorted(set(lengths), reverse=True):
        rows = [row for row, n in enumerate(lengths) if n == length]
        size = max(1, budget // length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def pad(
    sequences: Sequence[Tokens], *, side: Literal["right", "left"] = "right", n_before: int = 0
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row before_and_token"]]:
    """The tokens of every row, padded with zeros to the longest, and the attention mask.

    On the right every token keeps its own position, which models assume. The mask also covers the `n_before` shared
    tokens that every row follows.
    """
    import torch

    width = max(map(len, sequences))
    paddings = [width - len(sequence) for sequence in sequences]
    if side == "right":
        tokens = [(*sequence, *[0] * padding) for sequence, padding in zip(sequences, paddings, strict=True)]
        mask = [[1] * (n_before + width - padding) + [0] * padding for padding in paddings]
    else:
        tokens = [(*[0] * padding, *sequence) for sequence, padding in zip(sequences, paddings, strict=True)]
        mask = [[1] * n_before + [0] * padding + [1] * (width - padding) for padding in paddings]
    return torch.tensor(tokens), torch.tensor(mask)


def positions_of(mask: Int[Tensor, "row token"]) -> Int[Tensor, "row token"]:
    """The position of every token, padding not counted, from an attention mask."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def n_tokens_of(shared: KeysAndValues) -> int:
    """Number of tokens whose keys and values these are."""
    return shared[0][0].shape[-2] if shared else 0


@dataclass
class PrefixTree:
    """Prompts that share a row; a beginning that several share is in it once.

    Attributes:
        tokens: of the row.
        parents: for each token, the slot of the one before it; −1 for a first one.
        depths: for each token, number of tokens before it in its prompt.
        slots: for each prompt, by its index, the slots of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    slots: dict[int, list[int]] = field(default_factory=dict)

    def add(self, prompt: int, tokens: Sequence[int], stem: Sequence[int]) -> None:
        """Add a prompt that begins with the tokens at `stem`, slots that are there already."""
        path = list(stem)
        for depth in range(len(stem), len(tokens)):
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(tokens[depth])
            self.depths.append(depth)
        self.slots[prompt] = path


def n_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens in the common beginning of two prompts."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def pack_shared_prefixes(prompts: Sequence[Sequence[int]], width: int) -> list[PrefixTree]:
    """Prompts in rows of at most `width` tokens (a longer prompt has its own), those that begin alike together.

    Contrast twins begin alike, and half of all questions begin like another one; a common beginning is run once.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows, by the number of tokens that still fit
    for n_tokens, family in sorted(group_by_prefix(prompts, width), key=lambda family: -family[0]):
        tightest = next((room for room in range(n_tokens, width + 1) if with_room[room]), None)
        if tightest is None:
            rows.append(family)
            with_room[max(0, width - n_tokens)].append(len(rows) - 1)
        else:
            number = with_room[tightest].pop()
            rows[number] += family
            with_room[tightest - n_tokens].append(number)
    trees = []
    for row in rows:
        tree = PrefixTree()
        before: Sequence[int] = ()
        path: list[int] = []
        for index in row:
            tree.add(index, prompts[index], path[: n_alike(before, prompts[index])])
            before, path = prompts[index], tree.slots[index]
        trees.append(tree)
    return trees


def group_by_prefix(prompts: Sequence[Sequence[int]], width: int) -> list[tuple[int, list[int]]]:
    """(number of tokens, prompts) of families of at most `width` tokens, from the sorted prompts.

    Of all divisions this one runs the fewest tokens; among those it has small families, which are easier to pack.
    """
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    own = [len(prompts[order[0]])]  # of each prompt, what the one before it does not begin with
    own += [len(prompts[b]) - n_alike(prompts[a], prompts[b]) for a, b in pairwise(order)]
    divided = [(0, 0)]  # for the first i prompts: number of tokens, and where the last family begins
    for end in range(1, len(order) + 1):
        choices: list[tuple[int, int]] = []
        later = 0  # tokens that the family's other prompts add to its first one's
        for start in range(end - 1, -1, -1):
            n_tokens = len(prompts[order[start]]) + later
            if choices and n_tokens > width:
                break
            choices.append((divided[start][0] + n_tokens, start))
            later += own[start]
        divided.append(min(choices, key=lambda choice: choice[0]))
    families = []
    end = len(order)
    while end:
        total, start = divided[end]
        families.append((total - divided[start][0], order[start:end]))
        end = start
    return families


def keys_and_values(decoder: Any, tokens: Sequence[int], device: torch.device) -> KeysAndValues:
    """Keys and values of shared tokens in every block of a decoder (of `decoder_of`); empty for no tokens."""
    import torch

    if not tokens:
        return []
    cache = cache_of([], 1)
    decoder(torch.tensor([tuple(tokens)], device=device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(shared: KeysAndValues, n_prompts: int, config: Any = None) -> Any:
    """A transformers cache that holds `shared` for each of `n_prompts` prompts; what follows is appended to it.

    Where nothing is shared, a model's `config` gives it the kinds of layers that hybrids need.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=None if shared else config)
    for layer, (keys, values) in enumerate(shared):
        cache.update(keys.expand(n_prompts, -1, -1, -1), values.expand(n_prompts, -1, -1, -1), layer)
    return cache


def cache_before(shared: KeysAndValues) -> Any:
    """A transformers cache for a single pass of any number of prompts that all follow `shared`.

    It gives each of them `shared` and keeps nothing of what follows, which only the current block reads.
    """
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    class Before(DynamicLayer):
        def __init__(self, before: tuple[torch.Tensor, torch.Tensor]) -> None:
            super().__init__()
            self.lazy_initialization(*before)
            self.keys, self.values = self.before = before

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (
                torch.cat([before.expand(len(own), -1, -1, -1), own], dim=-2)
                for before, own in zip(self.before, (key_states, value_states), strict=True)
            )
            return keys, values

    return Cache(layers=[Before(before) for before in shared])


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a reply of this transformers model."""
    ids = model.generation_config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def until_end(reply: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """A reply up to and including the first token that ends it; all of it if none does."""
    end = next((index for index, token in enumerate(reply) if token in ends), len(reply) - 1)
    return tuple(reply[: end + 1])
