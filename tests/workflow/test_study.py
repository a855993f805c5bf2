"""The trials of a sweep without models: who takes which, what survives a kill, and what they come to."""

from __future__ import annotations

import json
import multiprocessing
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import pytest

from es2.core.errors import InputError
from es2.jobs.queue import create_job
from es2.training.config import FinetuneConfig
from es2.training.terms import DEFAULT_OBJECTIVE
from es2.training.validation import ValidationPoint
from es2.workflow import study as module
from es2.workflow.study import JOURNAL, Study
from es2.workflow.sweep_space import SEARCHED, SHAPE, Space, SweepConfig, make_space
from es2.workflow.sweeps import (
    TRIALS,
    beating_first,
    best_of,
    dominates,
    first_words,
    front_of,
    is_clearly_worse,
    read_trials,
    reopen_sweep,
    trial_numbers,
)

GIVEN: dict[str, Any] = {
    name: None if name in (*SEARCHED, "alpha") else field.default
    for name, field in FinetuneConfig.model_fields.items()
    if name not in (*SHAPE, "replies")
}


def space(**given: Any) -> Space:
    return make_space(SweepConfig(), GIVEN | given, n_layers=12)


def study(folder: Path, n_trials: int = 6, seed: int = 0, usual: dict[str, Any] | None = None) -> Study:
    return Study(folder, space(), n_trials, seed, usual or {})


def numbers(separation: float, kl: float, *, kept: bool = True, lost: str | None = None) -> dict[str, Any]:
    first = {"first_separation": separation / 2, "first_kl": kl / 2}
    return {"separation": separation, "kl": kl, "kept": kept, "lost": lost} | first


def go_through(own: Study, owner: str = "me", *, until: int | None = None) -> list[dict[str, Any]]:
    """Take and end trials until none is left."""
    while (trial := own.take(owner, lambda _: True)) is not None:
        factor = trial["settings"]["rate_factor"]
        own.end(trial["number"], status="done", numbers=numbers(factor, 0.01 * factor))
        if trial["number"] == until:
            break
    return read_trials(own.folder)


# -------------------------------------------------------------------------------------------------- the space


def test_what_is_given_is_fixed_and_the_rest_lies_in_the_space(tmp_path: Path) -> None:
    own = Study(tmp_path, space(rank=8, layers=(3, 5)), 5, 0, {})
    assert set(own.space.searched) == {"objective", "kl_weight", "rate_factor"}
    for trial in go_through(own):
        config = own.space.config(trial["settings"])
        assert (config.layers, config.rank, config.alpha) == ((3, 5), 8, 16)
        assert config.objective in SweepConfig().objectives
        assert 1 <= config.kl_weight <= 100
        assert 0.1 <= trial["settings"]["rate_factor"] <= 2
        assert config.learning_rate is None, "whoever knows the weights multiplies"


def test_pairs_of_layers_lie_between_a_quarter_and_nine_tenths(tmp_path: Path) -> None:
    for trial in go_through(study(tmp_path, 12)):
        lower, upper = trial["settings"]["layers"]
        assert 3 <= lower < upper <= 10


def test_the_space_comes_back_from_json() -> None:
    own = space(objective="margin")
    assert Space.from_dict(json.loads(json.dumps(own.to_dict())), "It") == own
    with pytest.raises(InputError, match="It is damaged: its space cannot be read"):
        Space.from_dict({"fixed": {}}, "It")


def test_the_first_trial_has_the_usual_settings(tmp_path: Path) -> None:
    own = space()
    usual = own.usual((5, 8))
    shipped = {"objective": DEFAULT_OBJECTIVE, "kl_weight": 10.0, "rate_factor": 1.0, "rank": 16}
    assert usual == {"layers": [5, 8]} | shipped
    assert "layers" not in own.usual((0, 8)), "it lies outside"
    first, second = go_through(study(tmp_path, 2, usual=usual))
    assert first["settings"] == usual
    assert second["settings"] != usual


