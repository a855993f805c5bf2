"""What `RepresentationCallback` adds to a training that saves every 50 steps.

Contestants take turns: a few steps of transformers' `Trainer` on all weights, with two sequences of 512 random tokens
each, and one `on_save` of the callback on a checkpoint that is new each time. What a save costs is given in tokens of
training, and as its part of 50 steps of TRL's usual batch, eight sequences: a step takes as long as its tokens do, and
50 whole steps would take ten minutes a round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from es2.models.loading import load_model, load_tokenizer
from es2.training import RepresentationCallback
from tests.benchmarks.contest import Figure, Report, Settings

SAVED_EVERY = 50
BATCH, AT_ONCE, LENGTH = 8, 2, 512

STEPS = 2


class _Clock(TrainerCallback):
    """The seconds of every step, what leads to the next one included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.marks: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.marks:
            self.marks.append(self.clock())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(self.clock())


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    before = os.environ.get("ES2_HOME")
    os.environ["ES2_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("ES2_HOME")
        if before is not None:
            os.environ["ES2_HOME"] = before


def measure(settings: Settings, *, steps: int = STEPS, length: int = LENGTH) -> Report:
    """Time of a step and of a save's capture, and the part that the second adds to 50 of the first."""
    model = load_model(settings.folder, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(settings.folder)
    ids = torch.randint(0, model.config.vocab_size, (AT_ONCE * steps, length), generator=torch.manual_seed(0))
    rows = [{"input_ids": one, "labels": one} for one in ids]
    per_step: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, _home(Path(scratch) / "home"):
        out = Path(scratch) / "out"
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=AT_ONCE,
            learning_rate=1e-6,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )

        def train() -> None:
            clock = _Clock(settings.clock)
            Trainer(model, arguments, train_dataset=rows, callbacks=[clock]).train()
            per_step.extend(after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False))

        callback = RepresentationCallback(settings.prompts)
        for number in range(1, settings.repeats + 1):  # files that no capture has read
            with torch.no_grad():
                next(model.parameters()).mul_(1 + 1e-4)
            model.save_pretrained(out / f"checkpoint-{number}")
            tokenizer.save_pretrained(out / f"checkpoint-{number}")

        def save() -> None:
            state = TrainerState(global_step=len(callback.captured) + 1, is_world_process_zero=True)
            callback.on_save(arguments, state, TrainerControl(), model=model)

        seconds, _ = settings.alternate({"train": train, "save": save})
        tokens = [found.meta["tokens"] for found in callback.captured.values()]
    step, write = statistics.median(per_step), statistics.median(seconds["save"])
    n_tokens = write / step * AT_ONCE * length
    added = n_tokens / (SAVED_EVERY * BATCH * length)
    figures = (
        Figure("training with the callback ÷ without, a save every 50 steps", 1 + added, "×", at_most=1.05),
        Figure("tokens whose training takes as long as a save's capture", n_tokens, ""),
        Figure("a save's capture", write, "s"),
        Figure("a step of two sequences", step, "s"),
    )
    details = {
        "batch": BATCH,
        "measured_batch": AT_ONCE,
        "length": length,
        "prompts": len(callback.prompts),
        "prompt_tokens": tokens,
        "seconds": {"step": per_step, "save": seconds["save"]},
    }
    return Report("callback", figures, details)
