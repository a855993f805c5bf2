"""Activation sets: the embeddings of a prompt set under a model, computed only if the store lacks them.

The key of an earlier capture is remembered by its request, so that a second request imports neither torch nor
transformers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.capture.residuals import capture_residuals
from es2.core.errors import InputError
from es2.core.files import content_key, is_key, read_json, user_cache, write_json
from es2.core.progress import Reporter, silent
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.models.batching import SHARING_VERIFIED
from es2.models.blocks import BlockHooks
from es2.models.catalogue import resolve
from es2.models.chat_template import Rendered, describe_rendering, render, shown
from es2.models.checked import refuse_failed
from es2.models.device import choose_device, choose_dtype
from es2.models.fingerprint import fingerprint
from es2.models.folders import model_folder
from es2.models.loading import load_bridge, load_tokenizer
from es2.models.model_files import model_type, read_config
from es2.models.placement import AUTO
from es2.models.shape import context_length
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import FORMAT_VERSION, ActivationSet
from es2.store.embeddings import lay_out, layers_of, narrow, release_pages
from es2.store.sources import LENS, MEAN, OWN_HOOKS, POSITIONS, in_order
from es2.store.store import Store

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_RENDERING = 2  # raise it when the same texts would be rendered into other tokens than before
_ATTENTION = "eager"  # what the numbers are those of; fused attention gives the same to rounding
_AS_LOADED = "as loaded"  # of architectures whose bridges are tried out against it first
_HALF_LIMIT = 3e4  # embeddings below this are stored as float16, which ends at 65504
_ROUNDING_PROMPTS = 4  # of a half-precision capture, whose difference from float32 is measured


@dataclass(frozen=True)
class CaptureRequest:
    """A model and the prompts to be read with it: all that another process needs for a share of a capture.

    Attributes:
        key: of the activation set to be written.
        folder, adapter: of the model, and of the adapter to merge, if any.
        device: a torch device, or `auto` for all GPUs.
        dtype: one of `es2.models.costs.DTYPES`.
        into: the file of the embeddings; None keeps them in memory.
        learned: what the set's `meta.json` says of how it was read; filled by `read`.
    """

    key: str
    folder: Path
    adapter: Path | None
    rendered: Rendered
    positions: Sequence[str]
    device: str | None
    dtype: str
    into: Path | None = None
    learned: dict[str, str] = field(default_factory=dict)

    def read(self, report: Reporter = silent) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
        """The embeddings by position, from a newly loaded model; errors as of `load_bridge` and `capture_residuals`."""
        report("load", 0, 1)
        bridge = load_bridge(self.folder, adapter=self.adapter, dtype=self.dtype, device=self.device, may_spread=True)
        report("load", 1, 1)
        self.learned["hooks"] = OWN_HOOKS if isinstance(bridge, BlockHooks) else LENS
        return capture_residuals(bridge, self.rendered, self.positions, into=self.into, report=report)


@dataclass(frozen=True)
class CaptureResult:
    """The result of a capture.

    Attributes:
        activations: the set, on disk.
        computed: False when the store had it already.
        seconds: duration of the call.
        tokens: number of tokens of all prompts.
    """

    activations: ActivationSet
    computed: bool
    seconds: float
    tokens: int

    @property
    def rounding(self) -> float | None:
        """Mean distance by which half precision moved an embedding, in units of its length; None where unknown."""
        known = self.activations.meta.get("rounding")
        return float(known) if isinstance(known, (int, float)) else None

    def to_dict(self) -> dict[str, Any]:
        sizes = {name: getattr(self.activations, name) for name in ("n_prompts", "n_layers", "d_model")}
        own: dict[str, Any] = {
            "computed": self.computed,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "rounding": self.rounding,
        }
        own |= {"hooks": self.activations.hooks, "given_as": self.activations.given_as}
        own["rendering"] = self.activations.rendering
        return {"key": self.activations.key, "path": str(self.activations.path)} | sizes | own


def capture(
    model: str,
    prompts: PromptSet,
    *,
    positions: Sequence[str] = POSITIONS,
    or_more: bool = False,
    adapter: Path | None = None,
    run: str | None = None,
    rendering: Rendering = AS_THE_TEMPLATE,
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
    read: Callable[
        [CaptureRequest, Reporter], dict[str, Float[np.ndarray, "layer prompt d_model"]]
    ] = CaptureRequest.read,
) -> CaptureResult:
    """The activation set of `prompts` under `model`, computed only if the store lacks it.

    Args:
        model: a name for `resolve`.
        prompts: the prompts; their labels do not matter.
        positions: which tokens are read (`es2.store.sources.check_position`).
        or_more: whether a set that holds other positions, too, will do.
        adapter: folder of a peft adapter to merge into the model.
        run: id of the adapter's fine-tuning run.
        rendering: how the model is given the prompts; a system prompt that is left open is that of the prompts' file.
        device: a torch device; by default the best there is.
        dtype: `float32`, `bfloat16` or `float16`; by default what suits the device.
        store: by default that of the current home.
        report: receives the progress of download, conversion and capture.
        read: reads the embeddings; by default in this process.

    Raises:
        InputError: for a model, a position or a prompt that cannot be used; the sentence names it.
        MachineError: when network, memory or disk refuse.
    """
    started = time.perf_counter()
    positions = in_order(positions or ["none"])
    store = store or Store()
    rendering = prompts.rendered_as(rendering)
    spec = resolve(model)
    folder = model_folder(spec, report)
    refuse_failed(folder, adapter, "capture")
    identity = fingerprint(folder, adapter)
    request = {
        "model": identity.to_dict(),
        "texts": prompts.texts_digest,
        "positions": positions,
        "dtype": dtype or (choose_dtype(device) if device and device != AUTO else None),
        "format": FORMAT_VERSION,
        "rendering": [_RENDERING, version("transformers"), version("tokenizers")],
    }
    if asked := rendering.settled.to_dict():
        request["asked"] = asked
    memo = user_cache() / "requests" / f"{content_key(request)}.json"
    known = (read_json(memo) or {}).get("key")
    found = store.get(known) if isinstance(known, str) and is_key(known) else None
    if found is not None:
        found = store.add_name(found, spec.name, run, rendering)
        return CaptureResult(found, False, time.perf_counter() - started, int(found.meta["tokens"]))

    tokenizer = load_tokenizer(folder)
    rendered = render(tokenizer, prompts.texts, rendering)
    _check_fit(rendered, prompts, folder)
    for position in positions:
        rendered.spans(position)  # one may lie beyond the template's end
    dtype = dtype or choose_dtype(choose_device() if device in (None, AUTO) else device)
    decides = {
        "format": FORMAT_VERSION,
        "weights": identity.weights,
        "adapter": identity.adapter,
        "attention": _ATTENTION if model_type(folder) in SHARING_VERIFIED else _AS_LOADED,
        "texts": prompts.texts_digest,
        "tokens": rendered.digest,
        "positions": positions,
        "dtype": dtype,
    }
    if MEAN in positions:
        decides["first_instruction"] = content_key({"of": rendered.first_instruction})
    key = content_key(decides)
    meta: dict[str, Any] = {
        "model": spec.name,
        "run": run,
        "texts_digest": prompts.texts_digest,
        "templated": rendered.templated,
        "rendering": describe_rendering(tokenizer, rendering),
        "tokens": rendered.n_tokens,
        "decides": decides,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    }
    with store.lock(key, lambda: report("wait", 0, 1)):
        found = exact = store.get(key)
        if found is None and or_more:
            found = _with_more_positions(store, decides)
        computed = found is None
        source = _superset(store, decides, prompts, tokenizer, rendering) if found is None else None
        if source is not None:
            row_of = {text: row for row, text in enumerate(source.texts)}
            rows = [row_of[text] for text in prompts.texts]
            with store.new_set(key, meta | {"from": source.key, "hooks": source.hooks}, prompts.texts) as file:
                shape = (source.n_layers, len(rows), source.d_model)
                kind = "float16" if source.meta["dtype"] == "float16" else "float32"
                for position, embeddings in lay_out(file, positions, shape, kind).items():
                    for l in range(source.n_layers):
                        embeddings[l] = source.layer(l, position)[rows]
                        release_pages(embeddings)
        elif found is None:
            with store.new_set(key, meta, prompts.texts) as file:
                reading = CaptureRequest(key, folder, adapter, rendered, positions, device, dtype, file)
                arrays = read(reading, report)
                if dtype != "float32" and device in (None, "cpu") and choose_device() == "cpu":
                    meta["rounding"] = _rounding(reading, arrays)
                meta |= reading.learned
                meta["seconds"] = time.perf_counter() - started
                fits = _fits_half(arrays, dtype)
                del arrays
                if fits:
                    narrow(file)
        found = store.written(key) if found is None else found
        found = store.add_name(found, spec.name, run, rendering)
    if computed or exact is not None:
        _remember(memo, key)
    return CaptureResult(found, computed, time.perf_counter() - started, rendered.n_tokens)


def _with_more_positions(store: Store, decides: dict[str, Any]) -> ActivationSet | None:
    """The newest set that was captured in the same way at these positions and others."""
    left_out = ("positions", "first_instruction")
    wanted = {name: value for name, value in decides.items() if name not in left_out}
    for found in store.list():
        of = found.meta.get("decides", {})
        same = wanted == {name: value for name, value in of.items() if name not in left_out}
        if same and set(decides["positions"]) < set(found.positions) and (checked := store.get(found.key)) is not None:
            return checked
    return None


def _superset(
    store: Store,
    decides: dict[str, Any],
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
) -> ActivationSet | None:
    """A set that was captured in the same way from these and other prompts."""
    own = ("texts", "tokens", "first_instruction")
    wanted = {name: value for name, value in decides.items() if name not in own}
    for found in store.list():
        of = found.meta.get("decides", {})
        if found.n_prompts <= len(prompts) or wanted != {name: of[name] for name in of if name not in own}:
            continue
        checked = store.get(found.key)
        if checked is None or not set(prompts.texts) <= set(checked.texts):
            continue
        if render(tokenizer, checked.texts, rendering).digest == of["tokens"]:
            return checked
    return None


def _check_fit(rendered: Rendered, prompts: PromptSet, folder: Path) -> None:
    """Raise `InputError` for prompts that are longer than the model's context, or the tokenizer of another model."""
    limit = context_length(folder)
    for number, (text, tokens) in enumerate(zip(prompts.texts, rendered.token_ids, strict=True), start=1):
        if limit is not None and len(tokens) > limit:
            raise InputError(
                f"Prompt {number} has {len(tokens):,} tokens, but the model reads at most {limit:,}: {shown(text)}; "
                "shorten or remove it."
            )
    config = read_config(folder / "config.json")
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    if isinstance(vocabulary, int) and max(map(max, rendered.token_ids)) >= vocabulary:
        raise InputError(f"The tokenizer in {str(folder)!r} is not this model's: it has more than {vocabulary} tokens.")


