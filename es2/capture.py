"""Embeddings of prompts, read with TransformerLens hooks.

One prompt's embedding must not depend on its neighbours in a batch, on the side of the padding, or on the day: this is
what everything downstream silently assumes. So prompts are rendered with the date pinned, padded under a mask, and
only the wanted positions of every block's output are kept, the moment the hook fires; keeping whole residual streams
would cost a hundred times the memory. A capture is found again by its request alone: the tokens that a tokenizer made
of the texts last time are remembered by digest, so that asking a second time imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from es2.batching import (
    SHARING_VERIFIED,
    KeysAndValues,
    Tree,
    batches_by_length,
    cache_of,
    keys_and_values,
    n_alike,
    plant,
    usual_tokens,
)
from es2.errors import InputError, MachineError
from es2.files import content_key, is_key, machine_error, read_json, user_cache, write_json
from es2.jobs import Reporter, silent
from es2.model_files import first_line, read_config
from es2.models import (
    choose_device,
    choose_dtype,
    context_length,
    fingerprint,
    is_out_of_memory,
    load_bridge,
    load_tokenizer,
    model_folder,
    resolve,
)
from es2.placement import AUTO
from es2.prompts import PromptSet
from es2.sources import POSITIONS
from es2.store import FORMAT_VERSION, ActivationSet, Store, let_go

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

PINNED_DATE = datetime(2024, 7, 26)
"""What templates that tell the model today's date are told: the date that Llama's own template falls back to."""

_RENDERING = 1  # raise it when the same texts would be rendered into other tokens than before
_ATTENTION = "eager"  # what the numbers are those of; fused attention gives the same to rounding
_HALF_LIMIT = 3e4  # float16 ends at 65504; embeddings below this are stored in it without a second thought
_ROUNDING_PROMPTS = 4  # of a half-precision capture, whose difference from float32 is measured
_SHARING_WORTHWHILE = 4  # shared tokens that pay for an extra pass
_ROW = 128  # tokens of a row of prompts: longer rows share more, but all their tokens look at each other
_EXACT = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # differences, relative to ‖e‖, that are rounding


@dataclass(frozen=True)
class Rendered:
    """Prompts as the model gets them.

    Attributes:
        token_ids: the tokens of each prompt, unpadded, generation prompt included.
        last_instruction: for each prompt, the index of the last token of the user's own text.
        templated: whether a chat template was applied; `False` for models that have none.
    """

    token_ids: tuple[tuple[int, ...], ...]
    last_instruction: tuple[int, ...]
    templated: bool

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.token_ids))

    @property
    def digest(self) -> str:
        """Identifies the tokens and the positions read from them."""
        data = json.dumps([self.token_ids, self.last_instruction], separators=(",", ":")).encode()
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def select(self, rows: Sequence[int]) -> Rendered:
        """Some of the prompts."""
        return Rendered(
            tuple(self.token_ids[row] for row in rows),
            tuple(self.last_instruction[row] for row in rows),
            self.templated,
        )

    def columns(self, position: str) -> list[int]:
        """For each prompt, the index of the token whose embedding `position` names."""
        if position == "last":
            return [len(tokens) - 1 for tokens in self.token_ids]
        return list(self.last_instruction)


@dataclass(frozen=True)
class Reading:
    """A model and the prompts to be read with it: what another process has to be told to do a share of a capture.

    Attributes:
        key: of the activation set that it will be.
        folder: of the model.
        adapter: of the adapter to merge, or None.
        rendered: the prompts.
        positions: some of `POSITIONS`.
        device: a torch device, or `auto` for all GPUs.
        dtype: one of `es2.models.DTYPES`.
        scratch: a folder for what was read so far; `None` keeps it in memory.
    """

    key: str
    folder: Path
    adapter: Path | None
    rendered: Rendered
    positions: Sequence[str]
    device: str | None
    dtype: str
    scratch: Path | None = None

    def read(self, report: Reporter = silent) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
        """Load the model and capture, as `load_bridge` and `capture_residuals` do."""
        report("load", 0, 1)
        bridge = load_bridge(self.folder, adapter=self.adapter, dtype=self.dtype, device=self.device, may_spread=True)
        report("load", 1, 1)
        return capture_residuals(bridge, self.rendered, self.positions, scratch=self.scratch, report=report)


@dataclass(frozen=True)
class CaptureResult:
    """What a capture gave.

    Attributes:
        activations: the set, on disk.
        computed: `False` when it was there already.
        seconds: how long this call took.
        tokens: how many tokens the prompts have.
    """

    activations: ActivationSet
    computed: bool
    seconds: float
    tokens: int

    @property
    def rounding(self) -> float | None:
        """How far half precision moved an embedding on average, in units of its length; `None` where unknown."""
        known = self.activations.meta.get("rounding")
        return float(known) if isinstance(known, (int, float)) else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.activations.key,
            "path": str(self.activations.path),
            "n_prompts": self.activations.n_prompts,
            "n_layers": self.activations.n_layers,
            "d_model": self.activations.d_model,
            "computed": self.computed,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "rounding": self.rounding,
        }


# -------------------------------------------------------------------------------------------------------------- render


def render(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Rendered:
    """Turn texts into what the model reads: one user message under the chat template, with the generation prompt.

    Templates that ask for today's date are told `PINNED_DATE`. Without a chat template the plain text is tokenised as
    the tokenizer does by default.

    Raises:
        InputError: when the template refuses or rewrites a text, or the tokenizer cannot tell which characters a
            token covers.
    """
    if not tokenizer.is_fast:
        raise InputError("This model's tokenizer has no fast version (tokenizer.json); use a model that has one.")
    templated = tokenizer.chat_template is not None
    head, tail = "", ""
    strings = list(texts)
    if templated:
        template = _pinned_template(tokenizer)
        mark = "(the user's text)"
        head, found, tail = _apply(tokenizer, template, mark).partition(mark)
        if not found or mark in tail:
            raise InputError(
                "This model's chat template does not show the user's text exactly once; use another model."
            )
        strings = [_apply(tokenizer, template, text) for text in texts]
    encoded = tokenizer(strings, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    last_instruction = []
    for text, string, spans in zip(texts, strings, encoded["offset_mapping"], strict=True):
        own = string[len(head) : len(string) - len(tail)].rstrip()
        last_character = len(head) + len(own) - 1
        covering = [i for i, (start, end) in enumerate(spans) if start <= last_character < end]
        if not (string.startswith(head) and string.endswith(tail) and own and covering):
            raise InputError(f"The model's chat template or tokenizer swallows the prompt {_shown(text)}; remove it.")
        last_instruction.append(covering[-1])
    return Rendered(tuple(map(tuple, encoded["input_ids"])), tuple(last_instruction), templated)


def template_head(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which every prompt begins, whatever the user says: the head of the chat template.

    Args:
        tokenizer: the model's.
        prompts: the tokens of prompts, from `render`.
    """
    # Two texts without a common beginning show where the head ends, also when the prompts all begin with one word.
    every = [*map(tuple, prompts), *render(tokenizer, ("A", "1")).token_ids]
    first, last = min(every), max(every)  # what these two share, all between them share
    return first[: min(n_alike(first, last), min(map(len, every)) - 1)]


