"""One step of the shipped fine-tune against a straightforward one, and against running the prompts forward only.

Both take the same steps from the same adapter on the same batches, with the same terms, so their losses have to agree.
The straightforward one is what the paper's description suggests: a second copy of the model as reference, every prompt
through all blocks of both with its whole template, logits of all tokens, the KL from two full softmaxes. The base's
replies, which the KL covers, are given to both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from es2.core.progress import silent
from es2.models.forward import FinetuneForward
from es2.models.loading import load_model, load_tokenizer
from es2.training.base import _tokens
from es2.training.config import FinetuneConfig
from es2.training.objective import es2_loss, running_direction, separation
from es2.training.sampling import Batch, make_schedule
from es2.training.terms import parse_objective
from es2.training.trainable import automatic_learning_rate, make_trainable
from es2.training.workload import Workload
from tests.benchmarks.capture import padded
from tests.benchmarks.contest import Figure, Report, Settings, ratio

VALIDATED = 2  # prompts of each label: `validation` takes no part in a step, but a plan needs some


class _Steps:
    """What both contestants share: the plan, an adapter of the same first weights, the optimizer and the terms."""

    def __init__(self, settings: Settings, config: FinetuneConfig) -> None:
        self.config = config
        self.plan = make_schedule(
            settings.prompts, config.pairs_per_step, config.steps, config.seed, VALIDATED, config.kl_prompts
        )
        self.tokens, self.head = _tokens(load_tokenizer(settings.folder), None, settings.prompts, self.plan, config)
        self.model = load_model(settings.folder, dtype="float32", device="cpu").requires_grad_(False)
        self.network = FinetuneForward(self.model, template_prefix=self.head, layers=config.targets)
        self.terms = parse_objective(config.objective)
        self.number = 0

    def prepare(self, base: Any) -> None:
        """Put the adapter in; `base` holds the constants of the separation terms."""
        config = self.config
        self.peak = config.learning_rate or automatic_learning_rate(self.network, config)
        self.trained, _ = make_trainable(self.network, config, "")
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=self.peak, weight_decay=0.0)
        self.base = base
        self.directions = torch.stack([layer.difference for layer in base.values()])

    def separation(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        """What the step makes large."""
        for index, direction in enumerate(self.directions):
            self.directions[index] = running_direction(direction, harmful[:, index], harmless[:, index])
        return separation(self.terms, harmful, harmless, harmless_base=None, base=self.base, directions=self.directions)

    def update(self) -> None:
        """Clip and step, at the learning rate of the schedule."""
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.number, self.peak)
        self.optimizer.step()
        self.number += 1


class Ours(_Steps):
    """The shipped step, by the functions that the fine-tune itself calls."""

    def __init__(self, settings: Settings, config: FinetuneConfig) -> None:
        super().__init__(settings, config)
        self.workload = Workload(
            self.network,
            self.plan,
            self.tokens,
            words=str,
            answer=str,
            reply_tokens=config.reply_tokens,
            every_harmless=False,
            harmful=(),
            report=silent,
        )
        self.prepare(self.workload.base_layers())

    def step(self) -> float:
        """The loss of the next step."""
        batch = self.plan.batches[self.number]
        (part,) = self.workload.parts(batch, 1)
        n_prompt, n_reply = self.workload.count_tokens([part])
        run, shape = self.workload.run(part), self.network.embedding_shape
        embeddings = self.workload.gather([part], [run.embeddings], 2 * len(batch.harmful), shape).requires_grad_()
        value = self.separation(embeddings[: len(batch.harmful)], embeddings[len(batch.harmful) :])
        (towards,) = torch.autograd.grad(value, embeddings)
        self.optimizer.zero_grad()
        share = (towards[list(part.places)] * run.embeddings).sum()
        kl_prompt, kl_reply = run.kl_prompt / n_prompt, run.kl_reply / n_reply
        es2_loss(share, kl_prompt, kl_reply, self.config.kl_weight).backward()
        self.update()
        return es2_loss(value.item(), kl_prompt.item(), kl_reply.item(), self.config.kl_weight)


class Straightforward(_Steps):
    """A second model, all blocks, all logits."""

    def __init__(self, settings: Settings, config: FinetuneConfig, ours: Ours) -> None:
        super().__init__(settings, config)
        self.reference = load_model(settings.folder, dtype="float32", device="cpu").requires_grad_(False)
        self.replies = {row: record.reply for row, record in ours.workload.replies.items()}
        self.prepare(ours.base)

    def read(self, sequences: Sequence[Sequence[int]], last: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, the tuned model's logits and the reference's."""
        input_ids, mask, _ = padded(sequences)
        output = self.model(input_ids, attention_mask=mask, output_hidden_states=True)
        with torch.no_grad():
            reference = self.reference(input_ids, attention_mask=mask).logits
        rows, columns = torch.arange(len(sequences)), torch.tensor(last)
        states = [output.hidden_states[layer + 1][rows, columns] for layer in self.config.targets]
        return torch.stack(states, dim=1), output.logits, reference

    def sequences(self, batch: Batch) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """The harmful prompts, and the harmless ones with the replies of those whose KL is taken."""
        harmless = [
            (*self.tokens[row], *(self.replies[row][:-1] if place < batch.n_kl else ()))
            for place, row in enumerate(batch.harmless)
        ]
        return [tuple(self.tokens[row]) for row in batch.harmful], harmless

    def step(self) -> float:
        """The loss of the next step."""
        batch = self.plan.batches[self.number]
        harmful, harmless = self.sequences(batch)
        here, _, _ = self.read(harmful, [len(tokens) - 1 for tokens in harmful])
        ends = [len(self.tokens[row]) - 1 for row in batch.harmless]
        there, logits, reference = self.read(harmless, ends)
        value = self.separation(here, there)
        log_base = reference.log_softmax(dim=-1)
        divergence = (log_base.exp() * (log_base - logits.log_softmax(dim=-1))).sum(dim=-1)
        prompt, reply = [], []
        for place in range(batch.n_kl):
            prompt.append(divergence[place, len(self.head) : ends[place] + 1])
            reply.append(divergence[place, ends[place] : len(harmless[place])])
        kl_prompt, kl_reply = torch.cat(prompt).mean(), torch.cat(reply).mean()
        loss = -value + self.config.kl_weight * (kl_prompt + kl_reply)
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.item()

    def forward(self) -> None:
        """The same prompts through the model once, without gradients and replies."""
        batch = self.plan.batches[self.number - 1]
        with torch.no_grad():
            for rows in (batch.harmful, batch.harmless):
                input_ids, mask, _ = padded([self.tokens[row] for row in rows])
                self.reference(input_ids, attention_mask=mask)