def test_a_single_factor_is_that_of_every_trial(tmp_path: Path) -> None:
    own = make_space(SweepConfig(rate_factors=(1.0,)), GIVEN, n_layers=12)
    trials = go_through(Study(tmp_path, own, 3, 0, {}))
    assert {trial["settings"]["rate_factor"] for trial in trials} == {1.0}


def test_no_settings_are_tried_twice_and_it_ends_when_all_were(tmp_path: Path) -> None:
    layers_alone = GIVEN | {"objective": "fisher", "kl_weight": 10.0, "rank": 4}
    own = make_space(SweepConfig(layer_range=(3, 8), rate_factors=(1.0,)), layers_alone, n_layers=12)
    found = []
    for until in (1, 9, None):  # interrupted before and after the sampler learns
        found = go_through(Study(tmp_path, own, 24, 0, {}), until=until)
    pairs = [tuple(trial["settings"]["layers"]) for trial in found]
    assert sorted(pairs) == list(combinations(range(3, 9), 2))
    again = tmp_path / "again"
    again.mkdir()
    assert [trial["settings"] for trial in go_through(Study(again, own, 24, 0, {}))] == [
        trial["settings"] for trial in found
    ]


def test_a_sweep_of_learning_rates_themselves_is_refused_and_not_misread(tmp_path: Path) -> None:
    """As earlier versions wrote it; its finished trials can still be shown."""
    document = space().to_dict()
    document["searched"]["learning_rate"] = document["searched"].pop("rate_factor")
    sweep = create_job("sweep", {"space": document, "model": "m", "prompts": "p"}, root=tmp_path)
    with pytest.raises(InputError, match=r"of a former version, .* start a new sweep"):
        reopen_sweep(sweep)


# -------------------------------------------------------------------------------------------- who takes which


def test_it_takes_as_many_as_were_asked_for_and_no_more(tmp_path: Path) -> None:
    trials = go_through(study(tmp_path))
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3, 4, 5]
    assert study(tmp_path).take("another", lambda _: False) is None


def test_the_seed_decides_them_also_when_it_is_interrupted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts", "other")]
    for folder in folders:
        folder.mkdir()
    whole = go_through(study(folders[0], 12))
    for until in (2, 9, None):  # before and after the sampler learns
        parts = go_through(study(folders[1], 12), until=until)
    assert [trial["settings"] for trial in parts] == [trial["settings"] for trial in whole]
    other = go_through(study(folders[2], 12, seed=1))
    assert other[0]["settings"] != whole[0]["settings"]


def test_a_trial_without_a_process_is_taken_again_under_its_number(tmp_path: Path) -> None:
    own = study(tmp_path)
    first = own.take("killed", lambda _: True)
    second = own.take("me", lambda _: True)
    assert first is not None
    assert second is not None
    again = own.take("me too", lambda owner: owner != "killed")
    assert again is not None
    assert (again["number"], again["settings"], again["owner"]) == (0, first["settings"], "me too")
    after_a_kill = own.take("me", lambda _: True)  # its own process takes one at a time
    assert after_a_kill is not None
    assert after_a_kill["number"] == second["number"] == 1


def _work(folder: Path) -> None:
    go_through(study(folder, 20), owner=multiprocessing.current_process().name)


@pytest.mark.long
def test_processes_never_take_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    trials = read_trials(tmp_path)
    assert [trial["number"] for trial in trials] == list(range(20))
    assert {trial["status"] for trial in trials} == {"done"}
    assert len({json.dumps(trial["settings"]) for trial in trials}) == 20


# ------------------------------------------------------------------------------------------ what survives a kill


def dies(*_: Any) -> None:
    raise RuntimeError("killed")


def test_a_kill_between_the_journal_and_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = study(tmp_path, 3)
    monkeypatch.setattr(module, "write_trials", dies)
    with pytest.raises(RuntimeError):
        own.take("me", lambda _: True)
    monkeypatch.undo()
    assert read_trials(tmp_path) == []
    trials = go_through(study(tmp_path, 3))
    assert [trial["number"] for trial in trials] == [0, 1, 2]


