"""What people do with the workbench, as processes in a home folder of their own, and what each leaves behind.

Everything runs on a tiny random model in processes that are forked from one that has imported torch already, so that a
whole operation takes a second. What is run is what the real processes run: the job's folder is laid down here, the
process that is forked does what `es2 job` does. Model and prompts lie outside of the home, since they are the user's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from es2.core.errors import Es2Error
from es2.core.files import content_key, file_digest, write_json
from es2.core.progress import Cancelled
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.jobs.job import HOST, Job
from es2.jobs.queue import create_job, reopen
from es2.jobs.running import run_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.training.config import FinetuneConfig
from es2.workflow import showcase
from es2.workflow.compared import find_compared
from es2.workflow.derived import find_activations, find_analysis, find_umap
from es2.workflow.evaluate import unfinished_job
from es2.workflow.job_kinds import JOBS
from es2.workflow.runs import export, list_runs, shipped_run, tuned_weights

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "pairs_per_step": 4,
    "validate_every": 2,
    "validation_prompts": 4,
    "reply_tokens": 4,
    "replies": False,
    "device": "cpu",
}
EVALUATION: dict[str, Any] = {
    "limit": 3,
    "new_tokens": 4,
    "kl_tokens": 3,
    "steering_limit": 1,
    "budgets": (0.5,),
    "soft_lengths": (2,),
    "soft_budgets": (1.0,),
    "question_limit": 3,
    "device": "cpu",
}
PATIENCE = 120.0
"""Seconds that a process of a tiny model may take before it counts as hung."""
BUG = 70
"""Exit code of a process that ended with a traceback."""


@dataclass(frozen=True)
class World:
    """The folders of all cases, and the choices that all operations share.

    Attributes:
        root: a folder that nobody else uses.
        layers: the target layers, which must be those that the analysis recommends.
    """

    root: Path
    layers: tuple[int, ...] = (1, 2)

    @property
    def home(self) -> Path:
        """What `ES2_HOME` says; every case has it at the same place, since paths stand in some artifacts."""
        return self.root / "home"

    @property
    def model(self) -> str:
        return str(self.root / "model")

    @property
    def source(self) -> str:
        return str(self.root / "locks.csv")

    @property
    def prompts(self) -> PromptSet:
        return load_prompts(self.source)

    @property
    def exported(self) -> Path:
        return self.home / "exported"

    @property
    def look(self) -> dict[str, Any]:
        """What the app tells a job that captures or projects."""
        return {"model": self.model, "prompts": self.source, "position": "last"}

    @property
    def tune(self) -> dict[str, Any]:
        config = FinetuneConfig(layers=self.layers, model=self.model, **SETTINGS)
        return config.to_dict() | {"prompts": self.source}

    def evaluation(self, run: Job) -> EvaluateConfig:
        return EvaluateConfig(model=self.model, prompts=self.source, run=run.id, **EVALUATION)

    def run(self) -> Job | None:
        """The newest run."""
        return next(iter(list_runs()), None)


@dataclass(frozen=True)
class Operation:
    """One thing that people do.

    Attributes:
        name: what it is called in reports.
        stage: the home that it begins in: `bare`, `captured` or `tuned`.
        prepare: lays the job down, if it is one: done by whoever starts the process, as the app does.
        work: what the process of that job does; returns its exit code. Without a job, everything that is still missing,
            as a person would who tries again.
        outcome: by name, a hash of each thing that it made, as its readers give it; None for what is not there.
    """

    name: str
    stage: str
    prepare: Callable[[World], Job | None]
    work: Callable[[World, Job | None], int]
    outcome: Callable[[World], dict[str, str | None]]


def do_look(kind: str) -> Callable[[World, Job | None], int]:
    return lambda world, job: run_job((job or create_job(kind, world.look)).path, JOBS)


def run_for_tuning(world: World) -> Job | None:
    """A run to tune in: a new one, one that goes on, or None where the newest is whole."""
    if (run := world.run()) is None:
        return create_job("finetune", world.tune)
    if run.status() in ("done", "stopped"):
        try:
            tuned_weights(run)
        except Es2Error:
            pass  # it says so in its state, and can be resumed
        else:
            return None
    reopen(run)
    return run


def evaluation_to_run(world: World) -> Job:
    run = world.run()
    assert run is not None
    config = world.evaluation(run)
    if (job := unfinished_job(config)) is not None:
        reopen(job)
        return job
    return create_job("evaluate", config.to_dict())


def with_a_run(work: Callable[[World, Job], int]) -> Callable[[World, Job | None], int]:
    """Do something with the run; where a fault has taken it, tune again first, as a person would."""

    def do(world: World, job: Job | None) -> int:
        run = ensure_run(world)
        return 1 if run is None else work(world, run)

    return do


def ensure_run(world: World) -> Job | None:
    again = run_for_tuning(world)
    if again is not None and run_job(again.path, JOBS) != 0:
        return None
    return world.run()


def do_evaluate(world: World, job: Job | None) -> int:
    """The job that was laid down; or, in the foreground, whatever is missing, the run included."""
    if job is not None:
        return run_job(job.path, JOBS)
    if ensure_run(world) is None:
        return 1
    return run_job(evaluation_to_run(world).path, JOBS)


def do_tune(world: World, job: Job | None) -> int:
    """The run, and beside it the embeddings of the tuned model."""
    if job is not None:
        return run_job(job.path, JOBS)
    run = ensure_run(world)
    return 1 if run is None else run_job(create_job("prepare", world.look | {"run": run.id}).path, JOBS)


def do_export(merged: bool) -> Callable[[World, Job], int]:
    def do(world: World, run: Job) -> int:
        if not world.exported.exists():
            export(run, world.exported, merged=merged)
        return 0

    return do


def do_showcase(world: World, run: Job) -> int:
    settings = FinetuneConfig(layers=(), **SETTINGS)
    showcase.build(run=run, model=world.model, prompts=world.source, settings=settings)
    return 0


# ------------------------------------------------------------------------------------------------------- what was made


def _hash(*values: Any) -> str:
    return content_key({"values": [json.loads(json.dumps(value, default=_plain)) for value in values]})


def _plain(value: Any) -> Any:
    return value.tobytes().hex() if isinstance(value, np.ndarray) else str(value)


def _embeddings(activations: ActivationSet) -> str:
    layers = range(activations.n_layers)
    return _hash([activations.layer(l, position) for l in layers for position in activations.positions])


_OF_THE_TIME = ("seconds", "seconds_per_step", "path", "run", "created", "generated", "activations", "behaviour_reason")


def lasting(document: Any) -> Any:
    """A document without what is another each time."""
    if isinstance(document, Mapping):
        return {name: lasting(entry) for name, entry in document.items() if name not in _OF_THE_TIME}
    return [lasting(entry) for entry in document] if isinstance(document, list) else document


def captured(world: World) -> dict[str, str | None]:
    prompts = world.prompts.measured()
    found = find_activations(world.model, prompts, "last")
    analysis = found and find_analysis(found, prompts, "last")
    return {
        "embeddings": _embeddings(found) if found else None,
        "analysis": _hash(analysis.to_dict()) if analysis else None,
    }


def projected(world: World) -> dict[str, str | None]:
    prompts = world.prompts.measured()
    found = find_activations(world.model, prompts, "last")
    coordinates = found and find_umap(found, prompts, "last")
    return {
        "embeddings": _embeddings(found) if found else None,
        "umap": _hash(coordinates.points) if coordinates else None,
    }


def tuned(world: World) -> dict[str, str | None]:
    prompts, run = world.prompts.measured(), world.run()
    result = run and run.result()
    if run is None or result is None:
        return {"result": None}
    base, changed = (find_activations(world.model, prompts, "last", run=id) for id in (None, run.id))
    analysis = base and changed and find_analysis(base, prompts, "last", changed)
    return {
        "result": _hash(lasting(result)),
        "adapter": _hash(sorted((path.name, file_digest(path)) for path in tuned_weights(run).iterdir())),
        "embeddings": _embeddings(changed) if changed else None,
        "analysis": _hash(analysis.to_dict()) if analysis else None,
    }


def evaluated(world: World) -> dict[str, str | None]:
    run = world.run()
    paths = find_evaluations(run) if run else []
    documents = [read_evaluation(path) for path in paths[:1]]
    return {"evaluation": _hash(lasting([[one["suite"], one["rows"]] for one in documents])) if documents else None}


def taken_away(world: World) -> dict[str, str | None]:
    if not world.exported.is_dir():
        return {"exported": None}
    files = sorted(path for path in world.exported.rglob("*") if path.is_file())
    return {"exported": _hash([(path.name, file_digest(path)) for path in files])}


def shown(world: World) -> dict[str, str | None]:
    if shipped_run() is None:
        return {"showcase": None}
    found = find_compared("showcase")
    umap = find_umap(found.base, found.prompts, found.position, found.tuned)
    return {
        "showcase": _hash(
            lasting(dict(found.result)),
            found.analysis.to_dict(),
            umap.points if umap else None,
            _embeddings(found.base),
            _embeddings(found.tuned),
        )
    }


def _nothing(world: World) -> Job | None:
    return None


OPERATIONS = (
    Operation("capture", "bare", lambda world: create_job("prepare", world.look), do_look("prepare"), captured),
    Operation("projection", "captured", lambda world: create_job("project", world.look), do_look("project"), projected),
    Operation("fine-tune", "captured", lambda world: create_job("finetune", world.tune), do_tune, tuned),
    Operation("evaluate", "tuned", evaluation_to_run, do_evaluate, evaluated),
    Operation("export", "tuned", _nothing, with_a_run(do_export(merged=False)), taken_away),
    Operation("export merged", "tuned", _nothing, with_a_run(do_export(merged=True)), taken_away),
    Operation("showcase", "tuned", _nothing, with_a_run(do_showcase), shown),
    Operation("showcase replaced", "shown", _nothing, with_a_run(do_showcase), shown),
)


# -------------------------------------------------------------------------------------------------------- the processes


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; minus the number of the signal that ended it; None when it hung and was killed.
        value: what it returned.
        log: what it printed.
        left: how many processes of its group were left.
    """

    code: int | None
    value: Any
    log: str
    left: int


