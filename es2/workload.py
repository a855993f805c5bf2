"""The prompts of one fine-tune, what the base model made of them, and one process's share of the work on them.

Sums are the only thing processes tell each other: of embeddings laid out by their place in the batch (zeros where
another process has the prompt), of KLs, of token counts, of gradients. One process alone runs the same lines with sums
that change nothing, so there is no second code path that only shows its bugs on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor

from es2.jobs import Cancelled, Reporter
from es2.objective import BaseLayer, measure_base
from es2.passes import BaseReply, HarmlessPass, Network, Tokens, end_tokens
from es2.prompts import HARMFUL
from es2.training_data import Batch, Plan
from es2.watch import WatchPoint, watch_numbers


@dataclass(frozen=True)
class Part:
    """The prompts that one process works on at once.

    Attributes:
        harmful: rows of the prompt set.
        harmless: likewise.
        places: where they stand in the batch, harmful ones first.
    """

    harmful: tuple[int, ...]
    harmless: tuple[int, ...]
    places: tuple[int, ...]


class Workload:
    """One process's view of a fine-tune's prompts; making it measures the base.

    Args:
        network: the model, nothing trained yet.
        plan: which prompts are needed.
        tokens: of every one of them.
        reply_tokens: tokens of the base's greedy replies.
        report: told about the base measurements (`base`).
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        tokens: Mapping[int, Tokens],
        reply_tokens: int,
        report: Reporter,
    ) -> None:
        self.network = network
        self.plan = plan
        self.tokens = tokens
        self.processes = PartialState()
        is_harmful = plan.watch.labels == HARMFUL
        self._watched_harmful = [row for row, yes in zip(plan.watched, is_harmful, strict=True) if yes]
        self._watched_harmless = [row for row, yes in zip(plan.watched, is_harmful, strict=True) if not yes]
        self.replies: dict[int, BaseReply] = {}
        self._measure_base(reply_tokens, report)

    # ------------------------------------------------------------------------------------------------ the base

    def _measure_base(self, reply_tokens: int, report: Reporter) -> None:
        """Embed what this process will work on, reply to what is harmless, and share the embeddings."""
        batches, share = self.plan.batches, self._share
        harmful = {row for batch in batches for row in share(batch.harmful)} | {*share(self._watched_harmful)}
        harmless = {row for batch in batches for row in share(batch.harmless)}
        harmless |= {*share(self._watched_harmless), *share(self.plan.tested)}
        known = sorted({*self.plan.harmful, *self.plan.harmless, *self.plan.watched})
        self._place_of = {row: place for place, row in enumerate(known)}
        found: dict[int, Tensor] = {}
        done, total = 0, len(harmless) + 1
        report("base", done, total)
        rows = sorted(harmless)
        ends = end_tokens(self.network.model)
        for index, reply, embedding in self.network.reply([self.tokens[row] for row in rows], reply_tokens, ends):
            self.replies[rows[index]] = reply
            found[rows[index]] = embedding
            done += 1
            report("base", done, total)
        rows = sorted(harmful)
        with torch.no_grad():
            embeddings = self.network.embed([self.tokens[row] for row in rows])
        found |= dict(zip(rows, embeddings, strict=True))
        report("base", total, total)
        mine = [row for row in found if row in self._place_of]
        values = torch.stack([found[row].to(self.network.device) for row in mine]) if mine else embeddings[:0]
        # A prompt that several processes will meet was measured by each of them.
        times = self._spread([self._place_of[row] for row in mine], torch.ones(len(mine), 1, 1), len(known))
        self._base = self._spread([self._place_of[row] for row in mine], values, len(known)) / times

    def base_embeddings(self, rows: Sequence[int]) -> Float[Tensor, "prompt layer d_model"]:
        """The base's embeddings of drawn or watched prompts at the target layers."""
        return self._base[[self._place_of[row] for row in rows]]

    def base_layers(self) -> dict[int, BaseLayer]:
        """The constants of the separation terms, by target layer, over the `tune` prompts that are drawn."""
        harmful, harmless = self.base_embeddings(self.plan.harmful), self.base_embeddings(self.plan.harmless)
        return {
            layer: measure_base(harmful[:, index], harmless[:, index])
            for index, layer in enumerate(self.network.layers)
        }

    # ------------------------------------------------------------------------------------------------ one step

    def parts(self, batch: Batch, n: int) -> list[Part]:
        """This process's share of a batch in `n` parts, fewer where it has fewer prompts."""
        harmful, harmless = self._own_places(batch.harmful), self._own_places(batch.harmless)
        parts = []
        for start in range(n):
            some, others = harmful[start::n], harmless[start::n]
            if some or others:
                part = Part(
                    harmful=tuple(batch.harmful[place] for place in some),
                    harmless=tuple(batch.harmless[place] for place in others),
                    places=(*some, *(len(batch.harmful) + place for place in others)),
                )
                parts.append(part)
        return parts

    def count_tokens(self, rows: Sequence[int]) -> tuple[int, int]:
        """How many tokens of harmless prompts, and of the replies to them, all processes together have."""
        mine = [self.replies[row] for row in self._share(rows)]
        counts = [sum(record.n_prompt for record in mine), sum(len(record.reply) for record in mine)]
        n_prompt, n_reply = self.total(torch.tensor(counts, device=self.network.device)).tolist()
        return n_prompt, n_reply

    def embed(self, part: Part) -> Float[Tensor, "place layer d_model"]:
        """The embeddings of a part, in the order of its places."""
        shared = self.network.run_template_head()
        return torch.cat([self.network.embed(self._tokens(rows), shared) for rows in (part.harmful, part.harmless)])

    def run(self, part: Part) -> HarmlessPass:
        """The embeddings of a part, in the order of its places, and the KL sums of its harmless prompts."""
        shared = self.network.run_template_head()
        harmful = self.network.embed(self._tokens(part.harmful), shared)
        replies = [self.replies[row] for row in part.harmless]
        harmless = self.network.read_harmless(self._tokens(part.harmless), replies, shared)
        return HarmlessPass(torch.cat([harmful, harmless.embeddings]), harmless.kl_prompt, harmless.kl_reply)

    def gather(
        self, parts: Sequence[Part], embeddings: Sequence[Tensor], n_places: int
    ) -> Float[Tensor, "place layer d_model"]:
        """The embeddings of the whole batch from those of every process's parts, without their graphs."""
        places = [place for part in parts for place in part.places]
        found = torch.cat([part.detach() for part in embeddings]) if places else self._base[:0]
        return self._spread(places, found, n_places)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make every process's gradients the sum of all processes' gradients."""
        if self.processes.num_processes == 1:
            return
        with_gradients = list(parameters)
        for parameter in with_gradients:
            if parameter.grad is None:  # a process that had no prompt in this batch
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in with_gradients if parameter.grad is not None])
        sizes = [parameter.numel() for parameter in with_gradients]
        for parameter, gradient in zip(with_gradients, self.total(flat).split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    # ---------------------------------------------------------------------------------------------- held-out prompts

    @torch.no_grad()
    def watch(self, step: int) -> WatchPoint:
        """Measure the watched prompts with the model as it is now."""
        watch, rows = self.plan.watch, self.plan.watched
        place = {row: index for index, row in enumerate(rows)}
        harmful, harmless = self._share(self._watched_harmful), self._share(self._watched_harmless)
        run = self.run(Part(tuple(harmful), tuple(harmless), ()))
        tuned = self._spread([place[row] for row in [*harmful, *harmless]], run.embeddings, len(rows)).cpu().numpy()
        base = self.base_embeddings(rows).cpu().numpy()
        n_prompt, n_reply = self.count_tokens(self._watched_harmless)
        kl_prompt, kl_reply = self.total(torch.stack([run.kl_prompt, run.kl_reply])).tolist()
        numbers = {
            layer: watch_numbers(watch, base[:, index], tuned[:, index])
            for index, layer in enumerate(self.network.layers)
        }
        return WatchPoint(step, kl_prompt / n_prompt, kl_reply / n_reply, numbers)

    def watch_base(self) -> WatchPoint:
        """What `watch` would measure before the first step, from what is known already."""
        base = self.base_embeddings(self.plan.watched).cpu().numpy()
        numbers = {
            layer: watch_numbers(self.plan.watch, base[:, index], base[:, index])
            for index, layer in enumerate(self.network.layers)
        }
        return WatchPoint(0, 0.0, 0.0, numbers)

    @torch.no_grad()
    def measure_kl(self) -> dict[str, float] | None:
        """The KLs on the harmless `test` prompts with the model as it is now; `None` if there are none."""
        if not self.plan.tested:
            return None
        rows = self._share(self.plan.tested)
        run = self.network.read_harmless(self._tokens(rows), [self.replies[row] for row in rows])
        n_prompt, n_reply = self.count_tokens(self.plan.tested)
        kl_prompt, kl_reply = self.total(torch.stack([run.kl_prompt, run.kl_reply])).tolist()
        return {"prompt": kl_prompt / n_prompt, "reply": kl_reply / n_reply}

    # ------------------------------------------------------------------------------------------------ between processes

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = reduce(numbers, reduction="sum")
        return summed

    def on_main(self, action: Callable[[], None]) -> None:
        """Do something in one process only."""
        if self.processes.is_main_process:
            action()

    def is_cancelled(self, report: Callable[[], None]) -> bool:
        """Report from the main process; whether that asked everybody to stop."""
        cancelled = False
        if self.processes.is_main_process:
            try:
                report()
            except Cancelled:
                cancelled = True
        if self.processes.num_processes == 1:
            return cancelled
        return bool(self.total(torch.tensor(float(cancelled), device=self.network.device)))

    def _own_places(self, rows: Sequence[int]) -> list[int]:
        """Where the prompts that this process works on stand in `rows`: every n-th by length, for equal shares."""
        by_length = sorted(range(len(rows)), key=lambda place: (-len(self.tokens[rows[place]]), place))
        return by_length[self.processes.process_index :: self.processes.num_processes]

    def _share(self, rows: Sequence[int]) -> list[int]:
        """The prompts that this process works on."""
        return [rows[place] for place in self._own_places(rows)]

    def _tokens(self, rows: Sequence[int]) -> list[Tokens]:
        return [self.tokens[row] for row in rows]

    def _spread(self, places: Sequence[int], values: Tensor, n_places: int) -> Tensor:
        """Values of all processes by place; a place that several processes fill holds the sum."""
        everyone = torch.zeros(n_places, *values.shape[1:], device=self.network.device)
        everyone[list(places)] = values.to(everyone)
        return self.total(everyone)
