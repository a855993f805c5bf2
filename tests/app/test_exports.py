"""What is taken away from a page: files that are what was shown, and nothing made before somebody asks."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from streamlit.testing.v1 import AppTest

from app import artifacts
from app.components import exports, plotly_library
from app.components.exports import chart, file_name, report, table
from app.state import Choice
from es2.charts import frames
from tests.builders_artifacts import Compared, write_comparison

pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture(scope="module")
def written(home: Path) -> Compared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        return write_comparison(home)


def read_csv(data: bytes) -> list[list[str]]:
    assert data.startswith(b"\xef\xbb\xbf"), "the mark by which Excel knows UTF-8"
    return list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))


class TestTable:
    @pytest.mark.parametrize(
        "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", '=HYPERLINK("http://x")', "＝1+1"]
    )
    def test_no_text_becomes_a_formula(self, text: str) -> None:
        rows = read_csv(table(pd.DataFrame({"prompt": [text]})))
        assert rows[1] == [f"'{text}"]

    def test_a_column_name_neither(self) -> None:
        assert read_csv(table(pd.DataFrame({"=cmd": [1]})))[0] == ["'=cmd"]

    def test_everything_else_stays_as_it_is(self) -> None:
        texts = ["a, b", 'say "hi"', "two\nlines", "two\rlines", "1-1=0", "<b>&amp;</b>", "مرحبا 🔒", ""]
        frame = pd.DataFrame({"prompt": texts, "margin": np.linspace(-1, 1, len(texts))}, index=range(5, 13))
        head, *rows = read_csv(table(frame))
        assert head == ["prompt", "margin"]
        assert [row[0] for row in rows] == texts
        assert [float(row[1]) for row in rows] == frame["margin"].tolist(), "negative numbers stay numbers"

    def test_models_that_are_called_alike_are_both_there(self, written: Compared) -> None:
        analysis = written.analysis
        frame = frames.numbers_frame([("run", analysis.base_layers), ("run", analysis.layers)])
        assert len(frame) == 2 * len(analysis.layers)
        assert frame["fisher_ratio"][len(analysis.layers)] == analysis.layers[0].numbers["fisher_ratio"].value

    def test_the_frame_is_not_changed(self) -> None:
        frame = pd.DataFrame({"=a": ["=1"]})
        table(frame)
        assert frame.to_dict("list") == {"=a": ["=1"]}


class TestChart:
    @pytest.mark.parametrize("plain", [False, True], ids=["figure", "dictionary"])
    def test_holds_the_figure_and_everything_it_needs(self, plain: bool) -> None:
        figure: Any = go.Figure(go.Scatter(x=[1, 2], y=np.array([3.5, 4.5]), text="</script><b>"), {"height": 321})
        page = chart(figure.to_dict() if plain else figure, "<i>My</i> chart").decode()
        assert "<h1>&lt;i&gt;My&lt;/i&gt; chart</h1>" in page
        drawn, _ = json.JSONDecoder().raw_decode(page.split('"figure-1": ', 1)[1])
        assert drawn["layout"]["height"] == 321
        assert drawn["data"][0]["text"] == "</script><b>"
        assert page.count("</script>") == 2
        assert "default-src 'none'" in page


class TestReport:
    def test_of_a_run(self, written: Compared) -> None:
        written.run.rename("my <run>")
        comparison = artifacts.find_comparison(Choice(run=written.run.id))
        assert comparison is not None
        page = report(comparison).decode()
        assert "<h1>my &lt;run&gt;</h1>" in page
        assert written.analysis.layers[2].numbers["fisher_ratio"].value > 0
        assert comparison.result["verdict_reason"] in page
        assert '"name":"loss"' in page, "the training curves"

    def test_of_two_runs_judges_what_is_compared(self, written: Compared) -> None:
        from dataclasses import replace

        comparison = artifacts.find_comparison(Choice(run=written.run.id))
        assert comparison is not None
        itself = replace(comparison, base=written.tuned, names=("one", "two"))
        page = report(itself).decode()
        assert "KL on harmless test prompts</dt><dd>not measured" in page, "the run's KL is against base"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Probe accuracy over layers", "probe-accuracy-over-layers"),
        ("../../etc/passwd", "etc-passwd"),
        ("مرحبا", "es2"),
        ("x" * 500, "x" * 80),
    ],
)
def test_names_of_files(name: str, file: str) -> None:
    assert file_name(name) == file


# ------------------------------------------------------------------------------------------------------------ the page


def page(opened: bool) -> None:
    import pandas as pd
    import plotly.graph_objects as go
    import streamlit as st

    from app.components.exports import page_exports

    st.session_state["take_away"] = opened
    figures = {"One <b>": go.Figure(go.Scatter(x=[1], y=[2])), "Two $x$": {"data": [], "layout": {}}}
    page_exports(lambda: (figures, {"Prompts": pd.DataFrame({"prompt": ["=1"]})}))


def test_nothing_is_made_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("chart", "table", "to_json"):
        monkeypatch.setattr(exports, name, lambda *given, name=name, **more: made.append(name) or "{}")
    closed = AppTest.from_function(page, args=(False,)).run()
    assert not closed.exception
    assert not closed.get("download_button")
    assert made == []
    opened = AppTest.from_function(page, args=(True,)).run()
    assert not opened.exception
    assert made == ["to_json", "to_json"], "what the browser makes pictures of; the files only when they are asked for"


def test_the_popover_offers_every_chart_and_table() -> None:
    opened = AppTest.from_function(page, args=(True,)).run()
    assert not opened.exception
    assert [button.label for button in opened.get("download_button")] == ["HTML", "HTML", "CSV"]
    assert [words.value for words in opened.markdown] == [r"One \<b\>", r"Two \$x\$", "Prompts"]


def test_plotly_is_served_from_its_package() -> None:
    assert plotly_library.ADDRESS.startswith("component/")
