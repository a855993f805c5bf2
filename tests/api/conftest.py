"""A folder as the examples of `import es2` describe it: a model, prompts, an adapter, and a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import es2
from es2.api.outcomes import Run
from tests.builders import save_tiny_adapter, save_tiny_model, tiny_prompts, write_prompts


@pytest.fixture(scope="module")
def folder(home: Path) -> Iterator[Path]:
    """The current folder, and the home."""
    model = save_tiny_model(home / "tiny-model", max_position_embeddings=1024)  # the built-in pairs fit
    save_tiny_adapter(home / "adapter", model)
    write_prompts(home / "locks.csv", tiny_prompts(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        patch.setenv("ES2_CACHE", str(home / "cache"))
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def run(folder: Path, one_thread: None) -> Run:
    """A short fine-tune."""
    return es2.finetune("./tiny-model", "locks.csv", layers=[1, 2], steps=2, pairs_per_step=4, replies=False)
