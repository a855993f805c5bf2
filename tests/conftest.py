"""Fixtures that many tests share, for those that ask for them.

No test sees the committed showcase unless it asks for it: what a page shows must not depend on the checkout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure() -> None:
    """Before any fixture, and inherited by every process that a test starts."""
    os.environ["ES2_SHOWCASE"] = str(Path(__file__).with_name("no-showcase"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny models threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for all tests of a file."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is kept below `home`."""
    monkeypatch.setenv("ES2_HOME", str(home))
    monkeypatch.setenv("ES2_CACHE", str(home / "cache"))
    monkeypatch.setenv("ES2_SHOWCASE", str(home / "none"))


@pytest.fixture
def es2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command line in this process; returns the exit code and the JSON document."""
    from es2.cli import main as cli

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["es2", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    return run
