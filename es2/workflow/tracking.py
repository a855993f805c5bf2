"""The numbers of a fine-tune in an experiment tracker, through accelerate's trackers.

The tracker sees what a `Reporter` sees, so the fine-tune knows nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from es2.core.errors import InputError, MachineError, one_line
from es2.core.progress import Reporter
from es2.jobs.job import Job
from es2.models.placement import processes_of_launch

logger = logging.getLogger(__name__)

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""The packages of which a tracker needs one."""
PROJECT = "es2"


def check_tracker(name: str) -> None:
    """Refuse an unknown tracker, or one whose package is not installed (`InputError`)."""
    if name not in TRACKERS:
        raise InputError(f"Unknown tracker {name[:40]!r}; one of {', '.join(TRACKERS)}.")
    if not any(map(find_spec, TRACKERS[name])):
        package = TRACKERS[name][0]
        raise InputError(f"The tracker {name} needs a package that is not installed; `pip install {package}`.")


@contextmanager
def tracked(name: str | None, run: Job, report: Reporter) -> Iterator[Reporter]:
    """Yield a reporter that passes on to `report`, and logs the numbers of the run's steps with this tracker, if any.

    TensorBoard's files go to `logs/` of the run's folder. A tracker that fails on the way is left out from there on,
    with a warning: the run goes on.

    Raises:
        MachineError: when the tracker cannot be started, such as without its key.
    """
    if name is None:
        yield report
        return
    tracker = _start(name, run)
    working = True

    def attempt(what: str, *arguments: Any, **more: Any) -> None:
        nonlocal working
        try:
            getattr(tracker, what)(*arguments, **more)
        except Exception as error:  # whatever a service and its client raise
            working = False
            logger.warning("The tracker %s failed (%s); the run goes on without it.", name, one_line(error))

    def both(stage: str, done: int, total: int, **numbers: float) -> None:
        if working and stage == "finetune" and numbers:
            attempt("log", numbers, step=done)
        report(stage, done, total, **numbers)

    try:
        yield both
    finally:
        if working:
            attempt("finish")


def _start(name: str, run: Job) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    processes_of_launch(run.config.get("device"))  # joined as the fine-tune will; a tracker asks for them
    kind = LOGGER_TYPE_TO_CLASS[name]
    where: dict[str, str | Path] = {"logging_dir": run.path / "logs"}
    tracker = kind(PROJECT, **where if kind.requires_logging_directory else {"name": run.id})
    plain = {name: one if isinstance(one, (bool, int, float, str)) else str(one) for name, one in run.config.items()}
    try:
        tracker.start()
        tracker.store_init_configuration(plain)
    except Exception as error:  # likewise
        raise MachineError(f"The tracker {name} cannot be started ({one_line(error)}); leave out --log-to.") from error
    return tracker
