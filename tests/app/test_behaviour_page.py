"""The pages of behaviour and of robustness without a browser: what they say of an evaluation, and what they start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app import evaluation_form
from app.views.behaviour import filtered
from es2.core.files import with_checksum, write_json
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.reply_log import ReplyLog, base_log
from es2.evaluation.results import read_evaluation
from es2.jobs.queue import create_job
from es2.jobs.running import run_job
from es2.models.fingerprint import fingerprint
from es2.prompts.loading import load_prompts
from es2.store.sources import PLAIN_TEXT
from es2.workflow.evaluation_plan import Sample
from es2.workflow.job_kinds import JOBS
from tests.app.test_app import MAIN, captions, has_button
from tests.builders_evaluation import (
    ANSWER,
    BABBLE,
    LONG,
    NASTY,
    REFUSAL,
    REFUSES_LESS,
    Evaluated,
    write_by_hand,
    write_directions,
    write_evaluated,
    write_replies,
    write_run,
)
from tests.figures import charts_of

NO_DEFENCE = ([REFUSAL, ANSWER] * 2 + [ANSWER, ANSWER] * 6, [REFUSAL, NASTY] * 2 + [ANSWER, LONG] * 6)
DEFENCE = ([ANSWER, ANSWER] * 8, [REFUSAL, ANSWER] * 5 + [REFUSAL, REFUSAL] * 2 + [BABBLE, BABBLE])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        patch.setenv("ES2_CACHE", str(home / "cache"))
        made = write_evaluated(home)
        write_by_hand(made, "defence", *DEFENCE)
        write_by_hand(made, "no-defence", *NO_DEFENCE)
    for age, name in enumerate(("no-defence.json", "defence.json", made.path.name)):
        os.utime(made.path.with_name(name), (2_000_000_000 - age, 2_000_000_000 - age))  # the newest first
    return made


@pytest.fixture
def home(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(evaluated.home))
    monkeypatch.setenv("ES2_CACHE", str(evaluated.home / "cache"))
    return evaluated.home


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: found.append((kind, dict(config))))
    return found


def open_page(name: str, link: Mapping[str, str]) -> AppTest:
    at = AppTest.from_file(MAIN, default_timeout=60)
    at._page_hash = calc_hash(name)
    for parameter, value in link.items():
        at.query_params[parameter] = value
    at.run()
    assert not at.exception
    return at


def words(at: AppTest) -> str:
    return "\n".join(element.value for element in at.markdown).replace("\\", "")


def texts(at: AppTest) -> list[str]:
    return [element.value for element in at.text]


def figure(at: AppTest, key: str) -> dict[str, Any]:
    return charts_of(at)[key][0]


def choose(at: AppTest, evaluation: str) -> AppTest:
    at.selectbox(key="evaluation").set_value(evaluation).run()
    assert not at.exception
    return at


class TestBehaviour:
    def test_a_separated_model_that_refuses_no_more_is_said_to(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("behaviour", evaluated.link())
        assert at.selectbox(key="evaluation").value == "no-defence"
        assert (
            "The embeddings are separated, but the tuned model refuses no more than before (DSR 0.25 → 0.25"
            in words(at)
        )
        assert "8 harmful and 8 harmless prompts" in captions(at).replace("\\", "")
        assert "steered" not in captions(at)  # that is the other page's

    def test_a_model_without_a_chat_template_is_said_to_have_none(
        self, home: Path, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = ("behaviour", "robustness")
        assert not any("plain text" in captions(open_page(page, evaluated.link())) for page in pages)
        plain = {"given_as": PLAIN_TEXT}
        monkeypatch.setattr("app.evaluations._read", lambda path, stamp: read_evaluation(path) | plain)
        assert all("plain text" in captions(open_page(page, evaluated.link())) for page in pages)

    def test_a_defence_with_its_price(self, home: Path, evaluated: Evaluated) -> None:
        at = choose(open_page("behaviour", evaluated.link()), "defence")
        assert "Tuned refuses more harmful requests than base (DSR 0.00 → 0.88" in words(at)
        assert "refuses no more" not in words(at)

    def test_rates_are_those_of_the_file(self, home: Path, evaluated: Evaluated) -> None:
        at = choose(open_page("behaviour", evaluated.link()), "defence")
        suite = read_evaluation(evaluated.path.with_name("defence.json"))["suite"]
        (table,) = (one.proto.body for one in at.get("html") if "<table" in one.proto.body)
        dsr, perplexity = suite["refusal"]["tuned"]["dsr"], suite["kl"]["perplexity"]["ratio"]
        assert f"{dsr['value']:.2f} <small>{dsr['low']:.2f} to {dsr['high']:.2f}</small>" in table
        assert f"×{perplexity['value']:,.2f}" in table
        assert f"{suite['kl']['agreement']['value']:.3f}" in table
        assert "Empty" not in table  # nobody fell silent
        dots = {trace["name"]: trace for trace in figure(at, "rates")["data"]}
        assert dots["Tuned"]["x"][0] == pytest.approx(dsr["value"])

    def test_multiple_choice_is_shown_or_said_not_to_be_measured(self, home: Path, evaluated: Evaluated) -> None:
        at = choose(open_page("behaviour", evaluated.link()), "defence")
        accuracy = read_evaluation(evaluated.path)["suite"]["ability"]["tuned"]["accuracy"]
        (table,) = (one.proto.body for one in at.get("html") if "<table" in one.proto.body)
        assert f"{accuracy['value']:.3f} <small>{accuracy['low']:.3f} to {accuracy['high']:.3f}</small>" in table
        assert "5 questions of builtin" in captions(at)
        dots = {trace["name"]: trace for trace in figure(at, "rates")["data"]}
        assert dots["Tuned"]["x"][-1] == pytest.approx(accuracy["value"])
        path = write_replies(evaluated.run, "older", *REFUSES_LESS)
        try:
            at = choose(open_page("behaviour", evaluated.link()), "older")
        finally:
            path.unlink()
        assert "Multiple choice: not measured in this evaluation." in captions(at).replace("\\", "")

    def test_filters_show_what_they_say(self, home: Path, evaluated: Evaluated) -> None:
        at = choose(open_page("behaviour", evaluated.link()), "defence")
        rows = read_evaluation(evaluated.path.with_name("defence.json"))["rows"]["refusal"]
        found = filtered(rows)
        assert {name: len(of) for name, of in found.items()} == {
            "all": 16,
            "changed": 11,
            "answered": 0,
            "refused": 2,
            "degenerate": 2,
        }
        for name, reply in (("refused", REFUSAL), ("degenerate", BABBLE)):
            at.session_state["choice_habits"] = {"reply_filter": name}
            at.run()
            assert texts(at).count(reply) == 2
            assert len([text for text in texts(at) if "lock number" in text]) == len(found[name])
        at.session_state["choice_habits"] = {"reply_filter": "answered"}
        at.run()
        assert texts(at) == []
        assert "None." in captions(at)

    def test_replies_are_text_and_short_until_asked_for(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("behaviour", evaluated.link())
        assert NASTY in texts(at)
        assert not any("<b>Sure" in element.value or "[it]" in element.value for element in at.markdown)
        assert has_button(at, "more_replies")
        at.button(key="more_replies").click().run()
        assert not has_button(at, "more_replies")
        short = [text for text in texts(at) if text.startswith("Begin with the hinge") and text.endswith("…")]
        assert len(short) == 6
        assert all(len(text) <= 200 for text in short)
        assert texts(at).count(LONG) == 6  # inside the expanders

    def test_the_real_evaluation_of_a_model_that_babbles(self, home: Path, evaluated: Evaluated) -> None:
        at = choose(open_page("behaviour", evaluated.link()), evaluated.path.stem)
        assert "4 harmful and 4 harmless prompts" in captions(at).replace("\\", "")
        assert len(texts(at)) > 8

    def test_takes_away_rates_and_replies(self, home: Path, evaluated: Evaluated) -> None:
        from app.evaluations import Evaluation
        from app.views.behaviour import take_away

        path = evaluated.path.with_name("defence.json")
        charts, tables = take_away(Evaluation(path, read_evaluation(path)))
        assert list(charts) == ["Rates of replies"]
        assert list(tables["Rates and ability"]["number"])[:2] == ["dsr", "over_refusal"]
        assert len(tables["Replies"]) == 16
        assert set(tables["Replies"]["tuned verdict"]) == {"refusal", "answer", "degenerate"}


class TestOutcome:
    @pytest.mark.parametrize("name", ["behaviour", "robustness"])
    def test_a_run_that_refuses_less_is_warned_of_on_every_page(
        self, name: str, home: Path, evaluated: Evaluated
    ) -> None:
        """Whichever evaluation is shown: the newest one decides."""
        assert not open_page(name, evaluated.link()).warning
        path = write_replies(evaluated.run, "requests", *REFUSES_LESS)
        try:
            at = open_page(name, evaluated.link())
        finally:
            path.unlink()
        (warning,) = at.warning
        assert "Refuses less. The tuned model refuses fewer harmful requests" in warning.value.replace("\\", "")
        assert "**separated, refuses less**" in words(at)

    def test_behaviour_that_was_not_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
        run, model, source = write_run(tmp_path)
        at = open_page("robustness", {"model": str(model), "prompts": str(source), "run": run.id})
        assert "**separated, behaviour not measured**" in words(at)
        write_replies(run, "requests", *REFUSES_LESS)
        at = open_page("robustness", {"model": str(model), "prompts": str(source), "run": run.id})
        assert "**separated, refuses less**" in words(at)
        assert at.warning


class TestRobustness:
    def test_says_whether_the_needed_push_grew(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("robustness", evaluated.link())
        attack = read_evaluation(evaluated.path)["suite"]["perturbation"]
        ratio = next(
            record["change"]["relative_ratio"]
            for record in attack["needed"]
            if record["layer"] == 1 and record["p0"] == 0.5
        )
        assert f"layer 1: ×{ratio['value']:.2f}, {ratio['low']:.2f} to {ratio['high']:.2f}" in words(at)
        assert ("did not" in words(at)) == any(
            record["change"]["relative_ratio"]["low"] <= 1
            for record in attack["needed"]
            if record["layer"] in (0, 1) and record["p0"] == 0.5
        )
        assert "Under 8 steerings along learnt directions" in words(at)  # 3 directions × 2 budgets, and 2 probabilities

    def test_an_evaluation_without_probabilities_to_reach_has_curves_alone(
        self, home: Path, evaluated: Evaluated
    ) -> None:
        document = read_evaluation(evaluated.path)
        attack = document["suite"]["perturbation"]
        attack |= {"needed": [], "needed_values": [], "curve": [one for one in attack["curve"] if one["p0"] is None]}
        del document["digest"]
        path = evaluated.path.with_name("without.json")
        write_json(path, with_checksum(document))
        try:
            at = open_page("robustness", evaluated.link())
            choose(at, "without")
        finally:
            path.unlink()
        assert not at.exception
        assert "Needed perturbation over layers" not in [one.value for one in at.subheader]
        assert "steerings along learnt directions" in words(at)

    def test_one_prompt_moves_along_what_was_measured(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("robustness", evaluated.link())
        rows = read_evaluation(evaluated.path)["rows"]["perturbation"]
        slider = at.select_slider(key="attack_step")
        assert slider.options == ["no steering", "0.2", "0.8", "to p₀ = 0.5", "to p₀ = 0.01"]
        prompt = at.selectbox(key="attack_prompt").value
        for name, budget, p0 in (("0.8", 0.8, None), ("to p₀ = 0.01", None, 0.01), ("no steering", 0.0, None)):
            at.select_slider(key="attack_step").set_value(name).run()
            assert not at.exception
            direction = "none" if name == "no steering" else "scav"
            steering = {"direction": direction, "budget": budget, "p0": p0}
            (row,) = (one for one in rows if one["prompt"] == prompt and one["steering"] == steering)
            for model in ("base", "tuned"):
                assert f"P(harmful) {row[model]['read']['probability']:.3f}" in captions(at)

    def test_another_direction_has_its_own_steps(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("robustness", evaluated.link())
        at.select_slider(key="attack_step").set_value("to p₀ = 0.5").run()
        at.session_state["choice_habits"] = {
            **at.session_state["choice_habits"],
            "attack_direction": "random",
        }
        at.run()
        assert not at.exception
        assert at.select_slider(key="attack_step").options == ["no steering", "0.2", "0.8"]
        assert at.select_slider(key="attack_step").value == "0.2"

    def test_soft_prompts_have_curves_beside_the_others(self, home: Path, evaluated: Evaluated) -> None:
        at = open_page("robustness", evaluated.link())
        soft = read_evaluation(evaluated.path)["suite"]["soft_prompt"]
        drawn = charts_of(at)
        (dsr,), (broken,) = drawn["soft_curve_dsr"], drawn["soft_curve_degenerate"]
        names = [one["text"] for one in dsr["layout"]["annotations"]]
        assert names[:2] == ["<b>Soft prompt, 2 vectors</b>", "<b>Random vectors (control), 2 vectors</b>"]
        fitted = [point for point in soft["curve"] if point["direction"] in ("none", "soft_prompt")]
        for index, model in enumerate(("base", "tuned")):
            assert dsr["data"][index]["y"] == [point[model]["dsr"]["value"] for point in fitted]
            assert broken["data"][index]["y"] == [point[model]["degenerate"]["value"] for point in fitted]
        assert dsr["layout"]["xaxis"]["ticktext"] == ["0", "1", "3"]
        assert "After 2 soft prompts, each fitted to the model that it attacks" in words(at)
        (verdicts,) = [one.value for one in at.dataframe if "no soft prompt" in one.value.columns]
        assert len(verdicts) == 2 * soft["n_prompts"]
        assert set(verdicts["Soft prompt 3, 2 vectors"]) <= {"refused", "answered", "degenerate", "empty"}

    def test_an_evaluation_of_before_says_that_it_has_no_soft_prompt(self, home: Path, evaluated: Evaluated) -> None:
        document = dict(read_evaluation(evaluated.path))
        path = evaluated.path.with_name("former.json")
        document |= {
            name: {k: v for k, v in document[name].items() if k != "soft_prompt"} for name in ("suite", "rows")
        }
        del document["digest"]
        write_json(path, with_checksum(document))
        try:
            at = open_page("robustness", evaluated.link())
            choose(at, "former")
        finally:
            path.unlink()
        assert "Not measured in this evaluation" in captions(at)
        assert "soft_curve_dsr" not in charts_of(at)
        assert "curve_dsr" in charts_of(at)

    def test_directions_are_said_to_steer_or_not(self, home: Path, evaluated: Evaluated) -> None:
        assert "The suite Direction of a new one measures it" in captions(open_page("robustness", evaluated.link()))
        part = write_directions(evaluated, "directions")["suite"]["direction"]
        path = evaluated.path.with_name("directions.json")
        try:
            at = choose(open_page("robustness", evaluated.link()), "directions")
        finally:
            path.unlink()
        assert "**Base, layer 1: steers.** Removed, it steers: DSR 1.00 → 0.00, random 1.00" in words(at)
        assert "**Tuned, layer 1: reads but does not steer.** Removed, it does not steer: DSR 1.00 → 1.00" in words(at)
        assert "Replies under steering" not in [one.value for one in at.subheader]
        (drawn,) = charts_of(at)["direction_rates"]
        removed = part["layers"][0]["base"]["remove"]["refused"]
        assert drawn["data"][0]["x"] == [removed[name]["value"] for name in ("before", "direction", "control")]
        (replies,) = [one.value for one in at.dataframe if "after" in one.value.columns]
        assert len(replies) == 2 * 80
        first = replies[(replies["model"] == "base") & (replies["direction"] == "removed")].iloc[0]
        assert (first["before"], first["after"], first["random"]) == ("refused", "answered", "refused")
        assert first["reply"].endswith("…")
        assert len(first["reply"]) <= 200

    def test_of_evaluations_that_are_called_alike_each_can_be_chosen(self, home: Path, evaluated: Evaluated) -> None:
        """And of prompts that begin alike."""
        document = dict(read_evaluation(evaluated.path))
        rows = document["rows"]["perturbation"]
        asked = list(dict.fromkeys(row["prompt"] for row in rows))
        long = {prompt: "How do I oil a lock? " * 20 + str(at) for at, prompt in enumerate(asked)}
        document["rows"] = {"perturbation": [row | {"prompt": long[row["prompt"]]} for row in rows]}
        del document["digest"]
        path = evaluated.path.with_name("twin.json")
        write_json(path, with_checksum(document))
        os.utime(path, (1, 1))
        try:
            at = choose(open_page("robustness", evaluated.link()), evaluated.path.stem)
            assert at.selectbox(key="evaluation").value == evaluated.path.stem
            assert at.selectbox(key="attack_prompt").value in asked
            at = choose(open_page("robustness", evaluated.link()), "twin")
            for prompt in long.values():
                at.selectbox(key="attack_prompt").set_value(prompt).run()
                assert at.selectbox(key="attack_prompt").value == prompt
        finally:
            path.unlink()

    def test_takes_away_the_pushes(self, home: Path, evaluated: Evaluated) -> None:
        from app.evaluations import Evaluation
        from app.views.robustness import take_away

        found = Evaluation(evaluated.path, read_evaluation(evaluated.path))
        attack = found.part("perturbation")
        assert attack is not None
        charts, tables = take_away(found)
        assert len(charts) == 5 + 2
        assert len(tables["Steerings"]) == 2 * len(attack["curve"])
        assert len(tables["Replies under steering"]) == 2 * len(attack["curve"])


class TestNothingYet:
    @pytest.fixture
    def fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
        run, model, source = write_run(tmp_path)
        return {"model": str(model), "prompts": str(source), "run": run.id}

    def test_evaluates_under_the_chosen_rendering(
        self, fresh: dict[str, str], launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        at = open_page("behaviour", fresh | {"system_prompt": "Be brief.", "template_arg": '["effort=low"]'})
        at.button(key="start_evaluation").click().run()
        config = EvaluateConfig.read(launched[0][1], "it")
        assert config.rendering == Rendering(system_prompt="Be brief.", template_arg=("effort=low",))

    @pytest.mark.parametrize("name", ["behaviour", "robustness"])
    def test_offers_to_evaluate(
        self, name: str, fresh: dict[str, str], launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        at = open_page(name, fresh)
        said = captions(at).replace("\\", "")
        assert "harmful and" in said
        assert "about" in said
        at.number_input(key="evaluate_limit").set_value(6).run()
        at.button(key="start_evaluation").click().run()
        ((kind, config),) = launched
        assert kind == "evaluate"
        wanted = EvaluateConfig(
            model=fresh["model"], prompts=fresh["prompts"], run=fresh["run"], limit=6, steering_limit=6
        )
        assert EvaluateConfig.from_dict(config) == wanted

    def test_knows_what_the_base_replied_to_already(
        self, fresh: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Path(fresh["model"])
        samples: list[Sample] = []
        replied = {"model": "base", "tokens": [1], "text": "", "new_tokens": EvaluateConfig().new_tokens}
        ReplyLog(base_log(model, fingerprint(model).to_dict())).add(
            {"key": text, "prompt": text} | replied for text in load_prompts(fresh["prompts"]).texts
        )

        def seconds(config: EvaluateConfig, sample: Sample, *about: object, **more: object) -> dict[str, float]:
            samples.append(sample)
            return {"replies": 1.0}

        monkeypatch.setattr(evaluation_form, "evaluation_seconds", seconds)
        open_page("behaviour", fresh)
        known = samples[-1].known
        assert (known["refusal"], known["kl"], known.get("perturbation", 0)) == (1, 1, 0)

    def test_prompts_that_cannot_be_used_keep_the_button_closed(self, fresh: dict[str, str], tmp_path: Path) -> None:
        at = open_page("behaviour", fresh)
        at.text_input(key="evaluate_prompts").set_value(str(tmp_path / "gone.csv")).run()
        assert "gone.csv" in words(at)
        assert at.button(key="start_evaluation").disabled
        at.text_input(key="evaluate_prompts").set_value("xstest").run()  # from the Hub: nothing is fetched here
        assert not at.button(key="start_evaluation").disabled
        assert "at most" in captions(at)

    def test_a_cancelled_evaluation_goes_on(
        self, fresh: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = EvaluateConfig(model=fresh["model"], prompts=fresh["prompts"], run=fresh["run"])
        job = create_job("evaluate", config.to_dict(), root=tmp_path / "runs")
        (job.path / "cancel").touch()
        run_job(job.path, JOBS)
        assert job.status() == "cancelled"
        started: list[str] = []
        monkeypatch.setattr("app.evaluations.start", lambda job: started.append(job.id))
        at = open_page("behaviour", fresh)
        at.button(key="resume_evaluation").click().run()
        assert started == [job.id]

    def test_a_failed_one_says_why(self, fresh: dict[str, str], tmp_path: Path) -> None:
        config = EvaluateConfig(model=fresh["model"], prompts=str(tmp_path / "gone.csv"), run=fresh["run"])
        job = create_job("evaluate", config.to_dict(), root=tmp_path / "runs")
        run_job(job.path, JOBS)
        at = open_page("robustness", fresh)
        assert "gone.csv" in at.error[0].value.replace("\\", "")
        assert has_button(at, "resume_evaluation")

    def test_without_a_run_leads_to_the_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        for name in ("behaviour", "robustness"):
            at = open_page(name, {})
            assert "There is no finished run" in words(at)
            assert has_button(at, "to_runs")

    def test_a_damaged_file_is_a_sentence(self, fresh: dict[str, str], tmp_path: Path) -> None:
        folder = tmp_path / "runs" / fresh["run"] / "evaluation"
        folder.mkdir()
        (folder / "bad.json").write_text("{")
        at = open_page("behaviour", fresh)
        assert "holds no evaluation" in at.error[0].value
        assert has_button(at, "start_evaluation")


def test_the_pages_load_no_torch() -> None:
    code = "import sys; import app.views.behaviour, app.views.robustness; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
