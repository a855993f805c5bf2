"""Whether what the workbench reads of a model is what the model computes: `es2 check`.

The reference is the plain transformers model: hooks of torch on its blocks, one prompt at a time, no padding, no cache.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.capture.residuals import capture_residuals
from es2.core.errors import Es2Error, one_line
from es2.core.progress import Reporter, silent
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.models.adapter_fit import fit_adapter
from es2.models.adapters import apply_finetune
from es2.models.architecture import empty_model
from es2.models.batching import end_tokens, rounding_of
from es2.models.blocks import BlockHooks, find_blocks, output_of
from es2.models.catalogue import resolve
from es2.models.chat_template import (
    PromptFrame,
    Rendered,
    describe_rendering,
    prompt_frame,
    render,
    template_prefix,
)
from es2.models.checked import remember_check
from es2.models.folders import model_doubts, model_folder
from es2.models.loading import load_bridge, load_model, load_tokenizer, load_tuned
from es2.models.replies import greedy_replies
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import LENS, OWN_HOOKS, PLAIN_TEXT_NOTE
from es2.training.config import FinetuneConfig
from es2.workflow.plan import guessed_layers

if TYPE_CHECKING:
    import torch

N_PROMPTS = 4
N_TOKENS = 6
"""Of each reply."""


@dataclass(frozen=True)
class Check:
    """One line of a check.

    Attributes:
        name: one of `es2.models.checked.NAMES`.
        passed: None where it could not be tried, since an earlier one failed.
        sentence: what was found.
        details: numbers and texts behind it, as JSON values.
    """

    name: str
    passed: bool | None
    sentence: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCheck:
    """All checks of a model, with an adapter or without.

    Attributes:
        seconds: duration.
    """

    model: str
    adapter: str | None
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and nothing was left untried."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with `passed`."""
        return asdict(self) | {"checks": [asdict(check) for check in self.checks], "passed": self.passed}


@dataclass
class _Reference:
    """What the plain model gives for each prompt: block outputs `[layer, token, d_model]`, logits, and replies."""

    blocks: list[torch.Tensor]
    logits: list[torch.Tensor]
    replies: list[tuple[int, ...]]
    n_ties: int = 0


class _Checks(list[Check]):
    """The checks so far. What one of them raises is its finding: this is what a user looks for."""

    def add(self, name: str, find: Callable[[], tuple[str, Mapping[str, Any]]]) -> bool:
        """Make a check: `find` returns a sentence and details, or raises."""
        try:
            sentence, details = find()
            self.append(Check(name, True, sentence, details))
        except Exception as error:
            ours = isinstance(error, Es2Error | _WrongError)
            sentence = str(error) if ours else f"{type(error).__name__}: {one_line(error)}"
            self.append(Check(name, False, f"{sentence.rstrip('.')}."))
        return bool(self[-1].passed)

    def skip(self, *names: str) -> None:
        """Name checks that cannot be made."""
        self += [Check(name, None, "Not tried, since an earlier check failed.") for name in names]


class _WrongError(Exception):
    """A number that differs from the reference."""


def check(
    model: str,
    prompts: PromptSet,
    *,
    adapter: Path | None = None,
    rendering: Rendering = AS_THE_TEMPLATE,
    device: str | None = None,
    dtype: str | None = None,
    report: Reporter = silent,
) -> ModelCheck:
    """Hold what the workbench reads of a model against the plain transformers model, on `N_PROMPTS` prompts.

    The result is remembered: what failed is refused by capture, fine-tune and evaluation (`es2.models.checked`).

    Args:
        model: a name for `resolve`.
        prompts: the shortest, the longest and some between are read.
        adapter: folder of a peft adapter to check on the model, too.
        rendering: how the model is given the prompts.
        device, dtype: as of `load_model`.
        report: receives the number of checks done.

    Raises:
        InputError, MachineError: when there is no such model, or it cannot be fetched.
    """
    started = time.perf_counter()
    spec = resolve(model)
    folder = model_folder(spec, report)
    checks = _Checks()
    found: dict[str, Any] = {"rendering": prompts.rendered_as(rendering)}

    def step(name: str, find: Callable[[], tuple[str, Mapping[str, Any]]]) -> bool:
        report("check", len(checks), len(_PLAN) + (adapter is not None))
        return checks.add(name, find)

    if (
        step("weights", lambda: _weights(folder, device, dtype, found, model_doubts(spec)))
        and step("template", lambda: _template(folder, prompts, found))
        and step("tokens", lambda: _tokens(found))
    ):
        step("positions", lambda: _positions(found))
        if step("blocks", lambda: _blocks(found)):
            step("head", lambda: _head(found))
            step("replies", lambda: _replies(found))
            step("finetune", lambda: _finetune(found, spec.name))
            found.pop("model")
            gc.collect()
            step("embeddings", lambda: _embeddings(folder, device, dtype, found))
            if adapter is not None:
                step("adapter", lambda: _adapter(folder, adapter, device, dtype, found, (spec.name, spec.location)))
    checks.skip(*(name for name in _PLAN if name not in {check.name for check in checks}))
    report("check", len(checks), len(checks))
    result = ModelCheck(spec.name, str(adapter) if adapter else None, tuple(checks), time.perf_counter() - started)
    remember_check(folder, adapter, result.to_dict())
    return result