def test_a_kill_between_the_trials_and_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = study(tmp_path, 3)
    trial = own.take("me", lambda _: True)
    assert trial is not None
    monkeypatch.setattr(optuna.Study, "tell", dies)
    with pytest.raises(RuntimeError):
        own.end(trial["number"], status="done", numbers=numbers(1, 0.1))
    monkeypatch.undo()
    trials = go_through(study(tmp_path, 3))
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert trials[0]["numbers"] == numbers(1, 0.1)
    values = [line for line in (tmp_path / JOURNAL).read_text().splitlines() if '"values":[1' in line]
    assert len(values) == 1, "the journal was told of it once"


def test_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    own = study(tmp_path, 3)
    go_through(own, until=0)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"op_code":4,"worker')
    assert len(go_through(study(tmp_path, 3))) == 3


def test_damaged_trials_are_named(tmp_path: Path) -> None:
    go_through(study(tmp_path, 2))
    path = tmp_path / TRIALS
    path.write_text(path.read_text().replace('"done"', '"doze"', 1))
    with pytest.raises(InputError, match=r"is damaged: trials\.json is not what was written"):
        study(tmp_path, 3).take("me", lambda _: True)


def test_a_trial_without_numbers_fails_and_counts(tmp_path: Path) -> None:
    own = study(tmp_path, 2)
    trial = own.take("me", lambda _: True)
    assert trial is not None
    own.end(trial["number"], status="failed", reason="Memory ran out.", numbers=None)
    trials = go_through(own)
    assert [trial["status"] for trial in trials] == ["failed", "done"]


@pytest.mark.filterwarnings("error")
def test_the_sampler_learns_which_trials_are_not_to_be_kept(tmp_path: Path) -> None:
    ends = [numbers(1, 0.05), numbers(9, 0.35), numbers(9, 0.05, kept=False), None]
    own = study(tmp_path, len(ends))
    for found in ends:
        trial = own.take("me", lambda _: True)
        assert trial is not None
        own.end(trial["number"], status="done" if found else "failed", numbers=found)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL)))
    (name,) = optuna.get_all_study_names(storage)
    within, over, kept_none, failed = (
        one.constraints for one in optuna.load_study(study_name=name, storage=storage).trials
    )
    budget = own.space.fixed["kl_budget"]
    assert within == {"kl_budget": pytest.approx(0.05 - budget)}
    assert over == {"kl_budget": pytest.approx(0.35 - budget)}
    assert 0 < kept_none["kl_budget"] < over["kl_budget"]
    assert failed == {}


# --------------------------------------------------------------------------------------------- what they come to


def trials_of(*found: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{"number": number, "status": "done", "numbers": one} for number, one in enumerate(found)]


def test_the_front_and_the_best() -> None:
    trials = trials_of(
        numbers(1.0, 0.05),
        numbers(0.5, 0.06),  # worse in both
        numbers(0.4, 0.01),
        numbers(3.0, 0.5, kept=False),  # over the budget
        None,
        numbers(2.0, 0.09, lost="begins 0.10 of the base's 12 refusals as the base does"),
        numbers(1.0, 0.05),  # as good as the first
    )
    assert front_of(trials) == [2, 0, 6, 5]
    assert best_of(trials) in (0, 6), "the one that lost behaviour counts only where all did"
    assert best_of(trials[5:6]) == 5
    assert best_of(trials[3:5]) is None
    assert front_of(trials[3:5]) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([numbers(1, 0.02), numbers(2, 0.03)], ", and is on the front."),
        ([numbers(1, 0.02), numbers(2, 0.01), numbers(9, 0.01, kept=False)], "; trial 1 beats it."),
        ([numbers(1, 0.02), numbers(1, 0.01), numbers(3, 0.02), None], "; trials 1, 2 beat it."),
        ([numbers(1, 0.02, kept=False), numbers(0.5, 0.01)], "."),
        ([None, numbers(1, 0.01)], "."),
    ],
)
def test_the_shipped_defaults_are_on_the_front_or_beaten(found: list[dict[str, Any] | None], words: str) -> None:
    trials = trials_of(*found)
    document = {"trials": trials, "front": front_of(trials), "beating_first": beating_first(trials)}
    assert first_words(document) == f"The first trial has the shipped defaults of what is searched{words}"


