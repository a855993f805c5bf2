"""Embeddings of rendered prompts, read with TransformerLens hooks in as little time and memory as is exact.

A prompt's embedding must not depend on its neighbours in a batch or the side of the padding. Shared beginnings run once
only where that changes nothing; hooks keep the wanted positions only, a hundredth of the residual streams.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from es2.core.errors import InputError, MachineError
from es2.core.malloc import keep_freed_memory
from es2.core.progress import Reporter, silent
from es2.models.batching import (
    KeysAndValues,
    PrefixTree,
    batches_by_length,
    cache_before,
    is_verified,
    keys_and_values,
    may_pad,
    n_alike,
    n_tokens_of,
    pack_shared_prefixes,
    pad,
    positions_of,
    rounding_of,
    usual_tokens,
)
from es2.models.blocks import BlockHooks, decoder_of
from es2.models.chat_template import Rendered
from es2.models.device import is_out_of_memory
from es2.store.embeddings import lay_out, release_pages
from es2.store.sources import POSITIONS

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from transformer_lens.model_bridge import TransformerBridge


logger = logging.getLogger(__name__)

_SHARING_WORTHWHILE = 4  # shared tokens that pay for an extra pass
_ROW = 128  # tokens of a row of prompts: longer rows share more, but attention grows with their square
_CPU_TOKENS = 1280  # at once: half of that took 9 % longer, twice that no less


def capture_residuals(
    bridge: TransformerBridge | BlockHooks,
    rendered: Rendered,
    positions: Sequence[str] = POSITIONS,
    *,
    max_tokens_per_batch: int | None = None,
    padding: Literal["right", "left"] = "right",
    into: Path | None = None,
    report: Reporter = silent,
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """The residual stream after every block (`blocks.{l}.hook_out`): by position, float32 `[layer, prompt, d_model]`.

    The shared prefix of all prompts (on the default model half of the tokens) runs once: later tokens see it through
    its keys and values. The rest is packed into rows of several prompts that share prefixes, too
    (`es2.models.batching.pack_shared_prefixes`). The result is the same to rounding, in a third of the time. Where an
    architecture does not allow it (a sliding window, a recurrent state), whole prompts of like length share a batch.

    Args:
        bridge: from `load_bridge`.
        rendered: from `render`.
        positions: which tokens are read, as `Rendered.spans` knows them.
        max_tokens_per_batch: padded tokens run at once, at least one prompt; by default what suits the device. Halved
            whenever memory runs out.
        padding: the side on which the shorter prompts of a batch are filled up; both give the same embeddings.
        into: path of a safetensors file to be made, to which the arrays are mapped, so that memory does not grow with
            the prompts.
        report: receives the number of tokens done after every batch, shared ones not counted.

    Raises:
        InputError: when the hooks of some layer did not fire.
        MachineError: when memory runs out for a single prompt, or the disk is full.
    """
    import torch

    model: Any = bridge.original_model
    usual = usual_tokens(model.device.type)
    if model.device.type == "cpu":
        usual = _CPU_TOKENS
        keep_freed_memory()
    budget = max_tokens_per_batch or usual
    columns = np.array([rendered.spans(position) for position in positions]).transpose(1, 0, 2)
    n_shared, packed = _ways(bridge, rendered, columns) if padding == "right" else (0, False)
    own_tokens = [tokens[n_shared:] for tokens in rendered.token_ids]
    shape = (int(bridge.cfg.n_layers), len(own_tokens), int(bridge.cfg.d_model))
    if into is None:
        captured = {position: np.empty(shape, dtype=np.float32) for position in positions}
    else:
        captured = lay_out(into, positions, shape)
    done, total = 0, sum(map(len, own_tokens))
    report("capture", done, total)
    waiting = _batches(own_tokens, range(len(own_tokens)), budget, packed)
    shared: KeysAndValues | None = None
    while waiting:
        batch = waiting[0]
        rows = [row for tree in batch for row in tree.slots]
        try:
            if shared is None:
                with torch.inference_mode():
                    shared = keys_and_values(decoder_of(model), rendered.token_ids[0][:n_shared], model.device)
            block = _run_batch(bridge, batch, columns - n_shared, padding, shared, packed)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise MachineError(
                    f"Memory ran out on a single prompt of {len(rendered.token_ids[rows[0]])} tokens; "
                    "use bfloat16, a smaller model, or shorter prompts."
                ) from error
            block = None  # the error's frames hold memory until this block is left
        if block is None:
            budget = max(1, sum(len(tree.tokens) for tree in batch) // 2)
            logger.warning("Memory ran out; capture goes on with batches of %d tokens.", budget)
            left = [row for other in waiting for tree in other for row in tree.slots]
            waiting = _batches(own_tokens, left, budget, packed)
            continue
        waiting.pop(0)
        for p, position in enumerate(positions):
            captured[position][:, rows] = block[:, :, p]
            release_pages(captured[position])
        del block
        done += sum(len(own_tokens[row]) for row in rows)
        report("capture", done, total)
    return captured


def _batches(tokens: Sequence[Sequence[int]], rows: Sequence[int], budget: int, packed: bool) -> list[list[PrefixTree]]:
    """The prompts of `rows` in batches, the longest first; if `packed`, in rows of several prompts."""
    if packed:
        trees = pack_shared_prefixes([tokens[row] for row in rows], min(_ROW, budget))
        for tree in trees:
            tree.slots = {rows[index]: slots for index, slots in tree.slots.items()}
    else:
        trees = [_alone(row, tokens[row]) for row in rows]
    lengths = [len(tree.tokens) for tree in trees]
    return [[trees[index] for index in batch] for batch in batches_by_length(lengths, budget)]


def _alone(row: int, tokens: Sequence[int]) -> PrefixTree:
    """A row of one prompt."""
    tree = PrefixTree()
    tree.add(row, tokens, ())
    return tree


def _shared_tokens(rendered: Rendered, columns: np.ndarray) -> int:
    """Length of the prefix that all prompts share before the first wanted token: most of a template's beginning."""
    first, last = min(rendered.token_ids), max(rendered.token_ids)  # all prompts between them share their prefix
    return min(n_alike(first, last), int(columns.min()))


