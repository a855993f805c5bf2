"""A capture by all processes of one `accelerate launch`: the prompts are shared out and the embeddings joined again.

The first process captures as usual, but sends the request to the others, which read their shares into a temporary
folder. So key and numbers are those of one process, and the store gets nothing before every share is complete.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from es2.capture.capture import CaptureRequest, CaptureResult, capture
from es2.core.errors import Es2Error, MachineError
from es2.core.files import writing
from es2.core.progress import Reporter, silent
from es2.models.chat_template import Rendered
from es2.models.placement import all_or_none, processes_of_launch
from es2.store.embeddings import lay_out, release_pages
from es2.store.store import Store

if TYPE_CHECKING:
    from accelerate import PartialState
    from jaxtyping import Float


logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=2)  # for the first process to render, and for the slowest to read


def capture_together(
    *arguments: Any, device: str | None = None, store: Store | None = None, **settings: Any
) -> CaptureResult | None:
    """As `capture`, with the reading shared out over the processes of the launch, all of which call it.

    Returns the result in the first process, None in the others.

    Raises:
        InputError, MachineError: as `capture`, and of a share that failed; in the first process only.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return capture(*arguments, device=device, store=store, **settings)

    processes = processes_of_launch(device, timeout=_PATIENCE)
    try:
        if not processes.is_main_process:
            _help(processes)
            return None
        sent: list[bool] = []
        try:
            store = store or Store()
            read = partial(_share_out, processes, store, sent)
            return capture(*arguments, device=device, store=store, read=read, **settings)
        finally:
            if not sent:
                _broadcast(None)  # nothing to read: the store has the set, or the request was refused
    finally:
        processes.destroy_process_group()


def _help(processes: PartialState) -> None:
    """In any process but the first: read a share on request."""
    try:
        if (order := _broadcast(None)) is not None:
            _read_share(processes, *order)
    except Es2Error as error:
        logger.error("%s", error)
    except Exception:
        # The first process knows, or is gone. A failed exit would have the launcher kill it before it can report.
        logger.exception("Process %d failed.", processes.process_index)


def _broadcast(order: tuple[CaptureRequest, Path] | None) -> tuple[CaptureRequest, Path] | None:
    """The first process's `order`, in every process."""
    from accelerate.utils import broadcast_object_list

    (received,) = broadcast_object_list([order])
    return received


def _share_out(
    processes: PartialState, store: Store, sent: list[bool], reading: CaptureRequest, report: Reporter
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """In the first process: have every process read a share, and join the shares."""
    scratch = store.root / f".tmp-{reading.key}-{secrets.token_hex(4)}"
    try:
        with writing(scratch):
            scratch.mkdir(parents=True)
            sent.append(True)
            _broadcast((reading, scratch))
            _read_share(processes, reading, scratch, report)
            return _join(processes.num_processes, reading, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_share(processes: PartialState, reading: CaptureRequest, scratch: Path, report: Reporter = silent) -> None:
    """Read this process's prompts into the folder; returns when all processes have."""

    def read() -> None:
        rows, into = _share(reading.rendered, processes.process_index, processes.num_processes, scratch)
        if rows:
            selected = reading.rendered.select(rows)
            replace(reading, rendered=selected, device=str(processes.device), into=into).read(report)

    all_or_none(read)


def _join(
    n_processes: int, reading: CaptureRequest, scratch: Path
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """The embeddings of all shares, prompts in their own order."""
    n_prompts = len(reading.rendered.token_ids)
    joined: dict[str, Float[np.ndarray, "layer prompt d_model"]] = {}
    for index in range(n_processes):
        rows, path = _share(reading.rendered, index, n_processes, scratch)
        if not rows:
            continue
        if not path.is_file():
            raise MachineError(
                f"The share of process {index} is not in {scratch}; on several hosts ES2_HOME has to be a folder that "
                "all of them share."
            )
        with safe_open(path, framework="numpy") as share:
            n_layers, _, d_model = share.get_slice(reading.positions[0]).get_shape()
            if not joined and reading.into is not None:
                joined = lay_out(reading.into, reading.positions, (n_layers, n_prompts, d_model))
            for position, whole in joined.items():
                for l in range(n_layers):
                    whole[l, rows] = share.get_slice(position)[l]
                    release_pages(whole)
    return joined


def _share(rendered: Rendered, index: int, n_processes: int, scratch: Path) -> tuple[list[int], Path]:
    """The prompts of one process, every n-th by length for equal shares, and the file of their embeddings."""
    lengths = [len(tokens) for tokens in rendered.token_ids]
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))[index::n_processes]
    return rows, scratch / f"share-{index}.safetensors"
