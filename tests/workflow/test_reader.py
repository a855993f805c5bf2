"""The process that keeps a model in memory, asked by another: a real one, on a tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from es2.capture.capture import capture
from es2.core.errors import InputError
from es2.core.progress import silent
from es2.jobs.job import Job
from es2.prompts.prompt_set import PromptSet
from es2.workflow import reader
from es2.workflow.reader import PromptEmbeddings, answer, ask, open_reader
from tests.builders import save_tiny_model, tiny_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))


def wait_for(job: Job, id: str, seconds: float = 120) -> PromptEmbeddings:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := answer(job, id)) is not None:
            return found
        time.sleep(0.05)
    raise AssertionError("no answer")


def test_answers_what_a_capture_would_and_is_asked_again(model: Path) -> None:
    prompts = PromptSet("two", *_columns(tiny_prompts(1)))
    job = open_reader(str(model))
    try:
        readings = [wait_for(job, ask(job, text)) for text in prompts.texts]
        assert open_reader(str(model)).id == job.id, "one model is loaded once"
        with pytest.raises(InputError, match="empty"):
            ask(job, "  \n")
        captured = capture(str(model), prompts).activations
        for row, reading in enumerate(readings):
            assert reading.text == prompts.texts[row]
            assert reading.tuned is None
            for position, values in reading.base.items():
                expected = np.stack([captured.layer(l, position)[row] for l in range(captured.n_layers)])
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    finally:
        job.cancel()
    while job.is_active():
        time.sleep(0.05)
    late = ask(job, "How do I oil a lock?")
    with pytest.raises(InputError, match="let go of"):
        answer(job, late)


def _columns(prompts: PromptSet) -> tuple[object, ...]:
    return prompts.texts, prompts.labels, prompts.categories, prompts.pairs, prompts.splits


def test_lets_go_of_the_model_when_nobody_asks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "IDLE_SECONDS", 0.2)
    assert reader.read_job({"model": str(model)}, silent, tmp_path) == {"answered": 0}


def test_a_prompt_that_cannot_be_read_is_answered_with_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "IDLE_SECONDS", 0.2)
    job = Job(tmp_path, {"kind": "read", "created": ""})
    bad = ask(job, "x")
    (tmp_path / "questions" / f"{bad}.json").write_text("{")
    good = ask(job, "How do I oil a lock?")
    assert reader.read_job({"model": str(model)}, silent, tmp_path) == {"answered": 2}
    with pytest.raises(InputError):
        answer(job, bad)
    found = answer(job, good)
    assert found is not None
    assert found.n_tokens > 3
