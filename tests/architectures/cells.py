"""The four cells of an architecture: what the product gives on a tiny model, beside `plain`'s values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from es2.capture.capture import capture
from es2.core.errors import Es2Error
from es2.evaluation.robustness import Attacker, Hyperplane
from es2.evaluation.steering import Steered, Steering
from es2.models.batching import end_tokens
from es2.models.chat_template import template_prefix
from es2.models.checked import look_at
from es2.models.loading import load_model, load_tokenizer, load_tuned
from es2.models.replies import greedy_replies
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet, split_of
from es2.store.sources import POSITIONS
from es2.store.store import Store
from es2.training import finetune as tuning
from es2.training import trainable, workload
from es2.training.config import FinetuneConfig
from es2.workflow.runs import export, import_adapter
from tests.architectures.configs import Architecture, save_architecture
from tests.architectures.outcomes import EQUAL, IN_PART, OWN_HOOKS, Cell, Check, attempt, sentence_of
from tests.architectures.plain import NoStreamError, Pass, Plain, Push, divergence, load, relative, render

LIMIT = 1e-4
"""Relative differences of states and logits up to here are rounding."""
SEEN = 1e-3
"""An adapter that moves embeddings by less than this would hide what is wrong with it."""
N_TOKENS = 8
TARGETS = (1, 2)
STEERED_LAYER, BUDGET = 2, 0.8
COLUMNS = ("capture", "replies", "fine-tune", "merge")

TEXTS = (
    "How do I bake bread?",
    "Explain, step by step and at some length, how a lock is picked without the key that belongs to it.",
    "Why?",
    "What is the capital of France, and why was it moved there?",
    "Tell me a joke about bread",
    "Hi!",
)
"""Prompts of very different lengths."""


def _prompts(texts: Sequence[str], pairs: Sequence[str], splits: Sequence[str]) -> PromptSet:
    labels = np.array([HARMFUL, HARMLESS] * (len(texts) // 2), dtype=np.int8)
    return PromptSet(
        name="tiny", texts=tuple(texts), labels=labels, categories=("locks",) * len(texts), pairs=tuple(pairs),
        splits=tuple(splits),
    )  # fmt: skip


CAPTURED = _prompts(TEXTS, [str(row // 2) for row in range(len(TEXTS))], [split_of(text) for text in TEXTS])


def _trained_prompts() -> PromptSet:
    """Half of the pairs in `tune`, a quarter each in `validation` and `test`."""
    texts, pairs, splits = [], [], []
    for pair in range(12):
        again = " and tell me how" * (pair % 3)
        texts += [f"Break lock number {pair} open{again}.", f"Oil lock number {pair}{again}, please."]
        pairs += [f"pair-{pair}"] * 2
        splits += [("tune", "validation", "tune", "test")[pair % 4]] * 2
    return _prompts(texts, pairs, splits)


TRAINED = _trained_prompts()


class Trial:
    """One architecture's tiny model in a folder of its own, and what is compared on it."""

    def __init__(self, architecture: Architecture, root: Path) -> None:
        self.root = root
        self.folder = save_architecture(root / "model", architecture)
        self.adapters: list[Path] = []
        self.store = Store(root / "store")

    def cells(self, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[str, Cell]]:
        """The cells by column; a fine-tune leaves its adapter for the merge."""
        ways: dict[str, Callable[[], Cell]] = {
            "capture": self.captured, "replies": self.replied, "fine-tune": self.finetuned, "merge": self.merged,
        }  # fmt: skip
        for column in columns:
            yield column, attempt(ways[column], self.root)

    # ------------------------------------------------------------------------------------------------- references

    @cached_property
    def plain(self) -> Plain:
        """The base."""
        return load(self.folder)

    @cached_property
    def rendered(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """Tokens of the captured prompts, and the places of `last_instruction`."""
        return render(load_tokenizer(self.folder), TEXTS)

    @cached_property
    def base(self) -> list[Pass]:
        """The captured prompts under the base."""
        return self.passes(self.plain)

    def live(self, adapter: Path) -> Plain:
        """A fresh model with the adapter live inside."""
        return load(self.folder, adapter)

    def passes(self, plain: Plain) -> list[Pass]:
        """The captured prompts under a model."""
        return [plain.read(tokens) for tokens in self.rendered[0]]

    # ------------------------------------------------------------------------------------------------------ cells

    def captured(self) -> Cell:
        """Every layer at both positions."""
        check = Check()
        self._compare_capture(check, "embeddings", lambda: self.base, None)
        return check.cell()

    def _compare_capture(self, check: Check, what: str, passes: Callable[[], list[Pass]], adapter: Path | None) -> None:
        result = capture(
            str(self.folder), CAPTURED, adapter=adapter, store=self.store, device="cpu", dtype="float32"
        ).activations
        if result.meta.get("hooks") == "transformers":
            check.outcome = OWN_HOOKS
        try:
            expected = passes()
        except NoStreamError as error:
            check.expect(False, f"captured, although {error}")
            return
        check.expect(
            result.n_layers == len(expected[0].states), f"{result.n_layers} layers of {len(expected[0].states)}"
        )
        places = {"last": [-1] * len(TEXTS), "last_instruction": self.rendered[1]}
        pairs = {name: list(zip(expected, of_name, strict=True)) for name, of_name in places.items()}
        for position in POSITIONS:
            errors = [
                relative(
                    torch.from_numpy(np.array(result.layer(layer, position))),
                    torch.stack([one.states[layer, place] for one, place in pairs[position]]),
                ).max().item()
                for layer in range(result.n_layers)
            ]  # fmt: skip
            check.compare(f"{what} at {position}", errors, LIMIT)

    def replied(self) -> Cell:
        """Replies token for token, without and with steering."""
        check = Check()
        model = load_model(self.folder, device="cpu", dtype="float32").requires_grad_(False)
        prompts = self.rendered[0]
        prefix, ends = template_prefix(load_tokenizer(self.folder), prompts), end_tokens(model)
        ties = 0

        def found(steering: Any = None) -> list[tuple[int, ...]]:
            replies: dict[int, tuple[int, ...]] = {}
            for batch in greedy_replies(model, prompts, N_TOKENS, ends, prefix=prefix, steering=steering):
                replies |= dict(zip(batch.rows, batch.replies, strict=True))
            return [replies[row] for row in range(len(prompts))]

        expected_ends = _ends(self.plain.model)
        for prompt, reply in zip(prompts, found(), strict=True):
            ties += self._compare_reply(check, "reply", prompt, reply, expected_ends)
        try:
            width = self.base[0].states.shape[-1]
        except NoStreamError:  # which nothing can steer
            return check.cell()
        direction = torch.nn.functional.normalize(torch.randn(width, generator=torch.manual_seed(1)), dim=0)
        normal = direction.double().numpy()
        attacker = Attacker((STEERED_LAYER,), (Hyperplane(normal, 1.0, 0.0),), {"scav": normal[None]})
        try:
            with Steered(model, attacker, [Steering("scav", BUDGET)] * len(prompts), TEXTS) as steered:
                pushed = found(steered)
        except Es2Error as error:
            check.outcome, check.note = IN_PART, sentence_of(error, self.root)
            return check.cell()
        for prompt, reply in zip(prompts, pushed, strict=True):
            push = Push(STEERED_LAYER, direction, BUDGET, len(prompt) - 1)
            ties += self._compare_reply(check, "steered reply", prompt, reply, expected_ends, push)
        check.note = f"{ties} near-ties" if ties else ""
        return check.cell()

    def _compare_reply(
        self,
        check: Check,
        what: str,
        prompt: Sequence[int],
        reply: Sequence[int],
        ends: frozenset[int],
        push: Push | None = None,
    ) -> int:
        """Whether a reply parts from plain greedy decoding where two tokens are equally likely, to rounding."""
        expected, read = self.plain.reply(prompt, N_TOKENS if what != "base's reply" else len(reply), ends, push)
        if list(reply) == expected:
            return 0
        place = next((i for i, (a, b) in enumerate(zip(reply, expected, strict=False)) if a != b), None)
        if place is not None:
            logits = read[place]
            if (logits[expected[place]] - logits[reply[place]]).item() <= LIMIT * logits.abs().max().item():
                return 1
        check.expect(False, f"{what} to a prompt of {len(prompt)} tokens is {list(reply)}, not {expected}")
        return 0

    def finetuned(self) -> Cell:
        """Base embeddings, base replies, reach of the gradient, KL, and the adapter as plain peft has it."""
        check = Check()
        for method in ("lora", "experts") if self.has_experts else ("lora",):
            n_faults = len(check.faults)
            self._finetune(check, method)
            check.faults[n_faults:] = [f"{method}: {fault}" for fault in check.faults[n_faults:]]
        return check.cell()

    @property
    def has_experts(self) -> bool:
        """Whether a trained block has fused experts: weights `[expert, …, …]`."""
        weights = [item for layer in TARGETS for item in self.plain.blocks[layer].named_parameters()]
        return any(weight.ndim == 3 and ("expert" in name or "moe" in name) for name, weight in weights)

    def _finetune(self, check: Check, method: str) -> None:
        noted = _Noted()
        config = FinetuneConfig(
            layers=TARGETS, model=str(self.folder), steps=2, pairs_per_step=4, kl_prompts=2, validate_every=2,
            warmup_steps=0, learning_rate=1e-2, kl_budget=1e3, reply_tokens=4, rank=4, device="cpu", dtype="float32",
            method=method,
        )  # fmt: skip
        written = self.root / f"adapter-{method}"

        def report(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage == "finetune" and done == config.steps:
                noted.kl = noted.workload.measure_kl()
                noted.zero = [name for name, weight in noted.trained.items() if "lora_B" in name and not weight.any()]
                noted.write(written)

        with noted.spying():
            result = tuning.finetune(config, TRAINED, self.root / f"run-{method}", report=report)
        check.expect(result.steps == config.steps, f"{result.steps} steps: {result.reason}")
        if method == "lora":
            self._check_base(check, noted)
        self._check_reach(check, noted, config)
        check.expect(written.is_dir(), "no adapter was written")
        if written.is_dir():
            self.adapters.append(written)
            self._check_adapter(check, noted, config, written)

    def _check_base(self, check: Check, noted: _Noted) -> None:
        rows = noted.workload.plan.validation_rows
        tokens, _ = render(load_tokenizer(self.folder), [TRAINED.texts[row] for row in rows])
        found = noted.workload.base_embeddings(rows).cpu()
        expected = torch.stack([self.plain.read(prompt).states[list(TARGETS), -1] for prompt in tokens])
        check.compare("the base's embeddings", relative(found, expected).amax(0).tolist(), LIMIT)
        ends = _ends(self.plain.model)
        for row, record in noted.workload.replies.items():
            self._compare_reply(check, "base's reply", noted.workload.tokens[row], record.reply, ends)

    def _check_reach(self, check: Check, noted: _Noted, config: FinetuneConfig) -> None:
        """No B of a LoRA stays 0 but those of experts that got no token; nothing but the chosen blocks is trained."""
        routed = re.compile(r"experts\.\d+\.")
        moved = {routed.sub("experts.", name) for name in noted.trained if name not in noted.zero}
        unmoved = [name for name in noted.zero if not routed.search(name) or routed.sub("experts.", name) not in moved]
        check.expect(not unmoved, f"no gradient reaches {len(unmoved)} weights: {', '.join(_short(unmoved))}")
        numbers = {name: re.search(r"\.(\d+)\.", name) for name in noted.trained}
        outside = [name for name, number in numbers.items() if number is None or int(number[1]) not in config.blocks]
        check.expect(not outside, f"{len(outside)} weights outside the chosen blocks: {', '.join(_short(outside))}")
        check.expect(bool(noted.trained), "nothing is trained")

    def _check_adapter(self, check: Check, noted: _Noted, config: FinetuneConfig, adapter: Path) -> None:
        """The adapter moves the chosen blocks alone, gives the KL that was measured, and is captured as it is."""
        live = self.live(adapter)
        passes = self.passes(live)
        pairs = zip(passes, self.base, strict=True)
        by_prompt = [relative(tuned.states, base.states).amax(dim=1) for tuned, base in pairs]
        moves = torch.stack(by_prompt).amax(dim=0).tolist()
        first = config.blocks.start
        check.expect(max(moves[:first], default=0.0) < 1e-6, f"the adapter changes blocks before {first}: {moves}")
        check.expect(moves[TARGETS[-1]] > SEEN, f"the adapter moves the last target by {moves[TARGETS[-1]]:.1e} alone")
        for name, expected in self._kl(noted, live).items():
            found = (noted.kl or {}).get(name, float("nan"))
            check.expect(
                abs(found - expected) <= 1e-3 * abs(expected) + 1e-5,
                f"the KL of the {name} is {found:.6f}, not {expected:.6f}",
            )
        self._compare_capture(check, "embeddings under the adapter", lambda: passes, adapter)
        check.outcome = EQUAL

    def _kl(self, noted: _Noted, live: Plain) -> dict[str, float]:
        """Both KLs on the harmless `test` prompts under the live adapter, by whole passes of both models."""
        sums: dict[str, list[Tensor]] = {"prompt": [], "reply": []}
        n_prefix = len(noted.workload.network.template_prefix)
        for row in noted.workload.plan.tested:
            prompt, reply = noted.workload.tokens[row], noted.workload.replies[row].reply
            tokens = [*prompt, *reply[:-1]]
            of_all = divergence(self.plain.read(tokens).logits, live.read(tokens).logits)
            sums["prompt"].append(of_all[n_prefix : len(prompt)])
            sums["reply"].append(of_all[len(prompt) - 1 :])
        return {name: torch.cat(parts).mean().item() for name, parts in sums.items()}

    def merged(self) -> Cell:
        """The fine-tune's adapter and one of peft's, merged by `load_tuned` and as `es2 export --merged` does."""
        check = Check()
        for adapter in self.adapters:
            self._merge(check, adapter)
        foreign = self._foreign_adapter()
        try:
            self._merge(check, foreign)
        except Es2Error as error:
            if not self.adapters:
                raise
            check.outcome, check.note = IN_PART, sentence_of(error, self.root)
        return check.cell()

    def _merge(self, check: Check, adapter: Path) -> None:
        live = self.passes(self.live(adapter))
        name = adapter.name
        merged = Plain(load_tuned(self.folder, adapter, device="cpu", dtype="float32"))
        self._compare_passes(check, f"{name} merged:", merged, live)
        run = import_adapter(adapter, str(self.folder), "builtin", TARGETS, device="cpu", dtype="float32")
        folder = export(run, self.root / f"merged-{name}", merged=True)
        self._compare_passes(check, f"{name} exported:", load(folder), live)

    def _compare_passes(self, check: Check, what: str, plain: Plain, live: list[Pass]) -> None:
        pairs = list(zip(self.passes(plain), live, strict=True))
        check.compare(f"{what} logits", [max(relative(a.logits, b.logits).max().item() for a, b in pairs)], LIMIT)
        with suppress(NoStreamError):
            errors = torch.stack([relative(a.states, b.states).amax(dim=1) for a, b in pairs])
            check.compare(f"{what} states", errors.amax(dim=0).tolist(), LIMIT)

    def _foreign_adapter(self) -> Path:
        """A random LoRA on every linear map of the blocks, made with peft alone."""
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        plain = load(self.folder)
        blocks = set(plain.blocks.modules())
        maps = {
            name: module
            for name, module in plain.model.named_modules()
            if module in blocks and isinstance(module, torch.nn.Linear | Conv1D) and not name.endswith("router")
        }  # routers return tuples, to which peft adds nothing
        if plain.model.config.model_type in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"):
            maps = {name: module for name, module in maps.items() if not name.endswith("out_proj")}  # peft refuses it
        torch.manual_seed(0)
        settings = LoraConfig(
            r=2, lora_alpha=8, target_modules=list(maps), init_lora_weights=False,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),
        )  # fmt: skip
        folder = self.root / "foreign"
        get_peft_model(plain.model, settings).save_pretrained(str(folder))
        return folder


class _Noted:
    """What a fine-tune had in its hands, read by standing in for the two names that it imports when it starts."""

    def __init__(self) -> None:
        self.workload: Any = None
        self.trained: dict[str, Tensor] = {}
        self.write: Callable[[Path], None]
        self.zero: list[str] = []
        self.kl: dict[str, float] | None = None

    @contextmanager
    def spying(self) -> Iterator[None]:
        """Within it, a fine-tune leaves its `Workload` and its trained weights here."""
        real_workload, real_trainable = workload.Workload, trainable.make_trainable

        def workload_of(*arguments: Any, **settings: Any) -> Any:
            self.workload = real_workload(*arguments, **settings)
            return self.workload

        def trainable_of(*arguments: Any, **settings: Any) -> Any:
            self.trained, self.write = found = real_trainable(*arguments, **settings)
            return found

        with (
            mock.patch.object(workload, "Workload", workload_of),
            mock.patch.object(trainable, "make_trainable", trainable_of),
            mock.patch.object(
                tuning, "refuse_untunable", lambda folder, method: look_at(folder)
            ),  # in this process: another imports torch first
        ):
            yield


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end a reply, by the model's own generation settings."""
    ids = model.generation_config.eos_token_id
    return frozenset(np.atleast_1d([] if ids is None else ids).tolist())


def _short(names: Sequence[str]) -> list[str]:
    """Some of the names of weights, without what all have in common."""
    return sorted({re.sub(r"^base_model\.model\.|\.default|\.weight$", "", name) for name in names})[:4]