_PLAN = ("weights", "template", "tokens", "positions", "blocks", "head", "replies", "finetune", "embeddings")


def _weights(
    folder: Path, device: str | None, dtype: str | None, found: dict[str, Any], doubts: list[str]
) -> tuple[str, dict[str, Any]]:
    """The model loads, and its files fill it."""
    model = found["model"] = load_model(folder, device=device, dtype=dtype)
    n = sum(weight.numel() for weight in model.parameters())
    found["limit"] = rounding_of(model)
    details = {"parameters": n, "model_type": model.config.model_type, "dtype": str(model.dtype).removeprefix("torch.")}
    filled = f"The files fill the {model.config.model_type} model: {n / 1e6:,.1f} million weights."
    return " ".join((filled, *doubts)), details | {"warnings": doubts}


def _template(folder: Path, prompts: PromptSet, found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The template leaves the users' texts as they are, and gives the tokens that transformers' own rendering has."""
    tokenizer = found["tokenizer"] = load_tokenizer(folder)
    order = sorted(set(prompts.texts), key=lambda text: (len(text), text))
    places = np.linspace(0, len(order) - 1, min(N_PROMPTS, len(order))).astype(int)
    texts = found["texts"] = [order[place] for place in places]
    rendering = found["rendering"]
    frame = prompt_frame(tokenizer, rendering)
    render(tokenizer, order, rendering)  # every text may be refused, and rendering takes no model
    rendered: Rendered = render(tokenizer, texts, rendering)
    found["rendered"] = rendered
    found["prefix"] = template_prefix(tokenizer, rendered.token_ids, rendering)
    if not rendered.templated:
        return PLAIN_TEXT_NOTE, {"templated": False}
    source = str(tokenizer.chat_template)
    dated = re.search(r"strftime_now|date_string|current_date|todays?_date", source) is not None
    if not dated and not all(map(partial(_as_transformers, tokenizer, frame), texts, rendered.token_ids)):
        raise _WrongError("The prompts' tokens are not those of transformers' apply_chat_template")
    tail = tokenizer.decode(list(rendered.token_ids[0][rendered.last_instruction[0] + 1 :]))
    sentence = f"After the user's text the template puts {tail!r}{'; its date is pinned' if dated else ''}; "
    own = describe_rendering(tokenizer, rendering)
    details = {"templated": True, "tail": tail, "thinking": frame.thinking, "rendering": own}
    return f"{sentence}last lies {own['last']}.", details


def _as_transformers(tokenizer: Any, frame: PromptFrame, text: str, tokens: Sequence[int]) -> bool:
    """Whether transformers' own rendering of a text has these tokens."""
    theirs = tokenizer.apply_chat_template(
        frame.messages(text), add_generation_prompt=True, return_dict=False, **frame.arguments
    )
    return tuple(theirs) == tuple(tokens)


def _tokens(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The tokenizer is this model's, and no beginning is put in twice."""
    tokenizer, rendered = found["tokenizer"], found["rendered"]
    size = found["model"].get_input_embeddings().weight.shape[0]
    if (largest := max(map(max, rendered.token_ids))) >= size:
        raise _WrongError(f"The tokenizer gives token {largest}, and the model has {size:,}: it is another model's")
    bos = tokenizer.bos_token_id
    if any(bos is not None and tokens[:2] == (bos, bos) for tokens in rendered.token_ids):
        raise _WrongError(f"Prompts begin with {tokenizer.bos_token!r} twice")
    sentence = f"{rendered.n_tokens} tokens of {len(rendered.token_ids)} prompts, all known to the model."
    return sentence, {"n_tokens": rendered.n_tokens}


def _positions(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which tokens `last` and `last_instruction` are."""
    rendered, tokenizer = found["rendered"], found["tokenizer"]
    seen = []
    for text, tokens, place in zip(found["texts"], rendered.token_ids, rendered.last_instruction, strict=True):
        before, own = tokenizer.decode(tokens[: place + 1]), tokenizer.decode([tokens[place]])
        if "\ufffd" not in before and not (before.rstrip().endswith(text.strip()) or text.strip()[-1:] in own):
            raise _WrongError(
                f"The token of last_instruction, {own!r}, is not the end of the user's text {text[:60]!r}"
            )
        seen.append({"last": tokenizer.decode([tokens[-1]]), "last_instruction": own})
    first = seen[0]
    sentence = f"last is {first['last']!r}, last_instruction is {first['last_instruction']!r}."
    return sentence, {"positions": seen, "rendered": [tokenizer.decode(tokens) for tokens in rendered.token_ids]}


def _outputs(model: Any, tokens: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """Every block's output `[layer, token, d_model]` in float32 for one prompt, and what the model returns."""
    import torch

    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int, block: Any, inputs: Any, output: Any) -> None:
        kept[layer] = output_of(output)[0].float().cpu()

    blocks = find_blocks(model)[1]
    handles = [block.register_forward_hook(partial(keep, layer)) for layer, block in enumerate(blocks)]
    try:
        with torch.inference_mode():
            output = model(torch.tensor([tokens], device=model.device), use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([kept[layer] for layer in range(len(blocks))]), output


def _blocks(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The blocks are those whose outputs the model reports itself; makes the reference."""
    model = found["model"]
    reference = found["reference"] = _Reference([], [], [])
    for tokens in found["rendered"].token_ids:
        blocks, output = _outputs(model, tokens)
        reference.blocks.append(blocks)
        reference.logits.append(output.logits[0].float().cpu())
    _plausible(reference.blocks)
    n_layers = len(reference.blocks[0])
    reported = output.hidden_states
    if reported is not None and len(reported) == n_layers + 1:
        apart = _largest(_apart(reported[l + 1][0].float().cpu(), blocks[l]) for l in range(n_layers - 1))
        if not apart <= found["limit"]:
            raise _WrongError(f"The outputs of the blocks are not the model's hidden states (apart by {apart:.2g})")
    return f"{n_layers} blocks of width {reference.blocks[0].shape[-1]}.", {"n_layers": n_layers}


def _plausible(outputs: Sequence[torch.Tensor]) -> None:
    """Refuse block outputs that are no numbers, or the same for every prompt."""
    for blocks in outputs:
        wrong = [layer for layer, states in enumerate(blocks) if not bool(states.isfinite().all())]
        if wrong:
            raise _WrongError(f"The output of block {wrong[0]} is not finite: the weights are damaged")
    last = [blocks[:, -1] for blocks in outputs]
    if len(last) > 1 and all(bool((states == last[0]).all()) for states in last):
        raise _WrongError("Every prompt has the same embeddings: the weights are those of no trained model")


def _head(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The LM head on the final states gives the model's logits."""
    import torch

    from es2.models.blocks import decoder_of
    from es2.models.kl import read_lm_head

    model = found["model"]
    head = read_lm_head(model)
    worst = 0.0
    for tokens, logits in zip(found["rendered"].token_ids, found["reference"].logits, strict=True):
        with torch.inference_mode():
            states = decoder_of(model)(torch.tensor([tokens], device=model.device), use_cache=False).last_hidden_state
            worst = _largest((worst, _apart(head.logits(states[0]).float().cpu(), logits)))
    if not worst <= found["limit"]:
        raise _WrongError(f"The LM head on the final states gives other logits (apart by {worst:.2g})")
    return f"The LM head gives the model's logits (apart by {worst:.1g}).", {"apart": worst}


def _replies(found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Batched replies are those of plain greedy decoding, and of `generate()`."""
    import torch

    model, rendered, reference = found["model"], found["rendered"], found["reference"]
    ends = end_tokens(model)
    replies: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, rendered.token_ids, N_TOKENS, ends, prefix=found["prefix"]):
        replies |= dict(zip(batch.rows, batch.replies, strict=True))
    n_tokens = 0
    for row, tokens in enumerate(rendered.token_ids):
        whole = torch.tensor([(*tokens, *replies[row][:-1])], device=model.device)
        with torch.inference_mode():
            ahead = model(whole, use_cache=False).logits[0, len(tokens) - 1 :].float().cpu()
        for count, (logits, token) in enumerate(zip(ahead, replies[row], strict=True), 1):
            if int(logits.argmax()) != token:
                if not float(logits.max() - logits[token]) <= found["limit"] * float(logits.abs().max()):
                    raise _WrongError(f"Reply {row + 1} is not that of plain greedy decoding from token {count} on")
                reference.n_ties += 1
            n_tokens += 1
    reference.replies = [replies[row] for row in range(len(replies))]
    with torch.inference_mode():
        ids = torch.tensor([rendered.token_ids[0]], device=model.device)
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS, do_sample=False)
    same = tuple(generated[0, ids.shape[1] :].tolist()) == reference.replies[0]
    ties = f", {reference.n_ties} of them ties within rounding" if reference.n_ties else ""
    sentence = f"{n_tokens} tokens of {len(replies)} replies are those of plain greedy decoding{ties}"
    return f"{sentence}{'' if same else '; generate() gives others, by settings of its own'}.", {
        "tokens": n_tokens, "ties": reference.n_ties, "as_generate": same,
    }  # fmt: skip


def _finetune(found: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """A fine-tune's passes give the plain embeddings; what it would train."""
    import torch

    from es2.models.forward import FinetuneForward
    from es2.training.trainable import describe_trained, make_trainable

    model, rendered = found["model"], found["rendered"]
    layers = guessed_layers(len(find_blocks(model)[1]))
    network = FinetuneForward(model, template_prefix=found["prefix"], layers=layers)
    with torch.no_grad():
        embeddings = network.embed(rendered.token_ids).cpu()
    worst = _largest(
        _apart(embeddings[row, place], found["reference"].blocks[row][layer, -1])
        for row in range(len(rendered.token_ids))
        for place, layer in enumerate(layers)
    )
    if not worst <= found["limit"]:
        raise _WrongError(f"The passes of a fine-tune give other embeddings (apart by {worst:.2g})")
    config = FinetuneConfig(layers=layers, model=name)
    trained, _ = make_trainable(network, config, name)
    described = describe_trained(network, config, trained)
    return f"Embeddings apart by {worst:.1g}. {described['sentence']}", described | {"apart": worst}


def _embeddings(
    folder: Path, device: str | None, dtype: str | None, found: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Every block's embedding, as a capture reads it, is the plain model's."""
    bridge = load_bridge(folder, device=device, dtype=dtype)
    rendered = found["rendered"]
    captured = capture_residuals(bridge, rendered)
    worst, where = 0.0, ""
    for position, array in captured.items():
        for row, column in enumerate(rendered.columns(position)):
            for layer in range(len(array)):
                apart = _apart(_tensor(array[layer, row]), found["reference"].blocks[row][layer, column])
                if not apart <= worst:
                    worst, where = apart, f"layer {layer} at {position} of prompt {row + 1}"
    if not worst <= found["limit"]:
        raise _WrongError(f"Embeddings are not those of the model's blocks: {where} is apart by {worst:.2g}")
    own = isinstance(bridge, BlockHooks)
    how = "hooks on the model's own blocks" if own else "TransformerLens"
    hooks = OWN_HOOKS if own else LENS
    return f"Embeddings of all layers through {how} are apart by {worst:.1g}.", {"apart": worst, "hooks": hooks}


def _adapter(
    folder: Path, adapter: Path, device: str | None, dtype: str | None, found: Mapping[str, Any], names: tuple[str, str]
) -> tuple[str, dict[str, Any]]:
    """Every key of the adapter has a home, and merging it gives the live adapter's model."""
    doubts = fit_adapter(adapter, partial(empty_model, folder)).doubts(*names)
    live = load_model(folder, device=device, dtype=dtype)
    apply_finetune(live, adapter)
    expected = [_outputs(live, tokens) for tokens in found["rendered"].token_ids[:2]]
    del live
    gc.collect()
    merged = load_tuned(folder, adapter, device=device, dtype=dtype)
    worst = moved = 0.0
    for row, (blocks, output) in enumerate(expected):
        own, own_output = _outputs(merged, found["rendered"].token_ids[row])
        worst = _largest((worst, _apart(own, blocks), _apart(own_output.logits[0].cpu(), output.logits[0].cpu())))
        moved = _largest((moved, _apart(blocks, found["reference"].blocks[row])))
    if not worst <= found["limit"]:
        raise _WrongError(f"The merged adapter is not the live one (apart by {worst:.2g})")
    moves = f"it moves the states by {100 * moved:.2g} %" if moved else "it changes nothing of the base"
    numbers = f"Merged and live adapter are apart by {worst:.1g}; {moves}."
    return " ".join((numbers, *doubts)), {"apart": worst, "moved": moved, "warnings": doubts}


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far one tensor is from another, over the length of that."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _largest(differences: Iterable[float]) -> float:
    """The largest difference; no number if one of them is none, which is no agreement."""
    return float(np.max([*differences]))


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(array))
