"""The app as a whole, without a browser: what it shows for which artifacts, links and jobs, and what it never loads."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app import artifacts as reading
from es2.analysis.layers import analyze
from es2.analysis.projection import UmapCoordinates
from es2.analysis.results import AnalysisConfig
from es2.core.errors import MachineError
from es2.jobs import queue as jobs
from es2.jobs.job import Job
from es2.jobs.running import run_job
from es2.models.mirror import ALLOW_MIRROR, mirror_folder, require_yes
from es2.workflow.derived import analysis_key, umap_key
from tests.builders_artifacts import BEST_LAYER, DISTANCES, MODEL, Artifacts, write_artifacts
from tests.figures import charts_of

MAIN = str(Path(__file__).parents[2] / "app" / "main.py")
LAYERS = calc_hash("layers")
"""What Streamlit calls the page at this path; its own way to turn to a page needs a file for each."""
CHARTS = ["accuracy_strip", "margin_strip", "projection", "histogram", "cost_accuracy", "cost_margin"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return write_artifacts(tmp_path_factory.mktemp("home"))


@pytest.fixture
def home(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with artifacts in it."""
    monkeypatch.setenv("ES2_HOME", str(artifacts.home))
    return artifacts.home


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    return tmp_path


def open_app(link: Mapping[str, str] | None = None) -> AppTest:
    """The page of layers."""
    at = AppTest.from_file(MAIN, default_timeout=60)
    at._page_hash = LAYERS
    for name, value in (link or {}).items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def figures(at: AppTest) -> dict[str, dict[str, Any]]:
    """The figures on the page, by their keys."""
    return {key: drawn[0] for key, drawn in charts_of(at).items()}


def marked_layer(at: AppTest) -> int:
    return figures(at)["accuracy_strip"]["layout"]["shapes"][0]["x0"]


def captions(at: AppTest) -> str:
    return "\n".join(element.value for element in at.caption)


def has_button(at: AppTest, key: str) -> bool:
    return any(button.key == key for button in at.button)


