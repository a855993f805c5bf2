"""Work that processes share: every piece is done once, whoever of them fails, and nobody stays behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import es2.analysis.layers
import es2.core.process_pool
from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.core.process_pool import Helpers
from es2.store.sources import ArrayLayers, Readers
from tests.analysis.test_layers import assert_same
from tests.clouds import clouds, paired_prompts
from tests.helping import PATIENCE, die_elsewhere, fail_elsewhere, where


def spread(
    work: Callable[..., Any], shared: Any, read: Callable[[int], tuple[Any, ...]], n_pieces: int, n_helpers: int
) -> list[tuple[int, Any]]:
    with Helpers(n_helpers, work) as helpers:
        return list(helpers.map_pieces(shared, read, n_pieces))


def one(number: int) -> tuple[int, ...]:
    return (number,)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "es2.core.process_pool" in " ".join(child.cmdline())]


@pytest.mark.parametrize("n_helpers", [0, 1, 3])
def test_every_piece_is_done_once(n_helpers: int) -> None:
    answers = spread(pow, 3, one, 20, n_helpers)
    assert sorted(answers) == [(number, 3**number) for number in range(20)]
    assert children() == []


def test_helpers_take_their_share(tmp_path: Path) -> None:
    processes = dict(spread(where, tmp_path, one, 6, 1))
    assert sorted(processes) == list(range(6))
    assert len(set(processes.values())) == 2


def test_what_fails_in_a_helper_is_told_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"piece \d+ cannot be done") as caught:
        spread(fail_elsewhere, (tmp_path, os.getpid()), one, 10, 1)
    assert "fail_elsewhere" in caught.value.__notes__[0]
    assert children() == []


def test_what_cannot_be_read_is_told_here() -> None:
    def read(number: int) -> tuple[int, ...]:
        if number == 5:
            raise IndexError("no layer 5")
        return (number,)

    with pytest.raises(IndexError, match="no layer 5"):
        spread(pow, 3, read, 10, 1)


def test_the_pieces_of_a_helper_that_dies_are_done_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answers = spread(die_elsewhere, (tmp_path, os.getpid()), one, 10, 1)
    assert sorted(number for number, _ in answers) == list(range(10))
    assert "A helping process has ended" in caplog.text


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(es2.core.process_pool.subprocess, "Popen", refuse)
    assert len(spread(pow, 3, one, 4, 2)) == 4
    assert "No process can be started" in caplog.text


def test_closing_early_leaves_nobody_behind() -> None:
    with Helpers(2, pow) as helpers:
        next(helpers.map_pieces(3, one, 1000))
        assert len(children()) == 2
    assert children() == []


def test_helpers_end_with_the_process_that_started_them() -> None:
    script = (
        "import time; from es2.core.process_pool import Helpers\n"
        "answers = Helpers(1, pow).map_pieces(3, lambda number: (number,), 10)\n"
        "next(answers); print('begun', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (helper,) = psutil.Process(process.pid).children()
        process.kill()
    helper.wait(PATIENCE)


def test_an_analysis_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = paired_prompts(60)
    base = ArrayLayers(clouds(prompts, (0.0, 1.5, 4.0, 2.0)))
    config = AnalysisConfig(n_bootstrap=100, n_shuffles=2)
    alone = analyze(prompts, base, config=config)
    read, taken = es2.analysis.layers._read_layer, threading.Event()

    def wait_for_the_other(layer: int, readers: Readers) -> tuple[Any, ...]:
        if threading.current_thread() is not threading.main_thread():
            taken.set()
        assert taken.wait(PATIENCE)
        return read(layer, readers)

    monkeypatch.setattr(es2.analysis.layers, "_read_layer", wait_for_the_other)
    monkeypatch.setattr(es2.analysis.layers, "_n_helpers", lambda n_layers, n_prompts: 1)
    together = analyze(prompts, base, config=config)
    assert_same(alone, together, rtol=0)
    np.testing.assert_array_equal(alone.base_probes.weights, together.base_probes.weights)


def test_only_what_takes_long_is_shared() -> None:
    assert es2.analysis.layers._n_helpers(4, 120) == 0
    assert es2.analysis.layers._n_helpers(30, 814) == min(os.cpu_count() or 1, es2.analysis.layers.MAX_PROCESSES) - 1
