"""The comparison itself: it sees faults that are planted, and its page can be read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.capture import capture as capture_module
from es2.core.errors import InputError
from es2.models.forward import FinetuneForward
from es2.models.loading import load_model
from es2.models.replies import ReplyBatch
from tests.architectures import cells, plain
from tests.architectures.configs import ARCHITECTURES
from tests.architectures.outcomes import (
    EQUAL,
    IN_PART,
    OWN_HOOKS,
    REFUSED,
    TRACEBACK,
    WRONG,
    Cell,
    Row,
    attempt,
    markdown,
    outcomes_in,
)
from tests.architectures.table import MARK, page

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cells.Trial:
    for name in ("HOME", "CACHE", "SHOWCASE"):
        monkeypatch.setenv(f"ES2_{name}", str(tmp_path / name))
    return cells.Trial(ARCHITECTURES["llama"], tmp_path)


def test_a_model_without_faults_is_equal_and_its_adapter_is_seen(trial: cells.Trial) -> None:
    found = dict(trial.cells())
    assert {cell.outcome for cell in found.values()} == {EQUAL}, found
    assert all(0 < (found[column].difference or 0) < 2e-5 for column in ("capture", "fine-tune", "merge"))
    assert [adapter.name for adapter in trial.adapters] == ["adapter-lora"]


def test_layers_that_are_shifted_are_seen(trial: cells.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    read = capture_module.capture_residuals

    def shifted(*given: Any, into: Path | None = None, **settings: Any) -> dict[str, np.ndarray]:
        found = read(*given, into=into, **settings)
        for array in found.values():
            array[1:] = array[:-1].copy()
        return found

    monkeypatch.setattr(capture_module, "capture_residuals", shifted)
    ((_, cell),) = trial.cells(["capture"])
    assert cell.outcome == WRONG
    assert "by layer: " in cell.detail


def test_a_token_that_is_another_is_seen(trial: cells.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = cells.greedy_replies

    def other(*given: Any, **settings: Any) -> Iterator[ReplyBatch]:
        for batch in reply(*given, **settings):
            yield replace(batch, replies=tuple((*tokens[:-1], (tokens[-1] + 1) % 300) for tokens in batch.replies))

    monkeypatch.setattr(cells, "greedy_replies", other)
    ((_, cell),) = trial.cells(["replies"])
    assert cell.outcome == WRONG


def test_base_embeddings_that_are_off_are_seen(trial: cells.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = FinetuneForward.reply

    def off(*given: Any, **settings: Any) -> Iterator[tuple[Any, ...]]:
        for index, record, embedding in reply(*given, **settings):
            yield index, record, 1.01 * embedding

    monkeypatch.setattr(FinetuneForward, "reply", off)
    ((_, cell),) = trial.cells(["fine-tune"])
    assert cell.outcome == WRONG
    assert "the base's embeddings differ" in cell.detail


def test_an_adapter_that_was_not_merged_is_seen(trial: cells.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "load_tuned", lambda folder, adapter, **settings: load_model(folder, **settings))
    ((_, cell),) = trial.cells(["merge"])
    assert cell.outcome == WRONG
    assert "merged: states differ" in cell.detail


def test_the_reference_steers_the_tokens_that_are_read_last(trial: cells.Trial) -> None:
    import torch

    tokens = trial.rendered[0][0]
    push = plain.Push(1, torch.nn.functional.normalize(torch.ones(32), dim=0), 0.5, len(tokens) - 1)
    before, after = (trial.plain.read(tokens, steered).states for steered in (None, push))
    moved = (after - before).norm(dim=-1)
    assert torch.equal(moved > 0, torch.arange(len(tokens))[None] >= torch.tensor([[999], *[[len(tokens) - 1]] * 3]))
    assert moved[1, -1].item() == pytest.approx(0.5 * before[1, -1].norm().item(), rel=1e-5)


def ends(error: Exception) -> Cell:
    def compare() -> Cell:
        raise error

    return attempt(compare, Path("/models"))


def test_what_a_user_would_see_decides_the_cell() -> None:
    assert ends(InputError("There is no model in '/models/tiny'; give one.")) == Cell(
        REFUSED, None, "There is no model in 'MODEL/tiny'; give one."
    )
    assert ends(InputError("No\nsentence.")).outcome == WRONG
    fault = ends(KeyError("layer"))
    assert fault.outcome == TRACEBACK
    assert "KeyError: 'layer' (test_harness.py:" in fault.detail


def test_a_page_says_what_was_seen() -> None:
    rows = [
        Row("one", {"capture": Cell(OWN_HOOKS, 3e-7), "merge": Cell(REFUSED, None, "It is one | of two.")}),
        Row("two, tied", {"capture": Cell(IN_PART, None, "It is none."), "merge": Cell(WRONG, None, "a | b")}),
    ]
    text = page(f"# Title\n\n{MARK}\nold", {"Architectures": markdown(rows, "architecture")})
    assert text.startswith("# Title\n")
    assert "old" not in text
    assert "\n2. It is one | of two.\n" in text
    assert "| one | own hooks 3e-07 | refused (2) |" in text
    assert outcomes_in(text, 2) == {"one": [OWN_HOOKS, REFUSED], "two, tied": [IN_PART, WRONG]}
