"""The forward passes of a fine-tune, through the plain transformers model; hooks read what `blocks.{l}.hook_out` gives.

Three savings change no number: the shared prefix is run once (with gradients, since tuned blocks change its keys and
values), harmful prompts stop at the last target layer, and prompts of like length share a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from es2.models.batching import (
    REPLIES_AT_ONCE,
    KeysAndValues,
    Tokens,
    batches_by_length,
    cache_before,
    cache_of,
    is_verified,
    keys_and_values,
    may_pad,
    may_share,
    n_tokens_of,
    pad,
    reply_batches,
    usual_tokens,
)
from es2.models.blocks import decoder_of, find_blocks, output_of
from es2.models.kl import LmHead, read_lm_head, score_tokens, token_kl
from es2.models.replies import decode, greedy_replies

if TYPE_CHECKING:
    from jaxtyping import Float


_DUMMY = (0,)


@dataclass(frozen=True)
class BaseReply:
    """The base model's reply to one prompt: constants of the KL terms, and what a fine-tune is to keep.

    Attributes:
        reply: greedy, up to and including the token that ends it.
        states: before the LM head, in the dtype of the pass: at the prompt's own tokens (all after the prefix), then at
            the reply's but the last. The reply's tokens were read from the states from `last` on.
    """

    reply: tuple[int, ...]
    states: Float[Tensor, "token d_model"]

    @property
    def n_prompt(self) -> int:
        """Number of states that belong to the prompt, `last` included."""
        return len(self.states) - len(self.reply) + 1


@dataclass(frozen=True)
class HarmlessPass:
    """One pass over harmless prompts.

    Attributes:
        embeddings: at `last`, at the target layers.
        ahead: the states before the LM head that the reply's first token follows from.
        kl_prompt: KL(base ‖ tuned) in nats, summed over the prompts' own tokens, `last` included.
        kl_reply: the same over the distributions of the reply's tokens, `last` included.
    """

    embeddings: Float[Tensor, "prompt layer d_model"]
    ahead: Float[Tensor, "prompt d_model"]
    kl_prompt: Float[Tensor, ""]
    kl_reply: Float[Tensor, ""]


@dataclass(frozen=True)
class ReplyScore:
    """What a model makes of a reply to one prompt that it is given word by word.

    Attributes:
        log_probs: of the reply's tokens, in nats.
        choices: the model's own first choice in the place of each of them.
        reply: the reply.
    """

    log_probs: Float[Tensor, "token"]
    choices: tuple[int, ...]
    reply: tuple[int, ...]

    @property
    def agreed(self) -> int:
        """Number of the reply's tokens that are the model's first choice."""
        return sum(map(int.__eq__, self.choices, self.reply))

    def begins_alike(self, n: int) -> bool:
        """Whether the model's own greedy reply begins with the reply's first `n` tokens, or all of a shorter one."""
        return self.choices[:n] == self.reply[:n]


class FinetuneForward:
    """A causal language model, with or without an adapter inside, as the fine-tune runs it.

    Args:
        model: from `load_model`, or `load_sharded`: then all processes call the same methods in the same order, each
            with any number of prompts. Passes run with an adapter that is put into it later.
        template_prefix: the tokens that every prompt begins with.
        layers: the target layers, ascending.
        gradient_checkpointing: whether blocks are run again in the backward pass. The prefix is not shared then, since
            checkpointed blocks have no cache, nor between shards.
        tokens_at_once: padded tokens per forward pass, at least one prompt; by default what suits the device.

    Raises:
        InputError: when the architecture's blocks or its LM head are not what this class knows.
    """

    def __init__(
        self,
        model: Any,
        *,
        template_prefix: Tokens,
        layers: Sequence[int],
        gradient_checkpointing: bool = False,
        tokens_at_once: int | None = None,
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.device: torch.device = model.device
        self.head: LmHead = read_lm_head(model)
        self._deep = decoder_of(model)
        self.list_name, self.blocks = find_blocks(model)
        self.template_prefix = tuple(template_prefix)
        self.in_step = isinstance(self.blocks[0], FSDPModule)
        # Shards are gone by the time that gradients come back through keys and values alone.
        shares = not gradient_checkpointing and not self.in_step and may_share(model)
        self._n_shared = len(self.template_prefix) if shares else 0
        self._shallow = _first_blocks(self._deep, self.list_name, self.layers[-1] + 1)
        self._tokens_at_once = tokens_at_once or usual_tokens(self.device.type)
        self._dtype = model.dtype
        self._head_width = self.head.weight.shape[1]
        self._width = model.config.get_text_config().hidden_size  # the head may be narrower
        self._checkpoints = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(layer, d_model) of a prompt's embeddings."""
        return len(self.layers), self._width

    def embed(
        self, prompts: Sequence[Tokens], shared: KeysAndValues | None = None
    ) -> Float[Tensor, "prompt layer d_model"]:
        """Embeddings at the target layers, in float32, running no block above the last of them and no head."""
        shared = self.run_template_prefix() if shared is None else shared
        sequences = [tuple(tokens[self._n_shared :]) for tokens in prompts]
        rows: list[int] = []
        parts: list[Tensor] = []
        for batch in self._together(batches_by_length([len(tokens) for tokens in sequences], self._tokens_at_once)):
            chosen = [sequences[row] for row in batch]
            embeddings, _ = self._run(self._shallow, chosen, [len(tokens) - 1 for tokens in chosen], shared)
            rows += batch
            parts.append(embeddings)
        return self._in_order(parts, rows)

    def look_ahead(
        self, prompts: Sequence[Tokens], shared: KeysAndValues | None = None
    ) -> tuple[Float[Tensor, "prompt layer d_model"], Float[Tensor, "prompt d_model"]]:
        """As `embed`, at full depth: also the states before the LM head that a reply's first token follows from."""
        shared = self.run_template_prefix() if shared is None else shared
        rows: list[int] = []
        parts: list[Tensor] = []
        ahead: list[Tensor] = []
        for batch, embeddings, states in self._read(prompts, [()] * len(prompts), shared):
            rows += batch
            parts.append(embeddings)
            ahead.append(self._ahead(prompts, batch, states))
        return self._in_order(parts, rows), self._in_order(ahead, rows, (self._head_width,))

    def read_harmless(
        self, prompts: Sequence[Tokens], base: Sequence[BaseReply], shared: KeysAndValues | None = None
    ) -> HarmlessPass:
        """One pass at full depth over prompts and the base's replies to them: embeddings and both KL sums."""
        shared = self.run_template_prefix() if shared is None else shared
        own = len(self.template_prefix) - self._n_shared
        rows: list[int] = []
        parts: list[Tensor] = []
        ahead: list[Tensor] = []
        kl_prompt = kl_reply = torch.zeros((), device=self.device)
        for batch, embeddings, states in self._read(prompts, [record.reply for record in base], shared):
            rows += batch
            parts.append(embeddings)
            ahead.append(self._ahead(prompts, batch, states))
            if not batch:
                kl_prompt = kl_prompt + states.sum()  # nothing, but the way back leads through every block
                continue
            tuned = torch.cat([states[i, own : own + len(base[row].states)] for i, row in enumerate(batch)])
            of_base = torch.cat([base[row].states for row in batch]).to(self.device)
            divergences = token_kl(tuned, of_base, self.head).split([len(base[row].states) for row in batch])
            for row, divergence in zip(batch, divergences, strict=True):
                n_prompt = base[row].n_prompt
                kl_prompt = kl_prompt + divergence[:n_prompt].sum()
                kl_reply = kl_reply + divergence[n_prompt - 1 :].sum()
        ahead_of_all = self._in_order(ahead, rows, (self._head_width,))
        return HarmlessPass(self._in_order(parts, rows), ahead_of_all, kl_prompt, kl_reply)

    def read_replies(
        self, prompts: Sequence[Tokens], replies: Sequence[Tokens], shared: KeysAndValues | None = None
    ) -> tuple[Float[Tensor, "prompt layer d_model"], list[Float[Tensor, "token d_model"]]]:
        """One pass at full depth over prompts and given replies.

        Returns:
            Embeddings at `last`; for each prompt, the states before the LM head that its reply's tokens follow from.
        """
        shared = self.run_template_prefix() if shared is None else shared
        rows: list[int] = []
        parts: list[Tensor] = []
        states: dict[int, Tensor] = {}
        for batch, embeddings, found in self._read(prompts, replies, shared):
            rows += batch
            parts.append(embeddings)
            for i, row in enumerate(batch):
                last = len(prompts[row]) - self._n_shared - 1
                states[row] = found[i, last : last + len(replies[row])]
        return self._in_order(parts, rows), [states[row] for row in range(len(prompts))]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Tokens], replies: Sequence[Tokens]
    ) -> tuple[Float[Tensor, "prompt layer d_model"], list[ReplyScore]]:
        """As `read_replies`, with what the model makes of the replies, which have a token at least."""
        embeddings, states = self.read_replies(prompts, replies)
        return embeddings, [self._score(*pair) for pair in zip(states, replies, strict=True)]

    def score_base(self, record: BaseReply) -> ReplyScore:
        """What the base made of its own reply."""
        return self._score(record.states[record.n_prompt - 1 :].to(self.device), record.reply)

    def _score(self, states: Float[Tensor, "token d_model"], reply: Tokens) -> ReplyScore:
        log_probs, choices = score_tokens(states, reply, self.head)
        return ReplyScore(log_probs, tuple(choices), tuple(reply))

    def _read(
        self, prompts: Sequence[Tokens], replies: Sequence[Tokens], shared: KeysAndValues
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Passes at full depth over prompts and replies but their last token: indices, embeddings and final states."""
        sequences = [(*tokens[self._n_shared :], *reply[:-1]) for tokens, reply in zip(prompts, replies, strict=True)]
        for batch in self._together(batches_by_length([len(tokens) for tokens in sequences], self._tokens_at_once)):
            last = [len(prompts[row]) - self._n_shared - 1 for row in batch]
            yield batch, *self._run(self._deep, [sequences[row] for row in batch], last, shared)

    def reply(
        self, prompts: Sequence[Tokens], n_tokens: int, end_tokens: frozenset[int]
    ) -> Iterator[tuple[int, BaseReply, Float[Tensor, "layer d_model"]]]:
        """Greedy replies, with the states that they were read from, so that base states cost no pass of their own.

        Prompts of like length share a batch, padded on the right, and a reply's tokens follow the padding at the
        positions that they would have without it. Where `may_pad` forbids that, prompts of equal length share a batch.

        Yields:
            (index in `prompts`, the reply with its states on the CPU, the embeddings at `last`).
        """
        self.model.eval()
        with torch.no_grad():
            shared = self.run_template_prefix()
        if not (is_verified(self.model) or self.in_step):
            yield from self._reply_and_read(prompts, n_tokens, end_tokens, shared)
            return
        own = len(self.template_prefix) - self._n_shared
        sequences = [tuple(tokens[self._n_shared :]) for tokens in prompts]
        pads = may_pad(self.model, max(map(len, prompts), default=0) + n_tokens)
        budget = REPLIES_AT_ONCE * self._tokens_at_once
        for batch in self._together(reply_batches([len(tokens) for tokens in sequences], budget, pads)):
            chosen = [sequences[row] for row in batch] or [_DUMMY]
            replies, embeddings, states, later = self._reply(chosen, shared, n_tokens, end_tokens, pads)
            for i, row in enumerate(batch):
                counted = states[i, own : len(chosen[i])]
                if later is not None:
                    counted = torch.cat([counted, later[i, : len(replies[i]) - 1]])
                yield row, BaseReply(replies[i], counted.clone()), embeddings[i]

    def _reply_and_read(
        self, prompts: Sequence[Tokens], n_tokens: int, end_tokens: frozenset[int], shared: KeysAndValues
    ) -> Iterator[tuple[int, BaseReply, Float[Tensor, "layer d_model"]]]:
        """As `reply`, by passes over prompts and whole replies: states in a cache may be others than a step's."""
        own = len(self.template_prefix) - self._n_shared
        for ended in greedy_replies(self.model, prompts, n_tokens, end_tokens, prefix=self.template_prefix):
            own_tokens = [tuple(prompts[row][self._n_shared :]) for row in ended.rows]
            sequences = [(*tokens, *reply[:-1]) for tokens, reply in zip(own_tokens, ended.replies, strict=True)]
            for batch in batches_by_length([len(tokens) for tokens in sequences], self._tokens_at_once):
                with torch.no_grad():
                    last = [len(own_tokens[i]) - 1 for i in batch]
                    embeddings, states = self._run(self._deep, [sequences[i] for i in batch], last, shared)
                for place, i in enumerate(batch):
                    counted = states[place, own : len(sequences[i])].cpu().clone()
                    yield ended.rows[i], BaseReply(ended.replies[i], counted), embeddings[place].cpu()

    @torch.no_grad()
    def _reply(
        self,
        sequences: Sequence[Tokens],
        shared: KeysAndValues,
        n_tokens: int,
        end_tokens: frozenset[int],
        pads: bool,
    ) -> tuple[list[tuple[int, ...]], Tensor, Tensor, Tensor | None]:
        """One batch's replies, embeddings at `last`, and states of the prompts and of the replies, on the CPU."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        cache = cache_of(shared, len(sequences), self.model.config)
        embeddings = torch.empty(0)
        read: list[Tensor] = []

        def next_tokens(latest: Tensor, inputs: dict[str, Tensor]) -> list[int]:
            nonlocal embeddings
            if not read:
                embeddings, states = self._run(self._deep, sequences, (lengths - 1).tolist(), shared, cache)
                ahead = states[torch.arange(len(sequences)), lengths - 1]
            else:
                with self.precision():
                    decoded = self._deep(latest, past_key_values=cache, use_cache=True, **inputs)
                states = decoded.last_hidden_state
                ahead = states[:, -1]
            read.append(states)
            return self.head.next_tokens(ahead)

        replies = decode(
            next_tokens,
            sequences,
            n_tokens,
            end_tokens,
            pads=pads,
            device=self.device,
            side="right",
            n_before=n_tokens_of(shared),
            go_on=lambda unfinished: self._most(unfinished) > 0,
        )
        later = torch.cat(read[1:], dim=1).cpu() if len(read) > 1 else None
        return replies, embeddings.cpu(), read[0].cpu(), later

    def _together(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """The batches; where processes hold shards, then empty ones, since all processes have to run every pass."""
        own = list(batches)
        idle: list[list[int]] = [[]] * (self._most(len(own)) - len(own))
        yield from (*own, *idle)

    def _most(self, number: int) -> int:
        """The largest of all processes' numbers where they hold shards, else this one."""
        if not self.in_step:
            return number
        largest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def run_template_prefix(self) -> KeysAndValues:
        """Keys and values of the template's prefix in every block, for all prompts of a step; empty if not shared."""
        with self.precision():
            return keys_and_values(self._deep, self.template_prefix[: self._n_shared], self.device)

    def _run(
        self,
        decoder: Any,
        sequences: Sequence[Tokens],
        last: Sequence[int],
        shared: KeysAndValues,
        cache: Any = None,
    ) -> tuple[Float[Tensor, "prompt layer d_model"], Float[Tensor, "prompt token d_model"]]:
        """One forward pass of prompts that all follow `shared`: embeddings at `last`, and the final states.

        Decoding needs a `cache`, which holds `shared` already. For no prompts the blocks run over a dummy token.
        """
        n_prompts = len(sequences)
        if not sequences:
            sequences, last = [_DUMMY], [0]
        tokens, mask = pad(sequences, n_before=n_tokens_of(shared))
        inputs: dict[str, Any] = {"attention_mask": mask.to(self.device)}
        if shared or cache is not None:
            inputs["past_key_values"] = cache_before(shared) if cache is None else cache
        rows = torch.arange(len(sequences), device=self.device)
        columns = torch.tensor(last, device=self.device)
        for block in self.blocks:
            # transformers checkpoints a block in training mode; dropout inside it stays off. Only where gradients are
            # needed: a checkpointed block has no cache, which replies need.
            block.training = self._checkpoints and torch.is_grad_enabled()
        with self._hooks() as kept, self.precision():
            states = decoder(tokens.to(self.device), use_cache="past_key_values" in inputs, **inputs).last_hidden_state
        embeddings = torch.stack([kept[layer][rows, columns] for layer in self.layers], dim=1).float()
        return embeddings[:n_prompts], states[:n_prompts]

    def _ahead(
        self, prompts: Sequence[Tokens], batch: Sequence[int], states: Float[Tensor, "prompt token d_model"]
    ) -> Float[Tensor, "prompt d_model"]:
        """The final states at `last` of a batch."""
        last = [len(prompts[row]) - self._n_shared - 1 for row in batch]
        return states[
            torch.arange(len(batch), device=states.device), torch.tensor(last, dtype=torch.long).to(states.device)
        ]

    def _in_order(self, parts: list[Tensor], rows: list[int], shape: tuple[int, ...] | None = None) -> Tensor:
        """What all batches gave, in the order of the prompts; `shape` of one prompt's, an embedding's if not given."""
        if not parts:
            return torch.zeros(0, *(shape or self.embedding_shape), device=self.device)
        order = torch.tensor(rows, device=self.device).argsort()
        return torch.cat(parts)[order]

    @contextmanager
    def _hooks(self) -> Iterator[dict[int, Tensor]]:
        """Keep the outputs of the target blocks of the next pass."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, block: nn.Module, inputs: Any, output: Any) -> None:
            kept[layer] = output_of(output)

        handles = [self.blocks[layer].register_forward_hook(partial(keep, layer)) for layer in self.layers]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def precision(self) -> Any:
        """Trained weights are float32 also in a model of bfloat16; autocast lets the two meet."""
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(self.device.type, dtype=self._dtype)


def _first_blocks(decoder: nn.Module, list_name: str, n: int) -> Any:
    """A view of the decoder that ends after `n` blocks; it shares every weight and every hook."""
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    view._modules[list_name] = nn.ModuleList(list(getattr(decoder, list_name))[:n])
    return view