def _pinned_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, behind a macro that stands in for the clock that transformers gives to templates.

    A function cannot be handed to a template (transformers replaces everything but plain data), but a macro of the
    same name hides the global one.
    """
    directives = {f"%{letter}": PINNED_DATE.strftime(f"%{letter}") for letter in "aAbBdmyYjHIMSpfwUW"}
    replaced = "".join(f" | replace('{directive}', '{value}')" for directive, value in directives.items())
    # The newline is swallowed (trim_blocks), so the template begins at the start of a line, as it does by itself.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{tokenizer.get_chat_template()}"
    )


def _apply(tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                date_string=PINNED_DATE.strftime("%d %b %Y"),
            )
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(
            f"The model's chat template fails on the prompt {_shown(text)} ({first_line(error)}); use another model."
        ) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


# ---------------------------------------------------------------------------------------------------------------- read


def capture_residuals(
    bridge: TransformerBridge,
    rendered: Rendered,
    positions: Sequence[str] = POSITIONS,
    *,
    max_tokens_per_batch: int | None = None,
    padding: Literal["right", "left"] = "right",
    scratch: Path | None = None,
    report: Reporter = silent,
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """Read the residual stream after every block (`blocks.{l}.hook_out`) at the given positions.

    The head is not run, and only the positions asked for are held. The tokens that all prompts begin with (on the
    default model half of them) are run once: later tokens see them only through their keys and values. The rest is
    laid out in rows of several prompts in which common beginnings stand once, too (`es2.batching.plant`). The result is
    the same to rounding, in a third of the time. Where an architecture does not allow it (a sliding window, a recurrent
    state), prompts of like length share a batch, each with all its tokens.

    Args:
        bridge: from `load_bridge`.
        rendered: from `render`.
        positions: some of `POSITIONS`.
        max_tokens_per_batch: padded tokens run at once, at least one prompt; by default what suits the device. Halved
            whenever memory runs out.
        padding: the side on which the shorter prompts of a batch are filled up; both give the same embeddings.
        scratch: a folder; the arrays are then on disk there, in files without a name that vanish with them, and memory
            does not grow with the prompts.
        report: told after every batch how many tokens are done, shared ones not counted.

    Returns:
        For each position a float32 array `[layer, prompt, d_model]`.

    Raises:
        InputError: when the hooks of some layer did not fire.
        MachineError: when memory runs out for a single prompt, or the disk is full.
    """
    import torch

    model: Any = bridge.original_model
    budget = max_tokens_per_batch or usual_tokens(model.device.type)
    columns = np.array([rendered.columns(position) for position in positions]).T
    n_shared, planted = _ways(bridge, rendered, columns) if padding == "right" else (0, False)
    own_tokens = [tokens[n_shared:] for tokens in rendered.token_ids]
    shape = (int(bridge.cfg.n_layers), len(own_tokens), int(bridge.cfg.d_model))
    captured = {position: _array(shape, scratch) for position in positions}
    done, total = 0, sum(map(len, own_tokens))
    report("capture", done, total)
    waiting = _batches(own_tokens, range(len(own_tokens)), budget, planted)
    shared: KeysAndValues | None = None
    while waiting:
        batch = waiting[0]
        rows = [row for tree in batch for row in tree.slots]
        try:
            if shared is None:
                with torch.inference_mode():
                    shared = keys_and_values(model.base_model, rendered.token_ids[0][:n_shared], model.device)
            block = _run_batch(bridge, batch, columns - n_shared, padding, shared, planted)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise MachineError(
                    f"Memory ran out on a single prompt of {len(rendered.token_ids[rows[0]])} tokens; "
                    "use bfloat16, a smaller model, or shorter prompts."
                ) from error
            block = None  # what the error's frames still hold is free once this block is left
        if block is None:
            budget = max(1, sum(len(tree.tokens) for tree in batch) // 2)
            logger.warning("Memory ran out; capture goes on with batches of %d tokens.", budget)
            left = [row for other in waiting for tree in other for row in tree.slots]
            waiting = _batches(own_tokens, left, budget, planted)
            continue
        waiting.pop(0)
        for p, position in enumerate(positions):
            captured[position][:, rows] = block[:, :, p]
            let_go(captured[position])
        done += sum(len(own_tokens[row]) for row in rows)
        report("capture", done, total)
    return captured


def _batches(tokens: Sequence[Sequence[int]], rows: Sequence[int], budget: int, planted: bool) -> list[list[Tree]]:
    """The prompts of some rows in batches, the longest first, several of them in a row where they may share one."""
    if planted:
        trees = plant([tokens[row] for row in rows], min(_ROW, budget))
        for tree in trees:
            tree.slots = {rows[index]: slots for index, slots in tree.slots.items()}
    else:
        trees = [_alone(row, tokens[row]) for row in rows]
    lengths = [len(tree.tokens) for tree in trees]
    return [[trees[index] for index in batch] for batch in batches_by_length(lengths, budget)]


def _alone(row: int, tokens: Sequence[int]) -> Tree:
    """A row of one prompt."""
    tree = Tree()
    tree.grow(row, tokens, ())
    return tree


def _array(
    shape: tuple[int, ...], scratch: Path | None, dtype: type[np.floating] = np.float32
) -> Float[np.ndarray, "layer prompt d_model"]:
    """Room for the embeddings of one position, in memory or in a file of that folder that has no name."""
    if scratch is None:
        return np.empty(shape, dtype=dtype)
    size = np.dtype(dtype).itemsize * math.prod(shape)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            if hasattr(os, "posix_fallocate"):  # a mapped file that meets a full disk later would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        raise machine_error(error, scratch) from error


def _shared_tokens(rendered: Rendered, columns: np.ndarray) -> int:
    """How many tokens every prompt begins with, before the first one that is wanted: most of a chat template's head."""
    first, last = min(rendered.token_ids), max(rendered.token_ids)  # what these two share, all between them share
    return min(n_alike(first, last), int(columns.min()))


