"""The trials of a sweep, shared by its processes: `trials.json` for readers, and Optuna's journal for the sampler.

A process changes either only while it holds the kernel's lock on `study.lock`, which a kill releases. `trials.json` is
replaced whole and decides; what a kill kept from the journal is added to it by the next process that holds the lock.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from es2.core.errors import InputError
from es2.core.files import content_key, writing
from es2.workflow.sweep_space import Space
from es2.workflow.sweeps import RUNNING, TRIALS, goals, read_trials, write_trials

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.jsonl"
_NAME = "sweep"
_DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize", "maximize")
_RANDOM_TRIALS = 8  # before the sampler learns from what was found
_CONSTRAINT = "kl_budget"
_KEPT_NONE = 1e-3  # nats over the budget that a trial counts as which kept no step, whatever its KL


@dataclass(frozen=True)
class Study:
    """The trials of one sweep.

    Attributes:
        folder: of the sweep.
        space: what is searched.
        n_trials: number of trials asked for.
        seed: of the sampler; with the trials before it decides a trial, in whatever process.
        usual: the searched settings of the first trial, by name; what is left out is sampled.
        defended: whether refusals under attack are a third goal.
    """

    folder: Path
    space: Space
    n_trials: int
    seed: int
    usual: Mapping[str, Any]
    defended: bool = False

    @property
    def _n_goals(self) -> int:
        return 3 if self.defended else 2

    def take(self, owner: str, is_alive: Callable[[str], bool], *, begins: bool = True) -> dict[str, Any] | None:
        """A trial for the process of the job `owner`; None when none is left to begin, or no settings are left to try.

        It is one whose process is gone, or, if `begins` or there is none yet, a new one. `is_alive` says whether the
        process of a job lives.
        """
        with self._held() as (study, trials):
            for trial in trials:
                if trial["status"] == RUNNING and (trial["owner"] == owner or not is_alive(str(trial["owner"]))):
                    trial["owner"] = owner
                    write_trials(self.folder, trials)
                    return trial
            if len(trials) >= self.n_trials or (trials and not begins):
                return None
            if not trials and self.usual:
                study.enqueue_trial(self._parameters(self.usual), skip_if_exists=True)
            elif (untried := self._untried(trials)) is not None:
                if not untried:
                    return None
                if self._foreseen(study, len(trials)) not in untried:  # the same fine-tune would come to the same
                    another = random.Random(f"{self.seed} {len(trials)}").choice(untried)
                    study.enqueue_trial(self._parameters(another), skip_if_exists=True)
            asked = study.ask()
            trial = _begun(asked.number, self._suggest(asked), owner)
            write_trials(self.folder, [*trials, trial])
            return trial

    def note(self, number: int, **entries: Any) -> None:
        """Change entries of a trial."""
        with self._held() as (_, trials):
            trials[number] |= entries
            write_trials(self.folder, trials)

    def end(self, number: int, **entries: Any) -> None:
        """Record the end of a trial: `status`, `numbers` (None where there are none), `reason` and others."""
        with self._held() as (study, trials):
            trials[number] |= entries
            write_trials(self.folder, trials)
            self._tell(study, trials)

    @contextmanager
    def _held(self) -> Iterator[tuple[optuna.Study, list[dict[str, Any]]]]:
        """The study and its trials, which no other process changes meanwhile."""
        with writing(self.folder / TRIALS), FileLock(self.folder / "study.lock"), warnings.catch_warnings():
            import optuna

            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            _mend(self.folder / JOURNAL)
            trials = read_trials(self.folder)
            study = optuna.create_study(
                study_name=_NAME,
                storage=_storage(self.folder / JOURNAL),
                directions=_DIRECTIONS[: self._n_goals],
                sampler=self._sampler(len(trials)),
                load_if_exists=True,
            )
            self._reconcile(study, trials)
            yield study, trials

    def _reconcile(self, study: optuna.Study, trials: list[dict[str, Any]]) -> None:
        """Bring journal and `trials.json` together after a kill between the two."""
        states = optuna_states()
        known = [found for found in study.get_trials(deepcopy=False) if found.state != states.WAITING]
        lost = known[len(trials) :]
        if len(known) < len(trials):
            raise InputError(
                f"The sweep in {self.folder} is damaged: {JOURNAL} has {len(known)} trials and {TRIALS} "
                f"{len(trials)}; start a new one."
            )
        for found in lost:  # asked for and never begun
            import optuna

            again = optuna.Trial(study, found._trial_id)
            trials.append(_begun(found.number, self._suggest(again), ""))
        if lost:
            write_trials(self.folder, trials)
        self._tell(study, trials)

    def _tell(self, study: optuna.Study, trials: Sequence[Mapping[str, Any]]) -> None:
        """Tell the journal every end that it does not know."""
        states = optuna_states()
        for found in study.get_trials(deepcopy=False):
            if found.state != states.RUNNING or trials[found.number]["status"] == RUNNING:
                continue
            numbers = trials[found.number]["numbers"]
            if numbers is None:
                study.tell(found.number, state=states.FAIL)
            else:
                if _CONSTRAINT not in found.constraints:  # it is there where a kill came between the two
                    import optuna

                    optuna.Trial(study, found._trial_id).set_constraint(_CONSTRAINT, self._over_budget(numbers))
                separation, minus_kl, refusals = goals(numbers)
                study.tell(found.number, [separation, -minus_kl, refusals][: self._n_goals])

    def _sampler(self, n_before: int) -> optuna.samplers.BaseSampler:
        """The sampler of the next trial. A seed of its own: every process starts its sampler anew."""
        import optuna

        seed = int(content_key({"seed": self.seed, "trial": n_before})[:8], 16)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)

    def _over_budget(self, numbers: Mapping[str, Any]) -> float:
        """How far a trial is from being one to keep, in nats; at most 0 where it is."""
        over = float(numbers["kl"]) - float(self.space.fixed["kl_budget"])
        return over if numbers["kept"] else max(over, _KEPT_NONE)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The searched settings of a trial."""
        chosen: dict[str, Any] = {}
        for name, bounds in self.space.searched.items():
            if name == "layers":
                lowest, highest = bounds
                lower = trial.suggest_int("lower_layer", lowest, highest - 1)
                gap = trial.suggest_int("layers_between", 1, highest - lowest)
                chosen[name] = [lower, min(lower + gap, highest)]
            elif name in ("objective", "rank"):
                chosen[name] = trial.suggest_categorical(name, bounds)
            else:
                lowest, highest = bounds[0], bounds[-1]
                value = float(f"{trial.suggest_float(name, lowest, highest, log=True):.3g}")
                chosen[name] = min(max(value, lowest), highest)
        return chosen

    def _untried(self, trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """All settings that no trial has had; None where a number is searched that may be any within its bounds."""
        values: dict[str, Sequence[Any]] = {}
        for name, bounds in self.space.searched.items():
            if name == "layers":
                values[name] = [list(pair) for pair in combinations(self.space.layers_tried, 2)]
            elif name in ("objective", "rank") or len(bounds) == 1:
                values[name] = bounds
            else:
                return None
        tried = [trial["settings"] for trial in trials]
        every = (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))
        return [chosen for chosen in every if chosen not in tried]

    def _foreseen(self, study: optuna.Study, n_before: int) -> dict[str, Any]:
        """The settings that the next trial will be given, which is asked of a copy."""
        import optuna

        copy = optuna.create_study(directions=study.directions, sampler=self._sampler(n_before))
        copy.add_trials(study.get_trials(deepcopy=False))
        return self._suggest(copy.ask())

    def _parameters(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's parameters that `_suggest` makes these settings from."""
        found = {name: value for name, value in chosen.items() if name != "layers"}
        if "layers" in chosen:
            lower, upper = chosen["layers"]
            found |= {"lower_layer": lower, "layers_between": upper - lower}
        return found


def _begun(number: int, chosen: Mapping[str, Any], owner: str) -> dict[str, Any]:
    nothing = {"run": None, "numbers": None, "reason": None, "seconds": None, "verdict": None}
    return {"number": number, "status": RUNNING, "owner": owner, "settings": dict(chosen)} | nothing


def optuna_states() -> Any:
    """The states of a trial of Optuna's."""
    import optuna

    return optuna.trial.TrialState


def _storage(path: Path) -> optuna.storages.BaseStorage:
    """Optuna's journal in a file; `study.lock` is held already, and unlike Optuna's own lock it ends with a kill."""
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    class Held(JournalFileOpenLock):
        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    return JournalStorage(JournalFileBackend(str(path), lock_obj=Held(str(path))))


def _mend(journal: Path) -> None:
    """Cut off a line that a killed process left unfinished, which would spoil the next one."""
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
