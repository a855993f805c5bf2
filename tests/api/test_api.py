"""`import es2`: names that load nothing, examples that run, records that are tables and figures, and its errors."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import es2
from es2.api import making, reading
from es2.api.asking import in_python
from es2.api.outcomes import Run, Sweep
from es2.core.errors import InputError
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store

FUNCTIONS = [name for name in dir(es2) if not name.startswith("_") and name[0].islower()]


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [found for module in (reading, making) for found in finder.find(module) if found.examples]


def output_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout


class TestNames:
    def test_importing_loads_nothing_and_takes_no_time(self) -> None:
        program = (
            "import sys, time; begun = time.perf_counter(); import es2; seconds = time.perf_counter() - begun\n"
            "assert not {'torch', 'pandas', 'transformers', 'plotly', 'numpy'} & set(sys.modules); print(seconds)"
        )
        assert min(float(output_of(program)) for _ in range(3)) <= 0.15

    def test_a_name_loads_neither_torch_nor_pandas(self) -> None:
        program = "import sys; from es2 import finetune, load_prompts; load_prompts(); print(*sys.modules)"
        assert not {"torch", "pandas", "transformers", "plotly.graph_objects"} & set(output_of(program).split())

    def test_each_name_is_there_and_has_an_example(self) -> None:
        assert {one.name.rpartition(".")[2] for one in examples()} == set(FUNCTIONS)
        assert len(FUNCTIONS) == 13
        with pytest.raises(AttributeError, match="no attribute 'train'"):
            es2.train  # noqa: B018

    @pytest.mark.parametrize("before", ["import es2.capture.config, es2.report.labels", "import es2"])
    def test_a_package_of_the_same_name_is_the_function_too(self, before: str) -> None:
        program = (
            f"{before}\nimport es2, inspect\nfrom es2 import capture, report\n"
            "from es2.capture.config import CaptureConfig\n"
            "for found in (es2.capture, es2.report, capture, report):\n"
            "    assert callable(found) and 'Raises:' in found.__doc__, found\n"
            "assert 'prompts' in inspect.signature(es2.capture).parameters\n"
            "try:\n    es2.report('no-such-run', 'out.html')\nexcept es2.InputError: print('refused')"
        )
        assert output_of(program) == "refused\n"


class TestExamples:
    @pytest.mark.parametrize("example", examples(), ids=lambda one: one.name.rpartition(".")[2])
    def test_an_example_prints_what_it_says(self, example: doctest.DocTest, run: Run) -> None:
        example.globs = {"run": run}
        said: list[str] = []
        doctest.DocTestRunner().run(example, out=said.append)
        assert not said, "".join(said)


class TestRecords:
    def test_embeddings_have_named_axes_and_are_those_on_disk(self, folder: Path) -> None:
        embeddings = es2.capture("./tiny-model", "locks.csv", positions=["last"])
        assert [len(entries) for entries in embeddings.coordinates.values()] == list(embeddings.values.shape)
        assert tuple(embeddings.coordinates) == embeddings.axes
        frame = embeddings.to_frame(layer=1)
        assert frame["prompt"].tolist() == list(embeddings.coordinates["prompt"])
        np.testing.assert_array_equal(frame[range(32)].to_numpy(), embeddings.values[1])
        with pytest.raises(InputError, match="not captured"):
            embeddings.at("mean")

    def test_the_table_of_an_analysis_has_each_number_and_its_interval(self, folder: Path) -> None:
        found = es2.analyze("./tiny-model", "locks.csv", n_bootstrap=50)
        frame = found.to_frame()
        number = found.analysis.base_layers[2].numbers["fisher_ratio"]
        row = frame[frame["layer"] == 2].iloc[0]
        assert (row["fisher_ratio"], row["fisher_ratio_low"]) == (number.value, number.low)
        accuracy = found.plot()
        shown = [trace for trace in accuracy.data if trace.name.startswith("probe accuracy") and trace.mode != "lines"]
        assert list(shown[0].y) == frame["probe_accuracy"].tolist()
        assert len(found.projection("pca").plot(layer=0).data) >= 2

    def test_the_table_of_a_comparison_is_that_of_its_analysis(self, run: Run) -> None:
        found = es2.compare(run)
        frame = found.to_frame().set_index(["layer", "number"])
        changed = found.comparison.analysis.layers[2].change
        assert changed is not None
        assert frame.loc[(2, "fisher_ratio"), "ratio"] == changed["fisher_ratio"].ratio.value  # type: ignore[union-attr]
        assert frame.loc[(0, "fisher_ratio"), "target"] == False  # noqa: E712
        assert pd.isna(frame.loc[(2, "norm_ratio"), "difference"])
        for what in ("overview", "accuracy", "margins", "projection", "distribution"):
            assert isinstance(found.plot(what), go.Figure)
        with pytest.raises(InputError, match="one of accuracy, margins, overview"):
            found.plot("pie")

    def test_a_comparison_that_is_not_on_disk_is_made(self, run: Run) -> None:
        assert es2.compare(run, position="mean").comparison.position == "mean"

    def test_a_run_has_its_numbers_and_its_curves(self, run: Run) -> None:
        frame = run.to_frame().set_index(["layer", "number"])
        assert run.result is not None
        assert frame.loc[(1, "fisher_ratio"), "after"] == run.result["after"]["1"]["fisher_ratio"]["value"]
        assert [trace.name for trace in run.plot().data][:2] == ["loss", "separation"]
        assert run.outcome == f"{run.result['verdict']}, behaviour not measured"

    def test_an_evaluation_has_a_row_for_each_number_and_no_reply(self, run: Run) -> None:
        found = es2.evaluate(
            "./tiny-model", "locks.csv", run=run, suite="perturbation", limit=2, steering_limit=2, new_tokens=2,
            kl_tokens=2, budgets=[0.1], p0s=[0.5], directions=["random"], soft_lengths=[], layers=[1],
        )  # fmt: skip
        frame = found.to_frame()
        assert set(frame["number"]) == {"dsr", "degenerate", "needed perturbation / ‖e‖"}
        point = found.result["suite"]["perturbation"]["curve"][0]
        assert frame.iloc[0]["base"] == point["base"]["dsr"]["value"]
        assert not any("lock number" in str(cell) for cell in frame.to_numpy().ravel())
        assert isinstance(found.plot("attack"), go.Figure)
        assert isinstance(found.plot("needed"), go.Figure)
        with pytest.raises(InputError, match="no refusal to draw: evaluate with suite='refusal'"):
            found.plot("rates")

    def test_two_models_are_projected_into_one_frame(self, run: Run) -> None:
        found = es2.project(run=run, prompts="locks.csv", view="separation")
        frame = found.to_frame(layer=2)
        np.testing.assert_allclose(frame["x_tuned"], found.margins(2)[1], atol=1e-6)
        assert found.plot(2, arrangement="tuned").layout.title.text == "<b>Tuned</b>"

    def test_a_sweep_s_refusals_under_attack_are_columns(self) -> None:
        counts = {"refusals": 5, "base_refusals": 2, "n_harmful": 16, "layers": [1, 2]}
        trial = {"number": 0, "status": "done", "settings": {"rank": 8}, "run": "r"}
        trials = [trial | {"numbers": {"kl": 0.1, "defence": one}} for one in (counts, None)]
        frame = Sweep({"front": [0], "trials": trials}).to_frame()
        assert list(frame["defence_refusals"])[:1] == [5]
        assert frame["defence_base_refusals"].isna().tolist() == [False, True]
        assert not {"defence", "defence_layers"} & set(frame.columns)

    def test_a_tuned_model_can_be_used(self, run: Run) -> None:
        tuned, base = es2.load_model(run=run), es2.load_model("./tiny-model")
        assert tuned.name == base.name == str(Path("tiny-model").resolve())
        weights = [model.network.get_submodule("model.layers.1.self_attn.q_proj").weight for model in (tuned, base)]
        assert (weights[0] != weights[1]).any()


class TestAsking:
    @pytest.mark.parametrize(
        ("ask", "sentence"),
        [
            (
                lambda: es2.analyze("./tiny-model", "locks.csv", n_fold=3),
                "There is no setting 'n_fold'; did you mean n_folds.",
            ),
            (lambda: es2.finetune("./tiny-model", "locks.csv", layers=[9]), "There is no layer 9"),
            (lambda: es2.finetune("./tiny-model", "locks.csv", layers=[0, 1, 2]), "allow it with allow_many_layers."),
            (lambda: es2.load_prompts("none.csv"), "There is no prompt file 'none.csv'"),
            (lambda: es2.load_prompts(harmful="locks.csv"), "Give both harmful and harmless"),
            (lambda: es2.open_run("none"), "There is no job 'none'"),
            (lambda: es2.capture("./nowhere", "locks.csv"), "There is no model folder './nowhere'"),
            (lambda: es2.project("./tiny-model", "locks.csv", view="tsne"), "Unknown view 'tsne'"),
            (lambda: es2.load_model("./tiny-model", device="tpu"), "tpu"),
            (lambda: es2.evaluate("./tiny-model", "locks.csv", limit="3"), "limit must be a whole number"),
            (lambda: es2.finetune("./tiny-model", "locks.csv", layers=1), "layers must be a list of whole numbers"),
            (lambda: es2.import_adapter("adapter", "./tiny-model", "locks.csv", layers=1), "layers must be a list"),
            (lambda: es2.import_adapter("adapter", "./tiny-model", "locks.csv", steps=3), "no setting 'steps'"),
            (lambda: es2.sweep("./tiny-model", "locks.csv", trials=2.5), "trials must be a whole number"),
            (lambda: es2.analyze("./tiny-model", pd.DataFrame()), "not a DataFrame; write them to a file"),
            (lambda: es2.load_prompts(pd.DataFrame()), "not by a DataFrame"),
            (lambda: es2.analyze(es2.load_model("./tiny-model"), "locks.csv"), "not by a Model"),
            (lambda: es2.compare(3), "There is no job '3'"),
            (lambda: es2.capture("./tiny-model", es2.load_prompts("locks.csv").take([])), "no prompt in its probe"),
            (lambda: es2.check("./tiny-model", "locks.csv", dtype="int8"), "Unknown dtype 'int8'"),
        ],
    )
    def test_bad_input_is_a_sentence_in_words_of_python(self, folder: Path, ask: Any, sentence: str) -> None:
        with pytest.raises(InputError) as refused:
            ask()
        assert sentence in str(refused.value)
        assert "--" not in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_a_name_that_cannot_be_leaves_no_run(self, folder: Path) -> None:
        before = sorted(folder.glob("runs/*"))
        with pytest.raises(InputError, match="A name is one line"):
            es2.finetune("./tiny-model", "locks.csv", layers=[1, 2], name="x" * 200)
        assert sorted(folder.glob("runs/*")) == before

    def test_commands_in_a_sentence_stay_commands(self) -> None:
        said = "Allow it with --allow-many-layers or --no-replies; `es2 analyze --run X` makes it again."
        assert (
            in_python(said) == "Allow it with allow_many_layers or replies=False; `es2 analyze --run X` makes it again."
        )

    def test_values_of_numpy_are_numbers(self, folder: Path) -> None:
        found = es2.analyze("./tiny-model", "locks.csv", n_bootstrap=np.int64(50), Cs=np.array([0.1, 1.0]))
        assert found.analysis.config.Cs == (0.1, 1.0)

    def test_a_selection_can_be_captured_and_cannot_be_kept_by_a_run(self, folder: Path) -> None:
        prompts = es2.load_prompts("locks.csv")
        some = prompts.select(prompts.in_split("test"))
        assert type(some) is PromptSet
        assert es2.capture("./tiny-model", some).shape[1] == len(some)
        with pytest.raises(InputError, match="were selected in Python"):
            es2.finetune("./tiny-model", some, layers=[1, 2])

    def test_two_files_are_one_set_and_keep_their_source(self, folder: Path) -> None:
        for label in ("harmful", "harmless"):
            frame = es2.load_prompts("locks.csv").to_frame()
            frame[frame["label"] == label][["prompt"]].to_csv(f"{label}.csv", index=False)
        prompts = es2.load_prompts(harmful="harmful.csv", harmless="harmless.csv:prompt")
        assert [int(prompts.labels.sum()), len(prompts)] == [60, 120]
        again = es2.load_prompts(prompts.source)
        assert again.digest == prompts.digest

    def test_one_value_of_a_label_may_be_given_alone(self, folder: Path) -> None:
        es2.load_prompts("locks.csv").to_frame().rename(columns={"label": "kind"}).to_csv("kinds.csv", index=False)
        prompts = es2.load_prompts("kinds.csv", label_column="kind", harmful_values="harmful")
        assert (prompts.labels.sum(), len(prompts)) == (60, 120)

    def test_a_system_prompt_is_part_of_what_is_captured(self, folder: Path) -> None:
        with_one = es2.capture("./tiny-model", "locks.csv", system_prompt="Answer briefly.")
        without = es2.capture("./tiny-model", "locks.csv")
        assert with_one.activations.key != without.activations.key


class TestLongWork:
    def test_a_function_is_told_of_progress(self, folder: Path) -> None:
        stages: list[str] = []
        es2.analyze(
            "./tiny-model", "locks.csv", n_bootstrap=51, progress=lambda stage, done, total, **_: stages.append(stage)
        )
        assert "analyse" in stages

    def test_stopping_a_capture_leaves_nothing_half_written(self, folder: Path) -> None:
        import signal

        def stop(stage: str, done: int, total: int, **_: float) -> None:
            if stage == "capture" and done:
                signal.raise_signal(signal.SIGINT)

        usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of pytest-xdist ignore it
        before = {found.key for found in Store().list()}
        files = {path.name for path in (folder / "cached_activations").iterdir()}
        try:
            with pytest.raises(KeyboardInterrupt):
                es2.capture("./tiny-model", "locks.csv", positions=["last-1"], progress=stop)
        finally:
            signal.signal(signal.SIGINT, usual)
        assert {found.key for found in Store().list()} == before
        assert {path.name for path in (folder / "cached_activations").iterdir()} <= files | {".locks"}
        assert es2.capture("./tiny-model", "locks.csv", positions=["last-1"]).shape[0] == 3

    def test_a_run_that_is_stopped_goes_on(self, folder: Path, one_thread: None) -> None:
        import signal

        def stop(stage: str, done: int, total: int, **_: float) -> None:
            if stage == "finetune" and done == 2:
                signal.raise_signal(signal.SIGINT)

        settings: dict[str, Any] = {"layers": [1, 2], "steps": 4, "pairs_per_step": 4, "replies": False}
        with pytest.raises(KeyboardInterrupt, match="was cancelled"):
            es2.finetune("./tiny-model", "locks.csv", validate_every=1, progress=stop, **settings)
        stopped = es2.open_run(max(path.name for path in (folder / "runs").iterdir() if not path.name.startswith(".")))
        assert (stopped.status, stopped.result) == ("cancelled", None)
        with pytest.raises(InputError, match="has no result"):
            stopped.to_frame()
        steps: list[int] = []

        def watch(stage: str, done: int, total: int, **_: float) -> None:
            steps.extend([done] if stage == "finetune" else [])

        assert es2.finetune(resume=stopped, progress=watch).status == "done"
        assert min(step for step in steps if step) >= 2  # not from the beginning
        with pytest.raises(InputError, match="own settings"):
            es2.finetune(resume=stopped, steps=8)

    def test_a_job_can_run_in_any_thread(self, folder: Path) -> None:
        found: list[Any] = []

        def work() -> None:
            settings: dict[str, Any] = {"suite": "refusal", "limit": 1, "new_tokens": 2}
            found.append(es2.evaluate("./tiny-model", "locks.csv", **settings).result["suite"].keys())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert [set(one) for one in found] == [{"refusal"}]

    def test_a_notebook_shows_a_line_for_each_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from types import ModuleType, SimpleNamespace

        from es2.api.progress import shown

        pictures: list[str] = []
        handle = SimpleNamespace(update=lambda bars: pictures.append(bars._repr_html_()))

        def display(bars: Any, display_id: bool) -> Any:
            pictures.append(bars._repr_html_())
            return handle

        notebook: Any = ModuleType("IPython")
        notebook.get_ipython = lambda: SimpleNamespace(kernel=object())
        notebook.display = ModuleType("IPython.display")
        notebook.display.display = display
        monkeypatch.setitem(sys.modules, "IPython", notebook)
        monkeypatch.setitem(sys.modules, "IPython.display", notebook.display)
        with shown(None) as report:
            report("capture", 0, 2)
            report("capture", 1, 2)
            report("capture", 2, 2)
            report("<b>", 0, 0)
        assert [picture.count("<tr>") for picture in (pictures[0], pictures[-1])] == [1, 2]
        assert '<progress value="2" max="2">' in pictures[-1]
        assert "&lt;b&gt;" in pictures[-1]

    def test_a_terminal_of_ipython_is_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from types import ModuleType, SimpleNamespace

        from es2.api.progress import _notebook_display

        terminal: Any = ModuleType("IPython")
        terminal.get_ipython = lambda: SimpleNamespace()
        monkeypatch.setitem(sys.modules, "IPython", terminal)
        assert _notebook_display() is None


def test_every_setting_of_a_function_is_described() -> None:
    for name in FUNCTIONS:
        function = getattr(es2, name)
        documented = inspect.getdoc(function) or ""
        for argument in inspect.signature(function).parameters:
            if argument != "run" or name != "open_run":
                assert argument in documented, f"{name}: {argument}"


def test_the_page_names_each_function() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    assert not [name for name in FUNCTIONS if f"`{name}`" not in page]