def measure(settings: Settings, config: FinetuneConfig | None = None) -> Report:
    """Time of a step, and how far the losses of both ways lie apart."""
    config = config or FinetuneConfig(layers=(16, 22), steps=settings.repeats)
    ours = Ours(settings, config)
    plain = Straightforward(settings, config, ours)
    losses: dict[str, list[float]] = {"ours": [], "straightforward": []}

    def stepped(name: str, step: Callable[[], float]) -> Callable[[], None]:
        return lambda: losses[name].append(step())

    seconds, _ = settings.alternate(
        {
            "straightforward": stepped("straightforward", plain.step),
            "ours": stepped("ours", ours.step),
            "forward": plain.forward,
        }
    )
    apart = max(abs(one - other) for one, other in zip(*losses.values(), strict=True))
    figures = (
        Figure("straightforward step ÷ ours", ratio(seconds, "straightforward", "ours"), "×", at_least=2.5),
        Figure("ours ÷ forward only", ratio(seconds, "ours", "forward"), "×"),
        Figure("ours", statistics.median(seconds["ours"]), "s"),
        Figure("largest difference of the losses", apart, "", at_most=0.01),
    )
    details = {"pairs": config.pairs_per_step, "seconds": seconds, "losses": losses}
    return Report("step", figures, details)