class TestBaseView:
    def test_opens_at_the_best_layer(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link())
        assert list(figures(at)) == CHARTS
        assert marked_layer(at) == artifacts.analysis.best_layer == BEST_LAYER
        assert at.slider(key="layer").value == BEST_LAYER
        metrics = {metric.label: metric.value for metric in at.metric}
        shown = artifacts.analysis.layers[BEST_LAYER].numbers
        assert metrics["Probe accuracy"] == f"{shown['probe_accuracy'].value:.3f}"
        assert metrics["Centroid distance"] == f"{shown['centroid_distance'].value:.2f}"

    def test_the_address_follows_the_choice(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link())
        assert at.query_params["layer"] == str(BEST_LAYER)
        at.button(key="next_layer").click().run()
        assert marked_layer(at) == BEST_LAYER + 1
        assert at.query_params["layer"] == str(BEST_LAYER + 1)
        at.slider(key="layer").set_value(0).run()
        assert marked_layer(at) == 0
        assert at.query_params["layer"] == "0"
        assert at.button(key="previous_layer").disabled

    def test_a_late_address_does_not_undo_a_click(self, home: Path, artifacts: Artifacts) -> None:
        """Of two quick clicks, the second comes with the address from before the first."""
        at = open_app(artifacts.link(layer="1"))
        before = dict(at.query_params)
        at.button(key="next_layer").click().run()
        at.button(key="next_layer").click()
        for name, value in before.items():
            at.query_params[name] = value
        at.run()
        assert marked_layer(at) == 3
        assert at.query_params["layer"] == "3"

    def test_going_back_in_the_browser(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link(layer="1"))
        at.button(key="next_layer").click().run()
        at.query_params["layer"] = "1"
        at.run()
        assert marked_layer(at) == 1

    def test_a_link_reopens_the_view(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link(layer="1", view="pca", splits="all"))
        assert marked_layer(at) == 1
        projection = figures(at)["projection"]
        assert "Principal component 1" in projection["layout"]["xaxis"]["title"]["text"]
        shown = sum(len(trace["customdata"]) for trace in projection["data"] if "customdata" in trace)
        assert shown == len(artifacts.prompts)

    def test_only_test_prompts_are_shown_by_default(self, home: Path, artifacts: Artifacts) -> None:
        projection = figures(open_app(artifacts.link()))["projection"]
        shown = [row for trace in projection["data"] if "customdata" in trace for _, row in trace["customdata"]]
        assert {artifacts.prompts.splits[row] for row in shown} == {"test"}
        assert len(shown) == sum(artifacts.prompts.in_split("test"))

    def test_a_selection_is_listed_and_survives_another_layer(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link())
        rows = (0, 1, 5)
        at.session_state["choice_selection"] = (artifacts.prompts.texts_digest, rows)
        at.run()
        for _ in range(2):
            table = at.dataframe[0].value
            assert set(table["prompt"]) == {artifacts.prompts.texts[row] for row in rows}
            own_side = np.where(table["label"] == "harmful", table["margin"], -table["margin"])
            assert list(own_side) == sorted(own_side), "the worst comes first"
            rings = next(trace for trace in figures(at)["projection"]["data"] if trace["name"] == "selected")
            assert len(rings["x"]) == len(rows)
            at.button(key="previous_layer").click().run()
        at.button(key="clear_selection").click().run()
        assert at.dataframe[0].value["side"].iloc[0] == "wrong", "with nothing selected the worst come first"

    def test_margins_and_sides_of_the_table(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link(layer="2"))
        embeddings = artifacts.activations.layer(2)
        margins = artifacts.analysis.base_probes.margin(embeddings, 2)
        table = at.dataframe[0].value
        rows = [artifacts.prompts.texts.index(text) for text in table["prompt"]]
        assert list(table["margin"]) == pytest.approx(margins[rows])
        for row, side in zip(rows, table["side"], strict=True):
            assert side == ("correct" if (margins[row] > 0) == (artifacts.prompts.labels[row] == 1) else "wrong")

    def test_one_selected_prompt_is_shown_with_its_twin(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link())
        at.session_state["choice_selection"] = (artifacts.prompts.texts_digest, (0,))
        at.run()
        assert [element.value for element in at.text] == list(artifacts.prompts.texts[:2])

    def test_an_analysis_with_other_settings_is_shown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_artifacts(tmp_path, 40, analysed=False)
        config = AnalysisConfig(n_bootstrap=200, confidence=0.8)
        analysis = analyze(made.prompts, made.activations, config=config)
        with made.activations.write_derived(analysis_key(made.activations, made.prompts, config)) as folder:
            analysis.save(folder)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        opened = reading.find(MODEL, made.prompts, "last")
        assert opened is not None
        assert opened.analysis.config == config
        assert reading.find(MODEL, made.prompts, "last_instruction") is None
        assert "projection" in figures(open_app(made.link(layer="2")))

    def test_umap_from_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_artifacts(tmp_path, 40)
        points = np.random.default_rng(0).normal(size=(len(DISTANCES), 1, len(made.prompts), 2)).astype(np.float32)
        with made.activations.write_derived(umap_key(made.activations, made.prompts, "last")) as folder:
            UmapCoordinates(points, "umap", "both").save(folder)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        projection = figures(open_app(made.link(view="umap", layer="2")))["projection"]
        assert projection["layout"]["xaxis"]["title"]["text"] == "UMAP 1 (no unit)"
        harmful = next(trace for trace in projection["data"] if trace["name"] == "harmful")
        rows = [row for _, row in harmful["customdata"]]
        np.testing.assert_allclose(harmful["x"], points[2, 0, rows, 0], atol=1e-5)

    def test_all_that_is_shown_can_be_taken_away(self, home: Path, artifacts: Artifacts) -> None:
        def page() -> None:
            import streamlit as st

            from app import artifacts
            from app.state import Choice
            from app.views.layers import take_away

            model, source = st.session_state["asked"]
            opened = artifacts.find(model, artifacts.prompts(source), "last")
            assert opened is not None
            charts, tables = take_away(Choice(model, source), opened, 3, artifacts.margins(opened, 3)[0])
            st.session_state["found"] = (list(charts), {name: len(frame) for name, frame in tables.items()})

        at = AppTest.from_function(page)
        at.session_state["asked"] = (MODEL, str(artifacts.source))
        at.run()
        assert not at.exception
        charts, tables = at.session_state["found"]
        assert len(charts) == len(CHARTS)
        assert tables == {
            "Prompts at layer 3": len(artifacts.prompts.measured()),
            "Numbers of all layers": len(artifacts.analysis.layers),
        }

    def test_the_other_position(self, home: Path, artifacts: Artifacts) -> None:
        """Captured but not analysed there: the page offers to do the rest."""
        at = open_app(artifacts.link(position="last_instruction"))
        assert has_button(at, "prepare")


