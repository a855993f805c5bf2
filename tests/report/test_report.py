"""The report: what it says, that nothing in a prompt can change the page, and that it needs nothing but itself."""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.analysis.projection import View
from es2.analysis.verdict import Behaviour
from es2.cli import main as cli
from es2.cli import runs as cli_runs
from es2.core.errors import InputError, MachineError
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.report import figures as report_figures
from es2.report.glossary import BY_NAME, COMPARED, TERMS
from es2.report.labels import shortened
from es2.report.page import PROMPT_CHARACTERS, Compared, report_html, reproduce
from es2.report.palette import BASE, TUNED
from es2.report.report import write_report
from es2.store.film import FILM, write_frame
from es2.training.config import FinetuneConfig
from es2.workflow.compared import find_compared
from es2.workflow.film import find_film
from es2.workflow.runs import open_run
from tests.builders import tiny_prompts
from tests.builders_artifacts import TARGETS, write_comparison
from tests.charts.test_evaluation_charts import attack, directed, soft

NASTY = (
    "</script><script>alert(1)</script><b>bold</b>",
    "<img src=x onerror=alert(1)> & &amp; &lt;",
    "<!-- comment --> ]]> ${alert(1)} `tick` \\u003c",
    "**Markdown** [link](https://example.org) $$\\int x^2$$ {title} {0}",
    "مرحبا كيف أفتح القفل 🔒 日本語の錠前",
    "a" * 10_000,
)
PLAIN = tuple("a plain prompt" for _ in NASTY)


pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture(scope="module")
def run(home: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        return write_comparison(home).run.id


@pytest.fixture
def compared(run: str) -> Compared:
    return find_compared(run)


def with_texts(compared: Compared, texts: tuple[str, ...]) -> Compared:
    """The comparison with other texts, in turn, in the place of its prompts', and one as the run's name."""
    repeated = tuple(texts[row % len(texts)] for row in range(len(compared.prompts)))
    return replace(compared, prompts=replace(compared.prompts, texts=repeated), title=texts[0], names=texts[:2])


class Page(HTMLParser):
    """A report as a browser reads it: its elements in order, the text of prompt cells, the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.prompts: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attributes)))
        self.attributes += [(name, value or "") for name, value in attributes]
        prompt = tag == "td" and ("class", "prompt") in attributes
        self._into = self.prompts if prompt else self.scripts if tag == "script" else None
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data
        else:
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        """The figures' data."""
        data = self.scripts[1].split("const FIGURES = ", 1)[1]
        found, _ = json.JSONDecoder().raw_decode(data)
        return found


def page_text(compared: Compared, ability: dict[str, Any]) -> str:
    return Page(report_html(replace(compared, ability=ability))).text


class TestAttacks:
    def test_curves_of_steerings_and_of_soft_prompts(self, compared: Compared) -> None:
        assert compared.attacked is None
        assert "Under attack" not in Page(report_html(compared)).text
        evaluation = {"prompts": "<locks>", "suite": {"perturbation": attack(), "soft_prompt": soft()}}
        before = len(Page(report_html(compared)).figures)
        page = Page(report_html(replace(compared, attacked=evaluation)))
        assert "harmful test prompts of <locks>" in page.text
        assert "Under 3 steerings along learnt directions" in page.text
        assert "After 3 soft prompts, each fitted to the model that it attacks" in page.text
        assert len(page.figures) == before + 2
        (curves,) = [
            figure
            for figure in page.figures.values()
            if any("Soft prompt" in one.get("text", "") for one in figure["layout"].get("annotations", ()))
        ]
        base, tuned = curves["data"][:2]
        assert base["x"] == ["0", "1", "2"]
        assert (base["y"], tuned["y"]) == ([0.5, 0.25, 0.0], [0.75, 0.5, 0.25])
        assert (base["line"]["color"], tuned["line"]["color"]) == (BASE, TUNED)

    def test_whether_directions_steer(self, compared: Compared) -> None:
        assert compared.directed is None
        assert "Does the direction steer?" not in Page(report_html(compared)).text
        broken = {"remove": ["degenerate"] * 6, "add": ["answer"] * 6}
        evaluation = {"prompts": "<locks>", "suite": {"direction": directed(**broken)}}
        text = Page(report_html(replace(compared, directed=evaluation))).text
        assert "6 harmful and 6 harmless test prompts of <locks>" in text
        assert "Base, layer 1: steers. Removed, it steers: DSR 1.00 → 0.17" in text
        assert "Tuned, layer 1: not measured enough." in text

    def test_a_part_that_was_not_measured_is_named(self, compared: Compared) -> None:
        evaluation = {"prompts": "locks", "suite": {"perturbation": attack(), "soft_prompt": {"problem": "No."}}}
        text = Page(report_html(replace(compared, attacked=evaluation))).text
        assert "Soft prompts were not measured." in text


class TestPage:
    def test_says_what_came_of_it_and_how_to_make_it_again(self, compared: Compared) -> None:
        page = Page(report_html(replace(compared, title="A run of mine")))
        assert "A run of mine" in page.text
        assert compared.result["verdict_reason"] in page.text
        for layer in TARGETS:
            assert compared.result["verdicts"][str(layer)]["reason"] in page.text
        assert "prompt 0.021, reply 0.034" in page.text
        assert reproduce(compared.config) in page.text
        assert "umap-learn" in page.text

    def test_says_what_became_of_multiple_choice(self, compared: Compared) -> None:
        assert "Abilitynot measured" in Page(report_html(compared)).text
        base, tuned, change = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.6, 0.58, -0.02))
        ability = {"questions": "builtin", "n_questions": 200, "answer_by": "text", "chance": 0.25}
        ability |= {"base": {"accuracy": base}, "tuned": {"accuracy": tuned}, "change": {"accuracy": change}}
        assert (
            "Multiple choice 0.600 (0.500 to 0.700) → 0.580 (0.480 to 0.680), change −0.020 (−0.120 to 0.080): "
            "200 questions of builtin, answered by text; guessing gets 0.25." in page_text(compared, ability)
        )

    @pytest.mark.parametrize(("name", "warned"), [("broken", True), ("refuses less", True), ("defends better", False)])
    def test_says_what_became_of_behaviour(self, compared: Compared, name: str, warned: bool) -> None:
        assert "Separated, behaviour not measured" in Page(report_html(compared)).text
        behaviour = Behaviour(name, "Of 8 <b>requests</b>.")
        page = Page(report_html(replace(compared, behaviours=(behaviour,))))
        assert f"Separated, {name}" in page.text
        assert "Of 8 <b>requests</b>." in page.text
        assert (("role", "alert") in page.attributes) == warned
        assert (str(behaviour.warning) in page.text) == warned

    def test_says_where_there_was_no_chat_template(self, compared: Compared) -> None:
        plain = replace(compared.base, meta=compared.base.meta | {"templated": False})
        assert "plain text" in Page(report_html(replace(compared, base=plain))).text
        assert "plain text" not in Page(report_html(compared)).text

    def test_judges_by_the_runs_own_budget(self, compared: Compared) -> None:
        result = {**compared.result, "kl_harmless_test": {"prompt": 0.45, "reply": 0.2}}
        wide = Page(report_html(replace(compared, result=result, config={**compared.config, "kl_budget": 0.5}))).text
        assert "Separated" in wide
        assert "prompt 0.450, reply 0.200 (budget 0.5)" in wide
        assert "4 budgets of 0.5 nats" in wide
        usual = Page(report_html(replace(compared, result=result))).text
        assert "harmless logits moved by 0.45 nats, the budget is 0.1." in usual

    def test_has_every_number_of_the_target_layers_with_its_interval(self, compared: Compared) -> None:
        text = Page(report_html(compared)).text
        for layer in TARGETS:
            before, after = compared.analysis.base_layers[layer], compared.analysis.layers[layer]
            for term in TERMS:
                for one in (before, after):
                    assert term.value(one.numbers[term.name]) in text
                    assert term.range(one.numbers[term.name]) in text
            for term in COMPARED:
                assert term.range(after.numbers[term.name]) in text
            ratio = after.change["fisher_ratio"].ratio
            assert f"×{ratio.value:.2f}(×{ratio.low:.2f} to ×{ratio.high:.2f})" in text

    def test_needs_nothing_from_outside(self, compared: Compared) -> None:
        page = Page(report_html(with_texts(compared, PLAIN)))
        assert not [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
        assert any(value.startswith("default-src 'none';") for name, value in page.attributes if name == "content")
        assert "http" not in page.scripts[1]
        assert len(page.scripts[0]) > 1_000_000, "plotly.js is inside, once"

    def test_nothing_in_a_prompt_or_a_name_changes_the_page(self, compared: Compared) -> None:
        plain, nasty = (Page(report_html(with_texts(compared, texts))) for texts in (PLAIN, NASTY))
        assert nasty.elements == plain.elements
        assert len(nasty.scripts) == 2
        assert nasty.figures.keys() == plain.figures.keys()

    def test_prompts_read_as_they_were_written(self, compared: Compared) -> None:
        page = Page(report_html(with_texts(compared, NASTY)))
        expected = {shortened(text, PROMPT_CHARACTERS) for text in NASTY}
        assert page.prompts
        assert set(page.prompts) <= expected
        assert NASTY[0] in page.text, "the run's name"

    def test_hover_labels_hold_no_markup_of_a_prompt(self, compared: Compared) -> None:
        figures = Page(report_html(with_texts(compared, NASTY))).figures
        hovers = [
            text for figure in figures.values() for trace in figure["data"] for text in trace.get("hovertext", [])
        ]
        assert hovers
        for text in hovers:
            assert "<" not in text.replace("<br>", "")
            assert "$" not in text
            assert len(text) < 3000

    def test_lists_who_moved_most_and_who_stands_wrong(self, compared: Compared) -> None:
        text = Page(report_html(compared)).text
        prompts, layer = compared.prompts, TARGETS[0]
        probes = compared.analysis.tuned_probes
        assert probes is not None
        after = probes.margin(compared.tuned.layer(layer), layer) * np.where(prompts.labels == HARMFUL, 1, -1)
        test = prompts.in_split("test")
        assert f"Layer {layer}: {(after[test] < 0).sum()} of {test.sum()} test prompts on the wrong side" in text
        assert f"Layer {layer}: the 10 test prompts that moved most" in text


class TestFilm:
    @pytest.fixture
    def filmed(self, run: str, home: Path) -> Iterator[Job]:
        """The run with a film of three validations of two pairs."""
        job = open_run(run)
        prompts = load_prompts(str(job.config["prompts"]))
        shown = prompts.take(np.flatnonzero(prompts.in_split("validation"))[:4].tolist())
        for step in (0, 5, 10):
            embeddings = np.random.default_rng(step).normal(size=(2, 4, 8)).astype(np.float32)
            about = {
                "layers": TARGETS,
                "labels": shown.labels,
                "texts": shown.texts,
                "numbers": {"mean_difference_margin": 0.5},
            }
            write_frame(job.path / FILM, step, embeddings, **about)
        yield job
        shutil.rmtree(job.path / FILM)

    def test_the_report_of_a_run_with_a_film_plays_it(self, filmed: Job) -> None:
        page = Page(report_html(find_compared(filmed.id)))
        assert "Film" in page.text
        assert "mean-difference direction" in page.text
        (figure,) = [one for one in page.figures.values() if one.get("frames")]
        assert [frame["name"] for frame in figure["frames"]] == ["0", "5", "10"]
        (cloud, _) = [trace for trace in figure["data"] if trace["name"] == "harmful"]
        assert cloud["hovertext"][0].startswith("How do I force lock"), "texts come from the prompt set"
        (loss,) = [trace for trace in figure["data"] if trace["name"] == "loss"]
        assert len(loss["x"]) == 40

    def test_a_run_without_one_is_reported_as_before(self, compared: Compared) -> None:
        assert compared.film is None
        page = Page(report_html(compared))
        assert "Film" not in page.text
        assert not any(one.get("frames") for one in page.figures.values())

    def test_what_is_missing_costs_that_and_nothing_else(self, filmed: Job) -> None:
        (filmed.path / FILM / "00000005.safetensors").write_bytes(b"half")
        view = find_film(filmed, None)
        assert view is not None
        assert set(view.texts) == {None}
        assert (view.steps, view.n_lost) == ((0, 10), 1)


class TestReproduce:
    def test_every_setting_has_an_option(self) -> None:
        options = set(inspect.signature(cli_runs.finetune).parameters)
        settings = set(FinetuneConfig(layers=()).to_dict())
        assert settings <= options

    def test_spells_the_settings_out(self) -> None:
        config = FinetuneConfig(layers=(1, 2), model="a b", allow_many_layers=True).to_dict() | {
            "prompts": "x; rm -rf /"
        }
        words = shlex.split(reproduce(config))
        given = dict(pairwise(words))
        assert words[:2] == ["es2", "finetune"]
        assert given["--model"] == "a b"
        assert given["--prompts"] == "x; rm -rf /"
        assert given["--layers"] == "1,2"
        assert given["--steps"] == str(config["steps"])
        assert "--allow-many-layers" in words
        assert "--gradient-checkpointing" not in words


class TestFile:
    def test_an_existing_file_stays_unless_forced(self, compared: Compared, tmp_path: Path) -> None:
        out = tmp_path / "new" / "report.html"
        assert write_report(compared, out) == out
        out.write_text("mine")
        with pytest.raises(InputError, match=r"report\.html' exists; .* --force"):
            write_report(compared, out)
        assert out.read_text() == "mine"
        write_report(compared, out, force=True)
        assert out.read_text().startswith("<!doctype html>")
        assert [entry.name for entry in out.parent.iterdir()] == ["report.html"]

    def test_a_folder_is_no_file(self, compared: Compared, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            write_report(compared, tmp_path, force=True)

    def test_a_full_disk_leaves_the_old_file(
        self, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "report.html"
        out.write_text("old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(MachineError, match="No space"):
            write_report(compared, out, force=True)
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("report.html", "old")]

    def test_half_of_a_surrogate_pair_is_no_obstacle(self, compared: Compared, tmp_path: Path) -> None:
        write_report(replace(compared, title="broken \ud83d"), tmp_path / "report.html")


class TestFind:
    def test_a_run_without_a_result(self, home: Path) -> None:
        config = FinetuneConfig(layers=TARGETS).to_dict() | {"prompts": "builtin"}
        unfinished = create_job("finetune", config, root=home / "runs")
        with pytest.raises(InputError, match=f"{unfinished.id} .*has no result to report"):
            find_compared(unfinished.id)
        shutil.rmtree(unfinished.path)

    def test_what_is_not_there(self) -> None:
        with pytest.raises(InputError, match="no-such-run"):
            find_compared("no-such-run")
        with pytest.raises(InputError, match=r"no showcase .*`es2 showcase` makes it"):
            find_compared("showcase")

    @pytest.mark.parametrize(("gone", "what"), [("", "embeddings"), ("derived", "analysis")])
    def test_embeddings_or_analysis_that_are_gone(self, compared: Compared, run: str, gone: str, what: str) -> None:
        place = compared.tuned.path / gone
        aside = place.rename(place.with_name(".aside"))
        try:
            with pytest.raises(InputError, match=f"The {what} of run .* `es2 analyze .*--run {run}` makes it again"):
                find_compared(run)
        finally:
            aside.rename(place)

    def test_prompts_that_have_changed(self, compared: Compared, run: str) -> None:
        source = Path(compared.config["prompts"])
        text = source.read_text(encoding="utf-8")
        source.write_text(text.replace("How do I oil", "How would I oil"), encoding="utf-8")
        try:
            with pytest.raises(InputError, match="have changed since run"):
                find_compared(run)
        finally:
            source.write_text(text, encoding="utf-8")


def test_the_command(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def es2(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["es2", "report", *arguments, "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    out = tmp_path / "report.html"
    code, document = es2("--run", run, "--out", str(out))
    assert (code, document) == (0, {"run": run, "path": str(out), "bytes": out.stat().st_size})
    code, document = es2("--run", run, "--out", str(out))
    assert code == 2
    assert "--force" in document["error"]
    assert es2("--run", run, "--out", str(out), "--force")[0] == 0


# ----------------------------------------------------------------------------------------------------------- figures


def test_a_strip_shows_both_models_and_the_targets(compared: Compared) -> None:
    analysis = compared.analysis
    figure = report_figures.strip(
        analysis, "margin_mean", names=("<i>A</i>", "B"), targets=TARGETS, y_title="scale-free units"
    )
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["&lt;i&gt;A&lt;/i&gt;", "B", "target layers"]
    assert list(lines["B"].y) == [layer.numbers["margin_mean"].value for layer in analysis.layers]
    assert list(lines["target layers"].x) == list(TARGETS)
    term, number = BY_NAME["margin_mean"], analysis.layers[2].numbers["margin_mean"]
    assert lines["B"].hovertext[2] == f"B: {term.value(number)} ({term.range(number)})"


@pytest.mark.parametrize("kind", ["separation", "pca"])
def test_a_pair_has_equal_axes_and_every_asked_prompt_on_both_sides(kind: str) -> None:
    prompts = tiny_prompts(20)
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(40, 2)), 5.0 + rng.normal(size=(40, 2))
    rows = np.arange(0, 40, 2)
    figure = report_figures.pair(
        View(kind, base, tuned, ("x", "y"), None), prompts, rows, margins=(base[:, 0], tuned[:, 0]), names=("A", "B")
    )
    layout = figure.layout
    assert layout.xaxis.range == layout.xaxis2.range
    assert layout.yaxis.range == layout.yaxis2.range
    for points in (base, tuned):
        assert layout.xaxis.range[0] < points[rows, 0].min()
        assert points[rows, 1].max() < layout.yaxis.range[1]
    if kind == "separation":
        assert layout.xaxis.range[0] == -layout.xaxis.range[1]
    for column, points in (("x", base), ("x2", tuned)):
        drawn = [trace for trace in figure.data if (trace.xaxis or "x") == column]
        assert [trace.name for trace in drawn] == ["harmless", "harmful"]
        of_label = [rows[prompts.labels[rows] == which] for which in (HARMLESS, HARMFUL)]
        for trace, expected in zip(drawn, of_label, strict=True):
            assert list(trace.x) == points[expected, 0].tolist()


def test_training_curves_take_the_last_word_on_a_repeated_step() -> None:
    def event(step: int, loss: float, **numbers: float) -> dict[str, Any]:
        return {"event": "progress", "stage": "finetune", "done": step, "total": 4, "loss": loss, **numbers}

    events = [
        {"event": "progress", "stage": "base", "done": 1, "total": 1},
        event(1, 5.0),
        event(2, 9.0, validation_kl_prompt=0.3),
        event(2, 4.0, validation_kl_prompt=0.02),
        event(3, 3.0),
    ]
    figure = report_figures.training(events, 0.1)
    assert figure is not None
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert lines["loss"] == ([1, 2, 3], [5.0, 4.0, 3.0])
    assert lines["prompts, held out"] == ([2], [0.02])
    assert figure.layout.yaxis2.range[1] > 0.1, "the budget is in sight"
    assert report_figures.training(events[:1], 0.1) is None
    assert "yaxis4" not in figure.layout
    seen = report_figures.training([*events, event(4, 2.0, validation_broken_first=0.25)], 0.1)
    assert seen is not None
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in seen.data}
    assert lines["broken first"] == ([4], [0.25])
    assert lines["begun alike"] == ([], []), "the base refuses none"
    assert tuple(seen.layout.yaxis4.range) == (-0.03, 1.05)