def _ways(bridge: TransformerBridge, rendered: Rendered, columns: np.ndarray) -> tuple[int, bool]:
    """How many tokens are run once for all, and whether prompts share rows: what is exact on this architecture.

    An architecture that no test has looked at is tried out on its longest prompt and on one more.
    """
    import torch

    model: Any = bridge.original_model
    if len(rendered.token_ids) == 1:
        return 0, False
    n_shared = _shared_tokens(rendered, columns)
    n_shared = n_shared if n_shared >= _SHARING_WORTHWHILE else 0
    longest = max(range(len(rendered.token_ids)), key=lambda row: len(rendered.token_ids[row]))
    if model.config.model_type in SHARING_VERIFIED:
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        return n_shared, window is None or len(rendered.token_ids[longest]) <= window
    rows = [longest, (longest + 1) % len(rendered.token_ids)]
    tried, own_columns = [rendered.token_ids[row] for row in rows], columns[rows]
    try:
        with torch.inference_mode():
            shared = keys_and_values(model.base_model, tried[0][:n_shared], model.device)
        trees = plant([tokens[n_shared:] for tokens in tried], sum(map(len, tried)))
        order = [row for tree in trees for row in tree.slots]
        found = _run_batch(bridge, trees, own_columns - n_shared, "right", shared, True)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        logger.debug("Prompts of a %s model do not share rows: %s", model.config.model_type, error)
        return 0, False
    plain = [_run_batch(bridge, [_alone(row, tried[row])], own_columns, "right", [], False) for row in order]
    expected = np.concatenate(plain, axis=1)
    error_found = np.linalg.norm(found - expected, axis=-1)
    limit = _EXACT[str(model.dtype).removeprefix("torch.")] * np.linalg.norm(expected, axis=-1)
    return (n_shared, True) if bool((error_found <= limit).all()) else (0, False)