# The processes below are forked and killed: one killed within the lock that tqdm shares between them would keep it.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def in_a_process(
    work: Callable[[], Any],
    log: Path,
    *,
    launched: Job | None = None,
    kill: tuple[float, int] | None = None,
    patience: float = PATIENCE,
) -> Ended:
    """Fork, do the work there and wait for the end.

    Args:
        work: what the process does; an `int` is its exit code, anything else is handed back as JSON, exit code 0.
        log: where its output goes.
        launched: the job that it runs, whose launch is noted as `es2.jobs.queue.start` does.
        kill: seconds from the start, and the signal that it then gets.
        patience: seconds after which it counts as hung.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _be_a_process(work, write, log)
    os.close(write)
    if launched is not None:
        write_json(launched.path / "launched.json", {"host": HOST, "pid": child, "time": time.time()})
    started = time.monotonic()
    code = None
    while time.monotonic() - started < patience:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            break
        if kill is not None and time.monotonic() - started >= kill[0]:
            os.kill(child, kill[1])
            kill = None
        time.sleep(0.003)
    left = _end_group(child)
    if code is None:
        os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    return Ended(code, json.loads(data) if data else None, log.read_text(errors="replace"), left)


def _be_a_process(work: Callable[[], Any], write: int, log: Path) -> None:
    code = BUG
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        code = _exit_code(work, write)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(work: Callable[[], Any], write: int) -> int:
    """As `es2.cli.main.main` ends: a sentence and the code of its kind."""
    try:
        value = work()
    except Es2Error as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except Cancelled:
        return 1
    except KeyboardInterrupt:
        return 130
    if isinstance(value, int):
        return value
    os.write(write, json.dumps(value).encode())
    return 0


def _end_group(leader: int) -> int:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def set_up(world: World) -> None:
    """The model and the prompts, and where everything is to be kept; imports what the operations need."""
    from tests.builders import save_tiny_model, tiny_prompts, write_prompts

    world.root.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "ES2_HOME": str(world.home),
        "ES2_CACHE": str(world.home / "cache"),
        "ES2_SHOWCASE": str(world.home / "cached_activations" / "showcase"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    import torch

    torch.set_num_threads(1)
    save_tiny_model(Path(world.model))
    write_prompts(Path(world.source), tiny_prompts(40))
    for name in ("accelerate", "peft", "sklearn.linear_model", "transformer_lens.model_bridge", "pyarrow.parquet"):
        __import__(name)


def warm_umap() -> None:
    """Let UMAP's compiler run once; what it made is inherited by all that are forked."""
    import umap

    cloud = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    umap.UMAP(n_neighbors=5, n_jobs=1, random_state=0).fit(cloud).transform(cloud[:5])


def stub_umap() -> None:
    """PCA in the place of UMAP, where the twenty seconds of its compiler are too many."""
    from types import SimpleNamespace

    from sklearn.decomposition import PCA

    sys.modules["umap"] = SimpleNamespace(UMAP=lambda **settings: PCA(2))  # type: ignore[assignment]
