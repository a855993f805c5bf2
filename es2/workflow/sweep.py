"""A sweep: many short fine-tunes of one model, each an ordinary run, whose settings Optuna chooses.

What they share is made once: the loaded model, the base's replies and embeddings, the base's capture. Several processes
may work on one sweep; each takes the next trial, and no two the same (`es2.workflow.study`).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import Es2Error, InputError, MachineError
from es2.core.progress import Cancelled, Reporter
from es2.jobs.job import Job
from es2.jobs.queue import create_job, find_jobs, open_job, reopen
from es2.jobs.running import run_job
from es2.models.catalogue import known_depth, resolve
from es2.models.checked import refuse_untunable
from es2.models.folders import model_folder
from es2.models.shape import count_layers
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.training.config import FinetuneConfig
from es2.training.sampling import make_schedule
from es2.training.validation import ValidationPoint
from es2.workflow.finetune_run import compare_run, finetune_run
from es2.workflow.prepare import prepare
from es2.workflow.runs import KIND as FINETUNE
from es2.workflow.runs import config_of
from es2.workflow.study import Study
from es2.workflow.sweep_defence import Defence, check_defence
from es2.workflow.sweep_space import RATE, Space, SweepConfig, first_config, make_space, most_compared
from es2.workflow.sweeps import (
    KIND,
    RUNNING,
    front_of,
    is_alive,
    is_clearly_worse,
    open_sweep,
    read_trials,
    run_name,
    separation,
    sweep_document,
    trial_numbers,
)

if TYPE_CHECKING:
    from es2.training.workload import Workload

_POLL_SECONDS = 0.5
_SHOW_SECONDS = 2.0


def create_sweep(
    sweep: SweepConfig, given: Mapping[str, Any], prompts: PromptSet, source: str, report: Reporter
) -> Job:
    """A new sweep, for `run_job` or `start`. Everything is checked before anything is loaded.

    Args:
        sweep: number and shape of the trials, and the space.
        given: settings of `FinetuneConfig` with the model; those that are None are searched.
        prompts: the prompt set.
        source: where it is from.
        report: of the model's download.

    Raises:
        InputError: for settings that cannot be, or nothing to search.
        MachineError: when network or disk refuse.
    """
    spec = resolve(given["model"])
    if depth := known_depth(spec):
        first_config(make_space(sweep, given, depth)).check(depth, prompts)  # before the model is fetched
    space = checked_space(sweep, given, prompts, model_folder(spec, report))
    document = {"sweep": sweep.to_dict(), "space": space.to_dict(), "prompts_digest": prompts.digest}
    return create_job(KIND, document | {"model": space.fixed["model"], "prompts": source})


def checked_space(sweep: SweepConfig, given: Mapping[str, Any], prompts: PromptSet, model_files: Path) -> Space:
    """The space of a sweep of the model in a folder; arguments and refusals as of `create_sweep`."""
    n_layers = count_layers(model_files)
    space = make_space(sweep, given, n_layers)
    config = first_config(space)
    config.check(n_layers, prompts)
    if sweep.defence:
        check_defence(config, prompts)
    refuse_untunable(model_files, config.method)
    return space


def create_helper(sweep: Job) -> Job:
    """A job that works on the trials of a sweep that runs, at the same time. It ends when no trial is left to begin."""
    own = {name: sweep.config[name] for name in ("model", "prompts")}
    return create_job(KIND, own | {"of": sweep.id}, heavy=False)


def sweep_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    """What a sweep's job does, or that of one of its helpers: take trials until none is left.

    Returns:
        `sweep_document`.

    Raises:
        InputError: when the prompts have changed since the sweep began.
        MachineError: when two trials in a row fail for the same reason.
        Cancelled: as `report` raised it.
    """
    sweep = open_sweep(str(config.get("of") or folder.name), folder.parent)
    prompts = load_prompts(sweep.config["prompts"])
    if prompts.digest != sweep.config["prompts_digest"]:
        raise InputError(
            f"The prompts {sweep.config['prompts']!r} have changed since sweep {sweep.id} began; start a new one."
        )
    _Worker(sweep, folder.name, prompts, report).work()
    return sweep_document(sweep)


def _began(sweep: Job) -> float:
    """When a sweep's own process began to work, last, in seconds since the epoch; now if it has not."""
    times = [event["time"] for event in sweep.events()[0] if event.get("status") == "running"]
    return float(times[-1]) if times else time.time()