def _run_batch(
    bridge: TransformerBridge,
    trees: Sequence[Tree],
    columns: Int[np.ndarray, "prompt position"],
    padding: Literal["right", "left"],
    shared: KeysAndValues,
    planted: bool,
) -> Float[np.ndarray, "layer prompt position d_model"]:
    """One forward pass, without the head, of rows that all follow `shared`; and what its hooks gave.

    Args:
        bridge: from `load_bridge`.
        trees: the rows; without `planted` of one prompt each.
        columns: which of each prompt's tokens are wanted, counted after `shared`.
        padding: the side on which shorter rows are filled up.
        shared: of the tokens before, in every block.
        planted: whether every token is told which ones it follows.

    Returns:
        In the order of the prompts in `trees`.
    """
    import torch

    model: Any = bridge.original_model
    width = max(len(tree.tokens) for tree in trees)
    n_shared = shared[0][0].shape[-2] if shared else 0
    shifts = [width - len(tree.tokens) if padding == "left" else 0 for tree in trees]
    input_ids = torch.zeros(len(trees), width, dtype=torch.long)
    seen = torch.zeros_like(input_ids)
    for row, (tree, shift) in enumerate(zip(trees, shifts, strict=True)):
        input_ids[row, shift : shift + len(tree.tokens)] = torch.tensor(tree.tokens)
        seen[row, shift : shift + len(tree.tokens)] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": seen}
    if planted:
        positions = torch.full_like(input_ids, n_shared)
        for row, tree in enumerate(trees):
            positions[row, : len(tree.tokens)] += torch.tensor(tree.depths)
        inputs |= {"attention_mask": _branches(trees, width, n_shared, model.dtype), "position_ids": positions}
    elif padding == "left":
        # Right padding leaves every token at its own position, which is what models assume.
        inputs["position_ids"] = (seen.cumsum(dim=1) - 1).clamp(min=0)
    elif shared:
        inputs["attention_mask"] = torch.cat([seen.new_ones(len(trees), n_shared), seen], dim=1)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if shared:
        inputs["past_key_values"] = cache_of(shared, len(trees))
    wanted = [
        (row, [slots[column] + shift for column in columns[prompt]])
        for row, (tree, shift) in enumerate(zip(trees, shifts, strict=True))
        for prompt, slots in tree.slots.items()
    ]
    rows = torch.tensor([row for row, _ in wanted], device=model.device)[:, None]
    places = torch.tensor([place for _, place in wanted], device=model.device)
    kept: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        # A copy: a view would hold the whole residual stream. Blocks may lie on several devices.
        there = activation[rows.to(activation.device), places.to(activation.device)]
        kept[hook.name] = there.to(model.device)

    names = [f"blocks.{layer}.hook_out" for layer in range(int(bridge.cfg.n_layers))]
    hooks: list[tuple[str, Any]] = [(name, keep) for name in names]
    lean = model.config.model_type in SHARING_VERIFIED and not any(
        _is_heard(part) for block in bridge.blocks for part in block.submodules.values()
    )
    if lean:
        hooks = _last_mlp_hooks(len(names) - 1, (len(trees), width), rows, places) + hooks
    with torch.inference_mode(), bridge.hooks(fwd_hooks=hooks), _plain_blocks(bridge) if lean else nullcontext():
        model.base_model(**inputs, use_cache=bool(shared))
    if silent_hooks := [name for name in names if name not in kept]:
        raise InputError(
            f"TransformerLens hooks did not fire for {silent_hooks[0]} ({len(silent_hooks)} of {len(names)}), so this "
            f"{model.config.model_type!r} model cannot be captured; use another architecture."
        )
    return torch.stack([kept[name] for name in names]).float().cpu().numpy()


