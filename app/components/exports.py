"""Downloads of a page: charts as pictures and as HTML, tables as CSV, a comparison as a report.

A file is made when its button is pressed, and the popover is empty while it is closed. The browser makes the pictures,
with the plotly.js of the charts, so no second renderer is needed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st
from plotly.io import to_json

from app import text
from app.artifacts import prompts, run_title
from app.components import plotly_library
from es2.analysis.comparison import Comparison
from es2.charts.canvas import Figure
from es2.evaluation.results import run_ability
from es2.report.page import Compared, figure_html, report_html
from es2.workflow.film import find_film
from es2.workflow.runs import open_run

if TYPE_CHECKING:
    import pandas as pd


_images = plotly_library.component("es2_images", Path(__file__), '<div class="images"></div>')

_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@＝＋－＠])")
"""The beginning of a spreadsheet's formula, in ASCII and in full width, or of one behind apostrophes."""


@st.fragment
def page_exports(
    contents: Callable[[], tuple[Mapping[str, Figure], Mapping[str, pd.DataFrame]]],
    comparison: Comparison | None = None,
) -> None:
    """Show the button for the downloads of a page's charts and tables, and of a comparison's report.

    Args:
        contents: returns the page's figures and tables by title, in order, when the popover opens. Text in tables is
            not escaped.
        comparison: the page's comparison, if any.
    """
    with st.popover("Take away", icon=":material/download:", key="take_away", on_change="rerun") as popover:
        if not popover.open:
            return
        charts, tables = contents()
        for at, (name, figure) in enumerate(charts.items()):
            with st.container(horizontal=True, vertical_alignment="center", key=f"take_chart_{at}"):
                st.markdown(text.markdown(name), width="stretch")
                data = {"library": plotly_library.ADDRESS, "name": name, "file": file_name(name)}
                data["figure"] = to_json(figure, validate=False)
                _images(key=f"take_images_{at}", data=data, width="content")
                download("HTML", partial(chart, figure, name), name, "html", f"take_html_{at}")
        for at, (name, frame) in enumerate(tables.items()):
            with st.container(horizontal=True, vertical_alignment="center", key=f"take_table_{at}"):
                st.markdown(text.markdown(name), width="stretch")
                download("CSV", partial(table, frame), name, "csv", f"take_csv_{at}")
        if comparison is not None:
            with st.container(horizontal=True, vertical_alignment="center", key="take_whole"):
                st.markdown("Everything about this run in one file, to send to a colleague", width="stretch")
                download("Report", partial(report, comparison), f"es2 report {comparison.run}", "html", "take_report")


def download(label: str, make: Callable[[], bytes], name: str, ending: str, key: str) -> None:
    """A button for one file, which is made when it is pressed; `name` is its title, `ending` that of the file."""
    mime = {"html": "text/html", "csv": "text/csv"}[ending]
    st.download_button(label, make, file_name=f"{file_name(name)}.{ending}", mime=mime, key=key, on_click="ignore")


def chart(figure: Figure, name: str, caption: str = "") -> bytes:
    """A figure as an HTML file that works without a network, headed by its name."""
    return figure_html(figure, name, caption).encode("utf-8", "replace")


def table(frame: pd.DataFrame) -> bytes:
    """A table as a CSV file (UTF-8 with a mark, for Excel), without its index.

    Text that a spreadsheet takes for a formula, in a cell or a column's name, gets an apostrophe in front, also where
    it has one already; a reader removes one. All text is quoted, since pandas leaves a lone carriage return bare.
    """
    safe = frame.map(_no_formula)
    safe.columns = [_no_formula(column) for column in frame.columns]
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode("utf-8-sig", "replace")


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def report(comparison: Comparison) -> bytes:
    """The report on a comparison, an HTML file; errors as of reading embeddings."""
    run = open_run(comparison.run)
    compared = Compared(
        **vars(comparison),
        title=run_title(run),
        events=run.events()[0],
        film=find_film(run, prompts(str(run.config.get("prompts", "builtin")))),
        ability=None if comparison.is_of_two_runs else run_ability(run),
    )
    return report_html(compared).encode("utf-8", "replace")


def file_name(name: str) -> str:
    """A file name without suffix for every system: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "es2"