def test_where_refusals_under_attack_count_they_make_a_front_and_decide_the_best(tmp_path: Path) -> None:
    def defended(refusals: int, *found: float, over_refusals: int = 1) -> dict[str, Any]:
        one, other = found
        counts = {"refusals": refusals, "over_refusals": over_refusals, "base_over_refusals": 1, "n_harmless": 10}
        return numbers(one, other) | {"defence": counts}

    own = Study(tmp_path, space(), 4, 0, {}, defended=True)
    for found in (defended(3, 1.0, 0.05), defended(9, 0.5, 0.06), defended(9, 0.4, 0.07), None):
        trial = own.take("me", lambda _: True)
        assert trial is not None
        own.end(trial["number"], status="done", numbers=found)
    trials = read_trials(tmp_path)
    assert front_of(trials) == [0, 1], "beaten in two goals it stays for the third"
    assert best_of(trials) == 1
    assert dominates(defended(9, 0.5, 0.06), defended(9, 0.4, 0.07))
    assert not dominates(defended(9, 0.5, 0.06), defended(10, 0.4, 0.07))
    journal = optuna.load_study(study_name="sweep", storage=module._storage(tmp_path / JOURNAL))
    assert [trial.values for trial in journal.trials] == [[1.0, 0.05, 3.0], [0.5, 0.06, 9.0], [0.4, 0.07, 9.0], None]


@pytest.mark.parametrize(("over_refusals", "lost"), [(3, None), (4, "refuses 4 of 10 harmless prompts (base: 1)")])
def test_a_trial_that_refuses_everything_lost_behaviour(over_refusals: int, lost: str | None) -> None:
    counts = {"refusals": 9, "over_refusals": over_refusals, "base_over_refusals": 1, "n_harmless": 10}
    result = {"validations": [point(0, 0.1, 0), point(4, 0.2, 0.01)], "best_step": 4, "defence": counts}
    found = trial_numbers(result)
    assert found is not None
    assert (found["lost"], found["defence"]) == (lost, counts)


def test_one_is_pruned_where_another_was_clearly_better_by_then() -> None:
    trials = trials_of(numbers(2.0, 0.04), None)  # at its first validation 1.0 for 0.02
    assert is_clearly_worse(0.2, 0.05, trials) == 0
    assert is_clearly_worse(0.4, 0.05, trials) is None, "less than twice the ratio"
    assert is_clearly_worse(0.2, 0.03, trials) is None, "more than half the KL"
    assert is_clearly_worse(0.2, float("nan"), trials) is None


def point(step: int, fisher: float, kl: float) -> dict[str, Any]:
    others = dict.fromkeys(("mean_difference_margin", "orthogonal_std_ratio", "norm_ratio", "effective_rank"), 1.0)
    layers = {layer: {"fisher_ratio": fisher * scale} | others for layer, scale in ((3, 1.0), (5, 2.0))}
    return ValidationPoint(step, kl, kl / 2, layers).to_dict()


@pytest.mark.parametrize(
    ("best", "separation", "kl", "kept"), [(4, 1.0, 0.02, True), (8, 2.0, 0.2, True), (0, 2.0, 0.2, False)]
)
def test_the_numbers_are_of_the_kept_step(best: int, separation: float, kl: float, kept: bool) -> None:
    e = 2.718281828459045
    result = {"validations": [point(0, 0.1, 0), point(4, 0.1 * e, 0.02), point(8, 0.1 * e**2, 0.2)], "best_step": best}
    found = trial_numbers(result)
    assert found is not None
    assert (found["separation"], found["kl"]) == (pytest.approx(separation), kl)
    assert (found["kept"], found["first_separation"], found["first_kl"]) == (kept, pytest.approx(1.0), 0.02)


def test_no_number_is_none() -> None:
    validations = [point(0, 0.1, 0), point(4, 0.2, 0.1)]
    assert trial_numbers({"validations": validations[:1], "best_step": 0}) is None
    validations[1]["kl_prompt"] = float("nan")
    assert trial_numbers({"validations": validations, "best_step": 0}) is None