def _ways(bridge: TransformerBridge | BlockHooks, rendered: Rendered, columns: np.ndarray) -> tuple[int, bool]:
    """The length of the prefix that runs once, and whether prompts share rows, as far as both are exact here.

    An architecture without tests is tried out on the longest prompt and on one more.
    """
    import torch

    model: Any = bridge.original_model
    if len(rendered.token_ids) == 1:
        return 0, False
    n_shared = _shared_tokens(rendered, columns)
    n_shared = n_shared if n_shared >= _SHARING_WORTHWHILE else 0
    longest = max(range(len(rendered.token_ids)), key=lambda row: len(rendered.token_ids[row]))
    if is_verified(model):
        return n_shared, may_pad(model, len(rendered.token_ids[longest]))
    rows = [longest, (longest + 1) % len(rendered.token_ids)]
    tried, own_columns = [rendered.token_ids[row] for row in rows], columns[rows]
    try:
        with torch.inference_mode():
            shared = keys_and_values(decoder_of(model), tried[0][:n_shared], model.device)
        trees = pack_shared_prefixes([tokens[n_shared:] for tokens in tried], sum(map(len, tried)))
        order = [row for tree in trees for row in tree.slots]
        found = _run_batch(bridge, trees, own_columns - n_shared, "right", shared, True)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        logger.debug("Prompts of a %s model do not share rows: %s", model.config.model_type, error)
        return 0, False
    plain = [_run_batch(bridge, [_alone(row, tried[row])], own_columns, "right", [], False) for row in order]
    expected = np.concatenate(plain, axis=1)
    error_found = np.linalg.norm(found - expected, axis=-1)
    limit = rounding_of(model) * np.linalg.norm(expected, axis=-1)
    return (n_shared, True) if bool((error_found <= limit).all()) else (0, False)


