"""One process's share of the work on a fine-tune's prompts.

Processes exchange sums only: of embeddings by place in the batch (zeros for other processes' prompts), KLs, token
counts and gradients. A single process runs the same lines, so no code path runs on a cluster only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from es2.analysis.refusal import judge_reply
from es2.core.progress import Cancelled, Reporter
from es2.models.batching import KeysAndValues, Tokens, end_tokens
from es2.models.forward import BaseReply, FinetuneForward, ReplyScore
from es2.prompts.prompt_set import HARMLESS
from es2.store.film import FILM, cut_film, write_frame
from es2.training.objective import BaseLayer, measure_base
from es2.training.sampling import Batch, BatchSchedule
from es2.training.validation import REFUSAL_OPENING, ValidationPoint, validation_numbers

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Part:
    """The prompts that one process works on at once.

    Attributes:
        harmful, harmless: rows of the prompt set.
        n_kl: number of harmless prompts, from the first on, whose KL is taken.
        places: of the prompts in the batch, harmful ones first.
    """

    harmful: tuple[int, ...]
    harmless: tuple[int, ...]
    n_kl: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class PartPass:
    """One pass over a part, in the order of its places.

    Attributes:
        embeddings: at the target layers.
        log_odds: in nats, that a reply begins as the base's refusals do; 0 where they were not asked for.
        kl_prompt, kl_reply: sums in nats over the tokens of the prompts that have a KL, and of their replies.
    """

    embeddings: Float[Tensor, "place layer d_model"]
    log_odds: Float[Tensor, "place"]
    kl_prompt: Float[Tensor, ""]
    kl_reply: Float[Tensor, ""]


class Workload:
    """One process's view of a fine-tune's prompts; creating it measures the base.

    Attributes:
        refusal_openings: of the vocabulary, the tokens that begin more of the base's refusals than of its other replies
            to `tune` and `validation` prompts.
        usual_log_odds: the base's mean log-odds, in nats, of beginning its reply to a harmless prompt with one of them.
        validated: the embeddings of the `validation` prompts at the latest validation, `[prompt, layer, d_model]`.

    Args:
        network: the model, nothing trained yet.
        tokens: of each prompt in the plan.
        words: gives the text of tokens, without special ones.
        answer: gives the text of a reply's tokens after its thinking (`answer_reader`).
        reply_tokens: number of tokens of the base's greedy replies.
        every_harmless: whether `base_embeddings` covers every harmless prompt of the batches.
        harmful: rows of the harmful `tune` and `validation` prompts that the base replies to (`base_refusals`).
        report: of the base measurements (`base`).
    """

    def __init__(
        self,
        network: FinetuneForward,
        plan: BatchSchedule,
        tokens: Mapping[int, Tokens],
        words: Callable[[Tokens], str],
        answer: Callable[[Tokens], str],
        reply_tokens: int,
        every_harmless: bool,
        harmful: Collection[int],
        report: Reporter,
    ) -> None:
        self.network = network
        self.plan = plan
        self.tokens = tokens
        self.processes = PartialState()
        labels = dict(zip(plan.validation_rows, plan.validation.labels.tolist(), strict=True))
        self._validation_harmless = [row for row, label in labels.items() if label == HARMLESS]
        replied = self._share([row for row, label in labels.items() if label != HARMLESS and row in harmful])
        begun = self._share([row for row, label in labels.items() if label != HARMLESS and row not in harmful])
        self._validation_harmful = (*replied, *begun)
        self._words = words
        self._answer = answer
        self._ends = end_tokens(network.model)
        self.replies: dict[int, BaseReply] = {}
        own = {row for batch in plan.batches for part in self.parts(batch, 1) for row in part.harmful if row in harmful}
        self._measure_base(reply_tokens, every_harmless, {*replied, *own}, begun, report)

    def on(self, network: FinetuneForward) -> Workload:
        """The same prompts and measurements for another view of the same model, at some of the measured layers."""
        other = copy(self)
        other.network = network
        other._base = self._base[:, [self.network.layers.index(layer) for layer in network.layers]]
        return other

    # ------------------------------------------------------------------------------------------------ the base

    def _measure_base(
        self, reply_tokens: int, every_harmless: bool, harmful: set[int], begun: Sequence[int], report: Reporter
    ) -> None:
        """Reply to this process's share of the KL prompts and to its `harmful` ones, and with one token to those of
        `begun`; embed its share of the rest, and exchange embeddings.
        """
        plan = self.plan
        known = {*plan.base_harmful, *plan.base_harmless, *plan.validation_rows} | (
            set(plan.harmless) if every_harmless else set()
        )
        self._place_of = {row: place for place, row in enumerate(sorted(known))}
        replied = {row for batch in plan.batches for part in self.parts(batch, 1) for row in part.harmless[: part.n_kl]}
        replied |= {*self._share(plan.validation_kl), *self._share(plan.tested)}
        replied |= harmful
        done, total = 0, len(replied) + len(begun) + 1
        report("base", done, total)
        found: dict[int, Tensor] = {}
        for rows, n_tokens in ((sorted(replied), reply_tokens), (sorted(begun), 1)):
            for index, reply, embedding in self.network.reply(self._tokens(rows), n_tokens, self._ends):
                self.replies[rows[index]] = reply
                if rows[index] in known:
                    found[rows[index]] = embedding
                done += 1
                report("base", done, total)
        decisive = replied - set(plan.tested)
        refused = {row for row in decisive if self.is_refusal(self.replies[row].reply)}
        self._refused = refused & harmful
        self._find_openings(decisive, refused)
        rows = [row for row in self._share(sorted(known)) if row not in found]
        with torch.no_grad():
            embeddings = self.network.embed(self._tokens(rows))
        found |= dict(zip(rows, embeddings, strict=True))
        report("base", total, total)
        values = torch.stack([value.to(self.network.device) for value in found.values()]) if found else embeddings
        places = [self._place_of[row] for row in found]
        # A prompt that several processes replied to was measured by each of them.
        times = self._scatter(places, torch.ones(len(places), 1, 1), len(known))
        self._base = self._scatter(places, values, len(known)) / times

    def _find_openings(self, replied: Collection[int], refused: Collection[int]) -> None:
        """Set `refusal_openings` and `usual_log_odds`."""
        counts = torch.zeros(2, len(self.network.head.weight))
        for row in replied:
            counts[int(row in refused), self.replies[row].reply[0]] += 1
        others, refusals = self.total(counts.to(self.network.device))
        self.refusal_openings: Bool[Tensor, "vocab"] = refusals > others
        harmless = [self.replies[row] for row in {*replied}.intersection(self.plan.harmless)]
        odds = torch.zeros(2, device=self.network.device)
        if harmless and bool(self.refusal_openings.any()):
            last = torch.stack([record.states[record.n_prompt - 1] for record in harmless]).to(self.network.device)
            odds = torch.stack([self._log_odds(last).sum().float(), torch.tensor(float(len(harmless))).to(odds)])
        total, n = self.total(odds).tolist()
        self.usual_log_odds = total / max(n, 1)

    def base_embeddings(self, rows: Sequence[int]) -> Float[Tensor, "prompt layer d_model"]:
        """The base's embeddings at the target layers of the plan's base prompts or of `validation` ones."""
        return self._base[[self._place_of[row] for row in rows]]

    def is_refusal(self, reply: Tokens) -> bool:
        """Whether a reply, after its thinking, refuses by the rules."""
        return judge_reply(self._answer(reply)) == "refusal"

    def base_refusals(self, rows: Iterable[int]) -> dict[int, BaseReply]:
        """The base's replies to those of this process's harmful prompts among `rows` that it refuses.

        It was asked for them when the workload was created; other rows are left out.
        """
        return {row: self.replies[row] for row in rows if row in self._refused}

    def base_layers(self) -> dict[int, BaseLayer]:
        """The constants of the separation terms, by target layer, over the first `tune` prompts of the batches."""
        harmful, harmless = self.base_embeddings(self.plan.base_harmful), self.base_embeddings(self.plan.base_harmless)
        return {
            layer: measure_base(harmful[:, index], harmless[:, index])
            for index, layer in enumerate(self.network.layers)
        }

    # ------------------------------------------------------------------------------------------------ one step

    def parts(self, batch: Batch, n: int) -> list[Part]:
        """This process's share of a batch in `n` parts, or fewer where it has fewer prompts and need not keep step."""
        harmful, harmless = self._own_places(batch.harmful), self._own_places(batch.harmless, batch.n_kl)
        parts = []
        for start in range(n):
            some, others = harmful[start::n], harmless[start::n]
            if some or others or self.network.in_step:
                part = Part(
                    harmful=tuple(batch.harmful[place] for place in some),
                    harmless=tuple(batch.harmless[place] for place in others),
                    n_kl=sum(place < batch.n_kl for place in others),
                    places=(*some, *(len(batch.harmful) + place for place in others)),
                )
                parts.append(part)
        return parts

    def count_tokens(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Numbers of tokens of harmless prompts, and of replies, under the KLs of all processes' parts."""
        mine = [self.replies[row] for part in parts for row in part.harmless[: part.n_kl]]
        counts = [sum(record.n_prompt for record in mine), sum(len(record.reply) for record in mine)]
        n_prompt, n_reply = self.total(torch.tensor(counts, device=self.network.device)).tolist()
        return n_prompt, n_reply

    def look(self, part: Part, ahead: bool) -> tuple[Float[Tensor, "place layer d_model"], Float[Tensor, "place"]]:
        """The embeddings and, if asked for, the log-odds of a part, in the order of its places."""
        return self._look((*part.harmful, *part.harmless), ahead, None)

    def run(self, part: Part, ahead: bool = False) -> PartPass:
        """What a step needs of a part; `ahead` asks for the log-odds, which take every prompt to full depth."""
        shared = self.network.run_template_prefix()
        n_harmful, with_kl = len(part.harmful), part.harmless[: part.n_kl]
        embedded, odds = self._look((*part.harmful, *part.harmless[part.n_kl :]), ahead, shared)
        read = self.network.read_harmless(self._tokens(with_kl), [self.replies[row] for row in with_kl], shared)
        read_odds = self._log_odds(read.ahead) if ahead else odds.new_zeros(len(with_kl))
        return PartPass(
            torch.cat([embedded[:n_harmful], read.embeddings, embedded[n_harmful:]]),
            torch.cat([odds[:n_harmful], read_odds, odds[n_harmful:]]),
            read.kl_prompt,
            read.kl_reply,
        )

    def _look(self, rows: Sequence[int], ahead: bool, shared: KeysAndValues | None) -> tuple[Tensor, Tensor]:
        if not ahead:
            embeddings = self.network.embed(self._tokens(rows), shared)
            return embeddings, embeddings.new_zeros(len(rows))
        embeddings, states = self.network.look_ahead(self._tokens(rows), shared)
        return embeddings, self._log_odds(states)

    def _log_odds(self, states: Float[Tensor, "place d_model"]) -> Float[Tensor, "place"]:
        return self.network.head.log_odds(states, self.refusal_openings)

    def gather(self, parts: Sequence[Part], values: Sequence[Tensor], n_places: int, shape: Sequence[int]) -> Tensor:
        """The values of the whole batch from those of every process's parts, without their graphs, `shape` for each."""
        places = [place for part in parts for place in part.places]
        found = torch.cat([part.detach() for part in values]) if places else self._base.new_zeros(0, *shape)
        return self._scatter(places, found, n_places)

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
    def validate(self, step: int) -> ValidationPoint:
        """Measure the `validation` prompts with the model as it is now."""
        rows = self.plan.validation_rows
        place = {row: index for index, row in enumerate(rows)}
        harmful = self._validation_harmful
        refused = self.base_refusals(harmful)
        replies = [self.replies[row].reply[: None if row in refused else 1] for row in harmful]
        embedded, scores = self.network.score(self._tokens(harmful), replies)
        with_kl = self._share(self.plan.validation_kl)
        without = self._share([row for row in self._validation_harmless if row not in self.plan.validation_kl])
        part = Part((), (*with_kl, *without), len(with_kl), ())
        run = self.run(part)
        mine = [place[row] for row in (*harmful, *part.harmless)]
        self.validated = self._scatter(mine, torch.cat([embedded, run.embeddings]), len(rows))
        kept = self._refusal_numbers(dict(zip(harmful, scores, strict=True)))
        return ValidationPoint(step, *self._mean_kls(part, run), self._numbers(self.validated), **kept)

    def validate_base(self) -> ValidationPoint:
        """What `validate` would measure before the first step, from the base's embeddings and replies."""
        kept = self._refusal_numbers(
            {row: self.network.score_base(self.replies[row]) for row in self._validation_harmful}
        )
        self.validated = self.base_embeddings(self.plan.validation_rows)
        return ValidationPoint(0, 0.0, 0.0, self._numbers(self.validated), **kept)

    def begin_film(self, run: Path, base: ValidationPoint, step: int) -> None:
        """Drop what the film of a run folder holds beyond a step, and keep the base's. Raises `MachineError`."""
        self.on_main(lambda: cut_film(run / FILM, after=step))
        self.film(run, base)

    def film(self, run: Path, point: ValidationPoint) -> None:
        """Keep the embeddings of the latest validation, and its numbers, in a run folder. Raises `MachineError`."""
        filmed = list(self.plan.filmed)
        shown, embeddings = self.plan.validation.take(filmed), self.validated[filmed].transpose(0, 1)
        numbers = {name: getattr(point, name) for name in ("kl_prompt", "kl_reply")}
        numbers["mean_difference_margin"] = point.mean("mean_difference_margin")
        self.on_main(
            lambda: write_frame(
                run / FILM,
                point.step,
                embeddings.detach().float().cpu().numpy(),
                layers=self.network.layers,
                labels=shown.labels,
                texts=shown.texts,
                numbers=numbers,
            )
        )

    def _refusal_numbers(self, scores: Mapping[int, ReplyScore]) -> dict[str, Any]:
        """What became of the base's refusals and of first tokens, over all processes' harmful `validation` prompts."""
        refusals = [scores[row] for row in self.base_refusals(scores)]
        firsts = [score.choices[0] for score in scores.values()]
        counts = [
            len(refusals),
            sum(score.begins_alike(REFUSAL_OPENING) for score in refusals),
            sum(len(score.reply) for score in refusals),
            sum(score.agreed for score in refusals),
            sum(float(score.log_probs.sum()) for score in refusals),
            len(firsts),
            sum(self._is_broken(token) for token in firsts),
        ]
        summed = self.total(torch.tensor(counts, dtype=torch.float32, device=self.network.device)).tolist()
        n_refusals, n_kept, n_tokens, n_agreed, log_prob, n_first, n_broken = summed
        return {
            "n_refusals": int(n_refusals),
            "refusals_kept": n_kept / n_refusals if n_refusals else None,
            "refusal_agreement": n_agreed / n_tokens if n_refusals else None,
            "refusal_log_prob": log_prob / n_tokens if n_refusals else None,
            "broken_first": n_broken / n_first,
        }

    def _is_broken(self, first: int) -> bool:
        """Whether a reply that begins with this token says nothing there: it ends, or has neither letter nor digit."""
        return first in self._ends or not any(map(str.isalnum, self._words((first,))))

    @torch.no_grad()
    def measure_kl(self) -> dict[str, float] | None:
        """The KLs on the harmless `test` prompts with the model as it is now; `None` if there are none."""
        if not self.plan.tested:
            return None
        rows = tuple(self._share(self.plan.tested))
        part = Part((), rows, len(rows), ())
        kl_prompt, kl_reply = self._mean_kls(part, self.run(part))
        return {"prompt": kl_prompt, "reply": kl_reply}

    def _numbers(self, tuned: Float[Tensor, "prompt layer d_model"]) -> dict[int, dict[str, float]]:
        """The scale-free numbers of the `validation` prompts, by target layer."""
        base, now = self.base_embeddings(self.plan.validation_rows).cpu().numpy(), tuned.cpu().numpy()
        return {
            layer: validation_numbers(self.plan.validation, base[:, index], now[:, index])
            for index, layer in enumerate(self.network.layers)
        }

    def _mean_kls(self, part: Part, run: PartPass) -> tuple[float, float]:
        """Both KLs in nats per token, over all processes' parts."""
        n_prompt, n_reply = self.count_tokens([part])
        kl_prompt, kl_reply = self.total(torch.stack([run.kl_prompt, run.kl_reply])).tolist()
        return kl_prompt / n_prompt, kl_reply / n_reply

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
        """Report from the main process; whether that cancelled the run."""
        cancelled = False
        if self.processes.is_main_process:
            try:
                report()
            except Cancelled:
                cancelled = True
        if self.processes.num_processes == 1:
            return cancelled
        return bool(self.total(torch.tensor(float(cancelled), device=self.network.device)))

    def _own_places(self, rows: Sequence[int], n_kl: int = 0) -> list[int]:
        """The places in `rows` of this process's prompts: every n-th by length, the costlier first `n_kl` before."""
        by_length = sorted(range(len(rows)), key=lambda place: (place >= n_kl, -len(self.tokens[rows[place]]), place))
        return by_length[self.processes.process_index :: self.processes.num_processes]

    def _share(self, rows: Sequence[int]) -> list[int]:
        """The prompts that this process works on."""
        return [rows[place] for place in self._own_places(rows)]

    def _tokens(self, rows: Sequence[int]) -> list[Tokens]:
        return [self.tokens[row] for row in rows]

    def _scatter(self, places: Sequence[int], values: Tensor, n_places: int) -> Tensor:
        """Values of all processes by place; a place that several processes fill holds the sum."""
        scattered = torch.zeros(n_places, *values.shape[1:], device=self.network.device)
        scattered[list(places)] = values.to(scattered)
        return self.total(scattered)
