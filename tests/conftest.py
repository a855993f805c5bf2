"""Fixtures that many tests share, for those that ask for them.

No test sees the committed showcase unless it asks for it: what a page shows must not depend on the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure() -> None:
    """Before any fixture, and inherited by every process that a test starts."""
    os.environ["ES2_SHOWCASE"] = str(Path(__file__).with_name("no-showcase"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models threads only wait for each other


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What the `-n auto` of `pyproject.toml` means."""
    from tests.scheduling import n_workers

    return n_workers(config.option.markexpr, config.args)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What its `--dist loadfile` means."""
    from tests.scheduling import OneBrowser

    return OneBrowser(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser's tests first: in one process, they would be what the others wait for in the end."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)


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
def old_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artifacts that commit b0b27d8 left, as the home and the current folder; its model is on the Hub.

    Every file is of the year 2023, so that what is written today stands out.
    """
    from huggingface_hub import constants

    home = shutil.copytree(Path(__file__).with_name("data") / "b0b27d8", tmp_path / "home")
    for path in home.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    for name, folder in (("HOME", "."), ("CACHE", "cache"), ("SHOWCASE", "cached_activations/showcase")):
        monkeypatch.setenv(f"ES2_{name}", str(home / folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.chdir(home)
    return home


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