class _Worker:
    """One process's work on a sweep.

    Args:
        sweep: the sweep.
        owner: id of this process's job: the sweep itself, or a helper.
        prompts: the prompt set.
        report: takes the progress; raises `Cancelled`.
    """

    def __init__(self, sweep: Job, owner: str, prompts: PromptSet, report: Reporter) -> None:
        what = f"The config.json of sweep {sweep.id}"
        self.sweep = sweep
        self.owner = owner
        self.prompts = prompts
        self.report = report
        config = SweepConfig.read(sweep.config["sweep"], what)
        self.n_trials = config.trials
        self.defended = config.defence
        self.ends = math.inf if config.minutes is None else _began(sweep) + 60 * config.minutes
        self.space = Space.from_dict(sweep.config["space"], what)
        self.root = sweep.path.parent
        self._base: Workload | None = None
        self._defence: Defence | None = None
        self._attacked: tuple[int, ...] = ()
        self._failures: list[str] = []
        self._shown = 0.0

    def work(self) -> None:
        """Run trials until none is left; a sweep's own process then waits for its helpers, and compares the front."""
        study = self._study()
        if self.defended and len(self._others()) < self.n_trials:
            self._share(self.report)  # refuses before any trial begins
        self._show(at_once=True)
        while True:
            begins = time.time() < self.ends
            trial = study.take(self.owner, lambda owner: is_alive(owner, self.root), begins=begins)
            if trial is not None:
                self._run(study, trial)
                self._show(at_once=True)
            elif self.owner != self.sweep.id:
                return
            elif not self._running():
                break
            else:  # the trial of a process that is killed meanwhile is taken, too
                self._show()
                time.sleep(_POLL_SECONDS)
        self._compare(study)

    def _compare(self, study: Study) -> None:
        """Capture the runs on the front and compare them with base, those with the most separation first."""
        self._base = self._defence = None  # two models in memory may be one too many
        gc.collect()
        trials = read_trials(self.sweep.path)
        for number in front_of(trials)[::-1][: most_compared(self.n_trials)]:
            try:
                run = open_job(trials[number]["run"], self.root)
                result = run.result() or {}
                if result.get("activations") is None:
                    result = compare_run(run, self.prompts, self.report)
                study.note(number, verdict=result["verdict"])
            except Es2Error as error:  # such as a run that was deleted: the sweep's own numbers are there
                study.note(number, reason=f"It was not compared with its base: {error}")

    def _study(self) -> Study:
        """The study, whose first trial has the shipped defaults, and the layers that the analysis recommends."""
        is_new = not read_trials(self.sweep.path)
        recommended: tuple[int, ...] = ()
        if self.space.layers is not None and (is_new or self.defended):
            config = first_config(self.space)
            recommended = prepare(
                config.model, self.prompts, rendering=config, device=config.device, dtype=config.dtype,
                report=self.report,
            ).analysis.recommended  # fmt: skip
        self._attacked = recommended or self.space.layers_tried
        usual = self.space.usual(recommended) if is_new else {}
        seed = int(self.space.fixed["seed"])
        return Study(self.sweep.path, self.space, self.n_trials, seed, usual, self.defended)

    def _run(self, study: Study, trial: Mapping[str, Any]) -> None:
        """Run one trial, or go on with it, and record its end."""
        number = int(trial["number"])
        run = self._run_of(number, trial["settings"])
        study.note(number, run=run.id)
        config = config_of(run)
        if run.result() is None:
            self._finetune(run, config)
        status, result = run.status(), run.result()
        if status == "cancelled" and not (run.path / "cancel").exists():
            raise Cancelled  # the request was to the whole sweep
        ended: dict[str, Any] = {"status": status, "reason": run.error(), "numbers": None}
        if result is not None:
            before_its_time = result["steps"] < config.steps
            ended = {"status": "pruned" if before_its_time else "done", "reason": result["reason"]}
            ended |= {"numbers": trial_numbers(result), "seconds": result["seconds"]}
        study.end(number, **ended)
        self._failures = [*self._failures, str(ended["reason"])] if status == "failed" else []
        if len(self._failures) > 1 and self._failures[-1] == self._failures[-2]:
            raise MachineError(f"Two trials in a row failed: {self._failures[-1]}")

    def _run_of(self, number: int, chosen: Mapping[str, Any]) -> Job:
        """The run of a trial, created unless a process did so that was killed; ready to be run, or ended."""
        which = {"sweep": self.sweep.id, "trial": number}
        if not (found := find_jobs(FINETUNE, which, self.root)):
            of = {"prompts": self.sweep.config["prompts"], **which}
            run = create_job(FINETUNE, self._config(chosen).to_dict() | of, root=self.root, heavy=False)
            run.rename(run_name(self.sweep, number))
            return run
        run = found[0]
        while run.is_active() and (run.path / "heartbeat.json").exists():  # another process runs it
            self._show()
            time.sleep(_POLL_SECONDS)
        if run.result() is None and (run.path / "heartbeat.json").exists():
            reopen(run)
        return run

    def _config(self, chosen: Mapping[str, Any]) -> FinetuneConfig:
        """The fine-tune of a trial, the factor on its automatic learning rate multiplied out where it is not 1."""
        config = self.space.config(chosen)
        if (factor := chosen.get(RATE, 1.0)) == 1:
            return config
        from es2.training.trainable import automatic_learning_rate

        rate = factor * automatic_learning_rate(self._share(self.report).network, config)
        return config.replace(learning_rate=float(f"{rate:.3g}"))

    def _finetune(self, run: Job, config: FinetuneConfig) -> None:
        """Run the job of a trial in this process, with the base that all trials share."""

        def task(_: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
            from es2.training.base import lent

            with lent(self._share(report), config) as workload:
                result = finetune_run(
                    config, self.prompts, folder, report,
                    workload=workload, stop=self._stop, compares=False,
                )  # fmt: skip
                if self._defence is not None and result["best_step"] > 0:
                    result["defence"] = self._defence.measure(report)
                return result

        run_job(run.path, {FINETUNE: task}, lambda *_, **__: self._show())

    def _share(self, report: Reporter) -> Workload:
        """The loaded model with what was measured of its base for all trials: at the first call."""
        from es2.training.base import measure_base

        if self._base is not None:
            return self._base
        config = first_config(self.space)
        config = config.replace(**dict(self.prompts.rendered_as(config)))
        plan = make_schedule(
            self.prompts, config.pairs_per_step, config.steps, config.seed, config.validation_prompts,
            config.kl_prompts,
        )  # fmt: skip
        folder = model_folder(resolve(config.model), report)
        layers, objectives = self.space.layers_tried, self.space.objectives_tried
        base = measure_base(config, self.prompts, folder, plan, layers=layers, objectives=objectives, report=report)
        if self.defended:
            self._defence = Defence(base, config, self.prompts, folder, self._attacked, report)
        self._base = base
        return base

    def _stop(self, validations: Sequence[ValidationPoint]) -> str | None:
        """Why a trial is pruned, at its first validation only; one far over the KL budget stops by itself.

        Where defence counts, no other trial is clearly better before a trial's own is known.
        """
        if len(validations) != 2 or self.defended:
            return None
        base, point = validations
        found = separation(point, base)
        better = is_clearly_worse(found, point.kl, self._others())
        if better is None:
            return None
        return f"Trial {better} was clearly better at step {point.step}: twice the fisher ratio at half the KL at most."

    def _others(self) -> list[dict[str, Any]]:
        return [trial for trial in read_trials(self.sweep.path) if trial["status"] != RUNNING]

    def _running(self) -> bool:
        return any(trial["status"] == RUNNING for trial in read_trials(self.sweep.path))

    def _show(self, at_once: bool = False) -> None:
        """Report how many trials have ended, every two seconds at most unless `at_once`; raises `Cancelled`."""
        if at_once or time.monotonic() - self._shown > _SHOW_SECONDS:
            self._shown = time.monotonic()
            self.report("sweep", len(self._others()), self.n_trials)