def _rounding(reading: CaptureRequest, arrays: dict[str, Float[np.ndarray, "layer prompt d_model"]]) -> float:
    """The mean distance, for a few prompts, between embeddings in half precision and in float32, over their length."""
    rows = np.linspace(0, len(reading.rendered.token_ids) - 1, _ROUNDING_PROMPTS).astype(int).tolist()
    exact = replace(reading, rendered=reading.rendered.select(rows), dtype="float32", into=None).read()
    errors = [
        np.linalg.norm(arrays[position][:, rows] - exact[position], axis=-1) / np.linalg.norm(exact[position], axis=-1)
        for position in reading.positions
    ]
    return float(np.mean(errors))


def _fits_half(arrays: dict[str, Float[np.ndarray, "layer prompt d_model"]], dtype: str) -> bool:
    """Whether half-precision embeddings fit into float16: they do unless the model has outlier dimensions."""
    largest = float(np.max([np.abs(layer).max() for array in arrays.values() for layer in layers_of(array)]))
    if not np.isfinite(largest):
        way = (
            "the weights of the model or of the adapter are damaged"
            if dtype == "float32"
            else "capture with float32, which tells whether the weights are damaged or too large for this format"
        )
        raise InputError(f"Some embeddings are not finite in {dtype}; {way}.")
    return dtype != "float32" and largest < _HALF_LIMIT


def _remember(memo: Path, key: str) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"key": key})
    except OSError as error:
        logger.warning("%s cannot be written (%s), so the next capture tokenises again.", memo, error)