def _is_heard(part: Any) -> bool:
    """Whether somebody listens to, or changes, what happens in a part of a bridge."""
    from transformer_lens.hook_points import HookPoint

    return any(isinstance(point, HookPoint) and point.has_hooks() for point in part.modules())


def _last_mlp_hooks(layer: int, shape: tuple[int, int], rows: Any, places: Any) -> list[tuple[str, Any]]:
    """Hooks that let the last block's MLP see the wanted tokens only, since nothing follows that would need the others.

    An MLP looks at each token by itself. What it does not compute is zero, and nobody reads it.

    Args:
        layer: of the last block.
        shape: rows and tokens of the batch.
        rows: of the wanted tokens, `[prompt, 1]`.
        places: of the wanted tokens in their rows, `[prompt, position]`.
    """

    def narrow(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation[rows.to(activation.device), places.to(activation.device)]

    def widen(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        whole = activation.new_zeros(*shape, activation.shape[-1])
        whole[rows.to(activation.device), places.to(activation.device)] = activation
        return whole

    return [(f"blocks.{layer}.mlp.hook_in", narrow), (f"blocks.{layer}.mlp.hook_out", widen)]


@contextmanager
def _plain_blocks(bridge: TransformerBridge) -> Iterator[None]:
    """Run what is inside the blocks as transformers does, with fused attention, except for parts that have hooks.

    For hooks inside a block, a bridge computes every norm twice and holds all attention scores. Where there are none,
    this is a sixth of the time. The blocks themselves stay bridged, so their hooks fire.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    def swaps(module: Any) -> Iterator[tuple[Any, str, Any]]:
        for name, part in module.named_children():
            if not isinstance(part, GeneralizedComponent):
                yield from swaps(part)
            elif not _is_heard(part):
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


def _branches(trees: Sequence[Tree], width: int, n_shared: int, dtype: Any) -> Any:
    """Added to attention scores, `[row, 1, token, shared + token]`: nothing for oneself and what one follows."""
    import torch

    follows = np.zeros((len(trees), width, n_shared + width), dtype=bool)
    follows[:, :, :n_shared] = True
    for row, tree in enumerate(trees):
        for place, parent in enumerate(tree.parents):
            if parent >= 0:
                follows[row, place] = follows[row, parent]
            follows[row, place, n_shared + place] = True
        for place in range(len(tree.tokens), width):  # filling, which nobody looks at, sees itself
            follows[row, place, n_shared + place] = True
    mask = torch.full(follows.shape, torch.finfo(dtype).min, dtype=dtype)
    mask[torch.from_numpy(follows)] = 0
    return mask[:, None]


# ------------------------------------------------------------------------------------------------------------- capture


def capture(
    model: str,
    prompts: PromptSet,
    *,
    positions: Sequence[str] = POSITIONS,
    adapter: Path | None = None,
    run: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
    read: Callable[[Reading, Reporter], dict[str, Float[np.ndarray, "layer prompt d_model"]]] = Reading.read,
) -> CaptureResult:
    """Give the activation set of `prompts` under `model`, computed only if it is not in the store yet.

    Args:
        model: what `resolve` understands.
        prompts: the prompts; their labels do not matter here.
        positions: some of `POSITIONS`.
        adapter: folder of a peft adapter to merge into the model.
        run: id of the fine-tuning run that the adapter is of.
        device: a torch device; by default the best there is.
        dtype: `float32`, `bfloat16` or `float16`; by default what suits the device.
        store: where to keep the set; by default the one of the current home.
        report: told about download, conversion and capture.
        read: what does the reading, if there is any to do; by default this process.

    Raises:
        InputError: for a model, a position or a prompt that cannot be used; the sentence names it.
        MachineError: when network, memory or disk refuse.
    """
    started = time.perf_counter()
    if not positions or (unknown := sorted(set(positions) - set(POSITIONS))):
        shown = repr(unknown[0][:40]) if positions else "none"
        raise InputError(f"A position to capture must be one of {', '.join(POSITIONS)}, not {shown}.")
    positions = [position for position in POSITIONS if position in positions]
    store = store or Store()
    spec = resolve(model)
    folder = model_folder(spec, report)
    identity = fingerprint(folder, adapter)
    request = {
        "model": identity.to_dict(),
        "texts": prompts.texts_digest,
        "positions": positions,
        "dtype": dtype or (choose_dtype(device) if device and device != AUTO else None),
        "format": FORMAT_VERSION,
        "rendering": [_RENDERING, version("transformers"), version("tokenizers")],
    }
    memo = user_cache() / "requests" / f"{content_key(request)}.json"
    known = (read_json(memo) or {}).get("key")
    found = store.get(known) if isinstance(known, str) and is_key(known) else None
    if found is not None:
        found = store.add_name(found, spec.name, run)
        return CaptureResult(found, False, time.perf_counter() - started, int(found.meta["tokens"]))

    tokenizer = load_tokenizer(folder)
    rendered = render(tokenizer, prompts.texts)
    _check_fit(rendered, prompts, folder)
    dtype = dtype or choose_dtype(choose_device() if device in (None, AUTO) else device)
    decides = {
        "format": FORMAT_VERSION,
        "weights": identity.weights,
        "adapter": identity.adapter,
        "attention": _ATTENTION,
        "texts": prompts.texts_digest,
        "tokens": rendered.digest,
        "positions": positions,
        "dtype": dtype,
    }
    key = content_key(decides)
    meta: dict[str, Any] = {
        "model": spec.name,
        "run": run,
        "texts_digest": prompts.texts_digest,
        "templated": rendered.templated,
        "tokens": rendered.n_tokens,
        "decides": decides,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    }
    with store.lock(key, lambda: report("wait", 0, 1)):
        found = store.get(key)
        computed = found is None
        source = _superset(store, decides, prompts, tokenizer) if found is None else None
        if source is not None:
            rows = _rows_in(source.texts, prompts.texts)
            arrays: dict[str, Float[np.ndarray, "layer prompt d_model"]] = {}
            for position in positions:
                shape = (source.n_layers, len(rows), source.d_model)
                kind = np.float16 if source.meta["dtype"] == "float16" else np.float32
                arrays[position] = _array(shape, store.root, kind)
                for l in range(source.n_layers):
                    arrays[position][l] = source.layer(l, position)[rows]
                    let_go(arrays[position])
            found = store.write(key, meta | {"from": source.key}, prompts.texts, arrays)
        if found is None:
            reading = Reading(key, folder, adapter, rendered, positions, device, dtype, store.root)
            arrays = read(reading, report)
            if dtype != "float32" and device in (None, "cpu") and choose_device() == "cpu":
                meta["rounding"] = _rounding(reading, arrays)
            meta["seconds"] = time.perf_counter() - started
            found = store.write(key, meta, prompts.texts, _storable(arrays, dtype, store.root))
        found = store.add_name(found, spec.name, run)
    _remember(memo, key)
    return CaptureResult(found, computed, time.perf_counter() - started, rendered.n_tokens)


def _superset(
    store: Store, decides: dict[str, Any], prompts: PromptSet, tokenizer: PreTrainedTokenizerBase
) -> ActivationSet | None:
    """A set that was captured in the same way from these and other prompts, so that a part of it is what is wanted."""
    own = ("texts", "tokens")
    wanted = {name: value for name, value in decides.items() if name not in own}
    for found in store.list():
        of = found.meta.get("decides", {})
        if found.n_prompts <= len(prompts) or wanted != {name: of[name] for name in of if name not in own}:
            continue
        checked = store.get(found.key)
        if checked is None or not set(prompts.texts) <= set(checked.texts):
            continue
        if render(tokenizer, checked.texts).digest == of["tokens"]:
            return checked
    return None


def _rows_in(texts: Sequence[str], wanted: Sequence[str]) -> list[int]:
    row_of = {text: row for row, text in enumerate(texts)}
    return [row_of[text] for text in wanted]


def _check_fit(rendered: Rendered, prompts: PromptSet, folder: Path) -> None:
    """Refuse prompts that are longer than the model reads, and a tokenizer that is another model's."""
    limit = context_length(folder)
    for number, (text, tokens) in enumerate(zip(prompts.texts, rendered.token_ids, strict=True), start=1):
        if limit is not None and len(tokens) > limit:
            raise InputError(
                f"Prompt {number} has {len(tokens):,} tokens, but the model reads at most {limit:,}: {_shown(text)}; "
                "shorten or remove it."
            )
    config = read_config(folder / "config.json")
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    if isinstance(vocabulary, int) and max(map(max, rendered.token_ids)) >= vocabulary:
        raise InputError(f"The tokenizer in {str(folder)!r} is not this model's: it has more than {vocabulary} tokens.")


def _rounding(reading: Reading, arrays: dict[str, Float[np.ndarray, "layer prompt d_model"]]) -> float:
    """The mean distance between embeddings in half precision and in float32, in units of their length; of a few."""
    rows = np.linspace(0, len(reading.rendered.token_ids) - 1, _ROUNDING_PROMPTS).astype(int).tolist()
    exact = replace(reading, rendered=reading.rendered.select(rows), dtype="float32", scratch=None).read()
    errors = [
        np.linalg.norm(arrays[position][:, rows] - exact[position], axis=-1) / np.linalg.norm(exact[position], axis=-1)
        for position in reading.positions
    ]
    return float(np.mean(errors))


def _storable(
    arrays: dict[str, Float[np.ndarray, "layer prompt d_model"]], dtype: str, scratch: Path | None = None
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """What a half-precision run gave fits into float16, unless the model has outlier dimensions."""
    largest = float(np.max([np.abs(layer).max() for array in arrays.values() for layer in _layers(array)]))
    if not np.isfinite(largest):
        raise InputError(f"Some embeddings are not finite in {dtype}; capture with bfloat16 or float32.")
    if dtype == "float32" or largest >= _HALF_LIMIT:
        return arrays
    halves = {position: _array(array.shape, scratch, np.float16) for position, array in arrays.items()}
    for position, array in arrays.items():
        for l, layer in enumerate(_layers(array)):
            halves[position][l] = layer
            let_go(halves[position])
    return halves


def _layers(array: Float[np.ndarray, "layer prompt d_model"]) -> Iterator[Float[np.ndarray, "prompt d_model"]]:
    """One layer after the other, of which only the current one is held where they lie on disk."""
    for layer in array:
        yield layer
        let_go(array)


def _remember(memo: Path, key: str) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"key": key})
    except OSError as error:
        logger.warning("%s cannot be written (%s), so the next capture tokenises again.", memo, error)