class TestLinks:
    def test_what_does_not_exist_is_replaced_with_a_note(self, home: Path) -> None:
        at = open_app(
            {"model": "no-such-model", "prompts": "/nowhere/p.csv", "view": "3d", "layer": "x", "position": "first"}
        )
        notes = captions(at)
        for part in ("no\\-such\\-model", "/nowhere/p\\.csv", "3d", "'x'", "first"):
            assert part in notes
        assert not at.error

    def test_a_layer_that_does_not_exist(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link(layer="99"))
        assert marked_layer(at) == BEST_LAYER
        assert "no layer 99" in captions(at)
        at.button(key="next_layer").click().run()
        assert "no layer 99" not in captions(at)

    def test_typing_nonsense_is_one_sentence(self, home: Path, artifacts: Artifacts) -> None:
        at = open_app(artifacts.link())
        at.session_state["choice"] = type(at.session_state["choice"])(model="no-such-model")
        at.run()
        assert not at.exception
        assert len(at.error) == 1
        assert "no\\-such\\-model" in at.error[0].value
        at.selectbox(key="model").set_value(MODEL).run()
        assert not at.error


class TestEmptyCache:
    def test_one_button_starts_everything(self, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[tuple[str, dict[str, str]]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append((kind, dict(config))))
        at = open_app()
        assert not figures(at)
        at.button(key="prepare").click().run()
        assert launched == [
            ("prepare", {"model": "smollm2-135m-instruct", "prompts": "builtin", "position": "last"}),
        ]

    def test_a_relative_file_is_told_absolutely(
        self, empty_home: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched: list[dict[str, str]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append(dict(config)))
        monkeypatch.chdir(artifacts.home)
        open_app({"prompts": "prompts.csv"}).button(key="prepare").click().run()
        assert launched[0]["prompts"] == str(artifacts.source)

    def test_umap_is_offered_with_what_it_costs(
        self, home: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched: list[tuple[str, dict[str, str]]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append((kind, dict(config))))
        at = open_app(artifacts.link(view="umap"))
        button = at.button(key="compute_umap")
        assert "about" in button.label
        button.click().run()
        assert launched == [("project", {"model": MODEL, "prompts": str(artifacts.source), "position": "last"})]


class TestMirror:
    CONFIG: ClassVar = {"model": "qwen2.5-coder-0.5b-instruct", "prompts": "builtin", "position": "last"}

    @pytest.fixture(autouse=True)
    def own_cache(self, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ES2_CACHE", str(empty_home / "cache"))
        monkeypatch.setenv(ALLOW_MIRROR, "")

    def test_the_page_says_what_to_expect(self) -> None:
        at = open_app(self.CONFIG)
        (words,) = (caption.value for caption in at.caption if "happens once" in caption.value)
        assert "from the Hugging Face Hub" in words
        assert re.search(r"Capturing takes about \d+ (s|min) on this machine", words)
        assert not has_button(at, "allow_mirror"), "the Hub was not tried yet"

    def test_a_hub_that_is_not_reached_brings_the_button(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job = jobs.create_job("prepare", self.CONFIG)
        assert run_job(job.path, {"prepare": lambda *_: require_yes(self.CONFIG["model"], "offline", False)}) == 1
        at = open_app(self.CONFIG)
        assert "offline" in at.error[0].value
        assert at.button(key="allow_mirror").label == "Fetch the third party's packages and capture"
        (words,) = (element.value for element in at.markdown if "Its maker did not" in element.value)
        assert "478 MB" in words
        launched: list[tuple[str, dict[str, str]]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append((kind, dict(config))))
        at.button(key="allow_mirror").click().run()
        assert launched == [("prepare", self.CONFIG | {"allow_mirror": True})]
        at.button(key="prepare").click().run()
        assert launched[1:] == [("prepare", self.CONFIG)], "the yes was to one job"

    def test_what_came_from_there_is_said(self) -> None:
        assert "four bits" not in captions(open_app(self.CONFIG))
        mirror_folder(self.CONFIG["model"]).mkdir(parents=True)
        assert "here rounded to four bits, from packages of a third party" in captions(open_app(self.CONFIG))

    def test_another_failure_brings_none(self) -> None:
        def fail(*_: object) -> dict[str, Any]:
            raise MachineError("No space is left.")

        assert run_job(jobs.create_job("prepare", self.CONFIG).path, {"prepare": fail}) == 1
        at = open_app(self.CONFIG)
        assert "No space" in at.error[0].value
        assert not has_button(at, "allow_mirror")


CHECK = {"model": "smollm2-135m-instruct", "prompts": "builtin", "run": None}


class TestCheck:
    def test_is_started_on_request(self, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[tuple[str, dict[str, str]]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append((kind, dict(config))))
        at = open_app()
        assert at.button(key="check_model").label == "Check this model"
        at.button(key="check_model").click().run()
        at.button(key="check_model").click()  # AppTest runs all of the page again, where a browser runs the dialog
        at.button(key="start_check").click().run()
        assert launched == [("check", CHECK)]

    def test_is_of_the_chosen_rendering(self, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[dict[str, Any]] = []
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: launched.append(dict(config)))
        at = open_app({"thinking": "off"})
        at.button(key="check_model").click().run()
        at.button(key="check_model").click()
        at.button(key="start_check").click().run()
        assert launched == [CHECK | {"rendering": {"thinking": "off"}}]

    @pytest.mark.parametrize(("passed", "label"), [(True, "Checked: all as computed"), (False, "Checked: 1 wrong")])
    def test_its_outcome_stays_in_sight(self, passed: bool, label: str, empty_home: Path) -> None:
        found = {"checks": [{"name": "head", "passed": passed, "sentence": "The *head* is off.", "details": {}}]}
        job = jobs.create_job("check", CHECK)
        assert run_job(job.path, {"check": lambda config, report, folder: found}) == 0
        at = open_app()
        assert at.button(key="check_model").label == label
        assert len(at.error) == (0 if passed else 1)
        at.button(key="check_model").click().run()
        assert any("**head**" in line.value for line in at.markdown)


FAKE_TASK = """
import sys, time
from pathlib import Path
from es2.core.errors import InputError
from es2.jobs.running import run_job

def task(config, report, *_):
    report("capture", 5, 20)
    while not Path(config["go_on"]).exists():
        report("capture", 10, 20)
        time.sleep(0.05)
    if config["fails"]:
        raise InputError("The lock is *stuck*; oil it.")
    return {}

sys.exit(run_job(Path(sys.argv[1]), {"prepare": task}))
"""


class TestJobs:
    @pytest.fixture
    def start(self, empty_home: Path) -> Iterator[Callable[..., Job]]:
        """Start a job that waits for the file `go_on`, in a process of its own as real ones are."""
        started = []

        def start(fails: bool = False) -> Job:
            config = {"model": "smollm2-135m-instruct", "prompts": "builtin", "position": "last"}
            more = {"go_on": str(empty_home / "go_on"), "fails": fails}
            job = jobs.launch("prepare", config | more, command=[sys.executable, "-c", FAKE_TASK])
            started.append(job)
            wait_until(lambda: job.progress() is not None)
            return job

        yield start
        for job in started:
            job.cancel()
            wait_until(lambda job=job: not job.is_active())

    def test_progress_is_shown_in_place_of_the_button(self, start: Callable[..., Job]) -> None:
        job = start()
        for _ in range(2):  # a second session sees the same
            at = open_app()
            assert not has_button(at, "prepare")
            assert has_button(at, f"cancel_page_{job.id}")
            assert has_button(at, f"cancel_sidebar_{job.id}")
            texts = [element.proto.text for element in at.get("progress")]
            assert len(texts) == 2
            assert all("10 of 20 tokens" in text.replace("\\", "") for text in texts)

    def test_cancel(self, start: Callable[..., Job]) -> None:
        job = start()
        at = open_app()
        at.button(key=f"cancel_page_{job.id}").click().run()
        wait_until(lambda: not job.is_active())
        assert job.status() == "cancelled"
        at.run()
        assert has_button(at, "prepare")
        assert "cancelled" in at.info[0].value

    def test_a_failure_is_its_sentence(self, start: Callable[..., Job], empty_home: Path) -> None:
        job = start(fails=True)
        (empty_home / "go_on").touch()
        wait_until(lambda: not job.is_active())
        at = open_app()
        assert "The lock is \\*stuck\\*; oil it\\." in at.error[0].value
        assert "The lock is" in captions(at)
        assert has_button(at, "prepare")

    def test_the_same_job_is_not_started_twice(
        self, start: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        at = open_app()
        start()
        monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: pytest.fail("started twice"))
        at.button(key="prepare").click().run()
        assert not at.exception


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_corrected_labels_show_at_once(tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis belongs to the labels it was made with; the page does not show it for others."""
    monkeypatch.setenv("ES2_HOME", str(artifacts.home))
    changed = tmp_path / "changed.csv"
    changed.write_text(artifacts.source.read_text(encoding="utf-8").replace("doors", "gates"), encoding="utf-8")
    assert has_button(open_app(artifacts.link(prompts=str(changed))), "prepare")


def test_only_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.builders_artifacts.DISTANCES", DISTANCES[3:4])
    made = write_artifacts(tmp_path, 40)
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    at = open_app(made.link())
    assert at.slider(key="layer").disabled
    assert at.button(key="next_layer").disabled


def test_importing_all_pages_leaves_out_what_only_tables_and_jobs_need() -> None:
    """Half a second and more, which would be everybody's who opens any page."""
    views = sorted(path.stem for path in (Path(MAIN).parent / "views").glob("[a-z]*.py"))
    assert len(views) == 9
    late = {"pandas", "pyarrow", "scipy", "sklearn", "torch", "transformers", "umap"}
    code = f"import sys, {', '.join(f'app.views.{name}' for name in views)}; sys.exit(str({late} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(MAIN).parents[1])
    assert done.stderr.splitlines()[-1] == "set()"


def test_no_torch_in_the_apps_process(artifacts: Artifacts) -> None:
    """Importing and running the page with artifacts loads nothing heavy; a fresh process, so nothing is left over."""
    script = f"""
import sys
from streamlit.testing.v1 import AppTest
at = AppTest.from_file({MAIN!r}, default_timeout=60)
at._page_hash = {LAYERS!r}
for name, value in {artifacts.link()!r}.items():
    at.query_params[name] = value
at.run()
assert not at.exception and len(at.get("bidi_component")) == {len(CHARTS) + 2}
heavy = sorted({{"torch", "transformers", "transformer_lens", "umap", "numba", "peft"}} & set(sys.modules))
print("heavy:", heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "ES2_HOME": str(artifacts.home)},
        cwd=Path(MAIN).parents[1],
    )
    assert "heavy: []" in done.stdout, done.stdout + done.stderr


def test_the_entry_holds_no_string_that_streamlit_would_show() -> None:
    """Streamlit writes bare expressions of the script it runs on the page, a constant's docstring too."""
    statements = ast.parse(Path(MAIN).read_text(encoding="utf-8")).body
    assert not [node for node in statements[1:] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