def _run_batch(
    bridge: TransformerBridge | BlockHooks,
    trees: Sequence[PrefixTree],
    columns: Int[np.ndarray, "prompt position end"],
    padding: Literal["right", "left"],
    shared: KeysAndValues,
    packed: bool,
) -> Float[np.ndarray, "layer prompt position d_model"]:
    """The embeddings of one forward pass, without the LM head, of rows that follow `shared`, in the order of `trees`.

    Args:
        trees: the rows; without `packed` of one prompt each.
        columns: for each prompt and position, the first and the last token whose mean is wanted, counted after
            `shared`.
        shared: keys and values of the tokens before, in every block.
        packed: whether a mask and positions describe the trees, rather than padding alone.
    """
    import torch

    model: Any = bridge.original_model
    width = max(len(tree.tokens) for tree in trees)
    n_shared = n_tokens_of(shared)
    shifts = [width - len(tree.tokens) if padding == "left" else 0 for tree in trees]
    input_ids, seen = pad([tree.tokens for tree in trees], side=padding, n_before=n_shared)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": seen}
    if packed:
        inputs["attention_mask"] = _branches(trees, width, n_shared, model.dtype)
        inputs["position_ids"] = n_shared + pad([tree.depths for tree in trees])[0]
    elif padding == "left":
        inputs["position_ids"] = positions_of(seen)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if shared:
        inputs["past_key_values"] = cache_before(shared)
    wanted = [
        (row, [slot + shift for slot in slots[first : last + 1]])
        for row, (tree, shift) in enumerate(zip(trees, shifts, strict=True))
        for prompt, slots in tree.slots.items()
        for first, last in columns[prompt]
    ]
    n_positions = columns.shape[1]
    counts = torch.tensor([len(places) for _, places in wanted], device=model.device)
    means = int(counts.max()) > 1
    rows = torch.tensor([row for row, own in wanted for _ in own], device=model.device)
    places = torch.tensor([place for _, own in wanted for place in own], device=model.device)
    # A row of tokens for each prompt, or where some are averaged each for itself.
    shaped = (-1, 1 if means else n_positions)
    rows, places = rows.reshape(shaped), places.reshape(shaped)
    owners = torch.arange(len(wanted), device=model.device).repeat_interleave(counts)
    names = [f"blocks.{layer}.hook_out" for layer in range(int(bridge.cfg.n_layers))]
    # In one piece, allocated first: small tensors between the large temporary ones of each layer fragment memory.
    shape = (len(names), len(wanted) // n_positions, n_positions, int(bridge.cfg.d_model))
    kept = torch.empty(shape, dtype=torch.float32, device=model.device)
    fired: set[str] = set()

    def keep(activation: torch.Tensor, hook: Any) -> None:
        # Blocks may be on several devices.
        found = activation[rows.to(activation.device), places.to(activation.device)]
        if means:
            sums = found.new_zeros(len(wanted), found.shape[-1], dtype=torch.float32)
            sums.index_add_(0, owners.to(found.device), found[:, 0].float())
            found = (sums / counts.to(found.device)[:, None]).view(shape[1:])
        kept[names.index(hook.name)] = found
        fired.add(hook.name)

    hooks: list[tuple[str, Any]] = [(name, keep) for name in names]
    lean = (
        not isinstance(bridge, BlockHooks)  # which has the model's own parts already
        and is_verified(model)
        and not any(_has_hooks(part) for block in bridge.blocks for part in block.submodules.values())
    )
    if lean:
        hooks = _last_mlp_hooks(len(names) - 1, (len(trees), width), rows, places) + hooks
    with torch.inference_mode(), bridge.hooks(fwd_hooks=hooks), _plain_blocks(bridge) if lean else nullcontext():
        decoder_of(model)(**inputs, use_cache=bool(shared))
    if silent_hooks := [name for name in names if name not in fired]:
        raise InputError(
            f"TransformerLens hooks did not fire for {silent_hooks[0]} ({len(silent_hooks)} of {len(names)}), so this "
            f"{model.config.model_type!r} model cannot be captured; use another architecture."
        )
    return kept.cpu().numpy()


def _has_hooks(part: Any) -> bool:
    """Whether a part of a bridge has hooks."""
    from transformer_lens.hook_points import HookPoint

    return any(isinstance(point, HookPoint) and point.has_hooks() for point in part.modules())


def _last_mlp_hooks(layer: int, shape: tuple[int, int], rows: Any, places: Any) -> list[tuple[str, Any]]:
    """Hooks that restrict the last block's MLP to the wanted tokens, since no later block needs the others.

    Outputs of other tokens are zero, and nothing reads them. `shape` is `[row, token]` of the batch; `rows`
    and `places` are the wanted tokens.
    """

    def narrow(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation[rows.to(activation.device), places.to(activation.device)]

    def widen(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        whole = activation.new_zeros(*shape, activation.shape[-1])
        whole[rows.to(activation.device), places.to(activation.device)] = activation
        return whole

    return [(f"blocks.{layer}.mlp.hook_in", narrow), (f"blocks.{layer}.mlp.hook_out", widen)]


@contextmanager
def _plain_blocks(bridge: Any) -> Iterator[None]:
    """Run the parts of blocks that have no hooks as transformers does, with fused attention: a sixth of the time.

    A bridge computes every norm twice and holds all attention scores, for hooks inside a block. The blocks themselves
    stay bridged, so their hooks fire.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    def swaps(module: Any) -> Iterator[tuple[Any, str, Any]]:
        for name, part in module.named_children():
            if not isinstance(part, GeneralizedComponent):
                yield from swaps(part)
            elif not _has_hooks(part):
                yield module, name, part
                yield from swaps(part.original_component)

    config: Any = bridge.original_model.config
    swapped = [swap for block in bridge.blocks for swap in swaps(block.original_component)]
    attention = config._attn_implementation
    try:
        config._attn_implementation = "sdpa"
        for module, name, part in swapped:
            setattr(module, name, part.original_component)
        yield
    finally:
        config._attn_implementation = attention
        for module, name, part in swapped:
            setattr(module, name, part)


def _branches(trees: Sequence[PrefixTree], width: int, n_shared: int, dtype: Any) -> Any:
    """The additive attention mask `[row, 1, token, shared + token]`: zero for a token itself and those it follows."""
    import torch

    follows = np.zeros((len(trees), width, n_shared + width), dtype=bool)
    follows[:, :, :n_shared] = True
    for row, tree in enumerate(trees):
        for place, parent in enumerate(tree.parents):
            if parent >= 0:
                follows[row, place] = follows[row, parent]
            follows[row, place, n_shared + place] = True
        for place in range(len(tree.tokens), width):  # padding, which no token attends to, sees itself
            follows[row, place, n_shared + place] = True
    mask = torch.full(follows.shape, torch.finfo(dtype).min, dtype=dtype)
    mask[torch.from_numpy(follows)] = 0
    return mask[:, None]
