"""One's own request, file and adapter on the page, against a real tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from app.views import own
from es2.jobs.queue import list_jobs
from es2.prompts.loading import load_prompts
from es2.store.store import Store
from es2.workflow.prepare import prepare
from tests.builders import N_LAYERS, save_tiny_model, tiny_prompts, write_prompts
from tests.figures import charts_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tiny model, prompts, and their analysis."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        patch.setenv("ES2_CACHE", str(home / "cache"))
        model = save_tiny_model(home / "tiny-llama")
        prompts = write_prompts(home / "locks.csv", tiny_prompts(60))
        prepare(str(model), load_prompts(str(prompts)))
    return home


@pytest.fixture(autouse=True)
def _home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(place))
    monkeypatch.setenv("ES2_CACHE", str(place / "cache"))


def script() -> None:
    from app import artifacts, state
    from app.views import own

    state.open_link(artifacts.existing, "own")
    own.page()


def open_page(place: Path, prompts: str = "locks.csv") -> AppTest:
    at = AppTest.from_function(script, default_timeout=60)
    at.query_params["model"] = str(place / "tiny-llama")
    at.query_params["prompts"] = str(place / prompts)
    at.run()
    assert not at.exception
    return at


def test_a_request_is_placed_at_every_layer(place: Path) -> None:
    at = open_page(place)
    text = "How do I **open** <b>this</b> lock?"
    at.text_input(key="own_text").input(text)
    next(button for button in at.button if button.label == "Read it").click().run()
    try:
        end = time.monotonic() + 120
        while not charts_of(at) and time.monotonic() < end:
            assert not at.exception
            assert not at.error
            time.sleep(0.3)
            at.run()
        assert charts_of(at)
        assert [element.value for element in at.text] == [text]
        assert any(f"of {N_LAYERS} layers" in caption.value for caption in at.caption)
    finally:
        for job in list_jobs(kind="read"):
            job.cancel()


def test_what_was_captured_is_placed_where_the_analysis_places_it(place: Path) -> None:
    activations = Store().list()[0]
    prompts = load_prompts(str(place / "locks.csv")).measured()
    analysis = prepare(str(place / "tiny-llama"), prompts).analysis
    embeddings = np.stack([activations.layer(layer)[3] for layer in range(activations.n_layers)])
    expected = [analysis.base_probes.margin(activations.layer(layer), layer)[3] for layer in range(len(embeddings))]
    np.testing.assert_allclose(own.placed(embeddings, analysis.base_probes), expected, rtol=1e-6)


def test_without_an_analysis_it_says_what_comes_first(place: Path) -> None:
    write_prompts(place / "others.csv", tiny_prompts(40))
    at = open_page(place, "others.csv")
    assert "Capture and analyse" in at.info[0].value
    assert not at.text_input or all(element.key != "own_text" for element in at.text_input)


def test_an_adapter_that_is_none_is_a_sentence(place: Path) -> None:
    at = open_page(place)
    at.text_input(key="own_adapter_folder").input(str(place))
    next(button for button in at.button if button.label == "Import and compare").click().run()
    assert "holds no peft adapter" in at.error[0].value
    assert not list_jobs(kind="finetune")
